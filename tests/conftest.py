"""No test fetches anything, or reads what is cached on this machine."""

import os
import signal
import tempfile

import torch  # noqa: F401  this process keeps its threads, those that tests start get one each

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GANS_OFFLINE"] = "1"
os.environ["GANS_CACHE"] = tempfile.mkdtemp(prefix="gans-cache-")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C


def pytest_collection_modifyitems(items):
    """Within a file, tests of its trained run come last: it may go on beside the others."""
    files = {path: k for k, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (files[item.path], "trained" in item.fixturenames))

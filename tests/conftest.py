"""No test fetches anything, or reads what is cached on this machine."""

import os
import tempfile

os.environ["GANS_OFFLINE"] = "1"
os.environ["GANS_CACHE"] = tempfile.mkdtemp(prefix="gans-cache-")

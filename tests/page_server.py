"""A web page with a trivial model, as a process: page_server.py [NAME=VALUE ...], limits of common.

The result is the inverted picture; its first pixel is (domain, seed mod 256, red of the reference).
"""

import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from PIL import ImageOps  # noqa: E402

import common  # noqa: E402

SLOW, FAULTY, UNSUITABLE = (255, 0, 0), (0, 255, 0), (0, 0, 255)  # first pixels that matter
in_use = threading.Lock()


def translate(picture, domain, seed, reference):
    assert not in_use.locked(), "called twice at the same time"
    with in_use:
        return invert(picture, domain, seed, reference)


def invert(picture, domain, seed, reference):
    first = picture.getpixel((0, 0))
    if first == SLOW:
        time.sleep(0.7)
    if first == FAULTY:
        raise RuntimeError("a secret\nin /etc/passwd")
    if first == UNSUITABLE:
        raise common.UserError("There is no face in this picture.")
    result = ImageOps.invert(picture)
    result.putpixel((0, 0), (domain, seed % 256, reference.getpixel((0, 0))[0] if reference else 0))
    return result


def main():
    for limit in sys.argv[1:]:
        name, value = limit.split("=")
        setattr(common, name, float(value) if "." in value else int(value))
    args = Namespace(host="127.0.0.1", port=0, max_side=512)
    domains = ["cat & <dog>", "anime"]
    common.serve_page(args, "Trivial <model>", translate, domains, styles=True)


if __name__ == "__main__":
    sys.exit(common.exit_status(main))

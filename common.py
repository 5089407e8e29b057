"""What the six papers' training loops and commands share, and no paper is about.

In this file, in the order in which a run meets it
    the command line            CommandLine, UserError: a mistake is one line and exit status 2
    data in                     open_data: public names, folders, zips, toy; decode; downloads
    toy                         cartoon faces drawn from a seed: domains, regions, attributes
    the loader                  ImageSet, batches: order is a pure function of (seed, step)
    a run                       Run: devices, processes, folder, log, update, checkpoint, resume
    pictures and files out      sheets of samples, curves, films, checkpoints in and out
    official checkpoints        read_official: pickles read as data, nothing in them is run
    metrics                     fd8, FID, KID; InceptionV3 written out
    VGG16, AlexNet              LPIPS, path length, precision and recall
    separability                the toy faces' attributes, a classifier, planes in latent space
    regions                     a segmenter, directions of attributes, the locality of edits
    landmarks                   FAN, and StarGAN v2's masks of a face
    projection                  a picture's latent
    generators                  what the StyleGANs' commands share
    the web page                serve_page: a visitor's picture in, a picture out

Networks and losses of the model files do not need this file, but for StarGAN v2's masks; their
loops and commands do.
"""

import argparse
import base64
import collections
import colorsys
import concurrent.futures
import contextlib
import copy
import datetime
import difflib
import errno
import functools
import hashlib
import html
import http.client
import importlib
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import random
import re
import shutil
import signal
import socket
import stat
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import nn

try:
    import fcntl
    import resource
except ImportError:  # Windows: no locks of downloads and run folders, no memory figure
    fcntl = resource = None

BICUBIC = Image.Resampling.BICUBIC
MAX_SEEDS = 100_000  # of --seeds
RESIZE_MODES = ("tf1", "pytorch_fid", "clean")  # of resize_for_inception

# =============================================================================
# The command line
# =============================================================================


class UserError(Exception):
    """A user's mistake: one line on stderr that says what is wrong and what to do, status 2."""


def exit_status(main):
    """Runs main(); the exit status of the script, after one line on stderr if it went wrong."""
    script = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):  # names of files may be in another encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 9):
            raise UserError(f"torch {torch.__version__} is too old: install 2.9 or newer.")
        main()
        return 0
    except UserError as e:
        problem, status = " ".join(str(e).split()), 2
    except torch.OutOfMemoryError:
        problem, status = "the GPU's memory is full: take a smaller --batch or picture size.", 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush
        problem, status = "stopped: nobody reads the output any more.", 1
    except OSError as e:
        if e.errno not in (*DISK_ERRORS, errno.EEXIST, errno.ENOTDIR):
            raise
        problem, status = f"cannot read or write {e.filename or 'a file'}: {e.strerror}.", 2
    except KeyboardInterrupt as e:
        problem, status = str(e) or "stopped.", 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    end_status_line()
    print(f"{script}: {problem}", file=sys.stderr)
    return status


def end_status_line():
    """Ends the line that a training refreshes on a terminal, if there is one."""
    if Run.refreshing:
        print(flush=True)
        Run.refreshing = False


def number(kind, fits, what):
    """A type for argparse: int or float of a text, if it fits; what: the numbers that do."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


positive = number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
not_negative = number(float, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
finite = number(float, math.isfinite, "a finite number")
probability = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
fraction = number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
positive_int = number(int, lambda x: x > 0, "a whole number above 0")
not_negative_int = number(int, lambda x: x >= 0, "a whole number of at least 0")
one_seed = number(int, lambda x: 0 <= x < 2**32, "a whole number from 0 to 2^32 - 1")


def new_file(text):
    """A path that a file can be written to, for argparse: better to know before the work."""
    folder = next(p for p in Path(text).absolute().parents if p.exists())
    if Path(text).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"no file can be written to {text!r}")
    return text


def seeds(text):
    """The list [0, 1, ..., 7, 42] for 0-7,42, for argparse; seeds go from 0 to 2^32 - 1."""
    chosen = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20})(?:-([0-9]{1,20}))?\s*", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{part[:40]!r} is no seed and no range, as in 0-7,42")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"{part} runs backwards; write {last}-{first}")
        if last >= 2**32:
            raise argparse.ArgumentTypeError(f"{last} is above {2**32 - 1}, the largest seed")
        if len(chosen) + last - first >= MAX_SEEDS:
            raise argparse.ArgumentTypeError(f"{text[:40]} is more than {MAX_SEEDS:,} seeds")
        chosen += range(first, last + 1)
    return chosen


class Parser(argparse.ArgumentParser):
    """argparse whose help shows defaults and whose errors are one line."""

    def add(self, *names, help="", **options):
        if options.get("default") not in (None, "") and options["default"] is not False:
            help += " (default: %(default)s)"
        return self.add_argument(*names, help=help.strip(), **options)

    def error(self, message):
        raise UserError(f"{message}. See {self.prog} --help.")


class CommandLine:
    """`FILE.py [COMMAND] [options]`; with no command it is `train`.

    presets: {name of a data set: {option: default}}, defaults of `train` that go with --data, also
    where that is a copy of the set, as DISK/NAME or NAME.zip, or with --preset where a script has
    that, but for `sizes`, options that a --checkpoint decides. On --resume the options of that run
    are the defaults. What the user types always wins.
    """

    def __init__(self, prog, doc, presets, sizes=()):
        self.parser = Parser(prog, description=doc.split("\n\n")[0])
        self.commands = self.parser.add_subparsers(dest="command", parser_class=Parser)
        self.presets, self.sizes = presets, sizes

    def command(self, name, function, help):
        parser = self.commands.add_parser(name, help=help, description=help)
        parser.set_defaults(function=function)
        if name == "train":
            lines = []
            for data, preset in self.presets.items():
                named = ((k.replace("_", "-"), v) for k, v in preset.items())
                options = (f"--no-{k}" if v is False else f"--{k} {v}" for k, v in named)
                lines.append(f"The defaults of --data {data}, otherwise: {' '.join(options)}.")
            parser.epilog = " ".join(lines)
        return parser

    def parse(self, argv=None):
        argv = list(sys.argv[1:] if argv is None else argv)
        commands = self.commands.choices
        if argv and not argv[0].startswith("-") and argv[0] not in commands:
            raise UserError(f"no command {argv[0]!r}; there are {', '.join(commands)}.")
        if not argv or argv[0] not in (*commands, "-h", "--help"):
            argv = ["train", *argv]
        args, unknown = self.parser.parse_known_args(argv)
        if unknown:
            commands[args.command].error(f"unknown: {' '.join(unknown)}")
        if args.command == "train":
            name = vars(args).get("preset") or args.data
            if name.startswith("toy/"):
                name = "toy"
            elif Path(name).stem != "toy":  # no folder holds the built-in faces
                name = Path(name).stem
            defaults = self.presets.get(name, {})
            if args.checkpoint:
                defaults = {k: v for k, v in defaults.items() if k not in self.sizes}
            if args.resume:
                defaults = read_run_args(args.resume, Path(self.parser.prog).stem)
            commands["train"].set_defaults(**defaults)
            args = self.parser.parse_args(argv)
        for name in ("data", "out", "resume", "checkpoint", "input", "ref"):
            if vars(args).get(name) == "":  # "$VARIABLE" that is not set would be this folder
                commands[args.command].error(f"--{name} is empty")
        return args


OWN_HALF = ("fp16", "bf16", "fp16+tf32", "bf16+tf32")  # of networks with own_half, see Run


def add_train_options(p, batch, every, default_every, gpu_precision="tf32", half=("fp16", "bf16")):
    """The options that every `train` has. every: what --every counts; half: choices of
    --precision beside fp32 and tf32."""
    p.add("--data", default="toy", help="toy, a public name, a folder or a .zip")
    p.add("--out", default="runs", help="where run folders go")
    p.add("--resume", metavar="RUN", help="continue the run in this folder")
    p.add("--checkpoint", help="start from these weights, ours or official ones")
    p.add("--batch", type=positive_int, default=batch, help="global, over all processes")
    p.add("--seed", type=one_seed, default=0, help="of weights, order and draws")
    known = ("fp32", "tf32", *half)
    p.add("--precision", choices=known, help=f"default: {gpu_precision}, CPU: fp32")
    p.add("--workers", type=not_negative_int, default=4, help="threads that load pictures")
    p.add(
        "--cache", choices=("auto", "off"), default="auto", help="keep decoded pictures in memory"
    )
    p.add("--every", type=positive_int, default=default_every, help=f"{every} between snapshots")
    add_device_option(p)


def add_stylegan_train_options(p):
    """What the StyleGANs' `train` have in common, beside add_train_options."""
    p.add("--size", type=positive_int, help="pixels: crop and resize; default: as the pictures are")
    p.add("--cond", action="store_true", help="learn the labels of dataset.json, too")
    p.add("--batch-gpu", type=positive_int, help="images at once, per process: less memory")
    p.add("--channel-max", type=positive_int, help="channels at most: 512")
    p.add(
        "--z-dim", type=positive_int, help="512; these and the widths default to a --checkpoint's"
    )
    p.add("--w-dim", type=positive_int, help="512")
    p.add("--keep-every", type=positive_int, default=1000, help="kimg between kept checkpoints")


def add_preprocess_options(p, load, crop):
    """The options of resize_for and crop_and_flip."""
    modes = ("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none")
    p.add("--preprocess", choices=modes, default="resize_and_crop")
    p.add("--load-size", type=positive_int, default=load, help="pixels, before the crop")
    p.add("--crop-size", type=positive_int, default=crop, help="pixels, what the networks see")
    p.add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror at random")


def add_translate_options(p):
    """The options of commands that turn pictures into pictures."""
    p.add("--checkpoint", required=True, help="ours or an official one")
    p.add("--input", required=True, help="a picture or a folder")
    p.add("--out", default="out", help="folder to write PNG files to, or one .png file")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--size", type=positive_int, help="scale the short side to it, in pixels")
    size.add_argument("--width", type=positive_int, help="scale the width to it, in pixels")
    size.add_argument("--square", type=positive_int, help="resize to a square of this side")
    add_device_option(p)


def add_evaluate_options(p, fid_resize="tf1"):
    """The options of every `evaluate`. fid_resize: the default, by the protocol of the paper's
    scores."""
    p.add("--checkpoint", required=True, help="ours or an official one")
    p.add("--data", help="default: what the checkpoint was trained on")
    p.add("--inception", help="weights of FID's network, where they cannot be fetched")
    rules = "pictures to Inception's 299 pixels; tf1: as NVIDIA's scores, pytorch_fid: as CUT's"
    p.add("--fid-resize", choices=RESIZE_MODES, default=fid_resize, help=rules)
    p.add("--out", type=new_file, help="JSON file to write the scores to")
    p.add("--cache", default="auto", choices=("auto", "off"), help="keep pictures in memory")
    add_device_option(p)


def add_generator_options(p):
    """The options of commands that make pictures of latents."""
    p.add("--checkpoint", required=True, help="ours, a run folder, or an official file")
    p.add("--class", dest="label", type=not_negative_int, help="number, for conditional models")
    p.add("--out", default="out", help="folder to write to")
    add_device_option(p)


def add_seeds(p, default, option, files):
    """--seeds, or an option for latents from a file instead; files: which ones."""
    either = p.add_mutually_exclusive_group()
    what = "as in 0-7,42 (default: %(default)s)"
    either.add_argument("--seeds", type=seeds, default=default, help=what)
    either.add_argument(option, metavar="FILE", help=f"{files}, instead of --seeds")


def add_generate_options(p, psi=1.0, cutoff=None, psi_rule=""):
    """The options of `generate`. psi_rule: what the help says of a psi that is None."""
    add_generator_options(p)
    add_seeds(p, "0-15", "--projected", "an .npz of latents, as generate writes")
    p.add("--psi", type=finite, default=psi, help=f"truncation, 1: none, 0: mean picture{psi_rule}")
    limit = "layers that are truncated" + ": all" * (cutoff is None)
    p.add("--cutoff", type=positive_int, default=cutoff, help=limit)
    p.add("--noise", choices=("const", "random", "none"), default="const")
    p.add("--mix-rows", type=seeds, help="seeds: a table of these with --mix-cols")
    p.add("--mix-cols", type=seeds, help="seeds whose layers replace those of the rows")
    p.add("--mix-layers", type=seeds, help="default: the coarse ones, 0-6 of 18")
    p.add("--film", metavar="FILE", help=".webp, .gif or .png: through the seeds and back")
    p.add("--frames", type=positive_int, default=30, help="of the film, from one seed to the next")


def add_edit_options(p, required=True):
    """What the `edit` of two papers have in common; required: --direction."""
    kinds = "NAME.area or NAME.light of a region, or an attribute of toy faces, as 'mouth open'"
    p.add("--direction", required=required, metavar="ATTR[,ATTR]", help=kinds)
    p.add("--alpha", type=finite, default=3, help="how far, in deviations of the latents along it")
    p.add("--samples", type=positive_int, default=2000, help="that a direction is fitted to")
    p.add("--batch", type=positive_int, default=32)
    p.add("--seed", type=one_seed, default=0, help="of the samples")


def add_app_options(p, max_side=512):
    """The options of every `app`."""
    p.add("--checkpoint", required=True, help="ours or an official one")
    p.add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: all of this machine")
    p.add("--port", type=not_negative_int, default=8000, help="0: any that is free")
    p.add("--max-side", type=positive_int, default=max_side, help="pixels: larger ones are shrunk")
    add_device_option(p)


def add_vgg_options(p):
    p.add("--vgg", help="vgg16-397923af.pth, where it cannot be fetched")
    p.add("--lpips", help="the LPIPS weights of VGG16, likewise")


def add_sample_scores_options(p, metrics="fd8,fid,pr,ppl", reals="as many as fakes"):
    """The options of an `evaluate` of samples, beside those of add_evaluate_options."""
    p.add("--samples", type=positive_int, help="fakes: 50000, on toy 4000")
    p.add("--reals", type=positive_int, help=f"at most: {reals}")
    p.add("--metrics", default=metrics, help="some of these")
    p.set_defaults(known_metrics=metrics)
    p.add("--batch", type=positive_int, default=32)
    p.add("--seed", type=one_seed, default=0)
    add_vgg_options(p)


def add_device_option(p):
    p.add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")


def pick_device(name):
    """The torch device of --device, or CUDA if there is one, else the CPU; a GPU that is named by
    its number becomes the current one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: use cuda, cuda:1 or cpu.")
    count = torch.cuda.device_count()
    if name != "cpu" and int(name[5:] or 0) >= count:
        raise UserError(
            f"--device {name}: this machine has {count} CUDA devices; use --device cpu."
        )
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


# =============================================================================
# Public data sets: download and unpack
# =============================================================================

GB = 10**9
TIMEOUT, WAITS = 30, (0, 1, 4)  # seconds without an answer; before each try of one address
MAX_DOWNLOAD = 20 * GB  # where the size is not known
MAX_MEMBERS, MAX_UNPACKED = 200_000, 20 * GB  # of an archive that is unpacked
MAX_FILE, MAX_RATIO = 2**28, 200  # one picture; its bytes per byte of the zip, beyond 16 MB
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
DISK_ERRORS += (errno.ENAMETOOLONG,)

# CycleGAN's sets. Bytes and sha256 were recorded when they lay at an older address
# (tensorflow/datasets: url_checksums/cycle_gan.txt).
_CYCLEGAN_HOST = "efrosgans.eecs.berkeley.edu/cyclegan/datasets"
_CYCLEGAN = """
horse2zebra             116867962  a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1
apple2orange            78456409   845a191e9af8926408ea597001cd03a452e3300a1f44a79fe329b3d59f6e3eb8
summer2winter_yosemite  132640856  167fe1726807a9d22bd106b4a6c0bd7953b688af924ac1bf967439c4961e49f9
facades                 35135868   9a31ebf3a31b9b5cd195dd5bf62e9308e00cb94604d1019e3889ac84248695c0
maps                    1476754427 639534f69dbf9f36bef8d6292a7698006361221f83f0285d7c9ca78afe6e8a9e
monet2photo             305231073  88f91b00fc228f97c9411fbf1880ec1d119c98f1722e4cfcfaa2fb35fac05b04
vangogh2photo           306590349  362c3473e70be0944bda08d49d660eafdc2854df55d697835b8186d1d79caaff
cezanne2photo           279885071  3a6c10ca21f9485862f1cbd707744b9dc258954a04631271d23a3605eeb63cff
ukiyoe2photo            292946532  02a2a2fb5ecf425ca1bf86aca7304377da64a2a1d3b86df54eb65e4068bf3b08
iphone2dslr_flower      339964458  8fcb5e374d631b107e1d961b8c4cd0a186aa2a4ff3e279923f4c426128de7113
"""
PUBLIC = {  # name: (addresses, bytes, sha256)
    name: ([f"{s}://{_CYCLEGAN_HOST}/{name}.zip" for s in ("https", "http")], int(size), sha256)
    for name, size, sha256 in map(str.split, _CYCLEGAN.strip().splitlines())
}
# StarGAN v2's sets (clovaai/stargan-v2: download.sh). No sizes and checksums are published.
for _name, _key in (("celeba_hq", "f7pvjij2xlpff59"), ("afhq", "t9l9o3vsx2jai3z")):
    PUBLIC[_name] = ([f"https://www.dropbox.com/s/{_key}/{_name}.zip?dl=1"], None, None)
PUBLIC["afhq_v2"] = (["https://www.dropbox.com/s/vkzjokiwof5h8w6/afhq_v2.zip?dl=1"], None, None)
BY_HAND = {  # name: how to get what nobody may fetch unasked
    "cityscapes": "cityscapes was withdrawn by its publishers (licence). Build it: get leftImg8bit "
    "and gtFine from cityscapes-dataset.com, resize photos (A) and *_gtFine_color label maps (B) "
    "to 256x256, and save them as {folder}/trainA, trainB (from train), testA, testB (from val).",
    "celebamask_hq": "celebamask_hq is downloaded by hand, for non-commercial research "
    "(its terms). Get it from github.com/switchablenorms/CelebAMask-HQ, then: python "
    "semantic_stylegan.py prepare --input CelebAMask-HQ.zip --out {folder}",
}


class Refused(Exception):
    """An answer that another try of the same address will not better."""


def _web_opener():
    """urllib without its ftp, file and data handlers, so that no redirect leads there."""
    opener, web = urllib.request.OpenerDirector(), urllib.request
    for handler in (web.ProxyHandler, web.HTTPHandler, web.HTTPSHandler, web.UnknownHandler):
        opener.add_handler(handler())
    for handler in (web.HTTPRedirectHandler, web.HTTPDefaultErrorHandler, web.HTTPErrorProcessor):
        opener.add_handler(handler())
    return opener


@contextlib.contextmanager
def locked(path):
    """One process at a time. The system drops the lock of a process that dies."""
    with _disk_errors(Path(path).parent):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{path}.lock", "w")
    with lock:
        if fcntl:
            with contextlib.suppress(OSError):  # some cluster file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        # Only after success: whoever holds or makes another lock file finds the work done.
        with contextlib.suppress(OSError):
            os.unlink(lock.name)


@contextlib.contextmanager
def _disk_errors(folder, needed=None):
    """Turn a full or forbidden disk into a UserError."""
    try:
        yield
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        size = f" {needed:,} bytes are needed." if needed else ""
        raise UserError(
            f"{folder} cannot be written: {e.strerror}.{size} Make room, or choose another folder."
        ) from e


def _fetch(url, part, size):
    """One try of one address, going on where part ends. OSError when cut off: try again."""
    have, most = part.stat().st_size if part.exists() else 0, size or MAX_DOWNLOAD
    if have > most:
        part.unlink()
        have = 0
    if have == size:
        return
    headers = {"User-Agent": "Mozilla/5.0"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = _web_opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # the file has no such range: start over
            part.unlink(missing_ok=True)
        elif e.code < 500:
            raise Refused(str(e)) from e
        raise
    with answer:
        if answer.status != 206:  # the whole file, this server ignores Range
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise OSError("answered with another range than asked for")
        total = size if answer.length is None else have + answer.length
        shown, of = 0, f" of {total / 1e6:.1f}" if total else ""
        chunk = answer.read(2**18)
        if have == 0 and chunk.lstrip().startswith(b"<"):
            raise Refused("answered with a web page instead of the file")
        if max(have + len(chunk), total or 0) > most:
            raise Refused(f"offers more than {most:,} bytes")
        with open(part, "ab" if have else "wb") as f:
            while chunk:
                have += len(chunk)
                if have > most:
                    part.unlink()
                    raise Refused(f"sent more than {most:,} bytes")
                f.write(chunk)
                if time.monotonic() > shown + 0.5:
                    shown = time.monotonic()
                    print(f"\r{part.stem}: {have / 1e6:.1f}{of} MB", end="", file=sys.stderr)
                chunk = answer.read(2**18)
        print(f"\r{part.stem}: {have / 1e6:.1f}{of} MB", file=sys.stderr)
    if have < (total or 0):
        raise OSError(f"cut off after {have:,} of {total:,} bytes")


def _try_address(url, part, size):
    """Fetch with a few tries. Returns None when the file is there, else the reason."""
    for wait in WAITS:
        time.sleep(wait)
        try:
            with _disk_errors(part.parent, size):
                return _fetch(url, part, size)
        except Refused as e:
            return str(e)
        except (OSError, http.client.HTTPException, ValueError) as e:
            reason = str(getattr(e, "reason", e)) or type(e).__name__
    return reason


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def download(urls, path, sha256=None, size=None):
    """Fetch one of urls to path, unless it is there. What arrived before a cut is kept in PATH.part
    and continued, also by the next run. Nothing is left at path that does not fit sha256, or, where
    no more is published, its first digits."""
    path, part = Path(path), Path(f"{path}.part")
    by_hand = f"Fetch it by hand, from {' or '.join(urls)}, and save it as {path}."
    with locked(path):
        if path.exists():
            if sha256 and not (found := sha256_of(path)).startswith(sha256):
                raise UserError(
                    f"{path} is not the published file: sha256 is {found}, expected {sha256}. "
                    "Remove it and run again, or, if you trust it, give it by its path."
                )
            return
        if os.environ.get("GANS_OFFLINE"):
            raise UserError(f"{path.name} is not fetched, since GANS_OFFLINE is set. {by_hand}")
        problems = []
        for url in urls:
            if not sha256:
                part.unlink(missing_ok=True)  # parts of unknown origin are not put together
            problem = _try_address(url, part, size)
            if problem is None:
                break
            problems.append(f"{url}: {problem}")
        else:
            kept = ", what has arrived is kept" if sha256 and part.exists() else ""
            raise UserError(
                f"{path.name} could not be fetched ({'; '.join(problems)}). Check the network and "
                f"run again{kept}. {by_hand}"
            )
        found = sha256_of(part)
        if sha256 and not found.startswith(sha256):
            part.unlink()
            raise UserError(
                f"{path.name} from {url} has sha256 {found}, expected {sha256}; it was deleted. "
                f"Run again; if that does not help, the publisher changed the file. {by_hand}"
            )
        if not sha256:
            print(f"{path.name}: no checksum is published; its sha256 is {found}", file=sys.stderr)
        os.replace(part, path)


# What zipfile raises on a damaged file, beside its own error.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError, KeyError)


def _refusal(info):
    """Why a member of a zip is not read, or None."""
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is neither stored nor deflated"
    if info.file_size > min(MAX_FILE, MAX_RATIO * info.compress_size + 2**24):
        return f"would unpack from {info.compress_size:,} to {info.file_size:,} bytes"
    return None


def _checked_members(archive, z):
    """The members worth unpacking. One bad name condemns the whole archive."""
    infos = z.infolist()
    total = sum(info.file_size for info in infos)
    most = min(MAX_UNPACKED, 50 * os.path.getsize(archive) + 2**26)
    for info in infos:
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        problem = _refusal(info)
        if re.match(r"/|[A-Za-z]:", name) or "\\" in name or ".." in name.split("/"):
            problem = "leads out of the folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        elif len(infos) > MAX_MEMBERS or total > most:
            problem = f"is one of {len(infos):,} (at most {MAX_MEMBERS:,}), {total:,} bytes in all"
            problem += f" (at most {most:,})"
        if problem:
            raise UserError(f"{archive} is refused: its member {name!r} {problem}.")
    if not any(is_image(info.filename) for info in infos):
        raise UserError(f"{archive} holds no pictures of these kinds: {' '.join(SUFFIXES)}.")
    return [i for i in infos if is_image(i.filename) or _is_wanted(i.filename, (".json", ".txt"))]


def unpack(archive, folder):
    """Unzip pictures, .json and .txt to folder, all or nothing. A single top folder of the same
    name is left out: horse2zebra/trainA/1.jpg becomes FOLDER/trainA/1.jpg. Hostile or damaged
    archives raise UserError."""
    folder, temp = Path(folder), Path(f"{folder}.part")
    shutil.rmtree(temp, ignore_errors=True)  # of a run that was killed
    try:
        with zipfile.ZipFile(archive) as z:
            members = _checked_members(archive, z)
            with _disk_errors(folder.parent, sum(i.file_size for i in members)):
                temp.mkdir(parents=True)
                z.extractall(temp, members)
        doubled = os.listdir(temp) == [folder.name] and (temp / folder.name).is_dir()
        os.replace(temp / folder.name if doubled else temp, folder)
    except ZIP_ERRORS as e:
        raise UserError(f"{archive} cannot be unpacked: {e}. Remove it and fetch it anew.") from e
    finally:
        shutil.rmtree(temp, ignore_errors=True)


# =============================================================================
# Pictures
# =============================================================================

# Only these decoders ever see a file, whatever it is called.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP")
MAX_PIXELS = 2**27  # about 11,600 x 11,600
warnings.filterwarnings("ignore", module="PIL")  # MAX_PIXELS decides; damaged EXIF is no matter


class BadImage(Exception):
    """One file that cannot be used: BadImage(name, reason)."""

    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")
        self.reason = reason


def _load(file, name, convert):
    """convert(upright image). Whatever a strange file makes Pillow raise becomes BadImage."""
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    try:
        with Image.open(file, formats=FORMATS) as img:  # reads the header only
            W, H = img.size
            if W * H > MAX_PIXELS:
                raise BadImage(name, f"{W} x {H} pixels, at most {MAX_PIXELS:,} are accepted")
            how = img.tile[0][3] if img.tile else None  # as the file packs pixels, and more
            img.info["raw mode"] = how[0] if isinstance(how, tuple) else how
            img.load()
            with contextlib.suppress(Exception):  # damaged EXIF around a good picture
                ImageOps.exif_transpose(img, in_place=True)
            return convert(img)
    except BadImage:
        raise
    except Image.UnidentifiedImageError as e:
        raise BadImage(name, f"not a picture of these kinds: {', '.join(FORMATS)}") from e
    except Exception as e:  # Pillow's decoders raise a dozen kinds on damaged data
        reason = getattr(e, "strerror", None) or " ".join(str(e).split()) or type(e).__name__
        raise BadImage(name, reason) from e


def _to_8bit(img, mode):
    if img.mode.startswith("I"):  # 16 bits: 65535 -> 255. (Pillow itself reads 16-bit RGB as 8.)
        x = np.asarray(img).astype(np.int32)
        if x.min() < 0 or x.max() > 65535:
            raise ValueError("32-bit pixels; save it with 8 or 16 bits")
        img = Image.fromarray(((x + 128) // 257).astype(np.uint8))
    elif img.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    elif img.has_transparency_data:
        img = img.convert("LA") if img.mode == "La" else img
        alpha = img.convert("RGBA")
        img = Image.new("RGB", img.size, "white")
        img.paste(alpha, mask=alpha.getchannel("A"))
    return img if img.mode == mode else img.convert(mode)


def decode(file, name, mode="RGB"):
    """A PIL image of 8-bit RGB or L, upright, alpha over white, from a path, bytes or open file.
    Of an animation, the first frame. Raises BadImage."""
    return _load(file, name, lambda img: _to_8bit(img, mode))


def decode_labels(file, name):
    """The indices (H, W), uint8, of a label map of mode L, P or 1. Raises BadImage."""

    def indices(img):  # not convert("L"), which would turn a palette's indices into luminance
        if img.mode not in ("L", "P", "1"):
            raise ValueError(f"mode {img.mode}; a label map holds indices, in mode L, P or 1")
        # Pillow stretches grey of 2 and 4 bits to 0 ... 255.
        step = {"L;2": 255 // 3, "L;4": 255 // 15}.get(img.info["raw mode"], 1)
        return np.array(img, dtype=np.uint8) // step

    return _load(file, name, indices)


# =============================================================================
# Where pictures lie: folders and zips
# =============================================================================


def _is_wanted(name, suffixes):
    """By suffix, and nothing hidden or of __MACOSX."""
    hidden = any(p == "__MACOSX" or p.startswith(".") and p.strip(".") for p in name.split("/"))
    return name.lower().endswith(suffixes) and not hidden


def is_image(name):
    return _is_wanted(name, SUFFIXES)


def _walk(folder, above=()):
    """Relative paths of the files below folder. Follows links, but not into a folder around it."""
    here = os.stat(folder)
    if any(os.path.samestat(here, a) for a in above):
        return
    if len(above) == 100:
        raise UserError(f"{folder}: folders are nested more than 100 deep.")
    for entry in os.scandir(folder):
        if entry.is_symlink() and not os.path.exists(entry.path):
            continue  # leads nowhere, or to itself
        if entry.is_dir() and not entry.name.startswith("."):
            yield from (f"{entry.name}/{name}" for name in _walk(entry.path, (*above, here)))
        elif entry.is_file():  # no pipe, no device
            yield entry.name


class Source:
    """What Folder, Zip and Subset share. Each has .path, for messages; .names, the sorted relative
    paths of its pictures; .read(name) -> bytes and .image(name), which may raise BadImage;
    .has(name), also of a folder or another file; .labels()."""

    is_toy = False  # whether .counterpart(name, domain) knows the true answer of a translation

    def _keep(self, names):
        self.names = sorted({name for name in names if is_image(name)})
        if not self.names:
            raise UserError(f"{self.path}: no images found. Looked for {' '.join(SUFFIXES)} files.")

    def image(self, name, mode="RGB"):
        return decode(self.read(name), name, mode)

    def regions(self, name):
        """A label map (H, W), uint8; toy: the regions of a face. May raise BadImage."""
        return decode_labels(self.read(name), name)

    def labels(self, names=None):
        """{name: class number} or {name: list of floats} of StyleGAN's dataset.json, or None.
        names: of the pictures that need one, if not all."""
        names = names or self.names
        if not self.has("dataset.json"):
            return None
        try:
            pairs = json.loads(self.read("dataset.json")).get("labels")
            if pairs is None:
                return None
            labels = {name.replace("\\", "/"): label for name, label in pairs}
            if missing := set(names) - set(labels):
                raise ValueError(f"{len(missing)} images have no label, {min(missing)} for one")
            values = np.array([labels[name] for name in names])  # ragged: ValueError
            classes = values.ndim == 1 and values.dtype.kind == "i"
            vectors = values.ndim == 2 and values.dtype.kind in "if" and np.isfinite(values).all()
            if not vectors and not (classes and 0 <= values.min() and values.max() < 10**5):
                raise ValueError("classes are 0 to 99,999, vectors hold numbers")
        except (BadImage, ValueError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(
                f'{self.path}: dataset.json cannot be used: {e}. Expected {{"labels": '
                '[["a.png", 3], ...]}, with a class or a list of numbers for each image.'
            ) from e
        return {name: labels[name] for name in names}


class Folder(Source):
    """The pictures of a folder and the folders below it."""

    def __init__(self, path):
        self.path = str(path)
        try:
            self._keep(_walk(path))
        except OSError as e:
            raise UserError(f"{e.filename or path} cannot be read: {e.strerror}.") from e

    def has(self, name):
        return os.path.exists(os.path.join(self.path, name))

    def read(self, name):
        try:
            with open(os.path.join(self.path, name), "rb") as f:
                if (size := os.fstat(f.fileno()).st_size) > MAX_FILE:
                    raise BadImage(name, f"{size:,} bytes, at most {MAX_FILE:,} are accepted")
                return f.read()
        except OSError as e:
            raise BadImage(name, e.strerror) from e


class Zip(Source):
    """The pictures of a zip, read where they are, by one thread at a time."""

    def __init__(self, path):
        self.path, self.lock = str(path), threading.Lock()
        try:
            self.zip = zipfile.ZipFile(path)
        except ZIP_ERRORS as e:
            raise UserError(f"{path} cannot be read as a zip: {e}. Fetch or pack it anew.") from e
        self._keep(self.zip.namelist())

    def has(self, name):
        return any(n == name or n.startswith(f"{name}/") for n in self.zip.namelist())

    def read(self, name):
        try:
            info = self.zip.getinfo(name)
            if problem := _refusal(info):
                raise BadImage(name, problem)
            with self.lock:
                return self.zip.read(info)
        except ZIP_ERRORS as e:
            raise BadImage(name, f"damaged in {self.path}: {e}") from e


class Subset(Source):
    """The pictures of another source below one of its folders, named from there."""

    def __init__(self, source, folder):
        self.source, self.folder, self.is_toy = source, f"{folder}/", source.is_toy
        self.path = os.path.join(source.path, folder)
        self._keep(n[len(self.folder) :] for n in source.names if n.startswith(self.folder))

    def has(self, name):
        return self.source.has(self.folder + name)

    def read(self, name):
        return self.source.read(self.folder + name)

    def image(self, name, mode="RGB"):
        return self.source.image(self.folder + name, mode)

    def regions(self, name):
        return self.source.regions(self.folder + name)

    def counterpart(self, name, domain, mode="RGB"):
        return self.source.counterpart(self.folder + name, domain, mode)

    def labels(self, names=None):
        names = names or self.names
        labels = self.source.labels([self.folder + name for name in names])
        return labels and {name: labels[self.folder + name] for name in names}


def top_folders(source):
    """The sorted names of the first folders that hold pictures (StarGAN v2's domains, say)."""
    return sorted({name.split("/")[0] for name in source.names if "/" in name})


def _places(source, name):
    """Where source may hold a name: there, or as TOP/name if TOP is its only folder."""
    tops = top_folders(source)
    return [name] + [f"{top}/{name}" for top in tops if len(tops) == 1]


def _place(source, folder):
    """Which of these holds pictures."""
    for place in _places(source, folder):
        if any(name.startswith(f"{place}/") for name in source.names):
            return place


def has_subset(source, folder):
    """Whether subset() would find pictures."""
    return _place(source, folder) is not None


def subset(source, folder, layout=None):
    """What source holds in folder, or in TOP/folder where TOP is its only folder. layout: the
    folders that the caller accepts, for the message."""
    place = _place(source, folder)
    if place is not None:
        return Subset(source, place)
    if source.has(folder):
        raise UserError(f"{os.path.join(source.path, folder)} is empty: it holds no images.")
    tops = top_folders(source)
    found = ", ".join(tops[:10]) + ", ..." * (len(tops) > 10) or "no folders"
    expected = f" Expected: {layout}." if layout else ""
    raise UserError(f"{source.path}: no folder {folder} in it, found {found}.{expected}")


# =============================================================================
# Toy faces
# =============================================================================
# A face is a list of flat polygons in units of the picture's side, so every size shows the same
# picture. The domains share geometry, clothes and the sky's hue. Skin, hair, iris lie at the same t
# on a ramp of colours per domain: recolouring is one-to-one and keeps the order of lightness, so
# that unpaired translation has one natural answer and loses nothing in either direction.

TOY_DOMAINS = ("human", "goblin", "robot")
TOY_REGIONS = ("background", "skin", "eyes", "brows", "nose", "mouth", "hair", "clothes", "neck",
               "ears", "glasses")  # fmt: skip
TOY_HAIR = ("parted", "bangs", "swept", "curly", "spiky", "bun", "bunches")

# fmt: off
# Colours by domain; ramps go from t = 0 to t = 1. Backgrounds and clothes keep clear of them.
_SKIN = (((140, 88, 62), (196, 134, 94), (240, 186, 148), (255, 222, 198)),
         ((40, 116, 62), (70, 156, 62), (122, 200, 76), (184, 236, 112)),
         ((112, 124, 150), (152, 166, 188), (192, 204, 220), (232, 238, 246)))
_HAIR = (((44, 30, 30), (104, 54, 32), (188, 84, 32), (242, 194, 88)),
         ((44, 16, 92), (100, 30, 156), (176, 62, 214), (232, 150, 252)),
         ((12, 52, 66), (10, 98, 110), (24, 160, 160), (120, 232, 214)))
_IRIS = (((70, 44, 30), (110, 120, 60), (60, 130, 190)),
         ((110, 20, 30), (200, 40, 30), (240, 110, 30)),
         ((40, 200, 240), (120, 235, 200), (220, 250, 140)))
_EYE_WHITE = ((255, 255, 252), (255, 238, 120), (32, 40, 60))
_LIPS = ((200, 62, 72), (64, 44, 76), (60, 70, 96))
_BLUSH = ((240, 92, 84), (236, 216, 40), (84, 96, 122))
# Saturation and value of the sky's top, its foot, the disc, the stripes: day, dusk, a workshop.
_SKY = (((0.24, 0.96), (0.10, 1.00), (0.05, 1.00), (0.12, 1.00)),
        ((0.42, 0.64), (0.32, 0.80), (0.24, 0.88), (0.34, 0.78)),
        ((0.10, 0.78), (0.05, 0.90), (0.03, 0.96), (0.06, 0.88)))
_CLOTHES = ((0.0, 0.72), (0.55, 0.75), (0.63, 0.68), (0.98, 0.5))  # hue, saturation
_INK, _WHITE, _STEEL = (44, 34, 46), (255, 255, 255), (74, 84, 106)

# Hairlines from the right temple to the left, in units of the head's half width and half height.
_HAIRLINES = {
    "parted": ((0.97, 0.02), (0.9, -0.32), (0.62, -0.56), (0.3, -0.8), (-0.1, -0.62),
               (-0.6, -0.44), (-0.9, -0.26), (-0.97, 0.02)),
    "bangs": ((0.97, 0.08), (0.9, -0.26), (0.6, -0.4), (0.2, -0.41), (-0.2, -0.41), (-0.6, -0.4),
              (-0.9, -0.26), (-0.97, 0.08)),
    "swept": ((0.97, 0.02), (0.92, -0.3), (0.78, -0.56), (0.4, -0.66), (0, -0.52), (-0.45, -0.42),
              (-0.82, -0.36), (-0.97, 0.02)),
    "high": ((0.97, 0.02), (0.93, -0.32), (0.76, -0.56), (0.4, -0.7), (-0.4, -0.7), (-0.76, -0.56),
             (-0.93, -0.32), (-0.97, 0.02)),
}
_GOBLIN_EAR = np.array(
    [(0.8, -0.1), (1.1, -0.2), (1.46, -0.38), (1.32, 0.04), (1.1, 0.3), (0.8, 0.3)])
# fmt: on

_DISC, _CIRCLE = (  # (60, 2) for large shapes and (24, 2), clockwise from the top
    np.stack([np.sin(angle), -np.cos(angle)], 1)
    for angle in (np.arange(n) * (2 * np.pi / n) for n in (60, 24))
)
_ANGLES = np.linspace(-1.7, 1.7, 19)
_ARC = np.stack([np.sin(_ANGLES), -np.cos(_ANGLES)], 1)  # (19, 2), temple to temple over the top
_LID, _LIP = np.linspace(-1, 1, 9), np.linspace(-1, 1, 15)
_T = np.linspace(0, 1, 6, endpoint=False)[:, None] ** np.arange(4)  # (6, 4): 1, t, t^2, t^3
_CATMULL_ROM = _T @ (np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2)


def toy_attributes(seed):
    """What seed (int >= 0) looks like in every domain: a dict of floats and, for styles, ints."""
    rng = random.Random(f"toy face {seed}")  # the same numbers on every machine
    u, choice = rng.uniform, rng.randrange
    # fmt: off
    return {
        "x": u(-0.045, 0.045), "y": u(-0.005, 0.035), "scale": u(1.03, 1.19),
        "tilt": u(-0.18, 0.18),
        "yaw": u(-1, 1), "pitch": u(-1, 1), "face_width": u(0.9, 1.08), "jaw": u(0.04, 0.34),
        "skin_tone": u(0, 1), "hair_tone": u(0, 1), "hair_style": choice(len(TOY_HAIR)),
        "hair_length": max(0.0, u(-0.8, 1)), "hair_volume": u(0, 1), "hair_side": 1 - 2 * choice(2),
        "eye_size": u(0.88, 1.12), "eye_gap": u(0.93, 1.07), "eye_open": u(0.8, 1.1),
        "gaze_x": u(-1, 1), "gaze_y": u(-1, 1), "iris": u(0, 1), "brow_raise": u(-1, 1),
        "brow_angle": u(-1, 1), "brow_width": u(0.75, 1.25), "nose": u(0.8, 1.25),
        "smile": u(-0.6, 1), "mouth_open": max(0.0, u(-0.6, 1)), "mouth_width": u(0.85, 1.15),
        "glasses": max(0, choice(6) - 3), "clothes_style": choice(4), "clothes_hue": choice(4),
        "clothes_light": u(0, 1), "background_style": choice(3), "background_hue": u(0, 1),
    }
    # fmt: on


def _mix(a, b, t):
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def _ramp(stops, t):
    """The colour at t in [0, 1] between evenly spaced stops."""
    i = min(int(t * (len(stops) - 1)), len(stops) - 2)
    return _mix(stops[i], stops[i + 1], t * (len(stops) - 1) - i)


def _hsv(h, s, v):
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(h, s, v))


def _oval(x, y, rx, ry):
    return _CIRCLE * (rx, ry) + (x, y)


def _spline(points, closed=True):
    """The Catmull-Rom curve through points (n, 2), six steps a piece."""
    p = np.asarray(points, float)
    curve = (_CATMULL_ROM @ p[_pieces(len(p), closed)]).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


@functools.cache
def _pieces(n, closed):
    """Of each piece of a curve through n points, the four points that it depends on."""
    if closed:
        return (np.arange(n)[:, None] + (0, 1, 2, 3)) % n
    return (np.arange(n - 1)[:, None] + (-1, 0, 1, 2)).clip(0, n - 1)


def _band(upper, lower):
    """The area between two curves that run in the same direction."""
    return np.concatenate([upper, lower[::-1]])


def _stroke(points, width, power=6):
    """A brush stroke along the open curve through points; a smaller power tapers it more."""
    p = _spline(points, closed=False)
    d = np.concatenate([p[1:2] - p[:1], p[2:] - p[:-2], p[-1:] - p[-2:-1]])
    normal = d[:, ::-1] * (-1, 1) / np.hypot(d[:, :1], d[:, 1:])
    offset = normal * (0.5 * width * _taper(len(p), power))
    return _band(p + offset, p - offset)


@functools.cache
def _taper(n, power):
    """(n, 1): 0 at the ends, 1 in the middle."""
    return (1 - np.abs(np.linspace(-1, 1, n)) ** power)[:, None] ** 0.5


def _mirror(half):
    """A left-right symmetric outline from its right half, (x, y) from top to bottom."""
    return np.array([*half, *((-x, y) for x, y in half[::-1])])


def _toy_shapes(a, domain):
    """The face with attributes a: a list of (region, colour, points (n, 2)), back to front."""
    human, goblin, robot = domain == 0, domain == 1, domain == 2
    skin, hair = _ramp(_SKIN[domain], a["skin_tone"]), _ramp(_HAIR[domain], a["hair_tone"])
    shade, light = _mix(skin, _INK, 0.2), _mix(skin, _WHITE, 0.2)
    hair_dark, hair_light = _mix(hair, _INK, 0.4), _mix(hair, _WHITE, 0.25)
    hue, saturation = _CLOTHES[a["clothes_hue"]]
    cloth = _hsv(hue, saturation, 0.42 + 0.48 * a["clothes_light"])
    cloth_dark, cloth_light = _mix(cloth, _INK, 0.35), _mix(cloth, _WHITE, 0.6)
    W, H = 0.28 * a["face_width"], 0.31
    centre = np.array([0.5 + a["x"], 0.5 + a["y"]])
    cos, sin = a["scale"] * np.cos(a["tilt"]), a["scale"] * np.sin(a["tilt"])
    rotate = np.array([[cos, sin], [-sin, cos]])
    shapes = []

    def body(region, colour, points):
        shapes.append((region, colour, points, np.nan))

    def head(region, colour, points, depth=0.0):
        """Points around the head's centre; depth moves them as the head turns and nods."""
        shapes.append((region, colour, points, depth))

    # ---- behind the head: hair, antennae, neck, clothes ----
    style, side, volume = TOY_HAIR[a["hair_style"]], a["hair_side"], a["hair_volume"]
    wide, low = 1.1 + 0.12 * volume, 0.35 + 1.2 * a["hair_length"]
    if a["hair_length"]:
        half = [(0.7, -1.05), (wide, -0.5), (wide + 0.06, 0.2), (wide + 0.1 * volume, low - 0.1)]
        head("hair", hair_dark, _spline(_mirror([*half, (0.8, low)])) * (W, H), -0.5)
    for s in (-1, 1):
        if robot:
            rod = np.array([(0.4, -0.9), (0.5, -1.2), (0.62, -1.36)]) * (s * W, H)
            head("ears", _STEEL, _stroke(rod, 0.024))
            head("ears", (255, 96, 72), _oval(*rod[-1], 0.034, 0.034))
        if style == "bunches":
            head("hair", hair, _oval(s * 1.12 * W, -0.86 * H, 0.1 + 0.025 * volume, 0.1), -0.5)
    if style == "bun":
        head("hair", hair, _oval(0, -1.24 * H, 0.11 + 0.03 * volume, 0.09), -0.5)
        head("hair", hair_light, _oval(-0.03, -1.3 * H, 0.03, 0.02), -0.5)
    x, y = 0.5 + 0.5 * a["x"], 0.92 + 0.4 * a["y"]
    jaw = np.array([(-0.1, 0.1), (0.1, 0.1)]) @ rotate + centre
    body("neck", shade, [*jaw, (x + 0.12, y + 0.1), (x - 0.12, y + 0.1)])
    half = [(0.12, -0.05), (0.27, -0.015), (0.38, 0.03), (0.43, 0.2)]
    body("clothes", cloth, _spline(_mirror(half)) + (x, y))
    if a["clothes_style"] == 0:  # jumper
        half = [(x - 0.13, y - 0.06), (x - 0.09, y - 0.01)]
        collar = [*half, (x, y + 0.015), *((2 * x - u, v) for u, v in half[::-1])]
        body("neck", shade, collar)
        body("clothes", cloth_dark, _stroke(collar, 0.034, 20))
    elif a["clothes_style"] == 1:  # V-neck
        body("neck", shade, np.array([(-0.1, -0.06), (0, 0.06), (0.1, -0.06)]) + (x, y))
    elif a["clothes_style"] == 2:  # hood
        body("clothes", cloth_dark, _oval(x, y, 0.22, 0.06))
        body("neck", shade, _oval(x, y - 0.03, 0.12, 0.045))
    for s in (-1, 1):
        if a["clothes_style"] == 1:
            lapel = np.array([(0.1, -0.07), (0.155, -0.035), (0, 0.1), (0, 0.045)])
            body("clothes", cloth_light, lapel * (s, 1) + (x, y))
        elif a["clothes_style"] == 2:
            cord = np.array([(0.07, 0.03), (0.075, 0.12)])
            body("clothes", cloth_light, _stroke(cord * (s, 1) + (x, y), 0.018))
        elif a["clothes_style"] == 3:  # shirt
            collar = np.array([(0, 0.0), (0.11, -0.07), (0.16, -0.03), (0.09, 0.06)])
            body("clothes", cloth_light, collar * (s, 1) + (x, y))

    # ---- the head: locks, ears, face ----
    locks = a["hair_length"] > 0.3
    half = [(0.8, -0.6), (wide, -0.35), (wide + 0.07, 0.3), (wide + 0.1 * volume, low),
            (0.88, low - 0.12), (0.8, 0.4)]  # fmt: skip
    for s in (-1, 1):
        if locks:
            head("hair", hair, _spline(np.array(half) * (s * W, H)), -0.2)
        if human and not locks:
            head("ears", skin, _oval(s * W, 0.1 * H, 0.05, 0.068), -0.5)
            head("ears", shade, _oval(s * (W + 0.01), 0.1 * H, 0.024, 0.038), -0.5)
        elif goblin:
            head("ears", skin, _spline(_GOBLIN_EAR * (s * W, H)), -0.5)
            inner = (_GOBLIN_EAR - (1.2, 0)) * 0.55 + (1.16, -0.02)
            head("ears", shade, _spline(inner * (s * W, H)), -0.5)
        elif robot:
            head("ears", _STEEL, _oval(s * 1.03 * W, 0.1 * H, 0.05, 0.08), -0.5)
            head("ears", (150, 165, 188), _oval(s * 1.05 * W, 0.1 * H, 0.028, 0.052), -0.5)
    face = _DISC * (W, H)
    face[:, 0] *= 1 - a["jaw"] * _DISC[:, 1].clip(0) ** 2
    head("skin", shade, face)
    head("skin", skin, face * (0.95, 0.97) - (0.006, 0.006), 0.1)
    for s in (-1, 1):
        if robot:
            head("skin", shade, _oval(s * 0.72 * W, 0.42 * H, 0.014, 0.014), 0.7)
            seam = np.array([(0.48, 0.6), (0.42, 0.72), (0.38, 0.86)]) * (s * W, H)
            head("skin", shade, _stroke(seam, 0.014), 0.7)
        else:
            blush = _mix(skin, _BLUSH[domain], 0.28)
            head("skin", blush, _oval(s * 0.62 * W, 0.45 * H, 0.046, 0.03), 0.8)
    if goblin:
        for dx, dy, r in ((0.7, 0.4, 0.014), (0.56, 0.52, 0.01), (-0.7, 0.46, 0.013)):
            head("skin", shade, _oval(dx * W, dy * H, r, r), 0.8)

    # ---- hair in front ----
    line = {"spiky": "high", "curly": "high", "bun": "high", "bunches": "parted"}.get(style, style)
    line = np.array(_HAIRLINES[line])[::side] * (side * W, H)
    crown = _ARC * ((wide - 0.02) * W, (1.09 + 0.12 * volume) * H)
    if style == "spiky":
        crown = _ARC * (1.06 * W, 1.1 * H)
        crown[1:-1:2] = crown[1:-1:2] * (1.14 + 0.12 * volume) + (0.015 * side, 0)
    elif style == "swept":
        crown[:, 1] += 0.35 * volume * (crown[:, 1] - side * crown[:, 0]).clip(-0.3, 0)
    elif style == "curly":
        for curl in _ARC[::2] * (1.02 * W, 1.06 * H):
            head("hair", hair, _oval(*curl, 0.08 + 0.025 * volume, 0.08 + 0.025 * volume), 0.2)
    crown = crown if style == "spiky" else _spline(crown, closed=False)
    head("hair", hair, np.concatenate([crown, _spline(line, closed=False)]), 0.3)
    head("hair", hair_light, _stroke(_ARC[5:9] * (0.86 * side * W, 0.92 * H), 0.03), 0.3)

    # ---- eyes, brows, glasses ----
    gap, y = 0.46 * W * a["eye_gap"], 0.1 * H
    for s in (-1, 1):
        ry = 0.067 * a["eye_size"]
        rx = ry * (0.92 - 0.14 * s * a["yaw"])  # the far eye is narrower
        head("eyes", _EYE_WHITE[domain], _oval(s * gap, y, rx, ry), 1)
        gx, gy = s * gap + 0.3 * rx * a["gaze_x"], y + ry * (0.05 + 0.18 * a["gaze_y"])
        head("eyes", _ramp(_IRIS[domain], a["iris"]), _oval(gx, gy, 0.66 * rx, 0.68 * ry), 1)
        head("eyes", _INK, _oval(gx, gy, 0.36 * rx, 0.38 * ry), 1)
        head("eyes", _WHITE, _oval(gx - 0.24 * rx, gy - 0.28 * ry, 0.2 * rx, 0.2 * ry), 1)
        arc = _LID * np.arccos(1.3 * a["eye_open"] - 0.5)
        arc = np.stack([s * gap + 1.06 * rx * np.sin(arc), y - 1.06 * ry * np.cos(arc)], 1)
        head("eyes", shade, arc, 1)
        lash = [arc[0], (arc[0] + arc[-1]) / 2 + (0, 0.006), arc[-1]]
        head("eyes", _INK, _stroke(lash, 0.018), 1)
        brow = np.array([(-0.058, 0.006), (0, -0.012), (0.062, 0.012)])
        brow[:, 1] -= brow[:, 0] * 0.33 * a["brow_angle"] + 0.022 * a["brow_raise"] + 0.3 * H
        brow = _stroke(brow * (s, 1) + (s * gap, 0), 0.028 * a["brow_width"], 3)
        head("brows", hair_dark, brow, 1.1)
    if a["glasses"]:
        frame = (36, 36, 58) if a["glasses"] == 1 else (206, 44, 66)
        for s in (-1, 1):
            lens = np.concatenate([_CIRCLE, _CIRCLE[:1]]) * (1, 0.96 if a["glasses"] == 1 else 0.84)
            head("glasses", frame, _band(0.104 * lens, 0.085 * lens) + (s * gap, y), 1.1)
            arm = np.array([(gap + 0.095, 0.06 * H), (0.97 * W, 0.02 * H)])
            head("glasses", frame, _stroke(arm * (s, 1), 0.017), 0.9)
        bridge = np.array([(0.095 - gap, 0.06 * H), (0, 0.02 * H), (gap - 0.095, 0.06 * H)])
        head("glasses", frame, _stroke(bridge, 0.017), 1.1)

    # ---- nose, mouth ----
    half = np.array([(0.004, 0.24 * H), (0.036, 0.44 * H), (0.02, 0.51 * H)]) * (a["nose"], 1)
    head("nose", shade, _spline(_mirror(half)), 1.6)
    head("nose", light, _oval(-0.006, 0.41 * H, 0.016, 0.02), 1.6)
    bow = 0.67 * H + 0.045 * a["smile"] * (0.5 - _LIP**2)
    upper = np.stack([0.1 * a["mouth_width"] * _LIP, bow], 1)
    drop = (1 - _LIP**2)[:, None] * (0, 0.02 + 0.07 * a["mouth_open"])
    lips = _band(upper - (0, 0.01), upper + drop + (0, 0.008)) * (1.08, 1)
    head("mouth", _mix(skin, _LIPS[domain], 0.75), lips, 1)
    if a["mouth_open"] > 0.1:
        head("mouth", (100, 30, 46), _band(upper, upper + drop - (0, 0.008)), 1)
        head("mouth", (250, 250, 246), _band(upper, upper + drop * 0.35), 1)
    if goblin:
        for i in (3, 11):
            fang = np.array([(-0.014, 0.022), (0, -0.022), (0.014, 0.022)])
            head("mouth", (255, 250, 225), fang + (upper + drop)[i], 1)

    # Place all points at once: many small array operations would cost more than the drawing.
    regions, colours, outlines, depths = zip(*shapes, strict=True)
    sizes = [len(points) for points in outlines]
    points, depths = np.concatenate(outlines), np.repeat(depths, sizes)[:, None]
    turned = points + depths * (0.045 * a["yaw"], 0.02 * a["pitch"])
    points = np.where(np.isnan(depths), points, turned @ rotate + centre)
    stops = np.cumsum(sizes).tolist()
    outlines = (points[stop - n : stop] for stop, n in zip(stops, sizes, strict=True))
    return list(zip(regions, colours, outlines, strict=True))


def _draw(image, shapes):
    """Fill shapes [(colour, points (n, 2))] in order."""
    inks, outlines = zip(*shapes, strict=True)
    # Pillow counts from the pixels' centres and cuts fractions off.
    flat = np.rint(np.concatenate(outlines) * image.width - 0.5).ravel().tolist()
    draw, start = ImageDraw.Draw(image), 0
    for ink, outline in zip(inks, outlines, strict=True):
        stop = start + 2 * len(outline)
        draw.polygon(flat[start:stop], fill=ink)
        start = stop


def _side(size):
    """Side of the drawing that is reduced to the picture: a multiple of size, at least 256."""
    return size * max(2, -(-256 // size))


def toy_face(seed, domain=0, size=64):
    """The face of a seed (int >= 0) in a domain (index of TOY_DOMAINS): an RGB picture.

    A pure function; every size from 16 to 1024 shows the same composition. The same seed in another
    domain is the true counterpart: skin, hair, eyes, ears, lips and the light behind change.
    """
    a = toy_attributes(seed)
    hue = a["background_hue"]
    hue = 0.46 + 0.27 * hue if hue < 0.75 else 0.15
    side = _side(size)
    t = np.linspace(0, 1, side)[:, None, None]
    top, foot, disc, stripes = (_hsv(hue, *tint) for tint in _SKY[domain])
    sky = np.array(top) * (1 - t) + np.array(foot) * t
    image = Image.fromarray(np.rint(sky).astype(np.uint8))  # one column
    image = image.resize((side, side), Image.Resampling.NEAREST)
    if a["background_style"] == 1:
        _draw(image, [(disc, 0.45 * _DISC + (0.5, 0.46))])
    elif a["background_style"] == 2:
        stripe = np.array([(0.1, 0), (0.2, 0), (-0.4, 1), (-0.5, 1)])
        _draw(image, [(stripes, stripe + (0.25 * i, 0)) for i in range(6)])
    _draw(image, [(colour, points) for _, colour, points in _toy_shapes(a, domain)])
    return image.reduce(side // size)


def toy_labels(seed, domain=0, size=64):
    """The regions of toy_face(seed, domain, size): indices of TOY_REGIONS, a mode "L" picture."""
    side = _side(size)
    image = Image.new("L", (side, side))
    shapes = _toy_shapes(toy_attributes(seed), domain)
    _draw(image, [(TOY_REGIONS.index(region), points) for region, _, points in shapes])
    return image.resize((size, size), Image.Resampling.NEAREST)  # the pixels' centres


TOY_FACES = {"faces": (0, 0, 4000)}  # for the papers that learn one set of pictures
TOY_LABELLED = {"train": (0, 0, 4000), "test": (0, 30_000, 200)}  # with maps of their regions
TOY_CLASSES = {name: (k, 2000 * k, 2000) for k, name in enumerate(TOY_DOMAINS)}  # with labels
TOY_PARTS = {  # part: (domain, first seed, faces); CycleGAN's two domains, no face in both
    "trainA": (0, 0, 800),
    "trainB": (1, 800, 800),
    "testA": (0, 1600, 100),
    "testB": (1, 1700, 100),
}
TOY_DOMAIN_FOLDERS = {  # StarGAN v2's three domains, no face in two of them
    f"{part}/{name}": (k, first + n * k, n)
    for part, first, n in (("train", 0, 1000), ("test", 3000, 100))
    for k, name in enumerate(TOY_DOMAINS)
}


class Toy(Source):
    """`toy` as a source: folders of size x size pictures, drawn when asked for; a face's label is
    its domain."""

    is_toy = True

    def __init__(self, size, parts):
        self.path, self.size, self.parts = "toy", size, parts
        self.names = [f"{part}/{i:04}.png" for part, (_, _, n) in parts.items() for i in range(n)]

    def has(self, name):
        return name in self.parts

    def labels(self, names=None):
        return {name: self.domain_and_seed(name)[0] for name in names or self.names}

    def image(self, name, mode="RGB"):
        domain, seed = self.domain_and_seed(name)
        return toy_face(seed, domain, self.size).convert(mode)

    def regions(self, name):
        domain, seed = self.domain_and_seed(name)
        return np.array(toy_labels(seed, domain, self.size))

    def counterpart(self, name, domain, mode="RGB"):
        return toy_face(self.domain_and_seed(name)[1], domain, self.size).convert(mode)

    def domain_and_seed(self, name):
        part, number = name.removesuffix(".png").rsplit("/", 1)
        domain, first, _ = self.parts[part]
        return domain, first + int(number)


def open_data(data, root="data", size=None, toy=TOY_PARTS):
    """The source for --data: toy (faces of size x size pixels, in folders of these names), toy/NAME
    (faces of one domain, as toy/goblin, for the papers that learn one), the name of a public
    set (fetched once, to ROOT/NAME), a folder or a .zip. One's own folder of such a name is given
    as ./NAME."""
    if data == "toy":
        return Toy(size, toy)
    one_domain = toy in (TOY_FACES, TOY_LABELLED)
    if data.startswith("toy/") and one_domain and data[4:] in TOY_DOMAINS:
        domain = TOY_DOMAINS.index(data[4:])
        return Toy(size, {part: (domain, first, n) for part, (_, first, n) in toy.items()})
    path = Path(os.path.expanduser(data))
    if data in PUBLIC or data in BY_HAND:
        folder, archive = Path(root, data), Path(root, f"{data}.zip")
        if not folder.is_dir() and data in BY_HAND:
            raise UserError(BY_HAND[data].format(folder=folder))
        if not folder.is_dir():
            with locked(folder):
                if not folder.is_dir():  # unless another process was first
                    urls, n_bytes, sha256 = PUBLIC[data]
                    download(urls, archive, sha256, n_bytes)
                    unpack(archive, folder)
                    archive.unlink()
        return Folder(folder)
    if data and path.is_dir():
        return Folder(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return Zip(path)
    names = sorted([*PUBLIC, *BY_HAND])
    if data.startswith("toy/") and one_domain:
        raise UserError(f"--data {data}: there are {', '.join(f'toy/{d}' for d in TOY_DOMAINS)}.")
    close = difflib.get_close_matches(str(data).lower(), [*names, "toy"], 1)
    problem = "is a file, but not a .zip" if path.is_file() else "does not exist"
    raise UserError(
        f"--data {data}: {problem}. {f'Did you mean {close[0]}? ' if close else ''}"
        f"Give a folder, a .zip, toy, or a public data set: {', '.join(names)}."
    )


# =============================================================================
# The loader
# =============================================================================
# Threads, not processes: Pillow decodes and resizes outside Python's lock, and all threads share
# one cache of decoded pictures, without copies between processes.


def available_memory():
    """Bytes that this process may still take: what the machine has free, or its cgroup, if less."""
    free, groups = 4 * GB, set()
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no Linux: half of the memory
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, TypeError):
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            own = Path(line.split(":", 2)[2])
            groups |= {str(own), *map(str, own.parents)}  # a limit holds for all below it
    for group in groups:
        for tree, limit, used in (
            ("", "memory.max", "memory.current"),  # version 2
            ("/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
        ):
            folder = Path(f"/sys/fs/cgroup{tree}{group}")
            with contextlib.suppress(OSError, ValueError):  # not there, or "max": no limit
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                cache = re.findall(r"inactive_file (\d+)", (folder / "memory.stat").read_text())
                free = min(free, left + int(cache[-1]))
    return max(free, 0)


class ImageSet:
    """The pictures of a source as uint8 arrays (H, W, C), decoded, prepared and kept in memory.

    prepare: PIL picture -> PIL picture, the part of the preprocessing that is always the same.
    mode: "RGB" or "L". cache: "auto" keeps what fits into a quarter of the free memory.
    A file that cannot be read is named, and its neighbour stands in for it; more than 1% of such
    files raise UserError.
    """

    def __init__(self, source, prepare, mode="RGB", cache="auto"):
        self.source, self.names, self.prepare, self.mode = source, source.names, prepare, mode
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each has a cache of its own
        # In a list: the levels of `shrunk` share it.
        self.room = [available_memory() // 4 // ranks if cache == "auto" else 0]
        self.kept, self.bad = {}, set()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return self.array(i)

    def array(self, i):
        """What `read` makes of file i, or of its neighbour; kept if there is room."""
        image = self.kept.get(i)
        if image is None:
            image = self.load(i)
            if i not in self.kept and image.nbytes <= self.room[0]:  # of another thread, meanwhile
                self.room[0] -= image.nbytes
                self.kept[i] = image
        return image

    def load(self, i):
        for k in range(len(self)):
            name = self.names[(i + k) % len(self)]
            try:
                return self.read(name)
            except BadImage as e:
                self.report(name, e)
        raise UserError(f"--data {self.source.path}: not one readable picture.")

    def read(self, name):
        return pixels(self.prepare(self.source.image(name, self.mode)))

    def shrunk(self, factor):
        """The same pictures averaged over boxes of factor x factor pixels: the levels that
        progressive growing begins with."""
        if factor == 1:
            return self

        def prepare(img):
            boxes = pixels(self.prepare(img))
            H, W, C = boxes.shape
            boxes = boxes.reshape(H // factor, factor, W // factor, factor, C)
            return np.rint(boxes.mean((1, 3), np.float32)).astype(np.uint8)

        small = copy.copy(self)
        small.prepare, small.kept = prepare, {}
        return small

    def forget(self):
        """Gives the memory of pictures back, to those of other levels."""
        kept, self.kept = self.kept, {}
        self.room[0] += sum(image.nbytes for image in kept.values())

    def report(self, name, problem):
        if name in self.bad:
            return
        self.bad.add(name)
        if len(self.bad) > 0.01 * len(self):
            raise UserError(
                f"--data {self.source.path}: {len(self.bad)} of {len(self)} pictures are damaged,"
                f" at most 1% may be; the last one: {problem}. Remove or replace them."
            ) from None
        print(f"skipped {problem} ({len(self.bad)} so far)", file=sys.stderr)

    def counterparts(self, domain, mode, n=None):
        """Toy data: the true counterparts of what all(n) returns, in domain "A", "B", "C" or a
        name of TOY_DOMAINS."""
        number = (TOY_DOMAINS if domain in TOY_DOMAINS else "ABC").index(domain)
        faces = (self.source.counterpart(name, number, mode) for name in self.names[:n])
        return stack([pixels(self.prepare(face)) for face in faces])

    def all(self, n=None):
        """All pictures that can be read, or those of the first n, uint8 (N, C, H, W)."""
        return self.some(range(len(self))[:n])

    def some(self, indices):
        """Those of some indices that can be read."""
        return stack(self.arrays(indices))

    def arrays(self, indices):
        images = {self.names[i]: self.array(i) for i in indices}
        good = [image for name, image in images.items() if name not in self.bad]
        return good or list(images.values())

    def batches(self, n=256):
        """All pictures that can be read, uint8 (up to n, C, H, W) at a time."""
        for k in range(0, len(self), n):
            images = {name: self[k + i] for i, name in enumerate(self.names[k : k + n])}
            if good := [image for name, image in images.items() if name not in self.bad]:
                yield stack(good)


def pixels(img):
    """PIL picture, or uint8 array, -> uint8 array (H, W, C)."""
    return np.atleast_3d(img)


def stack(images):
    """uint8 arrays (H, W, C) -> uint8 tensor (N, C, H, W), channels last in memory."""
    if len({image.shape for image in images}) > 1:
        sizes = sorted({f"{image.shape[1]}x{image.shape[0]}" for image in images})
        raise UserError(
            f"pictures of different sizes ({', '.join(sizes[:3])}) in one batch: use --batch 1, or"
            " a --preprocess that crops."
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def resize_for(mode, load, crop, multiple, img):
    """The part of CycleGAN's preprocessing that is always the same; img: PIL picture, any size.

    mode: resize_and_crop (to load x load), scale_width, scale_width_and_crop (to width load, and
    at least as high as the crop), crop (not at all) or none. The modes that do not crop end at the
    nearest multiple, since G changes other sizes. multiple: of both sides.
    """
    W, H = size = img.size
    if mode == "resize_and_crop":
        size = (load, load)
    elif mode.startswith("scale_width") and (W != load or H < crop):
        size = (load, max(load * H // W, crop))
    if not mode.endswith("crop"):
        size = tuple(max(1, round(side / multiple)) * multiple for side in size)
    return img.resize(size, BICUBIC)


def images_of(source):
    """The pictures of a source that may hold label maps, too: those to train on if it says so."""
    if has_labels(source) and has_subset(source, "train"):
        source = subset(source, "train")
    return subset(source, "images") if has_subset(source, "images") else source


def open_images(data, size, toy):
    """open_data, but of pictures beside label maps the pictures alone."""
    source = open_data(data, size=size, toy=toy)
    return images_of(source) if has_labels(source) else source


def square_pictures(args, source, channels=3):
    """An ImageSet of size x size pictures for the papers that generate squares, and the size.

    --size: the largest centre square of each picture, resized by Lanczos; without it, all
    must be squares of one power of two, as in NVIDIA's data sets.
    """
    size, mode = square_size(args, source), "RGB" if channels == 3 else "L"
    prepare = functools.partial(square, size, args.size is None)
    return ImageSet(source, prepare, mode, args.cache), size


def square_size(args, source):
    """--size, or the side of the first picture; UserError if it does not suit."""
    size = args.size
    if not source.is_toy:
        name, sides = first_sides(source)
    if size is None and not source.is_toy:
        W, size = sides
        if W != size:
            raise UserError(
                f"--data {args.data}: {name} is {W}x{size}, not square. Pass --size, a power of two"
                " such as 256, to crop and resize."
            )
    if size < 8 or size & (size - 1):
        given = "--size" if args.size else f"--data {args.data}: pictures of"
        raise UserError(
            f"{given} {size}: a power of two from 8 on is needed. Pass --size 256, say."
        )
    if len(source.names) < 2:
        raise UserError(f"--data {args.data}: one picture is no set to learn from; add others.")
    if not source.is_toy and min(sides) < size and os.environ.get("RANK", "0") == "0":
        print(f"pictures of {min(sides)} pixels are enlarged to {size}")
    return size


def first_sides(source):
    """Name and (width, height) of the first picture that can be read."""
    for name in source.names:
        with contextlib.suppress(BadImage):  # which the loader will name
            return name, source.image(name).size
    raise UserError(f"{source.path}: none of its {len(source.names)} pictures can be read.")


def square(size, exact, img, resample=Image.Resampling.LANCZOS):
    """The largest centre square of a PIL picture, size x size; exact: it has to be that already."""
    if img.size == (size, size):
        return img
    if exact:
        raise UserError(
            f"pictures of different sizes, {size}x{size} and {img.width}x{img.height}: pass --size"
            f" {size} to crop and resize them."
        )
    return ImageOps.fit(img, (size, size), resample)


NO_CLASS = 255  # in a label map: of the border that augment_pair moves in
CELEBAMASK = (  # the 19 classes of CelebAMask-HQ: 13, without left and right, lips and mouth
    "background face eye eyebrow mouth nose ear hair neck cloth glasses hat earring".split(),
    (0, 1, 5, 10, 2, 2, 3, 3, 6, 6, 4, 4, 4, 7, 11, 12, 8, 8, 9),
)
GROUPS = {"celebamask": CELEBAMASK}  # of --group: (names, the class of each index in the files)


def add_labelled_options(p):
    """The options of labelled_pictures, beside --data, --size and --cache."""
    classes = p.add_mutually_exclusive_group()
    names = "names, a line each; default: classes.txt of the data, or numbers"
    classes.add_argument("--classes", metavar="FILE", help=names)
    joined = "join the 19 classes of CelebAMask-HQ's files to the paper's 13"
    classes.add_argument("--group", choices=list(GROUPS), help=joined)


class LabelledSet(ImageSet):
    """Pictures with label maps: self[i] is uint8 (size, size, 3) and (size, size), cut alike.

    images, maps: sources; pairs: {name of a picture: name of its map}; table: the class of each
    index that a map may hold, uint8; swap: see mirror_table. A pair with a file that cannot be read
    is reported and stood in for as in ImageSet. A map of another shape or with another index is a
    UserError.
    """

    def __init__(self, images, maps, pairs, prepare, size, table, swap, cache):
        super().__init__(images, prepare, cache=cache)
        self.maps, self.pairs, self.names = maps, pairs, list(pairs)
        self.size, self.table, self.swap = size, table, swap

    def __getitem__(self, i):
        both = self.array(i)
        return both[:, :, :3], both[:, :, 3]

    def read(self, name):
        img, other = self.source.image(name), self.pairs[name]
        label = Image.fromarray(self.table[indices_below(len(self.table), self.maps, other)])
        (W, H), (w, h) = img.size, label.size
        if 2 * abs(W * h - w * H) > max(W + H, w + h):  # more than rounding a scaled side explains
            raise UserError(
                f"{self.maps.path}: {other} is {w}x{h}, its picture {W}x{H}: they need the same"
                " shape."
            )
        label = square(self.size, False, label, Image.Resampling.NEAREST)
        return np.dstack([pixels(self.prepare(img)), label])

    def some(self, indices):
        """Pairs of some indices that can be read: uint8 (N, 3, H, W), (N, H, W)."""
        arrays = self.arrays(indices)
        images = stack([both[:, :, :3] for both in arrays])
        return images, torch.from_numpy(np.stack([both[:, :, 3] for both in arrays]))


def indices_below(K, source, name):
    """The label map (H, W) of a source; UserError if it holds K or more."""
    label = source.regions(name)
    if (value := label.max()) >= K:
        hint = "" if value < 255 else " Save masks of two classes as 0 and 1; give void pixels one."
        of = f"with {K} classes they go to {K - 1}"
        raise UserError(f"{source.path}: {name} holds label {value}; {of}.{hint}")
    return label


def has_labels(source):
    """Whether labelled_pictures may find label maps in a source."""
    part = subset(source, "train") if has_subset(source, "train") else source
    return has_subset(part, "labels")


def labelled_pictures(args, source, part="train"):
    """A LabelledSet of size x size pictures, the size, and the names of the classes.

    source: the folders images and labels (toy: TOY_LABELLED), or those in the folder `part` if it
    has one. A picture and its map have one path, but for the suffix. The names of the classes are
    those of --classes or --group, else of a file classes.txt in the source; without any there are
    as many classes as the maps hold, called 0, 1, ...; all maps are read for that.
    --size as in square_pictures. Raises UserError for what does not go together.
    """
    named = named_classes(args, source) or (source.is_toy and list(TOY_REGIONS))
    source = subset(source, part) if has_subset(source, part) else source
    images = maps = source
    if not source.is_toy:
        images, maps = (subset(source, f, "images and labels") for f in ("images", "labels"))
    size = square_size(args, images)
    pairs = paired(args, images, maps)
    if lossy := [name for name in pairs.values() if name.lower().endswith((".jpg", ".jpeg"))]:
        raise UserError(
            f"{maps.path}: {lossy[0]} is a JPEG, which changes labels: save maps as PNG."
        )
    if args.group:
        names, table = GROUPS[args.group]
        if named and len(named) != len(table):
            has = f"{len(named)} in {args.data} have names already"
            raise UserError(
                f"--group {args.group} joins {len(table)} classes, but {has}: leave it out."
            )
    else:
        names = named or numbered_classes(args, maps)
        table = range(len(names))
    if len(names) > 16:
        warning = "each costs memory and time, and the paper has 13; join some if you can"
        print(f"{len(names)} classes: {warning}.", file=sys.stderr)
    prepare = functools.partial(square, size, args.size is None)
    table, swap = np.array(table, np.uint8), mirror_table(names)
    return LabelledSet(images, maps, pairs, prepare, size, table, swap, args.cache), size, names


def mirror_table(names):
    """The class in a mirrored picture of each index up to NO_CLASS: "left eye" and "right eye", or
    l_eye and r_eye, change places. uint8."""
    pairs = [("l", "r"), ("L", "R"), ("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")]
    other = dict(pairs) | {right: left for left, right in pairs}
    table = np.arange(NO_CLASS + 1, dtype=np.uint8)
    for k, name in enumerate(names):
        name = re.sub("[A-Za-z]+", lambda m: other.get(m[0], m[0]), name)
        table[k] = names.index(name) if name in names else k
    return table


def paired(args, images, maps):
    """{name in images: name in maps}, of equal paths without the suffix."""
    found = []
    for source in (images, maps):
        names = {}
        for name in source.names:
            stem = name.rpartition(".")[0]
            if stem in names:
                raise UserError(f"{source.path}: {names[stem]} and {name} have one name.")
            names[stem] = name
        found.append(names)
    alone = []
    for (a, b), what in zip((found, found[::-1]), ("pictures", "label maps"), strict=True):
        if missing := sorted(a.keys() - b.keys()):
            alone.append(f"{len(missing)} {what} without a partner, {a[missing[0]]} for one")
    if alone:
        raise UserError(f"--data {args.data}: {'; '.join(alone)}. Equal names make a pair.")
    return {name: found[1][stem] for stem, name in found[0].items()}


def named_classes(args, source):
    """The names in the file --classes, else in classes.txt of the source, or None."""
    where = f"--classes {args.classes}"
    try:
        if args.classes is not None:
            text = Path(args.classes).read_bytes()
        elif found := next(filter(source.has, _places(source, "classes.txt")), None):
            where, text = f"{source.path}: {found}", source.read(found)
        else:
            return None
        names = text.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError, BadImage) as e:
        reason = getattr(e, "strerror", None) or getattr(e, "reason", None)
        reason = "not a text file" if isinstance(e, UnicodeDecodeError) else reason
        raise UserError(f"{where}: {reason}.") from None
    names = [name.strip() for name in names if name.strip()]
    if not 2 <= len(names) <= NO_CLASS or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        needed = f"2 to {NO_CLASS} different names are needed, a line each"
        raise UserError(
            f"{where}: {len(names)} lines; {needed}{'; twice: ' * bool(twice)}{', '.join(twice)}."
        )
    return names


def numbered_classes(args, maps):
    """The names 0, 1, ... up to the largest label of all maps that can be read."""

    def largest(k):
        try:
            return int(indices_below(NO_CLASS, maps, maps.names[k]).max())
        except BadImage:
            return 0  # the loader will name it

    last = max(prefetch(largest, 0, len(maps.names), 4))
    if last == 0:
        raise UserError(f"--data {args.data}: all labels are 0: there is one class only.")
    return [str(k) for k in range(last + 1)]


# CelebAMask-HQ has a mask for each part of a face. Of parts that overlap the later one wins: eyes
# and brows show through glasses, of which the frame and the rest of the lenses stay.
CELEBAMASK_PARTS = {
    "skin": "face", "eye_g": "glasses", "l_eye": "eye", "r_eye": "eye", "l_brow": "eyebrow",
    "r_brow": "eyebrow", "mouth": "mouth", "l_lip": "mouth", "u_lip": "mouth", "nose": "nose",
    "hair": "hair", "l_ear": "ear", "r_ear": "ear", "neck": "neck", "neck_l": "neck",
    "cloth": "cloth", "hat": "hat", "ear_r": "earring",
}  # fmt: skip
CELEBAMASK_TRAIN = 28_000  # of its 30,000 pictures, by number; the others are for validation


def prepare_celebamask(args):
    """CelebAMask-HQ as it is published, --input (a folder or a .zip), as a set with label maps:
    --out/{train,val}/{images,labels} of --size pixels and classes.txt, the names of 13 classes.

    Pictures are resized by Lanczos and saved as JPEG, since that is what they were, of quality 95
    with colours of full resolution: a third of the bytes of PNG. Maps are resized to the nearest
    and saved as PNG. What is there already is not made again. Raises UserError for what is missing,
    damaged or of another shape.
    """
    size, out, path = args.size, Path(args.out), Path(args.input)
    if size < 8 or size & (size - 1):
        raise UserError(f"--size {size}: a power of two from 8 on is needed.")
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".zip"):
        raise UserError(f"--input {path}: name the folder or the .zip of CelebAMask-HQ.")
    source = Folder(path) if path.is_dir() else Zip(path)
    folders = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
    photos, masks = (subset(source, folder, " and ".join(folders)) for folder in folders)
    parts = celebamask_parts(photos, masks)
    numbers = sorted(parts)

    def make(k):
        number = numbers[k]
        part = out / ("train" if number < CELEBAMASK_TRAIN else "val")
        files = part / "images" / f"{number}.jpg", part / "labels" / f"{number}.png"
        if all(file.exists() for file in files):
            side = decode_labels(files[1], files[1]).shape[0]
            if side != size:
                raise UserError(f"--out {out} has pictures of {side}x{side}; go elsewhere.")
            return False
        image, label = photos.image(f"{number}.jpg"), merged_parts(masks, parts[number])
        (W, H), (w, h) = image.size, label.size
        if W * h != w * H:
            raise UserError(f"{masks.path}: parts of {number} are {w}x{h}, the picture {W}x{H}.")
        with write_whole(files[0]) as f:
            square(size, False, image).save(f, "JPEG", quality=95, subsampling=0)
        save_png(files[1], square(size, False, label, Image.Resampling.NEAREST))
        return True

    made = 0
    try:
        for k, new in enumerate(prefetch(make, 0, len(numbers), args.workers), 1):
            made += new
            if k % 1000 == 0:
                print(f"{k}/{len(numbers)}", flush=True)
    except BadImage as e:
        raise UserError(f"{e}. Get that file anew and go on: what is done stays.") from None
    with write_whole(out / "classes.txt") as f:
        f.write("".join(f"{name}\n" for name in CELEBAMASK[0]).encode())
    train = sum(number < CELEBAMASK_TRAIN for number in numbers)
    print(f"{train} pairs to train with and {len(numbers) - train} others are in {out}, {made} new")


def celebamask_parts(photos, masks):
    """{number of a picture: {part: name of its mask}} of two sources; UserError if they differ."""
    parts = {}
    for name in masks.names:
        found = re.fullmatch(r"\d+/(\d{5,9})_(\w+)\.png", name)
        number, part = (int(found[1]), found[2]) if found else (0, None)
        if part not in CELEBAMASK_PARTS or name != f"{number // 2000}/{number:05}_{part}.png":
            known = ", ".join(CELEBAMASK_PARTS)
            raise UserError(f"{masks.path}: {name} is not as 0/00012_skin.png. Parts: {known}.")
        parts.setdefault(f"{number}.jpg", {})[part] = name
    for (names, what), others in (
        ((photos.names, "pictures without masks"), parts),
        ((parts, "pictures of masks are missing"), set(photos.names)),
    ):
        if alone := [name for name in names if name not in others]:
            listed = ", ".join(alone[:5]) + ", ..." * (len(alone) > 5)
            raise UserError(f"{photos.path}: {len(alone)} {what}: {listed}. Unpack all of the set.")
    return {int(name.removesuffix(".jpg")): found for name, found in parts.items()}


def merged_parts(masks, names):
    """A label map, PIL picture of mode L, of masks {part: name}, white where the part is."""
    label = None
    for part, title in CELEBAMASK_PARTS.items():
        if part in names:
            mask = np.asarray(masks.image(names[part], "L"))
            if label is None:
                label, first = np.zeros_like(mask), names[part]
            if mask.shape != label.shape:
                raise UserError(f"{masks.path}: {names[part]} and {first} differ in size.")
            label[mask > 127] = CELEBAMASK[0].index(title)
    return Image.fromarray(label)


def augment_pair(image, label, rng, flip=True, affine=True, swap=None):
    """A pair of a LabelledSet, changed at random, both alike: the official --aug.

    flip: mirrored half of the time; swap: see mirror_table. affine: half of the time scaled by 0.8
    to 1.2, turned by up to 15 degrees and shifted by up to a tenth of the side, each drawn evenly;
    what moves in from outside is black and NO_CLASS, which one_hot_seg makes -1 in all planes.
    """
    if flip and rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
        label = label if swap is None else swap[label]
    if not affine or rng.random() >= 0.5:
        return image, label
    H, W = label.shape
    scale, angle = rng.uniform(0.8, 1.2), math.radians(rng.uniform(-15, 15))
    centre = np.array([W / 2, H / 2])
    moved = centre + rng.uniform(-0.1, 0.1, 2) * (W, H)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    back = np.array([[cos, sin], [-sin, cos]])  # from places in the result to those in the original
    a, b = np.column_stack([back, centre - back @ moved]).tolist()
    box = (W, H), Image.Transform.AFFINE, (*a, *b)
    image = Image.fromarray(image).transform(*box, Image.Resampling.BILINEAR)
    label = Image.fromarray(label).transform(*box, Image.Resampling.NEAREST, fillcolor=NO_CLASS)
    return np.array(image), np.array(label)


def one_hot_seg(labels, K, order=torch.channels_last):
    """Labels (N, H, W), integers, -> floats (N, K, H, W) in a memory order: 1 in the plane of the
    class, -1 in the others; -1 in all where the label is K or more, as NO_CLASS."""
    classes = torch.arange(K, device=labels.device)
    seg = torch.where(labels[..., None] == classes, 1.0, -1.0).movedim(3, 1)
    return seg.contiguous(memory_format=order)


def split(n, subset, seed):
    """Indices of `subset` of n pictures, and of the others, both sorted; subset None: all of them.
    Which ones is a matter of the seed, as in the official code."""
    if subset is None:
        return np.arange(n), np.arange(0)
    if subset > n:
        raise UserError(f"--subset {subset}: there are {n} pictures.")
    order = np.random.RandomState(seed % 2**32).permutation(n)
    return np.sort(order[:subset]), np.sort(order[subset:])


def one_hot(args, source, classes=0):
    """Labels of a source, float32 (N, c_dim): classes as one-hot vectors, of so many at least, or
    vectors as they are."""
    labels = source.labels()
    if labels is None:
        raise UserError(f"--data {args.data} has no labels; a dataset.json holds them.")
    values = np.array([labels[name] for name in source.names])
    if values.ndim == 1:
        classes = max(classes, values.max() + 1)
        return F.one_hot(torch.from_numpy(values), classes).float().numpy()
    return values.astype(np.float32)


def crop_and_flip(pixels, crop, flip, rng):
    """A random crop (unless None) and, half of the time, the mirror image of pixels (H, W, C)."""
    if crop is not None:
        H, W = pixels.shape[:2]
        if min(H, W) < crop:
            raise UserError(f"a {W}x{H} picture is smaller than --crop-size {crop}. Lower it.")
        y, x = rng.integers(H - crop + 1), rng.integers(W - crop + 1)
        pixels = pixels[y : y + crop, x : x + crop]
    return pixels[:, ::-1] if flip and rng.random() < 0.5 else pixels


def at_most(side, img):
    """A PIL picture whose shorter side is reduced to `side` if it is longer."""
    if min(img.size) <= side:
        return img
    return ImageOps.cover(img, (side, side), Image.Resampling.BILINEAR)


def squeezed(size, img, resample=Image.Resampling.BILINEAR):
    """The whole of a PIL picture as size x size pixels, whatever its sides are."""
    return img.resize((size, size), resample)


def random_box(W, H, rng):
    """(left, top, right, bottom) of a random part of a W x H picture, 80 to 100% of its area and
    0.9 to 1.1 times as wide as high; where ten tries do not fit, the largest in the middle."""
    for _ in range(10):
        area, ratio = rng.uniform(0.8, 1) * W * H, math.exp(rng.uniform(*np.log([0.9, 1.1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= W and 0 < h <= H:
            x, y = int(rng.integers(W - w + 1)), int(rng.integers(H - h + 1))
            return x, y, x + w, y + h
    w, h = min(W, round(H * 1.1)), min(H, round(W / 0.9))
    x, y = (W - w) // 2, (H - h) // 2
    return x, y, x + w, y + h


def crop_and_squeeze(pixels, size, crop_prob, flip, rng):
    """With probability crop_prob a random part, else the whole of pixels (H, W, C), as size x size
    pixels and, half of the time, mirrored."""
    H, W, C = pixels.shape
    img = Image.fromarray(pixels[:, :, 0] if C == 1 else pixels)
    if rng.random() < crop_prob:
        img = img.crop(random_box(W, H, rng))
    return crop_and_flip(np.atleast_3d(squeezed(size, img)), None, flip, rng)


def to_float(images, device):
    """uint8 (N, C, H, W) -> float32 in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def to_uint8(images):
    """Floats in [-1, 1] -> uint8, each to the nearest of the 256 values."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=4)
def shuffled(n, seed, epoch):
    """The order of n items in an epoch."""
    return np.random.default_rng([1, seed, epoch]).permutation(n)


def item_rng(seed, epoch, i):
    """The generator of item i's random choices in an epoch, whoever loads it."""
    return np.random.default_rng([2, seed, epoch, i])


def prefetch(make, start, stop, workers):
    """Yields make(start), ..., make(stop - 1) in order, made by `workers` threads ahead of time."""
    if workers == 0:
        yield from map(make, range(start, stop))
        return
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        ahead = collections.deque()
        for k in range(start, stop):
            while len(ahead) < 2 * workers and k + len(ahead) < stop:
                ahead.append(pool.submit(make, k + len(ahead)))
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# =============================================================================
# A run
# =============================================================================


def last_checkpoint(folder):
    """Of the run in a folder: checkpoint.pt, else the last one kept; None without either."""
    files = [Path(folder, "checkpoint.pt"), *sorted(Path(folder).glob("checkpoint-*.pt"))[::-1]]
    return next((path for path in files if path.exists()), None)


def first_weights(args):
    """--checkpoint, unless that is past: None where the run to resume has a checkpoint already."""
    return None if args.resume and last_checkpoint(args.resume) else args.checkpoint


def world_size():
    """The number of processes, of torchrun or 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def side_stream(device):
    """The stream of all first calls and recordings: what is made once for a stream is there."""
    return torch.cuda.Stream(device)


def graph(function, device, generators=(), memory=None):
    """function as a CUDA graph, on a GPU; on any other device, or where GAN_GRAPHS=off is in the
    environment, function itself.

    The first call runs as written: in it cuDNN chooses algorithms, and optimisers make their state.
    The second is recorded, and from there on a call starts the recording: one launch instead of
    thousands, which small networks spend most of their time with.

    A recording repeats the same work on the same memory. What function does may depend on numbers
    in tensors only, none of which it reads; tensors that it changes must be changed in place. Of
    its arguments, tensors are those of the recording from there on: what later calls pass is copied
    into them. Any other argument must stay the same, and hold no tensors that do not. Results,
    tensors without gradients in any nest of dicts and lists, are overwritten by the next call.
    generators: that function draws from, beside torch's own; memory: of
    torch.cuda.graph_pool_handle(), to share with graphs that never run at the same time.

    Raises ValueError where an argument has changed that cannot; UserError if CUDA records nothing.
    Source: Ng et al. 2021, "Accelerating PyTorch with CUDA Graphs" (pytorch.org).
    """
    if device.type != "cuda" or os.environ.get("GAN_GRAPHS") == "off":
        return function
    return Graph(function, device, generators, memory)


class Graph:
    """See `graph`."""

    def __init__(self, function, device, generators, memory):
        self.function, self.stream = function, side_stream(device)
        self.record = functools.partial(record, self.stream, generators, memory)
        self.called, self.replay = False, None

    def __call__(self, *args):
        if not self.called:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.result = self.function(*args)
            torch.cuda.current_stream().wait_stream(self.stream)
            self.called = True
            return self.result
        if self.replay is None:
            self.args = args
            self.replay = self.record(lambda: overwrite(self.result, self.function(*args)))
        for held, given in zip(self.args, args, strict=True):
            if held is given:
                continue
            tensors = isinstance(held, torch.Tensor) and isinstance(given, torch.Tensor)
            if tensors and (held.shape, held.dtype) == (given.shape, given.dtype):
                held.copy_(given)
            elif isinstance(held, torch.Tensor) or held != given:
                raise ValueError(f"a CUDA graph cannot change {held!r} into {given!r}")
        self.replay()
        return self.result


@torch.no_grad()
def overwrite(held, new):
    """The tensors in nested dicts, lists and tuples with those of another, of the same shapes."""
    if isinstance(held, torch.Tensor):
        held.copy_(new)
    elif isinstance(held, dict):
        overwrite(list(held.values()), list(new.values()))
    else:
        for a, b in zip(held, new, strict=True):
            overwrite(a, b)


def record(stream, generators, memory, function):
    """What function() launches on a GPU, none of which runs now, as a function that starts it.
    Raises UserError where that fails, which leaves torch unusable: the process should end."""
    recording = torch.cuda.CUDAGraph()
    for generator in generators:
        recording.register_generator_state(generator)
    try:
        # thread_local: threads that load pictures may pin memory meanwhile.
        with torch.cuda.graph(recording, memory, stream, capture_error_mode="thread_local"):
            function()
    except RuntimeError as e:
        e = e.__context__ or e  # a recording that broke fails once more at its end
        if isinstance(e, torch.OutOfMemoryError):
            raise e from None
        problem = str(e).splitlines()[0]
        raise UserError(f"no CUDA graph could be recorded ({problem}): set GAN_GRAPHS=off.") from e
    return recording.replay


class Run:
    """What a training run needs beside its paper: device, processes, folder, log, checkpoints.

    Run(model, args, script) reads RANK and WORLD_SIZE of torchrun and seeds torch; restore() makes
    the run folder, <out>/<model>-<data>-<nnn>, so that mistakes found before it leave nothing.
    own_half: the networks know where to use half precision: no autocast, no loss scaling, but
    gradients that are not finite are mended. The default on CUDA is then fp16+tf32: convolutions
    that are not in float16 round their inputs to as many bits, TF32; dense layers round nothing.
    precision: what is the default on CUDA instead; bf16 only where the GPU knows it, else tf32.
    """

    log_every = 100  # images between lines of log.jsonl
    fixed = ("batch", "checkpoint")  # options that a resumed run may not change
    refreshing = False  # whether a terminal shows a line that is not ended
    records = True  # phases as CUDA graphs; a loop whose pictures differ in size puts False here

    def __init__(self, model, args, script, own_half=False, precision=None):
        self.model, self.args, self.script = model, args, script
        self.rank, self.world = int(os.environ.get("RANK", 0)), world_size()
        if args.batch % self.world:
            raise UserError(f"--batch {args.batch} cannot be split over {self.world} processes.")
        self.device = pick_device(args.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        if self.world > 1:
            # Optimisers import this, and its functions keep the processes' group that there is by
            # then, with its threads, which abort now and then as Python ends. So it comes before.
            importlib.import_module("torch.distributed.nn")
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            patience = datetime.timedelta(hours=2)  # while rank 0 computes scores
            dist.init_process_group(backend, timeout=patience)
        best = precision or ("fp16+tf32" if own_half else "tf32")
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            if best == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
                best = "tf32"
        self.precision = args.precision or (best if self.device.type == "cuda" else "fp32")
        self.own_half = own_half
        kinds = {"fp16": "float16", "bf16": "bfloat16"}
        self.half = kinds.get(self.precision.removesuffix("+tf32"))  # None: no half precision
        if own_half and self.device.type == "cpu" and self.half:
            raise UserError(f"--precision {args.precision} needs a GPU; here, leave it out.")
        rounded = "tf32" in self.precision or (self.half and not own_half)
        torch.backends.cudnn.conv.fp32_precision = "tf32" if rounded else "ieee"
        rounded = rounded and "+" not in self.precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if rounded else "ieee"
        # The memory order of images and weights. Without tensor cores cuDNN is fast in NCHW only,
        # and its fastest algorithms are often not those it ranks first: it tries all of them (0).
        plain = self.precision == "fp32" and self.device.type == "cuda"
        self.order = torch.contiguous_format if plain else torch.channels_last
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark_limit = 0 if plain else 10
        scaled = self.precision == "fp16" and not own_half
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.copies, self.ahead = None, collections.deque()
        self.forget_graphs()

        self.steps_done, self.elapsed, self.stopped, self.next_line = 0, 0.0, False, 0.0
        self.sums = {}
        self.folder, self.tensorboard = None, None
        self.claim = contextlib.nullcontext()  # on the folder, of rank 0

    @property
    def weights(self):
        """The file that the networks start from: of the run to resume, or --checkpoint; or None."""
        return (self.args.resume and last_checkpoint(self.args.resume)) or self.args.checkpoint

    def say(self, text):
        if self.rank == 0:
            end_status_line()
            print(text, flush=True)

    # ---- training ------------------------------------------------------------------------------

    def batches(self, item, start, stop):
        """Yields (step, tensors): this rank's share of batches start .. stop - 1.

        item(n) -> uint8 arrays (H, W, C) of pictures, others of labels, as vectors or maps, a pure
        function of n; batch k is made of items images(k) ... The tensors are on the device:
        pictures as floats (batch / world, C, H, W) in [-1, 1], labels (batch / world, ...) as they
        are.
        """

        def make(k):
            share = (self.images(k + 1) - self.images(k)) // self.world
            first = self.images(k) + self.rank * share
            columns = zip(*(item(n) for n in range(first, first + share)), strict=True)
            tensors = [
                stack(column) if column[0].ndim == 3 else torch.from_numpy(np.stack(column))
                for column in columns
            ]
            return [t.pin_memory() for t in tensors] if self.device.type == "cuda" else tensors

        self.total, self.began, self.first = stop, time.monotonic(), start
        if start >= stop:
            length = next(n for n in ("epochs", "iters", "kimg") if n in vars(self.args))
            self.say(f"this run is finished: a larger --{length} makes it go on")
        elif self.rank == 0 and self.args.resume:
            write_args(self.folder, self.model, self.args)
        with self.stop_signals(), self.claim:
            for k, images in enumerate(prefetch(make, start, stop, self.args.workers), start):
                self.steps_done = k + 1
                yield k, self.on_device(images)
                if self.stopped:
                    self.save()
                    done = f"stopped at step {self.steps_done}"
                    raise KeyboardInterrupt(f"{done}; continue with --resume {self.folder}")

    def on_device(self, batch):
        """Floats on the device of uint8 images (N, C, H, W); labels as they are. A GPU copies them
        while it is still busy with the step before, on a stream of their own. Then this waits until
        it is two steps behind at most: a loop that only starts graphs would soon be far ahead, and
        fill its memory with batches."""
        device = self.device

        def moved(x):
            if x.ndim < 4:
                return x.to(device, non_blocking=True)
            return to_float(x, device).contiguous(memory_format=self.order)

        if device.type != "cuda":
            return [moved(x) for x in batch]
        now, self.copies = torch.cuda.current_stream(), self.copies or torch.cuda.Stream(device)
        with torch.cuda.stream(self.copies):
            batch = [moved(x) for x in batch]
        now.wait_stream(self.copies)
        for x in batch:
            x.record_stream(now)
        self.ahead.append(now.record_event(torch.cuda.Event(blocking=True)))
        if len(self.ahead) > 2:
            self.ahead.popleft().synchronize()
        return batch

    def images(self, step):
        """How many images come before a step; a loop whose batches differ puts its own here."""
        return step * self.args.batch

    @contextlib.contextmanager
    def stop_signals(self):
        """Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint."""
        signals = (signal.SIGINT, signal.SIGTERM) if self.world == 1 else ()
        try:
            before = {s: signal.signal(s, self.stop) for s in signals}
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def stop(self, number, frame):
        if self.stopped:  # asked twice: at once
            raise KeyboardInterrupt
        self.stopped = True

    def adam(self, nets, lr, betas, eps=1e-8, weight_decay=0.0, capturable=True):
        """One Adam over the parameters of all `nets`; its rate is a tensor (see set_lr).
        capturable: its other numbers stay the same, so that a CUDA graph can hold its step."""
        # torch warns of steps outside of graphs, where that is slower: the first few are.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable")
        params = [p for net in nets for p in net.parameters()]
        lr, how = torch.tensor(lr, device=self.device), dict(fused=True, capturable=capturable)
        return torch.optim.Adam(params, lr, betas, eps, weight_decay, **how)

    def set_lr(self, optimizers, lr):
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"].fill_(lr)

    def autocast(self):
        """The context of the networks' forward passes; does nothing in fp32 and tf32."""
        half = getattr(torch, self.half) if self.half else None
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def rand(self, n, *shape, shared=False):
        """(n, *shape) uniform in [0, 1): this rank's part of what one process would draw for all,
        or, shared, the same on all."""
        times = 1 if shared else self.world
        draws = torch.rand(n * times, *shape, generator=self.generator, device=self.device)
        return draws if shared else draws[self.rank * n : (self.rank + 1) * n]

    def randn(self, n, *shape):
        """(n, *shape) ~ N(0, 1): this rank's part of what one process would draw for all."""
        draws = torch.randn(n * self.world, *shape, generator=self.generator, device=self.device)
        return draws[self.rank * n : (self.rank + 1) * n]

    def mean(self, x):
        """The mean of x over all ranks, differentiable in each rank's x."""
        return MeanOverRanks.apply(x) if self.world > 1 else x

    def maximum(self, x):
        """The largest x of all ranks, element by element; no gradient."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def graph(self, phase, *optimizers, key=None):
        """phase, and a step of each optimiser with the gradients that it left, as one function of
        phase's arguments, with its result. On a single GPU it becomes a CUDA graph, but for steps
        of optimisers that are not capturable, where `records` says no, and with loss scaling: see
        `graph` for what phase may do. Made once for the same phase, key and optimisers."""
        key = (phase, key, *optimizers)
        if key not in self.graphs:

            def phase_and_gradients(*args):
                return phase(*args), self.gradients(optimizers)

            def phase_and_step(*args):
                result, gradients = phase_and_gradients(*args)
                if optimizers:
                    self.step_with(gradients, optimizers)
                return result

            if self.records and self.world == 1 and not self.scaler.is_enabled():
                how = self.device, [self.generator], self.memory
                if all(opt.defaults["capturable"] for opt in optimizers):
                    phase_and_step = graph(phase_and_step, *how)
                else:
                    phase_and_gradients = graph(phase_and_gradients, *how)
            self.graphs[key] = phase_and_step
        return self.graphs[key]

    def forget_graphs(self):
        """Before phases go on with networks of another shape."""
        self.graphs = {}
        self.memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def backward(self, loss):
        """Adds gradients of the loss."""
        self.scaler.scale(loss).backward()

    def trained(self, optimizers):
        """The parameters of the optimisers that require gradients."""
        params = (p for opt in optimizers for group in opt.param_groups for p in group["params"])
        return [p for p in params if p.requires_grad]

    def gradients(self, optimizers):
        """Those of `trained`, as steps take them: means over all ranks. A parameter that has none
        has gradient 0: its moments move with those of the others."""
        params = self.trained(optimizers)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        if self.world > 1 and grads:
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            flat /= self.world
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))
        if self.own_half:
            for g in grads:  # an overflow in half precision must not end the run
                torch.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5, out=g)
        return grads

    def step_with(self, gradients, optimizers):
        """One step of each with such gradients, which are then gone."""
        for p, grad in zip(self.trained(optimizers), gradients, strict=True):
            p.grad = grad
        for opt in optimizers:
            self.scaler.step(opt)
        self.scaler.update()
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # ---- the log -------------------------------------------------------------------------------

    def due(self, every):
        """Whether this step is the first one past a multiple of `every` images."""
        return self.images(self.steps_done) // every > self.images(self.steps_done - 1) // every

    def log(self, losses, **where):
        """Adds {name: 0-d tensor} to the means of the interval; `where` goes into the log as is.

        Where networks compute in half precision a regularizer may overflow now and then, and its
        gradients are mended: such a value is left out of the mean.
        """
        losses = {name if "/" in name else f"loss/{name}": loss for name, loss in losses.items()}
        mended = self.own_half and self.half
        for of_regularizers in (False, True):
            names = tuple(name for name in losses if name.startswith("reg/") == of_regularizers)
            if names:  # few launches for all of them: this is done in every step
                values = torch.stack([losses[name].detach() for name in names]).float()[:, None]
                rows = F.pad(values, (0, 1), value=1.0)  # sum, count
                if of_regularizers and mended:
                    rows = torch.where(values.isfinite(), rows, 0)
                self.sums[names] = self.sums.get(names, 0) + rows
        self.where = where
        if self.due(self.log_every):
            self.flush()

    def flush(self):
        """Writes the means over the interval and all processes; one not finite stops the run."""
        if not self.sums:
            return
        rows = torch.cat(list(self.sums.values())).double()
        if self.world > 1:
            dist.all_reduce(rows)
        names, totals = [name for names in self.sums for name in names], {}
        for name, row in zip(names, rows.cpu(), strict=True):  # steps differ in what they compute
            totals[name] = totals.get(name, 0) + row
        means = {name: (row[0] / row[1]).item() for name, row in totals.items() if row[1]}
        self.sums = {}
        for name, value in means.items():
            if not math.isfinite(value):
                self.diverged(f"{name} became {value}")
        if self.rank == 0:
            self.write_log(means)

    def diverged(self, what):
        last = (self.folder and last_checkpoint(self.folder)) or "none yet"
        raise UserError(
            f"{what} by step {self.steps_done}; last good checkpoint {last}. Lower the learning"
            " rate, or use --precision fp32."
        )

    def write_log(self, means):
        done, seconds = self.steps_done, time.monotonic() - self.began
        speed = (done - self.first) / max(seconds, 1e-9)
        images = (self.images(done) - self.images(self.first)) / max(seconds, 1e-9)
        gb = memory_gb(self.device)
        line = {
            "step": done,
            "images": self.images(done),
            **self.where,
            "sec": round(self.elapsed + seconds, 1),
            "mem_gb": round(gb, 2),
            **means,
        }
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        if self.tensorboard:
            for name, value in means.items():
                self.tensorboard.add_scalar(name, value, done)
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - done) / speed))
        days = int((self.total - done) / speed // 86400)
        losses = " ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in means.items())
        where = " ".join(f"{k} {v:g}" for k, v in self.where.items())
        status = (
            f"{self.model} {Path(self.args.data).stem} | {where} {done}/{self.total}"
            f" {done / self.total:.0%} | left {f'{days}d ' * (days > 0)}{left}"
            f" | {images:.1f} img/s {gb:.1f} GB | {losses}"
        )
        if sys.stdout.isatty():
            print(f"\r\033[K{status[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            Run.refreshing = True
        elif done == self.total or seconds >= self.next_line:
            self.next_line = seconds + 10  # a line each ten seconds where nothing can be refreshed
            print(status, flush=True)

    # ---- checkpoints ---------------------------------------------------------------------------

    def restore(self, nets, opts, pools, names):
        """Makes the run folder; on --resume loads its checkpoint. Returns the steps already done.

        nets, opts, pools: {name: object with state_dict()}; pools are each rank's own; names: of
        the pictures to learn from, whose hash checkpoints hold.
        """
        self.nets, self.opts, self.pools = nets, opts, pools
        self.names = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
        torch.manual_seed(self.args.seed + self.rank)  # weights are made; dropout differs by rank
        path = self.args.resume and last_checkpoint(self.args.resume)
        if path:  # None: it was stopped before the first one
            state = load_checkpoint(path, self.model)
            if "args" not in state:
                raise UserError(f"--resume: {path} holds no run, only networks.")
            self.load_state(state)
        if self.rank == 0:
            self.folder = make_run_folder(self.model, self.args, self.script)
            self.claim = claimed(self.folder)
            for part in self.folder.glob("checkpoint*.part"):  # a run was killed as it wrote this
                part.unlink()
            drop_later_lines(self.folder / "log.jsonl", self.steps_done)
            drop_later_lines(self.folder / "metrics.jsonl", self.steps_done)
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(self.folder, purge_step=self.steps_done + 1)
        begins = f", resumed at step {self.steps_done}" if path else ", with no checkpoint: anew"
        resumed = begins if self.args.resume else ""
        self.say(f"run folder {self.folder}, on {self.device} in {self.precision}{resumed}")
        return self.steps_done

    def load_state(self, state):
        """The reverse of save()."""
        for name in self.fixed:
            before, now = state["args"][name], plain(vars(self.args))[name]
            if before != now:
                option = name.replace("_", "-")
                before = "left out" if before is None else before
                raise UserError(f"--resume: --{option} was {before}, {now} would differ.")
        try:
            for name, net in self.nets.items():
                net.load_state_dict(state["nets"][name])
            for name, opt in self.opts.items():
                own = ("lr", "betas", "eps", "capturable", "fused")
                now = [{k: g[k] for k in own} for g in opt.param_groups]
                opt.load_state_dict(state["opts"][name])
                for p, held in opt.state.items():  # laid out as p: fused steps pair them by place
                    for key in ("exp_avg", "exp_avg_sq"):
                        held[key] = torch.empty_like(p).copy_(held[key])
                for group, options in zip(opt.param_groups, now, strict=True):
                    group |= options  # those of the command line, which may have changed
        except (KeyError, RuntimeError, ValueError) as e:
            problem = str(e).splitlines()[-1].strip()[:150]
            for name, config in state["config"].items():
                now = self.nets[name].config if name in self.nets else config
                changed = [k for k in config if now.get(k, config[k]) != config[k]]
                if changed := [k for k in changed if k != "lod"]:  # which moves as StyleGAN grows
                    problem = f"{changed[0]} was {config[changed[0]]}, not {now[changed[0]]}."
            raise UserError(f"--resume {self.args.resume}: other networks now: {problem}") from None
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.steps_done, self.elapsed = state["step"], state["sec"]
        seen, now = state.get("images"), self.images(self.steps_done)
        if seen is not None and seen != now:  # batches that depend on the number of processes
            raise UserError(
                f"--resume: after {self.steps_done} steps the run had seen {seen} images, here it"
                f" would be {now}: go on with {len(state['ranks'])} processes, as before."
            )
        before, now = state["args"], plain(vars(self.args))
        for name in sorted(set(before) & set(now) - {"resume", "out", "device", "workers"}):
            if before[name] != now[name]:
                self.say(f"--{name.replace('_', '-')} was {before[name]}, is {now[name]} from here")
        if before["data"] == now["data"] and state.get("names", self.names) != self.names:
            self.say(
                f"--data {now['data']} holds other pictures than before: batches differ from here"
            )
        if len(state["ranks"]) == self.world and state["device"] == self.device.type:
            self.load_rank_state(state["ranks"][self.rank])
        else:
            for name, pool in self.pools.items():
                if isinstance(pool, Held):  # equal on all ranks
                    pool.load_state_dict(state["ranks"][0]["pools"][name])
            before = f"{len(state['ranks'])} processes on {state['device']}"
            self.say(f"{before} before: pools and random draws start anew")

    def rank_state(self):
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        return {
            "pools": {name: moved(pool.state_dict(), "cpu") for name, pool in self.pools.items()},
            "rng": [torch.get_rng_state(), self.generator.get_state(), cuda],
        }

    def load_rank_state(self, state):
        for name, pool in self.pools.items():
            pool.load_state_dict(moved(state["pools"][name], self.device))
        cpu, generator, cuda = state["rng"]
        torch.set_rng_state(cpu)
        self.generator.set_state(generator)
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda)

    def save(self, keep=False):
        """Writes checkpoint.pt, with `keep` also checkpoint-<step>.pt. Call on all ranks."""
        self.flush()
        for name, net in self.nets.items():  # losses are those of the weights before this step
            if not all(p.isfinite().all() for p in net.parameters()):
                self.diverged(f"{name} is not finite")
        mine, ranks = self.rank_state(), [None] * self.world
        if self.world > 1:
            dist.gather_object(mine, ranks if self.rank == 0 else None)
        if self.rank > 0:
            return
        state = {
            "model": self.model,
            "format": 1,
            "config": {name: net.config for name, net in self.nets.items()},
            "args": plain(vars(self.args)),
            "step": self.steps_done,
            "images": self.images(self.steps_done),
            "device": self.device.type,
            "names": self.names,
            "sec": self.elapsed + time.monotonic() - self.began,
            "nets": {name: net.state_dict() for name, net in self.nets.items()},
            "opts": {name: opt.state_dict() for name, opt in self.opts.items()},
            "scaler": self.scaler.state_dict(),
            "ranks": ranks if self.world > 1 else [mine],
        }
        # The kept one first: a run killed in between goes on from before, and makes it again.
        for name in (*[f"checkpoint-{self.steps_done:07d}.pt"] * keep, "checkpoint.pt"):
            with write_whole(self.folder / name) as f:
                torch.save(state, f)

    def save_picture(self, picture, name=None, rows=()):
        """samples/<step>.png, or <name>.png: a PIL picture, or a sheet of {caption: images} and
        captions of rows."""
        path = self.folder and self.folder / "samples" / f"{name or f'{self.steps_done:07d}'}.png"
        if self.rank == 0 and isinstance(picture, dict):
            save_sheet(path, picture, rows)
        elif self.rank == 0:
            save_png(path, picture)

    def save_scores(self, scores):
        """One line of metrics.jsonl, in the place of an earlier one of this step."""
        if self.rank == 0:
            drop_later_lines(self.folder / "metrics.jsonl", self.steps_done - 1)
            with open(self.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps({"step": self.steps_done, **scores}) + "\n")
            if self.tensorboard:
                numbers = scores | scores.get("fid", {})
                for name, value in numbers.items():
                    if isinstance(value, float):
                        self.tensorboard.add_scalar(name, value, self.steps_done)


class MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over all ranks; its gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad):
        return MeanOverRanks.apply(grad)


class Held:
    """Tensors that a checkpoint holds, that training changes in place, equal on all ranks."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, state):
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


def write_args(folder, model, args):
    """args.json of a run folder: the options of the run."""
    write_json(folder / "args.json", {"model": model} | plain(vars(args)))


def make_run_folder(model, args, script):
    """The folder of this run, with args.json and a copy of the script."""
    if args.resume:
        return Path(args.resume)
    stem = f"{model}-{Path(args.data).stem}"
    for n in range(1000):
        folder = Path(args.out, f"{stem}-{n:03d}")
        try:
            folder.mkdir(parents=True)
        except OSError as e:
            if os.path.lexists(folder):
                continue
            raise UserError(f"--out {args.out}: {e.strerror}; name another folder.") from None
        write_args(folder, model, args)
        shutil.copy(script, folder)
        return folder
    raise UserError(
        f"--out {args.out}: 1000 runs of {stem} are there already; name another folder."
    )


def claimed(folder):
    """An ExitStack that holds a run folder for this process: two that train in one would overwrite
    each other's files. The system ends the claim of a process that dies. Raises UserError where
    another process has it."""
    claim = contextlib.ExitStack()
    if fcntl:
        held = os.open(folder, os.O_RDONLY)
        claim.callback(os.close, held)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim.close()
            raise UserError(f"--resume {folder}: another process is still training it.") from None
        except OSError:  # some cluster file systems have no locks
            pass
    return claim


def read_json(path, option):
    """The dict in a JSON file of a run folder that the user named with an option."""
    try:
        found = json.loads(path.read_text())
    except OSError:
        problem = f"no {path.name} there; name a run folder"
        raise UserError(f"{option} {path.parent}: {problem}.") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{option} {path.parent}: {path.name} is damaged.")
    return found


def read_run_args(folder, model):
    """The options of the run in a folder, for --resume; UserError if it is of another model."""
    args = read_json(Path(folder, "args.json"), "--resume")
    if args.get("model", model) != model:
        raise UserError(f"--resume {folder}: a run of {args['model']}, not of {model}.")
    return {k: v for k, v in args.items() if k not in ("command", "resume", "model")}


def drop_later_lines(path, step):
    """Takes out of a log what was written after the checkpoint that a run resumes from."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with write_whole(path) as f:
            f.write("".join(lines).encode())


def moved(state, device):
    return {name: value if value is None else value.to(device) for name, value in state.items()}


def plain(options):
    """Options as what JSON and a checkpoint may hold."""
    return {k: v for k, v in options.items() if isinstance(v, str | int | float | bool | None)}


def memory_gb(device):
    """Peak memory of this process: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# =============================================================================
# Pictures and files out, checkpoints in
# =============================================================================


@contextlib.contextmanager
def write_whole(path):
    """A binary file that appears under its name only when it is complete and on the disk.

    A crash or a full disk leaves an older file of that name as it was.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"cannot write {path}: a device or a pipe, which would be replaced.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a failed write as RuntimeError
        problem = getattr(e, "strerror", None) or str(e)
        if isinstance(e, RuntimeError) or e.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = next(p for p in path.absolute().parents if p.is_dir())
            problem += f"; {shutil.disk_usage(folder).free / 2**20:.0f} MB are free there"
        raise UserError(f"cannot write {path}: {problem}.") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_json(path, data):
    with write_whole(path) as f:
        f.write((json.dumps(data, indent=1) + "\n").encode())


def kept_beside(path):
    """What a message says of a damaged checkpoint.pt: which kept one would take its place."""
    newest = Path(path).name == "checkpoint.pt"
    kept = sorted(Path(path).parent.glob("checkpoint-*.pt")) if newest else None
    return f" Move it away to go on from {kept[-1].name} beside it." if kept else ""


def load_checkpoint(path, model):
    """One of our checkpoints, or the plain state dict of an official .pth; nothing in it is run.
    Of a dict of state dicts, as StarGAN v2's, the names are joined: "generator.from_rgb.weight".
    model: the script it has to be of, or several.

    Raises UserError if it is missing, damaged, of another model, or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        problem = "a folder without checkpoints" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {problem}. Name a .pt or .pth file.")
    damaged = f"{path}: not a checkpoint, or a damaged one.{kept_beside(path)}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r"(?:GLOBAL|class) +`?([\w.]+)", str(e))
        if found is None:
            raise UserError(damaged) from None
        raise UserError(
            f"{path}: refused, since it holds {found[1]}, which could run code; only"
            " tensors and plain values are read."
        ) from None
    except Exception as e:  # torch.load meets a strange file with a dozen kinds of exception
        strange = getattr(e, "errno", errno.EINVAL) == errno.EINVAL  # that of a seek in a cut file
        raise UserError(damaged if strange else f"{path}: {e.strerror}.") from None
    if isinstance(state, dict) and "model" in state and not torch.is_tensor(state["model"]):
        models = [model] if isinstance(model, str) else model
        if state["model"] not in models:
            needed = " or ".join(models)
            raise UserError(f"{path} holds a {state['model']} model; {needed} is needed here.")
        return state
    if isinstance(state, dict) and state and all(isinstance(v, dict) for v in state.values()):
        state = {f"{net}.{name}": v for net, part in state.items() for name, v in part.items()}
    if isinstance(state, dict) and state and all(torch.is_tensor(v) for v in state.values()):
        return state
    raise UserError(f"{path}: neither one of ours nor a plain dict of tensors.")


def load_networks(path, model, build, from_official):
    """({name: network}, options of its training) of our checkpoint, or (network, {}) of an official
    file. build(config) makes a network; from_official(arrays) may raise ValueError."""
    state = load_checkpoint(path, model)
    try:
        if "config" not in state:
            return from_official(state), {}
        nets = {name: build(config) for name, config in state["config"].items()}
        for name, net in nets.items():
            net.load_state_dict(state["nets"][name])
        return nets, dict(state["args"])
    except Exception as e:  # a strange file: build() may raise anything
        problem = (str(e).splitlines() or [type(e).__name__])[0]
        kind = state["model"] if isinstance(state.get("model"), str) else model
        raise UserError(f"{path} does not hold {kind} networks: {problem}.") from None


def load_gan(path, models, build, from_official):
    """({"G", "D", "G_ema": network}, options of its training) of a checkpoint or run folder of ours
    or of an official .pkl or .pt, of which from_official(arrays, options) makes a network."""
    path = Path(last_checkpoint(path) or path)
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: none there; name a run, or a .pt or .pkl file.")
    if is_ours(path):
        return load_networks(path, models, build, None)
    ours = {"Gs": "G_ema", "g_ema": "G_ema", "g": "G", "d": "D"}
    nets = {}
    for name, (kind, arrays, options) in read_official(path).items():
        if name != "augment_pipe":
            try:
                options = with_unsaid(kind, arrays, options)
                nets[ours.get(name, name)] = from_official(arrays, options)
            except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as e:
                raise UserError(f"{path}: its {name} is no such network: {e}.") from None
    return nets, {}


def is_ours(path):
    """Whether a file is a zip of torch.save with the "model" that our checkpoints begin with."""
    try:
        with zipfile.ZipFile(path) as z:
            (name,) = [n for n in z.namelist() if n.endswith("data.pkl")]
            with z.open(name) as f:
                return b"\x05\x00\x00\x00model" in f.read(64)  # a text of five letters
    except (OSError, ValueError, *ZIP_ERRORS):
        return False


def each_batch(function, device, batch, *inputs, generators=()):
    """function(*inputs) of tensors, on the device but `batch` rows at a time: yields tuples of what
    it returns, a tensor or a tuple of them, on the CPU. None among the inputs stays None. Whole
    batches are one CUDA graph; generators: see there."""
    recorded = graph(function, device, generators) if len(inputs[0]) >= 2 * batch else function
    for k in range(0, len(inputs[0]), batch):
        # Copies: those of the recording are written over.
        part = [None if x is None else x[k : k + batch].to(device, copy=True) for x in inputs]
        found = (recorded if len(part[0]) == batch else function)(*part)
        found = found if isinstance(found, tuple) else (found,)
        yield tuple(t.to("cpu", copy=True) for t in found)  # the next ones overwrite them


def in_batches(*args, **options):
    """What each_batch yields as one: the tensor, or a list of them."""
    columns = [torch.cat(column) for column in zip(*each_batch(*args, **options), strict=True)]
    return columns if len(columns) > 1 else columns[0]


@torch.no_grad()
def apply(net, images, device, batch=16):
    """uint8 images (N, C, H, W) through an image-to-image net in eval mode -> uint8 images."""
    training = net.training
    net.eval()
    images = in_batches(lambda x: to_uint8(net(to_float(x, device))), device, batch, images)
    net.train(training)
    return images


def check_size(nets, side, option="--crop-size"):
    """UserError if a network of {name: net} cannot work on side x side pictures: a dry run.

    Networks named G... must also give pictures of the size they get, a multiple of net.multiple.
    """
    for name, net in nets.items():
        x = torch.empty(2, net.config["in_channels"], side, side, device="meta")
        try:
            shape = copy.deepcopy(net).to("meta")(x).shape[-2:]
        except (RuntimeError, ValueError):
            shape = None
        if shape is None or (name.startswith("G") and shape != x.shape[-2:]):
            multiple = getattr(net, "multiple", 1)
            need = f"a multiple of {multiple}" if side % multiple else "a larger one"
            raise UserError(f"{option} {side} does not suit {name}: it needs {need}.")


def check_channels(nets, wanted):
    """UserError unless each of {name: net} has the wanted [in] or [in, out] channels."""
    for name, net in nets.items():
        own = [net.config[k] for k in ("in_channels", "out_channels") if k in net.config]
        if own != wanted[name]:
            raise UserError(f"{name} of the checkpoint has {own} channels, not {wanted[name]}.")


def resized(img, short=None, width=None, square=None):
    """A PIL picture scaled to a short side or a width, or made a square; else as it is."""
    W, H = img.size
    scale = short / min(W, H) if short else (width or W) / W
    size = (square, square) if square else tuple(max(1, round(side * scale)) for side in (W, H))
    if math.prod(size) > MAX_PIXELS:
        raise UserError(f"{size[0]} x {size[1]} pixels: at most {MAX_PIXELS:,} are made.")
    return img if size == (W, H) else img.resize(size, BICUBIC)


def to_picture(image):
    """A float tensor (C, H, W) in [-1, 1], or a uint8 one, -> PIL picture."""
    image = image if image.dtype == torch.uint8 else to_uint8(image)
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def save_sheet(path, columns, rows=()):
    """A captioned sheet of samples as PNG.

    columns: {caption: images (N, C, H, W), floats in [-1, 1] or uint8}; row i shows image i of
    every column; rows: captions of theirs. Small images are enlarged, pixel by pixel, so that one
    can see them.
    """
    pictures = {caption: [to_picture(x) for x in images] for caption, images in columns.items()}
    side = max(max(p.size) for column in pictures.values() for p in column)
    zoom, gap, top, font = max(1, 128 // side), 4, 18, ImageFont.load_default()
    cell = side * zoom + gap
    left = int(max([font.getlength(row) + gap for row in rows if row], default=0))
    count = max(len(column) for column in pictures.values())
    sheet = Image.new("RGB", (left + len(columns) * cell + gap, count * cell + top), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        draw.text((gap, (y + 0.45) * cell + top), row, "black", font)
    for x, (caption, column) in enumerate(pictures.items()):
        draw.text((left + x * cell + gap, 3), caption, "black", font)
        for y, picture in enumerate(column):
            picture = picture.resize([s * zoom for s in picture.size], Image.Resampling.NEAREST)
            sheet.paste(picture, (left + x * cell + gap, y * cell + top))
    save_png(path, sheet)


def save_png(path, picture):
    with write_whole(path) as f:
        picture.save(f, "PNG")


def grid(images, columns):
    """A PIL picture of images (N, C, H, W) in rows of `columns`; small ones are enlarged."""
    N, C, H, W = images.shape
    columns = min(columns, N)
    rows = -(-N // columns)
    tiles = torch.full((rows * columns, C, H, W), 255, dtype=torch.uint8)
    tiles[:N] = images if images.dtype == torch.uint8 else to_uint8(images)
    tiles = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    picture, zoom = to_picture(tiles.reshape(C, rows * H, columns * W)), max(1, 96 // H)
    return picture.resize([s * zoom for s in picture.size], Image.Resampling.NEAREST)


SEG_COLORS = torch.tensor([  # of 256 classes, all different; the first 17 are the official ones
    (0, 0, 0), (239, 234, 90), (44, 105, 154), (4, 139, 168), (13, 179, 158), (131, 227, 119),
    (185, 231, 105), (107, 137, 198), (241, 196, 83), (242, 158, 76), (234, 114, 71),
    (215, 95, 155), (207, 113, 192), (159, 89, 165), (142, 82, 172), (158, 115, 200),
    (116, 95, 159),
    *(_hsv(0.1 + 0.618 * k, (0.9, 0.5)[k % 2], 1 - k % 5 / 10) for k in range(239)),
], dtype=torch.uint8)  # fmt: skip
INFERNO = (  # ten colours, evenly spaced, of matplotlib's map of this name (CC0)
    (0, 0, 4), (27, 12, 65), (75, 12, 107), (120, 28, 109), (165, 45, 96), (207, 68, 70),
    (237, 105, 37), (251, 154, 6), (247, 209, 60), (252, 255, 164),
)  # fmt: skip


def color_labels(labels):
    """Labels (..., H, W), integers to 255, -> pictures (..., 3, H, W), uint8, in SEG_COLORS."""
    return SEG_COLORS.to(labels.device)[labels.long()].movedim(-1, -3)


def heat(x):
    """Floats (N, H, W) -> pictures (N, 3, H, W), uint8: 0 almost black, 1 bright, the rest cut."""
    table = torch.tensor(INFERNO, device=x.device).float()
    place = x.float().clamp(0, 1) * (len(table) - 1)
    low = place.long().clamp(max=len(table) - 2)
    colors = torch.lerp(table[low], table[low + 1], (place - low)[..., None])
    return colors.round().to(torch.uint8).permute(0, 3, 1, 2)


def inferno(x):
    """Maps (N, H, W), floats, -> uint8 pictures (N, 3, H, W), each from its least to its largest
    value; one that is constant is dark throughout."""
    low, high = x.amin([1, 2], keepdim=True), x.amax([1, 2], keepdim=True)
    return heat((x - low) / torch.where(high > low, high - low, 1))


def levels(images):
    """uint8 pictures, or floats in [-1, 1], as float32 in 0 ... 255, not clamped."""
    return images.float() if images.dtype == torch.uint8 else (images.float() + 1) * 127.5


def difference(a, b):
    """uint8 pictures (N, 3, H, W) of how much a and b, alike or in [-1, 1], differ: the mean over
    the channels, from almost black, 0, to the brightest, 128 levels of 255 and more."""
    return heat((levels(a) - levels(b)).abs().mean(1) / 128)


CURVE_COLORS = ("#0b62a4", "#d9480f", "#2b8a3e", "#862e9c")


def ticks(low, high):
    """Three to seven round numbers from low to high."""
    rough = max(high - low, 1e-9) / 5
    scale = 10 ** math.floor(math.log10(rough))
    step = next(k * scale for k in (1, 2, 5, 10) if k * scale >= rough)
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def plot(draw, x0, y0, width, height, title, lines, x_label):
    """One panel of curves(), its axes from (x0, y0)."""
    font = ImageFont.load_default(12)
    xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
    (left, right), (low, high) = ((min(v), max(v)) for v in (xs, ys))
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)

    def place(x, y):
        u, v = (x - left) / max(right - left, 1e-9), (y - low) / (high - low)
        return x0 + u * width, y0 + (1 - v) * height

    draw.text((x0, y0 - 40), title, "black", font)
    for y in ticks(low, high):
        draw.line([place(left, y), place(right, y)], "#e3e3e3")
        draw.text((x0 - 6, place(left, y)[1]), f"{y:.4g}", "#555", font, anchor="rm")
    for x in ticks(left, right):
        draw.line([place(x, low), place(x, high)], "#e3e3e3")
        draw.text((place(x, low)[0], y0 + height + 4), f"{x:.4g}", "#555", font, anchor="ma")
    draw.text((x0 + width, y0 + height + 18), x_label, "#555", font, anchor="ra")
    legend = x0
    for color, (name, line) in zip(itertools.cycle(CURVE_COLORS), lines.items(), strict=False):
        points = [place(*point) for point in line]
        draw.line(points, color, 2)
        for x, y in points if len(points) < 60 else points[-1:]:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], color)
        draw.text((legend, y0 - 22), name, color, font)
        legend += draw.textlength(name, font) + 16


def curves(panels, x_label):
    """A PIL picture of line plots, two in a row. panels: {title: {curve: [(x, y), ...]}}."""
    W, H, panels = 560, 280, {k: v for k, v in panels.items() if any(v.values())}
    sheet = Image.new("RGB", (2 * W, max(1, -(-len(panels) // 2)) * H), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, lines) in enumerate(panels.items()):
        corner = i % 2 * W + 64, i // 2 * H + 44
        plot(draw, *corner, W - 80, H - 78, title, lines, x_label)
    return sheet


def save_curves(folder, panels, batch):
    """progress.png of a run: curves of its logs over thousands of images. panels: {title: names in
    log.jsonl or metrics.jsonl}."""
    rows = []
    for log in (Path(folder, "log.jsonl"), Path(folder, "metrics.jsonl")):
        rows += [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = collections.defaultdict(list)
    for row in rows:
        row |= row.get("fid", {})  # the FID of a row stands beside its counts
        for name, y in row.items():
            if isinstance(y, float) and math.isfinite(y):
                found[name].append((row["step"] * batch / 1000, y))
    lines = {t: {name: found[name] for name in names if found[name]} for t, names in panels.items()}
    save_png(Path(folder, "progress.png"), curves(lines, "thousands of images"))


# Pillow's formats. .png: an APNG, lossless and large; programs that know only PNG show one frame.
FILMS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG"}


def check_film(path, size, count):
    """UserError if save_film could not hold `count` frames of size (W, H), or a file one."""
    W, H = size
    if Path(path).suffix.lower() == ".webp" and max(size) > 16_383:
        raise UserError(
            f"{path}: frames of {W}x{H}, WebP holds at most 16,383 pixels a side; give fewer"
            " pictures, or name a .png."
        )
    needed, free = 8 * W * H * count, available_memory()  # Pillow takes 4 a pixel, its encoders too
    if needed > free:
        raise UserError(
            f"{path}: {count} frames of {W}x{H} need {needed / GB:.1f} GB of memory,"
            f" {free / GB:.1f} are free; give fewer pictures or styles."
        )


def save_film(path, frames, fps=25):
    """An endless film of PIL pictures of one size, as WebP, GIF or animated PNG by the suffix.

    frames: an iterable, all kept in memory. Each lasts 1000 / fps milliseconds, rounded; in a GIF
    whole hundredths of a second, at least 2, since browsers slow down what is faster. Equal frames
    in a row may become one that lasts longer.
    Raises UserError for another suffix, before a frame is made, and if it cannot be written.
    """
    if Path(path).suffix.lower() not in FILMS:
        raise UserError(f"{path}: films are written as {', '.join(FILMS)}; name one of these.")
    format = FILMS[Path(path).suffix.lower()]
    duration = max(20, round(100 / fps) * 10) if format == "GIF" else max(1, round(1000 / fps))
    first, *others = frames  # a list: Pillow goes over the frames of an APNG twice
    options = dict(append_images=others, duration=duration, loop=0, quality=90)  # that of WebP
    with write_whole(path) as f:
        first.save(f, format, save_all=True, **options)


def fill(net, arrays, optional=()):
    """Loads {name: tensor} into a network; sides of 1 do not count. Names that end in one of
    `optional` may be missing. Raises ValueError for other names or shapes."""
    own = net.state_dict()
    missing = {name for name in own.keys() - arrays.keys() if not name.endswith(optional)}
    if wrong := sorted(missing | arrays.keys() - own.keys()):
        raise ValueError(f"{', '.join(wrong[:3])} missing or unknown")
    for name, t in arrays.items():
        if [n for n in t.shape if n > 1] != [n for n in own[name].shape if n > 1]:
            raise ValueError(f"{name} is {tuple(t.shape)}, not {tuple(own[name].shape)}")
    net.load_state_dict(own | {name: t.reshape(own[name].shape) for name, t in arrays.items()})


def set_missing(args, options):
    """Gives options that were left out their values."""
    for name, value in options.items():
        if vars(args).get(name) is None:
            setattr(args, name, value)


def stylegan2_options(nets):
    """The options of stylegan2.py's `train` that networks {name: net} were made with; G decides."""
    options = {}
    for kind, net in sorted(nets.items()):
        held = net.config
        options |= {k: held[k] for k in ("channel_base", "channel_max")}
        if kind == "D":
            options |= dict(D=held["architecture"])
            options |= dict(D_map_layers=held["map_layers"]) if held["c_dim"] else {}
        else:
            options |= dict(G=held["architecture"], noise_inputs=held["use_noise"])
            options |= {k: held[k] for k in ("z_dim", "w_dim", "map_layers")}
    return options


def copy_matching(nets, found, say):
    """Copies from networks `found` into {name: net} what agrees in name and shape, and says what
    does not: the start of transfer learning. UserError if nothing agrees."""

    def some(names):
        return f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}"

    for name, net in nets.items():
        other = name.removesuffix("_ema") if name.endswith("_ema") else f"{name}_ema"
        source = found.get(name) or found.get(other)
        if source is None:
            say(f"{name}: not in the checkpoint, starts anew")
            continue
        own, held = net.state_dict(), source.state_dict()
        fits = {k: v for k, v in held.items() if k in own and v.shape == own[k].shape}
        if not fits:
            raise UserError(f"--checkpoint: nothing in its {name} fits; other sizes or widths?")
        net.load_state_dict(own | fits)
        lists = {  # what starts anew, and what of the checkpoint is left out
            "new": [k for k in own if k not in held],
            "of another shape": [k for k in own if k in held and k not in fits],
            "not used": [k for k in held if k not in own],
        }
        rest = "".join(f"; {len(v)} {what}: {some(v)}" for what, v in lists.items() if v)
        say(f"{name}: {len(fits)} of {len(own)} tensors copied{rest}")


def save_arrays(path, **arrays):
    """An .npz file."""
    with write_whole(path) as f:
        np.savez(f, **arrays)


def closed_spline(points, n):
    """n points (n, D) of a smooth closed curve through points (m, D), m >= 3: the cubic spline
    whose first two derivatives go on where it closes, evenly timed."""
    m = len(points)
    p = points.double()
    t = torch.arange(n, dtype=torch.float64) * m / n
    i, u = t.long(), (t - t.floor())[:, None]
    eye = torch.eye(m, dtype=torch.float64)
    system = 4 * eye + eye.roll(1, 0) + eye.roll(-1, 0)
    bend = torch.linalg.solve(system, 6 * (p.roll(-1, 0) - 2 * p + p.roll(1, 0)))  # p''
    q, bent = p.roll(-1, 0), bend.roll(-1, 0)
    v = 1 - u
    curve = v * p[i] + u * q[i] + ((v**3 - v) * bend[i] + (u**3 - u) * bent[i]) / 6
    return curve.to(points.dtype)


def load_array(path, name, shape):
    """The array of that name in an .npz, as a float tensor; shape: None where any side will do
    but 0."""
    try:
        with np.load(path, allow_pickle=False) as data:
            array = torch.from_numpy(data[name].astype(np.float32))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or 'not an .npz file'}.") from None
    except Exception:  # NumPy meets a strange file with a dozen kinds of exception
        raise UserError(f"{path}: not an .npz file with an array {name!r}.") from None
    fits = len(array.shape) == len(shape) and array.numel()
    if not fits or any(b not in (None, a) for a, b in zip(array.shape, shape, strict=True)):
        raise UserError(f"{path}: {name} is {tuple(array.shape)}, {shape} is needed here.")
    return array


def read_square(path, size, channels):
    """A picture file as uint8 (channels, size, size): the largest centre square, resized."""
    try:
        img = decode(path, path, "RGB" if channels == 3 else "L")
    except BadImage as e:
        raise UserError(f"--input {e}.") from None
    if img.size != (size, size):
        print(f"{path} is {img.width}x{img.height}: its centre square is resized to {size}x{size}")
    return stack([pixels(square(size, False, img))])[0]


def read_pictures(path, prepare, mode, option):
    """(names, uint8 (N, C, H, W)) of a picture, or of all pictures of a folder that can be read;
    others are named and skipped. prepare: as of ImageSet. option: for messages."""
    (folder, names), found = picture_files(path, option), {}
    for name in names:
        try:
            found[name] = pixels(prepare(decode(folder / name, name, mode)))
        except BadImage as e:
            print(f"skipped {name}: {e.reason}", file=sys.stderr)
    if not found:
        raise UserError(f"{option} {path}: not one readable picture.")
    return list(found), stack(list(found.values()))


def picture_files(path, option):
    """(folder, names in it) of a picture, or of all pictures of a folder. option: for messages."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{option} {path} does not exist; name a picture or a folder.")
    return (path, Folder(path).names) if path.is_dir() else (path.parent, [path.name])


def keep_originals(targets, option, *paths):
    """UserError if a file to write is one of the pictures at paths, each a picture or a folder."""
    found = (picture_files(path, option) for path in paths)
    files = ((folder / name).stat() for folder, names in found for name in names)
    held = {(file.st_dev, file.st_ino) for file in files}
    for target in map(Path, targets):
        if target.exists() and (target.stat().st_dev, target.stat().st_ino) in held:
            raise UserError(f"{option}: {target} would replace an original; name another place.")


def stems_of(names):
    """Names of files without their suffixes, but for those that would coincide."""
    stems = {name: str(Path(name).with_suffix("")) for name in names}
    taken = collections.Counter(text.lower() for text in (*stems, *stems.values()))
    return [stem if taken[stem.lower()] == 1 else name for name, stem in stems.items()]


def map_pictures(source, out, mode, function, originals=()):
    """function(PIL picture) -> PIL picture for one file, or all below a folder, written as PNG.

    A folder's relative paths are kept below `out`; names that would coincide (a.jpg, a.png) keep
    their old suffix (a.jpg.png). Files that cannot be read are named and skipped.
    Raises UserError if there is nothing to read, or if results would replace those that are read,
    or `originals`, other pictures or folders of them.
    """
    out, (folder, names) = Path(out), picture_files(source, "--input")
    if Path(source).is_dir() and out.suffix.lower() == ".png":
        raise UserError(f"--out {out}: a folder of pictures needs a folder to go to.")
    if out.suffix.lower() in SUFFIXES and out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: results are PNG files; name a .png or a folder.")
    targets = [out / f"{stem}.png" for stem in stems_of(names)]
    if out.suffix.lower() == ".png":
        targets = [out]
    keep_originals(targets, "--out", source, *originals)
    failed = 0
    for n, (name, target) in enumerate(zip(names, targets, strict=True), 1):
        try:
            result = function(decode(folder / name, name, mode))
        except BadImage as e:
            failed += 1
            print(f"skipped {name}: {e.reason}", file=sys.stderr)
            continue
        save_png(target, result)
        print(f"{n}/{len(names)} {target}")
    if failed == len(names):
        raise UserError(f"--input {source}: not one readable picture.")
    if failed:
        print(f"{len(names) - failed} written, {failed} skipped")


# =============================================================================
# Official checkpoints
# =============================================================================

# A pickle is a program, and Python's own machine for it calls whatever the file names. Below is a
# smaller machine: it has the instructions that official files need, and takes the names in them as
# texts that stand for plain data. It imports nothing, and what it does not know it refuses by name.
# Its work and memory have limits, since a file of a few bytes can ask for endless amounts of both.

OfficialNetwork = collections.namedtuple("OfficialNetwork", "kind arrays options")
OfficialNetwork.__doc__ = """One network of an official file.

kind: "pytorch" (stylegan2-ada-pytorch, stylegan3), "tensorflow" or "rosinality"
arrays: {official name: tensor}, parameters and buffers, e.g. "synthesis.b4.const", or in files of
    TensorFlow "synthesis/4x4/Const/const"; some may be views of one memory, with any strides
options: what its constructor or training was given; None stands for what is not plain data
"""

MAX_STEPS, MAX_NODES, MAX_NAME = 1_000_000, 100_000, 300  # instructions, entries, letters
TORCH_SAVE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # so begin its files before torch 1.6
MODULE = "torch_utils.persistence._reconstruct_persistent_obj"
NETWORK = "dnnlib.tflib.network.Network"
ARRAY, DTYPE = "numpy.core.multiarray._reconstruct", "numpy.dtype"
STORAGES = {
    **{"torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64},
    **{"torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16},
    **{"torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32},
}
KEPT = {MODULE, NETWORK, ARRAY, DTYPE}  # calls of these stay what they are until the walk
NAMES = KEPT | STORAGES.keys() | {"numpy.ndarray", "numpy.core.multiarray.scalar"}
NAMES |= {"collections.OrderedDict", "builtins.set", "dnnlib.util.EasyDict", "_codecs.encode"}
NAMES |= {"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"}
NAMES |= {"torch.storage._load_from_bytes"}
PUSHES = (  # instructions that push their own argument
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE"
    " SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
).split()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Thing:
    """A name in a file (args is None), or what calling it would have made."""

    def __init__(self, name, args=None):
        self.name, self.args, self.state = name, args, None


def _check(condition):
    if not condition:
        raise ValueError


def _counts(*numbers):
    """Are these sizes or positions? Not bool, not negative, and small enough to multiply."""
    return len(numbers) < 20 and all(type(n) is int and 0 <= n < 2**40 for n in numbers)


class _Official:
    """One file: the machine, then the walk over what it made. A name that is not known is a
    UserError; whatever else is wrong ends in any exception at all."""

    def __init__(self, path):
        self.path, self.size = path, Path(path).stat().st_size
        # A file's byte may be read, and returned, a few times: G and G_ema may be one and the same.
        self.left = {"steps": MAX_STEPS, "nodes": MAX_NODES}
        self.left |= {"read": 4 * self.size, "returned": 4 * self.size}

    def spend(self, kind, n=1):
        self.left[kind] -= n
        _check(self.left[kind] >= 0)

    def refuse(self, what):
        what = re.sub(r"[^\w. ]", "?", what[:80], flags=re.ASCII)
        raise UserError(
            f"{self.path}: refused, since it holds {what}, which could run code; only tensors and"
            " plain values are read."
        )

    # ---- the machine ----------------------------------------------------------------------

    def run(self, file, in_storage=False):
        """What the pickle at the position of an open file makes."""
        stack, marks, memo = [], [], {}

        def take(start):
            items = stack[start:]
            del stack[start:]
            return items

        for op, arg, _ in pickletools.genops(file):
            self.spend("steps")
            match op.name:
                case name if name in PUSHES:
                    stack.append(arg)
                case name if name in CONSTANTS:
                    stack.append(CONSTANTS[name])
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    marks.append(len(stack))
                case "EMPTY_LIST" | "EMPTY_SET":  # a list does for a set, and hashes nothing
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "TUPLE":
                    stack.append(tuple(take(marks.pop())))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(take(-int(op.name[-1]))))
                case "APPEND" | "APPENDS" | "ADDITEMS":
                    items = take(-1 if op.name == "APPEND" else marks.pop())
                    _check(type(stack[-1]) is list)
                    stack[-1].extend(items)
                case "SETITEM" | "SETITEMS":
                    items = take(-2 if op.name == "SETITEM" else marks.pop())
                    keys = items[::2]  # no tuples: to hash a nest of them can take for ever
                    _check(type(stack[-1]) is dict and {type(k) for k in keys} <= {str, int})
                    stack[-1].update(zip(keys, items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                    memo[len(memo) if arg is None else arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "GLOBAL" | "STACK_GLOBAL" | "INST":
                    name = ".".join(take(-2) if arg is None else arg.split(" ", 1))
                    name = name.replace("numpy._core.", "numpy.core.")  # NumPy 2
                    name = name.replace("__builtin__.", "builtins.")  # Python 2
                    if name not in NAMES or op.name == "INST":
                        self.refuse(name)
                    stack.append(_Thing(name))
                case "REDUCE" | "NEWOBJ":
                    function, args = take(-2)
                    _check(type(function) is _Thing and function.args is None)
                    stack.append(self.call(function.name, args))
                case "BUILD":
                    state = stack.pop()
                    if type(stack[-1]) is not dict:  # nobody needs attributes of an OrderedDict
                        _check(type(stack[-1]) is _Thing and stack[-1].args is not None)
                        stack[-1].state = state
                case "BINPERSID" if in_storage:
                    pass
                case "STOP":
                    return stack.pop()
                case "OBJ" | "NEWOBJ_EX" | "PERSID" | "BINPERSID" | "EXT1" | "EXT2" | "EXT4":
                    self.refuse(f"the pickle instruction {op.name}")
                case _:
                    raise ValueError

    def call(self, name, args):
        if name in KEPT:
            return _Thing(name, args)
        match name, args:
            case (("dnnlib.util.EasyDict" | "collections.OrderedDict"), ()):
                return {}
            case "builtins.set", (list() as items,):
                return items
            case "_codecs.encode", (str() as text, "latin1"):  # so were bytes before protocol 3
                self.spend("read", len(text))
                return text.encode("latin1")
            case "torch.storage._load_from_bytes", (bytes() as data,):
                return self.storage(io.BytesIO(data))
            case "torch._utils._rebuild_tensor_v2", (torch.Tensor() as x, start, size, stride, *_):
                return self.view(x, start, size, stride)
            case "torch._utils._rebuild_parameter", (torch.Tensor() as x, *_):
                return x
            case "numpy.core.multiarray.scalar", (dtype, raw):
                return self.array((), dtype, False, raw)
        raise ValueError

    def storage(self, file):
        """A 1-d tensor from what torch.save wrote for a storage before torch 1.6: five pickles,
        its length, its numbers. On which device it was does not matter."""
        magic, version, system, value, keys = (self.run(file, in_storage=True) for _ in range(5))
        kind, cls, key, _, n, *view = value
        dtype = STORAGES[cls.name]
        _check([kind, magic, version] == ["storage", 0x1950A86A20F9469CFC6C, 1001])
        _check(type(key) is str and keys == [key] and view in ([], [None]) and _counts(n))
        _check(system["little_endian"] is True)
        raw = file.getbuffer()[file.tell() :]
        _check(len(raw) == 8 + n * dtype.itemsize and raw[:8] == n.to_bytes(8, "little"))
        self.spend("read", len(raw))
        numbers = bytearray(raw[8:])
        return torch.frombuffer(numbers, dtype=dtype) if n else torch.empty(0, dtype=dtype)

    def view(self, x, start, size, stride):
        _check(type(size) is tuple and type(stride) is tuple and len(size) == len(stride))
        _check(_counts(start, *size, *stride) and math.prod(size) <= x.numel())
        last = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        _check(0 in size or last < x.numel())
        return x.as_strided(size, stride, start)

    def array(self, shape, dtype, fortran, raw):
        """A NumPy array of numbers. Files of Python 2 hold its bytes as latin1 text."""
        _check(type(dtype) is _Thing and dtype.name == DTYPE)
        code, order = dtype.args[0], "|" if dtype.state is None else dtype.state[1]
        _check(re.fullmatch("b1|[iu][1248]|f[248]", code) and order in ("<", ">", "|", "="))
        dtype = np.dtype(code).newbyteorder(order)
        _check(type(raw) in (bytes, str) and type(shape) is tuple and _counts(*shape))
        _check(math.prod(shape) * dtype.itemsize == len(raw))
        self.spend("read", len(raw))
        raw = raw.encode("latin1") if type(raw) is str else raw
        x = np.frombuffer(raw, "u1") != 0 if code == "b1" else np.frombuffer(raw, dtype)
        return x.astype(code).reshape(shape, order="F" if fortran else "C")

    # ---- the walk -------------------------------------------------------------------------

    def inside(self, prefix, pairs):
        """(full name, part) for pairs (name, part). What contains itself gets too long a name."""
        for name, part in pairs:
            self.spend("nodes")
            _check(type(name) is str and 0 < len(name) < MAX_NAME - len(prefix))
            yield prefix + name, part

    def add(self, arrays, prefix, pairs):
        for name, value in self.inside(prefix, pairs):
            if type(value) is _Thing and value.name == ARRAY:
                _, shape, dtype, fortran, raw = value.state
                value = self.array(shape, dtype, fortran, raw)
            value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            if torch.is_tensor(value):
                self.spend("returned", value.nbytes)
                arrays[name] = value

    def walk(self, thing, arrays, prefix=""):
        """The state of a module or Network; its tensors and those of its parts go to arrays."""
        if thing.name == MODULE:
            state, between = thing.args[0]["state"], "."
            tensors, parts = [*state["_parameters"].items()], state["_modules"]
            tensors += state["_buffers"].items()
        else:
            _check(thing.name == NETWORK)
            state, between = thing.state, "/"
            tensors, parts = state["variables"], state.get("components", {})
        self.add(arrays, prefix, tensors)
        for name, part in self.inside(prefix, parts.items()):
            if part is not None:
                self.walk(part, arrays, name + between)
        return state

    def options(self, value, depth=0):
        self.spend("nodes")
        _check(depth < 20)
        if isinstance(value, dict):
            return {k: self.options(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.options(v, depth + 1) for v in value]
        value = value.item() if isinstance(value, np.ndarray) else value
        return value if isinstance(value, str | int | float | None) else None

    # ---- the three kinds of files ---------------------------------------------------------

    def nvidia(self, file):
        state, nets = self.run(file), {}
        kind, key, names = "pytorch", "_init_kwargs", ("G", "D", "G_ema", "augment_pipe")
        if type(state) is tuple:
            kind, key, names = "tensorflow", "static_kwargs", ("G", "D", "Gs")
            state = dict(zip(names, state, strict=True))
        for name in names:
            if state.get(name) is not None:
                arrays = {}
                options = self.walk(state[name], arrays).get(key, {})
                nets[name] = OfficialNetwork(kind, arrays, self.options(options))
        return nets

    def rosinality(self, file, zipped):
        if zipped:  # torch.save compresses nothing: a file that would grow is a bomb
            with zipfile.ZipFile(file) as z:
                _check(sum(info.file_size for info in z.infolist()) <= self.size)
            file.seek(0)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            found = re.search(r"GLOBAL ([\w.]+)", str(e))
            return self.refuse(found[1]) if found else _check(False)
        nets = {}
        options = self.options(vars(state["args"])) if "args" in state else {}
        average = [(k, state[k]) for k in ("latent_avg",) if k in state]
        for name in ("g_ema", "g", "d"):
            if name in state:
                arrays = {}
                self.add(arrays, "", [*state[name].items(), *(average if name != "d" else [])])
                nets[name] = OfficialNetwork("rosinality", arrays, options)
        return nets


def read_official(path):
    """{name: OfficialNetwork} of an official checkpoint; nothing in the file is run.

    G, D, G_ema (and augment_pipe) of a .pkl of stylegan2-ada-pytorch or stylegan3; G, D, Gs of a
    .pkl of the TensorFlow releases; g_ema (and g, d) of a .pt of rosinality/stylegan2-pytorch.
    Raises UserError if the file is missing, damaged, something else, or could run code.
    """
    if not Path(path).is_file():
        problem = "a folder" if Path(path).is_dir() else "no such file"
        raise UserError(f"{path}: {problem}. Name an official .pkl or .pt file.")
    try:
        with open(path, "rb") as file:
            start = file.read(len(TORCH_SAVE))
            file.seek(0)
            zipped = start.startswith(b"PK\3\4")
            by_torch = zipped or start == TORCH_SAVE
            official = _Official(path)
            nets = official.rosinality(file, zipped) if by_torch else official.nvidia(file)
    except UserError:
        raise
    except Exception:  # a damaged file leads to a dozen kinds, MemoryError and RecursionError too
        problem = "not an official checkpoint, or a damaged one"
        raise UserError(f"{path}: {problem}.{kept_beside(path)}") from None
    if not nets:
        raise UserError(f"{path} holds no network under a name of the official releases.")
    return nets


def official_option(options, name, default=None):
    """The value of a name, wherever it stands in nested official arguments, else default."""
    parts = [official_option(v, name, default) for v in options.values() if isinstance(v, dict)]
    return options.get(name, next((v for v in parts if v != default), default))


def with_unsaid(kind, arrays, options):
    """The official arguments of a network, with the defaults that its file leaves out."""
    unsaid = {}
    if kind == "pytorch":  # stylegan3's; stylegan2-ada-pytorch always says them
        unsaid = dict(conv_clamp=256, num_fp16_res=4)
    elif kind == "tensorflow" and any(name.startswith("Mapping") for name in arrays):
        unsaid = dict(mapping_lrmul=0.1)  # of stylegan2-ada's D
    return options | {k: v for k, v in unsaid.items() if official_option(options, k, v) == v}


# ---- names of StyleGAN2's tensors: the form of stylegan2-ada-pytorch stands for all -----------


def noise_name(m):
    """Our name of noise map k: 0 belongs to b4.conv1, 1 and 2 to b8.conv0 and conv1, ..."""
    k = int(m[1])
    return f"synthesis.b{2 ** ((k + 5) // 2)}.conv{(k + 1) % 2}.noise_const"


TENSORFLOW = (  # pattern in a variable's name, ours
    (r"^dlatent_avg", "mapping.w_avg"),
    (r"^synthesis/noise(\d{1,2})", noise_name),
    (r"^synthesis/4x4/Conv/", "synthesis/4x4/Conv1/"),
    (r"(\d+)x\d+/", r"b\1."),
    (r"Conv([01])(_up|_down)?/", r"conv\1."),
    (r"(Conv|ToRGB|FromRGB|Skip)/", lambda m: f"{m[1].lower()}."),
    (r"(mapping/Dense|Mapping)(\d+)/", r"mapping.fc\2."),
    (r"(mapping/)?LabelEmbed/", "mapping.embed."),
    (r"Dense0/", "fc."),
    (r"^Output/", "b4.out."),
    (r"Const/const", "const"),
    (r"mod_(weight|bias)", r"affine.\1"),
    (r"/", "."),
)
ROSINALITY_G = (
    (r"^latent_avg", "mapping.w_avg"),
    (r"^style\.(\d+)", lambda m: f"mapping.fc{int(m[1]) - 1}"),
    (r"^input\.input", "synthesis.b4.const"),
    (r"^noises\.noise_(\d{1,2})", noise_name),
    (r"^conv1", "synthesis.b4.conv1"),
    (r"^convs\.(\d{1,2})", lambda m: f"synthesis.b{8 << int(m[1]) // 2}.conv{int(m[1]) % 2}"),
    (r"^to_rgb1", "synthesis.b4.torgb"),
    (r"^to_rgbs\.(\d{1,2})", lambda m: f"synthesis.b{8 << int(m[1])}.torgb"),
    (r"\.conv\.modulation\.", ".affine."),
    (r"\.conv\.weight", ".weight"),
    (r"\.noise\.weight", ".noise_strength"),
    (r"\.activate\.bias", ".bias"),
)


def rosinality_D(res):
    return (
        (r"^convs\.0\.\d", f"b{res}.fromrgb"),
        (r"^convs\.(\d{1,2})", lambda m: f"b{2 * res >> int(m[1])}"),
        (r"conv([12])\.\d", lambda m: f"conv{int(m[1]) - 1}"),
        (r"skip\.1", "skip"),
        (r"^final_conv\.\d", "b4.conv"),
        (r"^final_linear\.(\d)", lambda m: ("b4.fc", "b4.out")[int(m[1])]),
    )


def stylegan2_names(arrays, options):
    """The tensors of an official StyleGAN2 network of any kind, named and laid out as those of
    stylegan2-ada-pytorch are, but for sides of 1. Raises ValueError if that cannot be."""
    arrays = {k: v for k, v in arrays.items() if not k.endswith(("_filter", ".kernel", "lod"))}
    if any(re.search(r"RGB_lod\d/mod_", name) for name in arrays):
        raise ValueError("its images grow, as in Table 1's rows B to D, which is not supported")
    if any(re.search(r"StyleMod/|RGB_lod\d", name) for name in arrays):
        raise ValueError("these are tensors of a StyleGAN: use stylegan.py")
    if any("LabelConcat" in name for name in arrays):
        raise ValueError("its labels are concatenated to z, which is not supported")
    rules = ()
    if any("/" in name for name in arrays):
        rules = TENSORFLOW
        for name, t in arrays.items():
            if name.endswith("weight"):  # (kh, kw, I, O), (I, O)
                t = t.permute(3, 2, 0, 1) if t.ndim == 4 else t.T
            if name.endswith("Conv0_up/weight"):  # the original correlates there
                t = t.flip([2, 3])
            arrays[name] = t + 1 if name.endswith("mod_bias") else t
    elif "input.input" in arrays:
        rules = ROSINALITY_G
    elif numbers := {int(m[1]) for name in arrays if (m := re.match(r"convs\.(\d+)", name))}:
        rules = rosinality_D(4 << max(numbers))
    found = {}
    for name, t in arrays.items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        found[name] = t
    known = (official_option(options, name) for name in ("mapping_lrmul", "lr_multiplier"))
    times = next(filter(None, known), 0.01) / 0.01  # the learning rate's factor, ours is 0.01
    return {k: t * times if k.startswith("mapping.fc") else t for k, t in found.items()}


def stylegan2_config(arrays, options):
    """The config of the G or D of stylegan2.py that holds these tensors, with official names."""
    shape = {name: tuple(t.shape) for name, t in arrays.items()}
    G = "synthesis." if "synthesis.b4.const" in shape else ""
    found = (re.match(rf"{re.escape(G)}b(\d+)\.", name) for name in shape)
    blocks = sorted({int(m[1]) for m in found if m})
    if blocks != [2**i for i in range(2, len(blocks) + 2)] or not blocks:
        raise ValueError("no blocks b4, b8, ... of a StyleGAN2 network")
    res, rgb = blocks[-1], "torgb" if G else "fromrgb"
    conv = {r: f"{G}b{r}.{'conv1' if G else 'conv0'}.weight" for r in blocks}
    conv |= {} if G else {4: "b4.conv.weight"}
    widths = {r: shape[name][-4] for r, name in conv.items()}
    most = max(widths.values())
    narrow = [r * w for r, w in widths.items() if w < most]
    config = dict(channel_max=most, channel_base=max(narrow, default=res * most))
    if widths != {r: min(config["channel_base"] // r, most) for r in blocks}:
        raise ValueError(f"{widths} channels are not those of a StyleGAN2 network")
    architecture = "resnet" if any(".skip." in name for name in shape) else "orig"
    config["architecture"] = "skip" if f"{G}b4.{rgb}.weight" in shape else architecture
    img_channels = shape[f"{G}b{res}.{rgb}.weight"][-4 if G else -3]
    map_layers = len([n for n in shape if re.fullmatch(r"mapping\.fc\d+\.weight", n)])
    config |= dict(img_resolution=res, img_channels=img_channels, map_layers=map_layers)
    embed_dim, c_dim = shape.get("mapping.embed.weight", (0, 0))
    config |= dict(c_dim=c_dim, clamp=official_option(options, "conv_clamp"))
    config["half_res"] = official_option(options, "num_fp16_res") or 0
    if not G:
        group = official_option(options, "mbstd_group_size") or 4
        extra = shape["b4.conv.weight"][1] - widths[4]
        cmap_dim = shape["b4.out.weight"][0] if c_dim else None
        return dict(kind="D", mbstd_group=group, mbstd_features=extra, cmap_dim=cmap_dim, **config)
    w_dim = shape["synthesis.b4.conv1.affine.weight"][1]
    z_dim = shape["mapping.fc0.weight"][1] - embed_dim
    noisy = "synthesis.b4.conv1.noise_strength" in shape
    return dict(kind="G", z_dim=z_dim, w_dim=w_dim, use_noise=noisy, **config)


# =============================================================================
# Scores: FID, KID, fd8
# =============================================================================

KID_ROWS = 10_000  # features kept for KID, 80 MB; of more images, evenly spaced ones
STATISTICS_FORMAT = 1  # part of the cache key: raise it when the numbers below change meaning


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def shrink(x):
    return F.max_pool2d(x, 3, stride=2)


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalisation (eps 0.001), ReLU."""

    def __init__(self, I, O, kernel, stride=1, pad=0):
        super().__init__()
        self.conv = nn.Conv2d(I, O, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(O, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Several branches on one input, concatenated in the given order.

    A branch is a list of steps, one after the other. A step is a pooling function; or a tuple
    (name, output channels, kernel (height, width), stride), padded to keep the size unless it has
    a stride; or a list of such tuples, all applied to the same tensor and concatenated.
    """

    def __init__(self, I, branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = I
            for step in (step for step in branch if not callable(step)):
                units = step if isinstance(step, list) else [step]
                for name, O, kernel, *stride in units:
                    pad = 0 if stride else (kernel[0] // 2, kernel[1] // 2)
                    self.add_module(name, ConvUnit(width, O, kernel, *stride, pad=pad))
                width = sum(unit[1] for unit in units)

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                if callable(step):
                    y = step(y)
                elif isinstance(step, list):
                    y = torch.cat([self.get_submodule(name)(y) for name, *_ in step], 1)
                else:
                    y = self.get_submodule(step[0])(y)
            outputs.append(y)
        return torch.cat(outputs, 1)


K1, K3, K5, K17, K71, K13, K31 = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)


def mixed_a(I, pool_features):
    five = [("branch5x5_1", 48, K1), ("branch5x5_2", 64, K5)]
    three = [("branch3x3dbl_1", 64, K1), ("branch3x3dbl_2", 96, K3), ("branch3x3dbl_3", 96, K3)]
    pool = [average, ("branch_pool", pool_features, K1)]
    return Mixed(I, [[("branch1x1", 64, K1)], five, three, pool])


def mixed_b(I):
    three = [("branch3x3dbl_1", 64, K1), ("branch3x3dbl_2", 96, K3), ("branch3x3dbl_3", 96, K3, 2)]
    return Mixed(I, [[("branch3x3", 384, K3, 2)], three, [shrink]])


def mixed_c(I, C):
    once = [("branch7x7_1", C, K1), ("branch7x7_2", C, K17), ("branch7x7_3", 192, K71)]
    twice = [("branch7x7dbl_1", C, K1), ("branch7x7dbl_2", C, K71), ("branch7x7dbl_3", C, K17)]
    twice += [("branch7x7dbl_4", C, K71), ("branch7x7dbl_5", 192, K17)]
    return Mixed(I, [[("branch1x1", 192, K1)], once, twice, [average, ("branch_pool", 192, K1)]])


def mixed_d(I):
    three = [("branch3x3_1", 192, K1), ("branch3x3_2", 320, K3, 2)]
    seven = [("branch7x7x3_1", 192, K1), ("branch7x7x3_2", 192, K17)]
    seven += [("branch7x7x3_3", 192, K71), ("branch7x7x3_4", 192, K3, 2)]
    return Mixed(I, [three, seven, [shrink]])


def mixed_e(I, pool):
    once = [("branch3x3_1", 384, K1), [("branch3x3_2a", 384, K13), ("branch3x3_2b", 384, K31)]]
    twice = [("branch3x3dbl_1", 448, K1), ("branch3x3dbl_2", 384, K3)]
    twice += [[("branch3x3dbl_3a", 384, K13), ("branch3x3dbl_3b", 384, K31)]]
    return Mixed(I, [[("branch1x1", 320, K1)], once, twice, [pool, ("branch_pool", 192, K1)]])


class InceptionV3(nn.Module):
    """The Inception-v3 of FID, as in the TensorFlow graph of 2015-12-05 (Szegedy et al. 2015).

    It is not the ImageNet network of torchvision: average pools leave the padding out, the last
    block pools with the maximum, and there are 1008 classes. State dict names are those of the
    published file (566 entries). `label` says which weights it holds.

    forward(x) -> features (N, 2048); x: (N, 3, 299, 299) from resize_for_inception.
    """

    def __init__(self):
        super().__init__()
        self.label = "inception with unnamed weights"
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, pad=1)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = mixed_b(288)
        self.Mixed_6b = mixed_c(768, 128)
        self.Mixed_6c = mixed_c(768, 160)
        self.Mixed_6d = mixed_c(768, 160)
        self.Mixed_6e = mixed_c(768, 192)
        self.Mixed_7a = mixed_d(768)
        self.Mixed_7b = mixed_e(1280, average)
        self.Mixed_7c = mixed_e(2048, maximum)
        self.fc = nn.Linear(2048, 1008)  # only in the file: no score here needs it

    def stages(self, x):
        """Yields the maps of four depths: (N, 64, 73, 73), (N, 192, 35, 35), (N, 768, 17, 17),
        (N, 2048, 8, 8). Whoever stops early does not pay for the rest."""
        x = shrink(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        yield x
        x = shrink(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        yield x
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        yield x
        yield self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))

    def forward(self, x):
        for maps in self.stages(x):
            features = maps.mean([2, 3])  # of the last stage in the end
        return features


def cache_folder():
    """Where fetched weights and statistics are kept, for all projects on this machine."""
    return Path(os.environ.get("GANS_CACHE") or "~/.cache/gans").expanduser()


def uint8_batches(images, batch=32):
    """Yields tensors (n, C, H, W), n <= batch, of images: such a tensor, an iterable of them, or a
    function that returns one, whenever it is gone over; uint8 where networks look at them."""
    images = images() if callable(images) else images
    for chunk in [images] if torch.is_tensor(images) else images:
        yield from chunk.split(batch)


def bilinear_tf1(x, size):
    """(N, C, H, W) -> (N, C, size, size); source coordinate = destination * in / size, as TF1,
    with in / size, but no product, rounded to float32, as toshas/torch-fidelity has it."""
    for dim in (3, 2):
        step = float(np.float32(x.shape[dim] / size))
        position = torch.arange(size, dtype=torch.float64, device=x.device) * step
        lo = position.long().clamp(max=x.shape[dim] - 1)
        hi = (lo + 1).clamp(max=x.shape[dim] - 1)
        weight = (position - lo).to(x.dtype)
        near = x.index_select(dim, lo)
        far = x.index_select(dim, hi)
        x = near + (far - near) * (weight if dim == 3 else weight[:, None])
    return x


def resize_for_inception(images, mode="tf1", dtype=torch.float32):
    """uint8 (N, 1 or 3, H, W) -> (N, 3, 299, 299), what InceptionV3 takes, about [-1, 1].

    "tf1": bilinear, source = destination * in / 299, no half-pixel shift, no antialiasing even
        when shrinking, then (x - 128) / 128. FID as TTUR, StyleGAN and torch-fidelity compute it.
    "pytorch_fid": bilinear about pixel centres, then 2 x / 255 - 1 (mseitzer/pytorch-fid).
    "clean": Pillow's antialiased bicubic in float, clipped to 0..255, then as tf1 (clean-fid).
    A score of one mode does not compare with a score of another.
    """
    N, C, H, W = images.shape
    if mode not in RESIZE_MODES or C not in (1, 3) or images.dtype != torch.uint8:
        raise ValueError(f"mode {mode!r}, {images.dtype} {tuple(images.shape)}: see the docstring")
    x = images.expand(N, 3, H, W)
    if mode == "pytorch_fid":
        return 2 * F.interpolate(x.to(dtype) / 255, (299, 299), mode="bilinear") - 1
    if mode == "clean":
        planes = x.reshape(-1, H, W).cpu().numpy().astype(np.float32)
        planes = [Image.fromarray(p).resize((299, 299), Image.Resampling.BICUBIC) for p in planes]
        x = torch.from_numpy(np.stack([np.asarray(p) for p in planes])).reshape(N, 3, 299, 299)
        return (x.to(images.device, dtype).clamp(0, 255) - 128) / 128
    return (bilinear_tf1(x.to(dtype), 299) - 128) / 128


@contextlib.contextmanager
def exact_float32(device):
    """No autocast and no TF32 within, so that a score is the same whatever the training uses."""
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


@torch.no_grad()
def features_of(images, net, prepare):
    """net(prepare(x)) of images (see uint8_batches) where the network is, gathered on the CPU.
    Raises ValueError without images and for features that are not finite."""
    weight, rows = next(net.parameters()), []
    for x in uint8_batches(images):  # a generator network that makes x lazily keeps its precision
        with exact_float32(weight.device):
            rows.append(net(prepare(x.to(weight.device), dtype=weight.dtype)).cpu())
    features = torch.cat(rows) if rows else torch.zeros(0)
    if not len(features) or not features.isfinite().all():
        raise ValueError(f"features of {len(features)} images: none, or not all finite")
    return features


def inception_features(images, net, mode="tf1"):
    """Pooled features (n, 2048) of images, see uint8_batches, in the type of the network."""
    return features_of(images, net, functools.partial(resize_for_inception, mode=mode))


def mean_cov(features, ddof=1):
    """mu (d,), sigma (d, d) of features (n, d), in float64. ddof 1 as in TTUR and pytorch-fid, 0 as
    NVIDIA's PyTorch."""
    if len(features) <= ddof:
        raise ValueError(f"a covariance needs more than {ddof} images, got {len(features)}")
    mu = features.mean(0, dtype=torch.float64)
    centred = (rows.double() - mu for rows in features.split(4096))  # no copy of all of them
    return mu, sum(rows.T @ rows for rows in centred) / (len(features) - ddof)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, Eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of R sigma2 R with R the
    symmetric root of sigma1: two symmetric eigenproblems in float64, stable where the root of the
    product is not. Raises ValueError for distances that are NaN or clearly negative.
    """
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(t).to("cpu", torch.float64) for t in (mu1, sigma1, mu2, sigma2)
    )
    e, V = torch.linalg.eigh(sigma1)
    root = (V * e.clamp(min=0).sqrt()) @ V.T
    product = root @ sigma2 @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return clamped((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap)


def frechet_distance_of_features(features1, features2, ddof=1):
    """The same from the features (n1, d), (n2, d) themselves: exact, and fast, where n < d.

    With A and B the centred features over sqrt(n - ddof), sigma1 = A^T A, sigma2 = B^T B, and the
    trace of the root is the sum of the singular values of A B^T (n1, n2).
    """
    f1, f2 = (torch.as_tensor(f).to("cpu", torch.float64) for f in (features1, features2))
    A = (f1 - f1.mean(0)) / (len(f1) - ddof) ** 0.5
    B = (f2 - f2.mean(0)) / (len(f2) - ddof) ** 0.5
    overlap = torch.linalg.svdvals(A @ B.T).sum()
    traces = A.square().sum() + B.square().sum()
    return clamped((f1.mean(0) - f2.mean(0)).square().sum() + traces - 2 * overlap)


def clamped(distance):
    if not distance >= -1e-3:  # NaN too
        raise ValueError(f"Frechet distance {distance:g}: the covariances are not sound")
    return max(float(distance), 0.0)


def kid(real, fake, subsets=100, subset_size=1000, indices=None):
    """Kernel inception distance (Binkowski et al. 2018): mean and deviation over the subsets.

    The unbiased squared MMD of features real (n1, d), fake (n2, d) with kernel (x.y / d + 1)^3,
    float64; may be slightly negative. Subsets of min(subset_size, n1, n2) rows, drawn without
    replacement by a numpy Generator of seed 0, or given as pairs (real rows, fake rows).
    """
    real, fake = (torch.as_tensor(f).to("cpu", torch.float64) for f in (real, fake))
    m = min(subset_size, len(real), len(fake))
    if indices is None:
        subsets = 1 if m == len(real) == len(fake) else subsets  # every subset would be the same
        pick = np.random.default_rng(0).choice
        indices = (
            (pick(len(real), m, replace=False), pick(len(fake), m, replace=False))
            for _ in range(subsets)
        )
    values = []
    for i, j in indices:
        x, y = real[torch.as_tensor(i)], fake[torch.as_tensor(j)]
        if min(len(x), len(y)) < 2:
            raise ValueError(f"KID needs 2 images on each side, got {len(x)} and {len(y)}")
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy))
        values.append(float(within - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def averaged(x):
    """uint8 images, or floats in [-1, 1], (n, C, H, W) -> (n, C, 8, 8), float64 in [-1, 1]."""
    x = x.double() / 127.5 - 1 if x.dtype == torch.uint8 else x.double()
    return F.adaptive_avg_pool2d(x, 8)


@torch.no_grad()
def fd8(real, fake):
    """Frechet distance between images in [-1, 1] area-averaged to 8 x 8: needs no network.

    real, fake: see uint8_batches; floats in [-1, 1], too, so that those once `averaged` give the
    same; grey counts as three equal channels. 192 numbers per image, float64, covariance with
    n - 1.
    """
    moments = []
    for images in (real, fake):
        small = torch.cat([averaged(x).cpu() for x in uint8_batches(images, 256)])
        moments += mean_cov(small.expand(-1, 3, 8, 8).flatten(1))
    return frechet_distance(*moments)


def feature_statistics(features):
    """{mu, sigma, n, features}: the moments, and at most KID_ROWS evenly spaced rows for KID."""
    mu, sigma = mean_cov(features)
    rows = np.linspace(0, len(features) - 1, min(len(features), KID_ROWS)).round()
    return {"mu": mu, "sigma": sigma, "n": len(features), "features": features[rows.astype(int)]}


def cached(path, compute, use):
    """use(compute()), {name: tensor or number} as tensors, kept in an .npz file for the next time.
    A damaged file is computed again; one that cannot be written costs only a line."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return use({name: torch.from_numpy(data[name]) for name in data})
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception:  # NumPy, and use, meet a strange file with a dozen kinds of exception
        print(f"{path} is damaged: computing it again.", file=sys.stderr)
    found = {name: np.asarray(value) for name, value in compute().items()}
    try:
        save_arrays(path, **found)
    except UserError as e:
        print(f"{e} What it holds will be computed anew next time.", file=sys.stderr)
    return use({name: torch.from_numpy(array) for name, array in found.items()})


def real_statistics(images, net, mode="tf1", folder=None):
    """feature_statistics of the real images, cached in a folder (default: the cache) by content.

    images: see uint8_batches, no generator, since they are gone over twice: the name of the cache
    file is a hash over every pixel, the resize mode, the weights and the format, so that changed
    data never meets old statistics. A damaged cache file is computed again.
    """
    if hasattr(images, "__next__"):
        raise ValueError("real images are read twice: pass a tensor, a list or a function")
    digest = hashlib.sha256(f"{STATISTICS_FORMAT} {mode} ddof 1 {KID_ROWS}".encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    for x in uint8_batches(images):
        for image in x.cpu():
            digest.update(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes())
    path = Path(folder or cache_folder(), f"inception-statistics-{digest.hexdigest()[:32]}.npz")

    def compute():
        return feature_statistics(inception_features(images, net, mode))

    def use(found):  # all of these, or the file is damaged
        found = {name: found[name] for name in ("mu", "sigma", "n", "features")}
        return found | {"n": int(found["n"])}

    return cached(path, compute, use)


def fid_kid(real, fake, net, mode="tf1", folder=None):
    """FID and KID x 1000 of images (see uint8_batches) with counts, resize rule and network.
    real may also be what real_statistics says of them, with this network and mode.

    Only the real images' statistics are cached. FID shrinks as n grows: compare scores of
    equal n_real and n_fake only. Moves no random state of torch, even where `fake` is a
    generator that samples as it goes.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        a = real if isinstance(real, dict) else real_statistics(real, net, mode, folder)
        b = feature_statistics(inception_features(fake, net, mode))
    if max(a["n"], b["n"]) <= 2048:  # rank-deficient: the features give more digits, sooner
        fid = frechet_distance_of_features(a["features"], b["features"])
    else:
        fid = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    mean, std = kid(a["features"], b["features"])
    scores = {"fid": fid, "kid_x1000": 1000 * mean, "kid_x1000_std": 1000 * std}
    scores.update(n_real=a["n"], n_fake=b["n"], resize=mode, features=net.label)
    if min(a["n"], b["n"]) < 2048:
        scores["warning"] = "fewer than 2048 images: FID is biased upward; read KID, or equal n"
    return scores


def mean_abs(a, b):
    """Mean absolute difference of uint8 images, on the scale on which they range over [-1, 1]."""
    return (a.short() - b.short()).abs().sum().item() / a.numel() / 127.5


def mean_abs_of_pairs(images):
    """The mean of mean_abs over all pairs of n uint8 images (n, ...), none of which is formed: the
    k-th smallest of n values is above k others and below n - 1 - k."""
    n = len(images)
    weights = torch.arange(1 - n, n, 2, device=images.device).float()
    sums = torch.tensordot(weights, images.sort(0).values.float(), 1)  # of small whole numbers
    return sums.double().mean().item() / (n * (n - 1) / 2) / 127.5


def translation_scores(real, fake, target, rec=None, true=None):
    """Scores of translations `fake` of `real`, all uint8 (N, C, H, W), that need no download.

    fd8 to pictures `target` of the domain; with `rec`, the way back, the cycle error; with `true`,
    the right answers, the error and that of doing nothing. Errors are mean absolute differences of
    values in [-1, 1]; fakes count in 8 bits, as one saves them.
    """
    row = {"n_real": len(target), "n_fake": len(fake)}
    if min(len(target), len(fake)) > 1:  # of one picture there is no covariance
        row["fd8"] = fd8(target, fake)
    if rec is not None:
        row["cycle_error"] = mean_abs(rec, real)
    if true is not None:
        row["error"] = mean_abs(fake, true)
        row["error_of_doing_nothing"] = mean_abs(real, true)
    return row


def load_inception_or_explain(path, device):
    """The FID network, or None after one line that says how to get it."""
    return load_or_explain("FID and KID are left out", load_inception, path, device=device)


def load_or_explain(without, load, *paths, device):
    """load(*paths, device), or None after a line of what is `without` it and how to get it; a file
    that the user named has to be there."""
    for path in filter(None, paths):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file.")
    try:
        return load(*paths, device)
    except UserError as e:
        if any(paths):
            raise
        print(f"{without}: {e}")
        return None


def metrics_of(args):
    """The names in --metrics."""
    metrics = [name for name in args.metrics.split(",") if name]
    known = args.known_metrics.split(",")
    if unknown := set(metrics) - set(known):
        raise UserError(
            f"--metrics: no {', '.join(sorted(unknown))}; there are {', '.join(known)}."
        )
    return metrics


PPL2 = {"ppl2_wend": dict(space="w")}  # path lengths of StyleGAN2 and later: perceptual_path_length


def describe_scores(row):
    """One line for a dict of scores, with counts, resize rule and feature network."""
    parts = [f"{row['n_real']} real, {row['n_fake']} fake"]
    if "fd8" in row:
        parts += [f"fd8 {row['fd8']:.3f}"]
    if "fid" in row:
        fid = row["fid"]
        parts += [f"FID {fid['fid']:.2f}, KID x 1000 {fid['kid_x1000']:.2f}"]
        parts += [f"{fid['n_real']} real, resize {fid['resize']}, features {fid['features']}"]
        parts += [fid["warning"]] if "warning" in fid else []
    if "precision" in row:
        parts += [f"precision {row['precision']:.3f}, recall {row['recall']:.3f} (VGG16, k = 3)"]
    lengths = [k for k in row if k.startswith(("ppl", "path"))]
    if lengths:
        lengths = ", ".join(f"{k} {row[k]:.4g}" for k in lengths)
        parts += [f"{lengths} ({row['n_paths']} paths)"]
    if "ls" in row:
        ls = row["ls"]
        parts += [f"linear separability z {ls['z']:.2f}, w {ls['w']:.2f} ({ls['n']} samples)"]
    if "diversity" in row:
        parts += [f"diversity {row['diversity']:.4f}"]
    if "cycle_error" in row:
        parts += [f"cycle error {row['cycle_error']:.4f}"]
    if "error" in row:
        share = row["error"] / row["error_of_doing_nothing"]
        parts += [f"error to the true counterpart {row['error']:.4f}"]
        parts += [f"{share:.0%} of doing nothing ({row['error_of_doing_nothing']:.4f})"]
        if "error_in_mean_style" in row:
            share = row["error_in_mean_style"] / row["error_of_doing_nothing"]
            parts += [f"in the mean style {share:.0%}"]
    return " | ".join(parts)


# =============================================================================
# VGG16 and AlexNet: LPIPS, path length, precision and recall
# =============================================================================

WEIGHTS = {  # what: (name in the cache folder, address, sha256)
    "Inception": (  # the TensorFlow graph of 2015-12-05, Apache-2.0
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "VGG16": (
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "LPIPS": (  # BSD-2
        "lpips-v0.1-vgg.pth",
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
        "v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
    "AlexNet": (  # of the checksum the name's digits are published
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be79",
    ),
    "LPIPS of AlexNet": (
        "lpips-v0.1-alex.pth",
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
        "v0.1/alex.pth",
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    ),
    "FAN": (  # no checksum is published
        "wing.ckpt",
        "https://www.dropbox.com/s/tjxpypwpt38926e/wing.ckpt?dl=1",
        None,
    ),
    "mean landmarks": (
        "celeba_lm_mean.npz",
        "https://www.dropbox.com/s/91fth49gyb7xksk/celeba_lm_mean.npz?dl=1",
        None,
    ),
}


class Ignored:
    """Stands in for NumPy's numbers in a file of tensors, which nobody needs."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


NUMPY_NAMES = ("numpy.dtype", "numpy.ndarray") + tuple(
    f"numpy.{core}.multiarray.{name}"
    for core in ("core", "_core")
    for name in ("scalar", "_reconstruct")
)


def read_tensors(file):
    """What torch.save wrote, onto the CPU, but for NumPy's numbers; nothing in it is run."""
    with torch.serialization.safe_globals([(Ignored, name) for name in NUMPY_NAMES]):
        return torch.load(file, map_location="cpu", weights_only=True)


def read_weights(what, path, shapes, read=read_tensors):
    """(tensors, label) of a file, or of the cache's copy of WEIGHTS (fetched there if missing).

    Another file than the published one is taken when given by path, and labelled by its hash.
    read(file) -> {name: tensor or array}.
    Raises UserError if it is missing, damaged, or holds other names and shapes than `shapes`.
    """
    name, url, sha256 = WEIGHTS[what]
    file = Path(path) if path else cache_folder() / name
    if not path and not file.exists():
        download([url], file, sha256=sha256)
    try:
        found = sha256_of(file)
    except OSError as e:
        raise UserError(f"{what} weights {file}: {e.strerror}.") from e
    published = bool(sha256) and found.startswith(sha256)
    if not path and sha256 and not published:
        raise UserError(f"{file} is damaged (sha256 {found[:8]}, not {sha256[:8]}). Delete it.")
    try:
        tensors = read(file)
        if {k: tuple(v.shape) for k, v in tensors.items()} != shapes:
            raise ValueError("other tensors")
    except Exception as e:  # torch.load meets a strange file with a dozen kinds of exception
        raise UserError(
            f"{file} does not hold {what} weights ({type(e).__name__}). Expected {name} from {url},"
            f" {len(shapes)} tensors{f', sha256 {sha256[:8]}' if sha256 else ''}."
        ) from e
    return tensors, Path(name).stem if published else f"{what} {found[:8]}"


class VGG16(nn.Module):
    """Configuration D of Simonyan and Zisserman (2015), with torchvision's names of tensors.

    forward(x) -> (N, 4096), the second fully connected layer after its ReLU; x: for_vgg16(images),
    224 x 224 as in training, or another size from 32. Dropout is left out: nothing here trains it.
    width: 64; less makes a small network of the same shape.
    """

    least = 16  # pixels, of which the last stage has one

    def __init__(self, width=64):
        super().__init__()
        layers, I = [], 3
        for O, convs in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(convs):
                layers += [nn.Conv2d(I, O * width, 3, padding=1), nn.ReLU(inplace=True)]
                I = O * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = 64 * width
        self.classifier = nn.Sequential(
            *(nn.Linear(I * 7 * 7, hidden), nn.ReLU(), nn.Identity()),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Identity()),
            nn.Linear(hidden, 1000),  # only in the file: no score here needs it
        )

    def stages(self, x):
        """Yields the five maps that LPIPS compares, relu1_2, 2_2, 3_3, 4_3 and 5_3: 64, 128, 256,
        512, 512 channels, sides H, H / 2, ..., H / 16."""
        for layer in self.features[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
        yield x

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), 7)
        return self.classifier[:5](x.flatten(1))


def for_vgg16(x):
    """Images (N, 1 or 3, H, W) in [-1, 1] -> (N, 3, H, W) with ImageNet's mean and scale taken out.

    LPIPS writes the same map as (x - (-.030, -.088, -.188)) / (.458, .448, .450).
    """
    mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return ((x + 1) / 2 - mean) / std


class AlexNet(nn.Module):
    """The convolutions of Krizhevsky (2014, "one weird trick"), with torchvision's names.

    stages(x) yields the five maps that LPIPS compares, each after its ReLU: 64, 192, 384, 256, 256
    channels; x: for_vgg16(images), sides from 31.
    """

    least = 31  # pixels, of which the last stages have one

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )

    def stages(self, x):
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                yield x


def load_frozen(build, what, path=None, device="cpu"):
    """The network build() in eval mode, with weights of a file; see read_weights for files and
    errors. Moves no random state."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        net = build()
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    counts = {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")}

    def known(file):  # it may hold a classifier, too, or a training's state, and may lack counts
        found = read_tensors(file)
        found = counts | found.get("state_dict", found)
        return {name: found[name] for name in shapes}

    tensors, net.label = read_weights(what, path, shapes, known)
    net.load_state_dict(tensors, assign=True)
    return net.float().requires_grad_(False).eval().to(device)


load_inception = functools.partial(load_frozen, InceptionV3, "Inception")
load_vgg16 = functools.partial(load_frozen, VGG16, "VGG16")
load_alexnet = functools.partial(load_frozen, AlexNet, "AlexNet")


class LPIPS(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018, Eq. (1)): a distance that people's eyes agree with.

    forward(x, y) -> (N,); x, y: (N, 1 or 3, H, W) in [-1, 1], sides from net.least; grey counts as
    three equal channels. features(x) -> (N, n), whose squared distances are the same numbers, so
    that those of a fixed target are computed once. Differentiable in x and y; the weights are
    frozen.
    """

    def __init__(self, net, weights):
        """net: VGG16 or AlexNet; weights: five tensors, as many numbers as its stages have
        channels, none negative."""
        super().__init__()
        self.net = net
        for k, weight in enumerate(weights):
            if weight.min() < 0:
                raise ValueError(f"LPIPS weights of stage {k} are negative: {weight.min():g}")
            self.register_buffer(f"lin{k}", weight.detach().float().reshape(-1, 1, 1))
        self.requires_grad_(False).eval()

    def features(self, x):
        least = self.net.least
        if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < least:
            shape = tuple(x.shape)
            raise ValueError(f"LPIPS takes (N, 1 or 3, H, W) from {least} pixels, not {shape}")
        parts = []
        for k, maps in enumerate(self.net.stages(for_vgg16(x))):  # (N, C, h, w)
            unit = maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + 1e-10)
            # |sqrt(a / hw) (u - v)|^2, summed, is a |u - v|^2, averaged over the pixels.
            share = getattr(self, f"lin{k}") / maps[0, 0].numel()
            parts.append((unit * share.sqrt()).flatten(1))
        return torch.cat(parts, 1)

    def forward(self, x, y):
        return (self.features(x) - self.features(y)).square().sum(1)


def lpips_of(load, what, widths, net_path=None, lin_path=None, device="cpu"):
    """LPIPS from two files, a network's and the weights of its channels; see read_weights. Under
    other names, as in StarGAN v2's lpips_weights.ckpt, these stand in the order of the stages."""
    shapes = {f"lin{k}.model.1.weight": (1, C, 1, 1) for k, C in enumerate(widths)}

    def by_stage(file):
        found = read_tensors(file)
        same = found.keys() == shapes.keys()
        return found if same else dict(zip(shapes, found.values(), strict=True))

    tensors, label = read_weights(what, lin_path, shapes, by_stage)  # the small file first
    net = load(net_path)
    net.classifier = nn.Sequential()  # 0.5 GB of VGG16 that LPIPS does not need
    lpips = LPIPS(net, [tensors[name] for name in shapes])
    lpips.label = f"{label} of {net.label}"
    return lpips.to(device)


load_lpips = functools.partial(lpips_of, load_vgg16, "LPIPS", (64, 128, 256, 512, 512))
ALEX = "LPIPS of AlexNet"  # the one in tables of translation papers
load_lpips_alex = functools.partial(lpips_of, load_alexnet, ALEX, (64, 192, 384, 256, 256))


def vgg_features(images, vgg):
    """Features (n, 4096), float32, of images (see uint8_batches), for precision_recall.

    Bilinear with antialiasing to 224 x 224, then for_vgg16. NVIDIA's own VGG16 takes uint8 and
    resizes by itself, so that scores are close to those of the papers, and not the same.
    """

    def prepare(x, dtype):
        x = x.to(dtype) / 127.5 - 1
        return for_vgg16(F.interpolate(x, (224, 224), mode="bilinear", antialias=True))

    return features_of(images, vgg, prepare)


@torch.no_grad()
def precision_recall(real, fake, k=3, chunk=1024):
    """Precision and recall (Kynkaanniemi et al. 2019, Eqs. (1), (2)) of features (n1, d), (n2, d).

    Every point has a ball that reaches to its k-th nearest neighbour in its own set. Precision:
    the share of fakes in at least one real ball; recall: of reals in a fake one. Computed where the
    features are, in rows of `chunk`. The papers: 50,000 + 50,000 images, k = 3, vgg_features.
    """
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) <= k:
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise ValueError(f"features (n, d) of more than k = {k} images each, not {shapes}")
    real, fake = real - real.mean(0), fake - real.mean(0)  # distances round less near the origin

    def share_inside(points, centres):
        radii, hits = [], 0
        for i, rows in enumerate(centres.split(chunk)):
            distances = torch.cdist(rows, centres)  # (chunk, n)
            distances.diagonal(i * chunk).fill_(math.inf)  # no point is its own neighbour
            radii.append(distances.kthvalue(k, dim=1).values)
        radii = torch.cat(radii)
        for rows in points.split(chunk):
            hits += int((torch.cdist(rows, centres) <= radii).any(1).sum())
        return hits / len(points)

    with exact_float32(real.device):
        return share_inside(fake, real), share_inside(real, fake)


def path_point(a, b, t, space="w"):
    """The point at t (N,) between a and b (N, ..., d): on a line in w, on a great circle in z."""
    t = t.reshape(-1, *[1] * (a.ndim - 1))
    if space == "w":
        return a.lerp(b, t)
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    cosine = (a * b).sum(-1, keepdim=True)
    across = F.normalize(b - cosine * a, dim=-1)
    angle = t * cosine.clamp(-1, 1).acos()
    return a * angle.cos() + across * angle.sin()


def at_most_256(x):
    """Images (N, C, H, W), averaged over boxes of H // 256 pixels if they are larger than 256."""
    return F.avg_pool2d(x, x.shape[2] // 256) if x.shape[2] > 256 else x


def trimmed_mean(values):
    """Mean of what lies from the 1st percentile, rounded down, to the 99th, rounded up."""
    values = np.asarray(values, np.float64)
    low, high = np.percentile(values, 1, method="lower"), np.percentile(values, 99, method="higher")
    return float(values[(values >= low) & (values <= high)].mean())


@torch.no_grad()
def perceptual_path_length(
    draw, distance, n=50_000, batch=8, space="w", full=False, crop=False, eps=1e-4, seed=0
):
    """PPL (StyleGAN sec. 4.1): how far images move, in LPIPS / eps^2, for a step of eps in latents.

    draw(m) -> a, b, render: m pairs of endpoints, each (m, ..., d), w or ws if space is "w", normal
    z if it is "z"; and render(points) -> images (m, C, H, W), float32 around [-1, 1]: rounding to 8
    bits first would multiply the score. It is called twice, and must use the same noise and labels.
    distance(x, y) -> (m,): LPIPS. full: t uniform in [0, 1), not 0. crop: to the face, rows 3/8 to
    7/8, columns 2/8 to 6/8, as FFHQ's. The variants of the official code:
        ppl2_wend, in the tables of StyleGAN2 and ADA    the defaults
        ppl_wend, ppl_wfull, ppl_zend, ppl_zfull         crop=True; StyleGAN: n=100_000
    Boxes of at_most_256 are chosen after the crop, as in the TensorFlow code; the PyTorch code
    chooses them before, so that its cropped values at 512 and above do not compare.
    """
    rng = torch.Generator().manual_seed(seed)
    lengths = []
    for start in range(0, n, batch):
        a, b, render = draw(min(batch, n - start))
        t = (torch.rand(len(a), generator=rng) * full).to(a)
        views = []
        with exact_float32(a.device):  # in TF32 a step of eps would drown in rounding
            for at in (t, t + eps):
                x = render(path_point(a, b, at, space))
                if x.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"path length needs float32 images, not {x.dtype}")
                c = x.shape[2] // 8
                views.append(at_most_256(x[:, :, 3 * c : 7 * c, 2 * c : 6 * c] if crop else x))
            lengths.append(distance(*views).double().cpu() / eps**2)
    lengths = torch.cat(lengths)
    if not lengths.isfinite().all():
        raise ValueError("a path length is NaN or infinite")
    return trimmed_mean(lengths)


# =============================================================================
# Linear separability
# =============================================================================
# StyleGAN sec. 4.2, of the toy faces: their attributes, known exactly, stand for CelebA's 40.

_HEAD = ("skin", "eyes", "brows", "nose", "mouth", "hair", "neck", "ears", "glasses")
# Of toy_attributes, those that split the faces and show in 32 x 32 pixels: {name: (who has it, the
# regions where a picture has to change with it)}.
TOY_BINARY = {
    "looks right": (lambda a: a["yaw"] > 0, _HEAD),
    "leans right": (lambda a: a["tilt"] > 0, _HEAD),
    "mouth open": (lambda a: a["mouth_open"] > 0.1, ("mouth",)),
    "glasses": (lambda a: a["glasses"] > 0, ("glasses",)),
    "long hair": (lambda a: a["hair_length"] > 0.3, ("hair",)),
    "hair up": (lambda a: TOY_HAIR[a["hair_style"]] in ("bun", "bunches"), ("hair",)),
    "dark hair": (lambda a: a["hair_tone"] < 0.5, ("hair", "brows")),
    "dark skin": (lambda a: a["skin_tone"] < 0.5, ("skin", "nose", "mouth", "neck", "ears")),
    "dark clothes": (lambda a: a["clothes_light"] < 0.5, ("clothes",)),
    "blue clothes": (lambda a: a["clothes_hue"] in (1, 2), ("clothes",)),
    "striped sky": (lambda a: a["background_style"] == 2, ("background",)),
    "yellow sky": (lambda a: a["background_hue"] >= 0.75, ("background",)),
}
CLASSIFIER_SEEDS = 10_000  # its faces start here, after those that the GANs learn from


def attribute_classifier(size):
    """Images (N, 3, size, size) -> logits (N, K): a discriminator without minibatch statistics.

    Larger images are averaged to 64 pixels first, as the paper's are to 256.
    """
    layers, I, res = [nn.AvgPool2d(max(size // 64, 1))], 3, min(size, 64)
    while res > 4:
        O = 512 // res
        layers += [nn.Conv2d(I, O, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2)]
        I, res = O, res // 2
    layers += [nn.Conv2d(I, 128, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten()]
    layers += [nn.Linear(128 * 4 * 4, 128), nn.LeakyReLU(0.2), nn.Linear(128, len(TOY_BINARY))]
    return nn.Sequential(*layers)


def toy_examples(seeds, domain, size):
    """Toy faces (N, 3, size, size), uint8, and which of TOY_BINARY they have, (N, K) bool."""
    images = stack([pixels(toy_face(seed, domain, size)) for seed in seeds])
    has = [[test(a) for test, _ in TOY_BINARY.values()] for a in map(toy_attributes, seeds)]
    return images, torch.tensor(has)


def toy_classifier(size, device="cpu", seed=0, domain=0, faces=16_000, held_out=2000, epochs=4):
    """Learns to see TOY_BINARY in toy faces of size x size, a power of 2 from 8.

    Returns net, {attribute: accuracy on `held_out` other faces}, with net(images (N, 3, size, size)
    in [-1, 1]) -> logits (N, K), positive where a face has the attribute. Half a minute on one CPU
    core at 32 pixels. A pure function on the CPU; torch's global random state is left alone.
    """
    seeds = range(CLASSIFIER_SEEDS, CLASSIFIER_SEEDS + faces + held_out)
    images, has = toy_examples(seeds[:faces], domain, min(size, 64))
    images, has = images.to(device), has.to(device).float()
    with torch.random.fork_rng(devices=[]), exact_float32(device):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
        net = attribute_classifier(size).to(device)
        opt = torch.optim.Adam(net.parameters())
        batches = [rows for _ in range(epochs) for rows in torch.randperm(faces).split(32)]
        for k, rows in enumerate(batches):  # the learning rate falls to 0 over the second half
            opt.param_groups[0]["lr"] = 3e-3 * min(1, 2 - 2 * k / len(batches))
            logits = net[1:](to_float(images[rows], device))  # at most 64 x 64 already
            loss = F.binary_cross_entropy_with_logits(logits, has[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
        net.eval().requires_grad_(False)
        right = 0
        for start in range(faces, len(seeds), 100):
            images, has = toy_examples(seeds[start : start + 100], domain, size)
            right = right + ((net(to_float(images, device)) > 0).cpu() == has).sum(0)
    return net, {name: n / held_out for name, n in zip(TOY_BINARY, right.tolist(), strict=True)}


def linear_svm(x, y):
    """What a linear support vector machine, fitted to x (N, d) and y (N,) bool, takes y for.

    It minimises |w|^2 / 2 + sum_i max(0, 1 - y_i w.x_i)^2, y_i = -1 or 1, with a constant 1 as last
    feature: the objective of scikit-learn's LinearSVC, whose defaults the paper's code uses. Newton
    steps in float64, exact along the step; between kinks the objective is a parabola, so that a few
    reach its minimum. Returns (N,) bool; raises ValueError after 1000 steps.
    """
    if y.all() or not y.any():
        return y.clone()
    x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()  # (N, d + 1)
    signed = torch.where(y[:, None], x, -x)
    w = x.new_zeros(x.shape[1])
    for _ in range(1000):
        margin = 1 - signed @ w
        inside = signed[margin > 0]  # the samples that cost something
        grad = w - 2 * inside.T @ margin[margin > 0]
        if grad.norm() <= 1e-6 * signed.norm():  # at w = 0 and for random y, it is twice that norm
            return x @ w > 0
        hessian = 2 * inside.T @ inside
        hessian.diagonal().add_(1)
        move = -torch.linalg.solve(hessian, grad)
        along, low, high = signed @ move, 0.0, 1.0
        for _ in range(30):
            t = (low + high) / 2
            slope = (w + t * move) @ move - 2 * (margin - t * along).clamp(min=0) @ along
            low, high = (t, high) if slope < 0 else (low, t)
        w = w + high * move
    raise ValueError(f"no plane found in 1000 steps: latents of norm {x.norm(dim=1).mean():.3g}")


def conditional_entropy(x, y):
    """H(Y|X) in bits of samples x, y (N,) bool: what is left to know of y where x is known."""
    joint = torch.bincount(2 * x.long() + y.long(), minlength=4).double().reshape(2, 2) / len(x)
    nats = torch.special.entr(joint).sum() - torch.special.entr(joint.sum(1)).sum()
    return max(0.0, float(nats) / math.log(2))


def linear_separability(latents, logits):
    """How well planes split latent spaces by what the images show (StyleGAN sec. 4.2): 1 is best.

    latents: {space: (N, d)}; logits (N, K) of the images, as toy_classifier's. Of each attribute
    the half of the images with the surest logits counts; an attribute that all of them share adds
    nothing. Returns {space: 2 ** (sum of H)}, the paper's exp with H in nats, and {space: H (K,)}.
    The planes are fitted to the samples that they are judged by: N must be well above d.
    """
    entropies = {space: [] for space in latents}
    for logit in logits.T:
        sure = logit.abs().argsort(descending=True, stable=True)[: len(logit) // 2]
        has = logit[sure] > 0
        for space, x in latents.items():
            try:
                guess = linear_svm(x[sure], has)
            except ValueError:  # no plane was found: a perfect one, as the official code has it
                guess = has
            entropies[space].append(conditional_entropy(guess, has))
    return {space: 2 ** sum(H) for space, H in entropies.items()}, entropies


# =============================================================================
# Regions: what an edit changes, and where
# =============================================================================
# Of no paper, though SemanticStyleGAN's claims that its edits are local: measures for any model.

SEGMENTER_FORMAT = 1  # part of the name of its file: raise it when the training changes


class Segmenter(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] -> logits (N, K, H, W) of K classes: a small U-Net.

    H, W: multiples of 8; pictures above 128 pixels are averaged to 128 first, and the logits
    enlarged.
    """

    def __init__(self, K, widths=(16, 32, 64, 64)):
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for I, O in itertools.pairwise((3, *widths)):
            self.down.append(nn.Sequential(*self.layer(I, O), *self.layer(O, O)))
        for O, I in itertools.pairwise(widths):
            self.up.insert(0, nn.Sequential(*self.layer(I + O, O)))
        self.classes = nn.Conv2d(widths[0], K, 1)

    def layer(self, I, O):
        return nn.Conv2d(I, O, 3, padding=1, bias=False), nn.BatchNorm2d(O), nn.ReLU()

    def forward(self, x):
        size = x.shape[2:]
        x = F.avg_pool2d(x, max(1, min(size) // 128))
        skips = []
        for layers in self.down:
            skips.append(layers(F.avg_pool2d(skips[-1], 2) if skips else x))
        x = skips.pop()
        for layers in self.up:
            x = layers(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return F.interpolate(self.classes(x), size, mode="bilinear")


def load_segmenter(data, K, size, device="cpu", seed=0, folder=None, steps=400, batch=16):
    """A Segmenter that learned from labelled pictures, in eval mode, and a printed line on it.

    data: a LabelledSet of size x size pictures, of which at most 4,000, evenly spaced, are used, at
    128 pixels at most; K: its classes. A tenth of them, at most 400, are held out and judged:
    net.scores = {"accuracy", "mean_iou", "n"}. It is kept in a folder (default: the cache) under a
    hash of all that it learned from, so that changed data never meets an old one.
    One to two minutes on one CPU core at 64 pixels. torch's global random state is left alone.
    """
    rows = np.linspace(0, len(data) - 1, min(len(data), 4000)).round().astype(int)
    factor = max(1, size // 128)
    centre = slice(factor // 2, None, factor)

    def small(k):
        image, label = data[rows[k]]
        return np.asarray(Image.fromarray(image).reduce(factor)), label[centre, centre]

    images, labels = zip(*prefetch(small, 0, len(rows), 4), strict=True)
    images, labels = stack(images), torch.from_numpy(np.stack(labels))
    n = min(len(rows) // 10 + 1, 400)
    digest = hashlib.sha256(f"{SEGMENTER_FORMAT} {K} {size} {seed} {steps} {batch}".encode())
    swap = torch.from_numpy(data.swap)
    for part in (images, labels, swap):
        digest.update(str(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
    path = Path(folder or cache_folder(), f"segmenter-{digest.hexdigest()[:32]}.npz")
    learn_from = images, labels, swap, n, K, device, seed, steps, batch

    def segmenter(held):
        with torch.device("meta"):  # no random numbers for weights that are replaced
            net = Segmenter(K)
        net.scores = {name: held.pop(name).item() for name in ("accuracy", "mean_iou", "n")}
        net.load_state_dict(held, assign=True)
        return net

    net = cached(path, functools.partial(train_segmenter, *learn_from), segmenter)
    accuracy, iou, n = net.scores.values()
    print(
        f"segmenter of {K} classes, on {n} pictures that it did not learn from: {accuracy:.1%} of"
        f" the pixels are right, mean IoU {iou:.3f}"
    )
    return net.to(device).eval().requires_grad_(False)


def train_segmenter(images, labels, swap, held_out, K, device, seed, steps, batch):
    """State dict of a Segmenter of `steps` steps of Adam on cross entropy, mirrored at random, and
    its scores on `held_out` random pairs that it does not see. swap: see mirror_table."""
    print(f"training a segmenter of {K} classes on {len(images) - held_out} pictures", flush=True)
    images, labels, swap = images.to(device), labels.to(device), swap.to(device).long()
    with torch.random.fork_rng(devices=[]), exact_float32(device):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
        order = torch.randperm(len(images))
        test, learn = order[:held_out], order[held_out:]
        net = Segmenter(K).to(device)
        opt = torch.optim.Adam(net.parameters())
        for k in range(steps):
            opt.param_groups[0]["lr"] = 1e-2 * (1 - k / steps)
            rows = learn[torch.randint(len(learn), (batch,))].to(device)
            mirror = torch.randint(2, (batch,)).to(device).bool()
            x, y = to_float(images[rows], device), labels[rows].long()
            x = torch.where(mirror[:, None, None, None], x.flip(3), x)
            y = torch.where(mirror[:, None, None], swap[y.flip(2)], y)
            loss = F.cross_entropy(net(x), y, ignore_index=NO_CLASS)
            opt.zero_grad()
            loss.backward()
            opt.step()
        net.eval()
        iou, accuracy = mean_iou(segment(net, images[test.to(device)]), labels[test.to(device)], K)
    scores = {"accuracy": accuracy, "mean_iou": iou, "n": held_out}
    return moved(net.state_dict(), "cpu") | scores


@torch.no_grad()
def segment(net, images):
    """The classes that a Segmenter sees in images, uint8 (N, 3, H, W): uint8 (N, H, W), where the
    images are."""
    device = next(net.parameters()).device
    parts = [net(to_float(x, device)).argmax(1).to(torch.uint8) for x in uint8_batches(images)]
    return torch.cat(parts).to(images.device)


def mean_iou(a, b, K):
    """Agreement of labels a, b (N, H, W): intersection over union, the mean of the classes below K
    that are in a or b, and the share of equal pixels. Pixels of K or more in one do not count."""
    known = (a < K) & (b < K)
    table = torch.bincount(K * a[known].long() + b[known].long(), minlength=K * K)
    table = table.reshape(K, K).double()
    equal, union = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    seen = union > 0
    return (equal[seen] / union[seen]).mean().item(), (equal.sum() / table.sum()).item()


def locality(before, after, region):
    """Where an edit changes pictures: two float64 tensors (N,).

    before, after: (N, 3, H, W), uint8 or in [-1, 1]; region: (N, H, W) bool, the union of the
    region in both. It is grown by 3% of the height, rounded up, in all eight directions (a square).
    Returns the share of the squared change that is inside, NaN where nothing changes, and the mean
    absolute change of a value outside, in levels of 255, NaN where there is no outside.
    """
    reach = -(-3 * region.shape[1] // 100)
    grown = F.max_pool2d(region.float(), 2 * reach + 1, 1, reach) > 0
    change = levels(after) - levels(before)
    energy, amount = change.square().sum(1), change.abs().mean(1)
    add = functools.partial(torch.sum, dim=[1, 2], dtype=torch.float64)
    return add(energy * grown) / add(energy), add(amount * ~grown) / add(~grown)


def describe_locality(shares, outside):
    """One line for what locality returns."""
    changed, bounded = shares[~shares.isnan()], outside[~outside.isnan()]
    parts = [f"{len(shares)} pairs, {len(shares) - len(changed)} without any change"]
    if len(changed):
        low, middle, high = changed.quantile(changed.new_tensor([0.25, 0.5, 0.75])).tolist()
        parts += [
            f"of the squared change {middle:.1%} are inside (quartiles {low:.1%}, {high:.1%})"
        ]
    if len(bounded):
        parts += [f"a value outside changes by {outside.nanquantile(0.5):.2f} of 255 levels"]
    return f"locality, medians of {'; '.join(parts)}"


def region_area(k, images, labels):
    """The share of the pixels of labels (N, H, W) that are of class k: float64 (N,)."""
    return (labels == k).double().mean([1, 2])


def region_light(k, images, labels):
    """The mean luminance (Rec. 601), 0 to 255, of class k in images, uint8 (N, 3, H, W): float64
    (N,), NaN where it is not there."""
    where, weights = labels == k, torch.tensor([0.299, 0.587, 0.114], device=images.device)
    luminance = torch.einsum("nchw,c->nhw", images.float(), weights).double()
    return (luminance * where).sum([1, 2]) / where.sum([1, 2])


def fit_direction(w, y):
    """The direction in which an attribute grows: (unit vector (D,), float32, accuracy).

    w: latents (N, D); y: (N,) bool, who has it. The normal of the plane of a logistic regression,
    as InterFaceGAN's (Shen et al. 2020) of a support vector machine, in float64: mean log loss +
    0.01 |v|^2 / 2 (best for held-out samples of the toy run among powers of ten), of w divided by
    one deviation for all D numbers, so that v points to where latents do vary. Every fifth sample
    of either class is held out and judged for the accuracy.
    Raises UserError if one of the classes has fewer than 10 members.
    """
    n = int(y.sum())
    if min(n, len(y) - n) < 10:
        raise UserError(
            f"{n} of {len(y)} samples have the attribute: at least 10 with it and 10 without are"
            " needed. Take more samples, or another attribute."
        )
    rank = torch.where(y, y.cumsum(0), (~y).cumsum(0))  # 1, 2, ... within its class
    learn = rank % 5 > 0
    x = w.double()
    x = (x - x[learn].mean(0)) / x[learn].std(0).square().mean().sqrt()
    v = x.new_zeros(x.shape[1] + 1, requires_grad=True)  # the last one: the constant
    opt = torch.optim.LBFGS(
        [v], max_iter=200, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        opt.zero_grad()
        logits = x[learn] @ v[:-1] + v[-1]
        loss = F.binary_cross_entropy_with_logits(logits, y[learn].double())
        loss = loss + 0.005 * v[:-1].square().sum()
        loss.backward()
        return loss

    opt.step(objective)
    v = v.detach()
    right = (x @ v[:-1] + v[-1] > 0) == y
    return F.normalize(v[:-1], dim=0).float(), right[~learn].double().mean().item()


PAIRS = 200  # of samples, that the locality of an edit is measured on

Attribute = collections.namedtuple("Attribute", "name classes score threshold")
Attribute.__doc__ = """What a direction can be fitted to.

classes: the numbers of the classes where pictures have to change with it
score(images, labels): float64 (N,) of uint8 (N, 3, H, W) and (N, H, W), NaN where it has no value
threshold: who scores more has the attribute; None: the median of all samples
"""


def attributes_of(text, classes, toy=None):
    """The Attributes in --direction, "mouth.area,glasses", say.

    classes: names of the classes in label maps; toy: what toy_classifier is called with where the
    pictures are toy faces. Raises UserError for names that are none.
    """

    def of_toy(i, images, labels):
        device = next(net.parameters()).device
        parts = [net(to_float(x, device))[:, i] for x in uint8_batches(images)]
        return torch.cat(parts).double().cpu()

    known = {}
    for k, region in enumerate(classes):
        for kind, score in (("area", region_area), ("light", region_light)):
            name = f"{region}.{kind}"
            known[name] = Attribute(name, (k,), functools.partial(score, k), None)
    for i, (name, (_, regions)) in enumerate(TOY_BINARY.items() if toy else ()):
        numbers = tuple(map(TOY_REGIONS.index, regions))
        known[name] = Attribute(name, numbers, functools.partial(of_toy, i), 0.0)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--direction: no {name!r}; there are {', '.join(known)}.")
    if set(names) & TOY_BINARY.keys() and toy:
        print(f"training a classifier of {len(TOY_BINARY)} attributes of toy faces", flush=True)
        net, accuracy = toy_classifier(**toy)
        for name in names:
            if name in accuracy:
                print(f"{name}: the classifier is right on {accuracy[name]:.1%}")
    return [known[name] for name in names]


def edit_directions(args, attributes, w, shown, render, names=None):
    """The command `edit`: fits a direction to each attribute and moves latents along it.

    w: latents (N, D) that the directions are fitted to; shown: others, for a sheet of before, after
    and difference in args.out, with these names, or those of args.seeds; render(w, move, attribute)
    -> images, labels, uint8 (n, 3, H, W) and (n, H, W) on the CPU: of w or shown, to which the
    model adds `move` (D,), if it is not None, where it can so that this attribute changes.
    args.alpha counts deviations of w along the direction. Prints how often the attribute is there
    before and after and the locality of the change, both of PAIRS of w.
    Returns {attribute: {"direction" (D,), "deviation", "accuracy" of fit_direction, shares
    "before" and "after", and of locality() "inside" and "outside" (PAIRS,)}}.
    """
    scores, found = [], {}
    for part in w.split(args.batch):
        seen = render(part, None, None)
        scores.append(torch.stack([a.score(*seen) for a in attributes]))
    for a, score in zip(attributes, torch.cat(scores, 1), strict=True):
        known = ~score.isnan()
        limit = score.nanmedian() if a.threshold is None else a.threshold
        try:
            direction, accuracy = fit_direction(w[known.to(w.device)].cpu(), score[known] > limit)
        except UserError as e:
            raise UserError(f"--direction {a.name}: {e}") from None
        deviation = (w.cpu() @ direction).std().item()
        move = (args.alpha * deviation * direction).to(w.device)
        parts = []
        for part in w[:PAIRS].split(args.batch):
            (image, label), (edited, seg) = render(part, None, a), render(part, move, a)
            region = sum((label == k) | (seg == k) for k in a.classes) > 0
            parts.append((*locality(image, edited, region), a.score(edited, seg)))
        shares, outside, after = map(torch.cat, zip(*parts, strict=True))
        has = [(x[~x.isnan()] > limit).double().mean().item() for x in (score[:PAIRS], after)]
        found[a.name] = dict(direction=direction, deviation=deviation, accuracy=accuracy)
        found[a.name] |= dict(before=has[0], after=has[1], inside=shares, outside=outside)
        print(
            f"{a.name}: the plane is right on {accuracy:.1%} of held-out samples; {has[0]:.0%} of"
            f" the pictures have it, and {args.alpha:g} deviations along its normal {has[1]:.0%}"
        )
        print(f"{a.name}: {describe_locality(shares, outside)}")
        path = Path(args.out, f"{re.sub('[^A-Za-z0-9_.-]+', '-', a.name)}.png")
        before, after = render(shown, None, a)[0], render(shown, move, a)[0]
        sheet = {"before": before, "after": after, "difference": difference(before, after)}
        save_sheet(path, sheet, names or [f"seed {seed}" for seed in args.seeds])
        print(f"{a.name}: {path}")
    return found


# =============================================================================
# Face landmarks
# =============================================================================
# StarGAN v2 keeps a face's detail around landmarks, which this network finds, and has its faces
# where their landmarks fit mean ones. Tensors have the names of the official wing.ckpt.


class CoordConv(nn.Module):
    """A convolution that knows where it is (Liu et al. 2018), by three more maps: row and column in
    [-1, 1], and the distance from the centre, at most 1."""

    def __init__(self, I, O, kernel, stride=1, pad=0):
        super().__init__()
        self.conv = nn.Conv2d(I + 3, O, kernel, stride, pad)

    def forward(self, x):
        N, _, H, W = x.shape
        places = (torch.arange(n, device=x.device, dtype=torch.float32) / (n - 1) for n in (H, W))
        rows, columns = torch.meshgrid(*(2 * t - 1 for t in places), indexing="ij")
        radius = torch.sqrt(rows.square() + columns.square())
        maps = torch.stack([rows, columns, radius / radius.max()]).to(x.dtype)
        return self.conv(torch.cat([x, maps.expand(N, -1, -1, -1)], 1))


class FanBlock(nn.Module):
    """Three 3x3 convolutions after one another, their maps side by side, and a skip (Bulat and
    Tzimiropoulos 2017). forward(x): (N, I, H, W) -> (N, O, H, W)"""

    def __init__(self, I, O):
        super().__init__()
        for k, (a, b) in enumerate(((I, O // 2), (O // 2, O // 4), (O // 4, O // 4)), 1):
            self.add_module(f"bn{k}", nn.BatchNorm2d(a))
            self.add_module(f"conv{k}", nn.Conv2d(a, b, 3, padding=1, bias=False))
        self.downsample = nn.Identity()
        if I != O:
            conv = nn.Conv2d(I, O, 1, bias=False)
            self.downsample = nn.Sequential(nn.BatchNorm2d(I), nn.ReLU(), conv)

    def forward(self, x):
        a = self.conv1(F.relu(self.bn1(x)))
        b = self.conv2(F.relu(self.bn2(a)))
        c = self.conv3(F.relu(self.bn3(b)))
        return torch.cat([a, b, c], 1) + self.downsample(x)


class Hourglass(nn.Module):
    """Down to a sixteenth of the side and up again, with a skip at every level (Newell et al.
    2016). forward(x): (N, C, H, W) -> (N, C, H, W)"""

    def __init__(self, C):
        super().__init__()
        self.coordconv = CoordConv(C, C, 1)
        for level in (4, 3, 2, 1):
            for branch in ("b1", "b2", "b3"):
                self.add_module(f"{branch}_{level}", FanBlock(C, C))
        self.b2_plus_1 = FanBlock(C, C)

    def level(self, x, n):
        y = getattr(self, f"b2_{n}")(F.avg_pool2d(x, 2))
        y = self.level(y, n - 1) if n > 1 else self.b2_plus_1(y)
        y = F.interpolate(getattr(self, f"b3_{n}")(y), scale_factor=2, mode="nearest")
        return getattr(self, f"b1_{n}")(x) + y

    def forward(self, x):
        return self.level(self.coordconv(x), 4)


class FAN(nn.Module):
    """The network of Wang et al. 2019 (adaptive wing loss) that finds 98 landmarks of a face.

    forward(x) -> (N, 99, 64, 64), a map per landmark, high where it is, and one of the outline
    masks(x) -> (2, N, 1, 256, 256) in [0, 1], the coarse and the fine mask of StarGAN v2
        x: (N, 1 or 3, H, W) in [-1, 1], any size; grey counts as three equal channels
    Frozen, and always in evaluation mode.
    """

    def __init__(self):
        super().__init__()
        self.config = {"kind": "FAN"}
        self.conv1, self.bn1 = CoordConv(3, 64, 7, 2, 3), nn.BatchNorm2d(64)
        self.conv2, self.conv3 = FanBlock(64, 128), FanBlock(128, 128)
        self.conv4 = FanBlock(128, 256)
        self.m0, self.top_m_0 = Hourglass(256), FanBlock(256, 256)
        self.conv_last0, self.bn_end0 = nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256)
        self.l0 = nn.Conv2d(256, 99, 1)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        x = F.interpolate(x, (256, 256), mode="bilinear").expand(-1, 3, -1, -1) / 2 + 0.5
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 64, 128, 128)
        x = F.avg_pool2d(self.conv2(x), 2)  # (N, 128, 64, 64)
        x = self.top_m_0(self.m0(self.conv4(self.conv3(x))))
        return self.l0(F.relu(self.bn_end0(self.conv_last0(x))))

    @torch.no_grad()
    def masks(self, x):
        with torch.autocast(x.device.type, enabled=False):
            maps = self(x)[:, :-1]
        return landmark_masks(F.interpolate(maps, (256, 256), mode="bilinear", align_corners=True))


def landmark_masks(maps):
    """The coarse and the fine mask, (2, N, 1, 256, 256) in [0, 1], of maps of landmarks (N, 98,
    256, 256): where StarGAN v2 keeps a face's detail. The fine one leaves out what expression
    moves.

    As in the official code (clovaai/stargan-v2: core/wing.py): maps of some parts are moved off the
    edges that they lie on, and made narrower by a power.
    """
    chin, brows, nostrils, eyes = slice(8, 25), slice(33, 51), slice(55, 60), slice(60, 76)
    upper, lower, inner = slice(77, 82), slice(83, 88), slice(88, 96)

    def up(part, rows):
        return part.roll(-rows, 2)

    h = torch.where(maps < 0.1, 0, maps)
    low, high = h.amin([2, 3], keepdim=True), h.amax([2, 3], keepdim=True)
    h = (h - low) / (high - low + 1e-6)
    parts = ((chin, 0, 3), (brows, -7, 2), (nostrils, 8, 4), (upper, -8, 4), (lower, 8, 4))
    for part, rows, power in (*parts, (inner, -2, 3)):
        h[:, part] = up(h[:, part], rows).pow(power)
    for part in (slice(8), slice(25, 34), 46, 76, 82):  # the cheeks, and corners
        h[:, part].zero_()
    h[:, 52:55] = up(h[:, 52:55], 4)  # the bridge of the nose
    h[:, eyes] = up(h[:, eyes], -8).pow(3) + up(h[:, eyes], -24)
    fine = h.clone()
    for part in (chin, brows, slice(76, 96)):
        fine[:, part].zero_()
    return torch.stack([part.sum(1, keepdim=True) for part in (h, fine)]).clamp(0, 1)


def landmarks_of_maps(maps):
    """Where landmarks are, (N, 98, 2), x and y in pixels of a 256 px picture, of their maps (N, 98,
    64, 64): the middle of the largest pixel and, unless that lies at an edge, along either axis a
    quarter of a pixel towards the larger neighbour (Bulat and Tzimiropoulos 2017)."""
    H, W = maps.shape[2:]
    flat = maps.flatten(2)
    best = flat.argmax(2)  # (N, 98)
    y, x = best // W, best % W
    inside = (y > 0) & (y < H - 1) & (x > 0) & (x < W - 1)

    def beside(step):
        return flat.gather(2, torch.where(inside, best + step, best)[..., None])[..., 0]

    shift = torch.stack([beside(step) - beside(-step) for step in (1, W)], 2).sign() / 4
    return (torch.stack([x, y], 2) + 0.5 + shift) * (256 / W)


LEFT_EYE, RIGHT_EYE, MOUTH = [*range(60, 68), 96], [*range(68, 76), 97], [76, 82]  # in the picture


def similarity(landmarks, target):
    """(a, b), complex: z -> a z + b, of z = x + iy, turns, scales and moves landmarks (98, 2) onto
    target (98, 2), centre onto centre. Eyes and mouth tell the direction; pupils and the mouth's
    ends the scale (clovaai/stargan-v2: core/wing.py). Raises ValueError if these coincide."""
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (landmarks, target))
    four = [96, 97, *MOUTH]

    def direction(z):
        left, right, mouth = (z[part].mean() for part in (LEFT_EYE, RIGHT_EYE, MOUTH))
        across = right - left + 1j * ((left + right) / 2 - mouth)
        return across / abs(across)

    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.mean(abs(w[four] - w.mean()) / abs(z[four] - z.mean()))
        a = scale * direction(w) / direction(z)
    if not np.isfinite(a):
        raise ValueError("landmarks coincide")
    return a, w.mean() - a * z.mean()


def mirrored_around(img):
    """A PIL picture twice as wide and high, `img` with half of its reflection on each side, which
    blurs towards the edges."""
    W, H = img.size
    sharp = np.asarray(img)
    sharp = np.pad(sharp, [(H // 2,) * 2, (W // 2,) * 2, (0, 0)][: sharp.ndim], "reflect")
    blurred = Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(H / 100))
    rows, columns = (np.arange(n) for n in sharp.shape[:2])
    rows = np.minimum(rows, rows[::-1]) / max(1, H // 2)  # to the edge; from 1 on it is in `img`
    columns = np.minimum(columns, columns[::-1]) / max(1, W // 2)
    share = np.minimum(rows[:, None], columns).clip(max=1) ** 4  # of what is sharp
    share = Image.fromarray(np.rint(255 * share).astype(np.uint8))
    return Image.composite(Image.fromarray(sharp), blurred, share)


@torch.no_grad()
def aligned(fan, mean, size, img):
    """A PIL picture of a face, turned, scaled and moved to a (size, size) one in which its
    landmarks fit the mean ones (98, 2), x and y in pixels of 256. The face has to fill most of it.
    Raises BadImage if there is none to be found."""
    img = img.copy()
    img.thumbnail((4 * size, 4 * size), BICUBIC)
    x = to_float(stack([pixels(squeezed(256, img))]), next(fan.parameters()).device)
    landmarks = landmarks_of_maps(fan(x)[:, :-1])[0].double().cpu().numpy() / 256
    target = mean * (size / 256)
    try:
        scale = abs(similarity(landmarks * img.size, target)[0])
        if scale < 1:  # to shrink is to average, which a warp does not do
            img = img.resize([max(1, round(side * scale)) for side in img.size], BICUBIC)
        a, b = similarity(landmarks * img.size, target)
    except ValueError:
        raise BadImage("The picture", "no face was found in it") from None
    back = 1 / a
    corner = complex(img.width // 2, img.height // 2) - back * b
    matrix = (back.real, -back.imag, corner.real, back.imag, back.real, corner.imag)
    around = mirrored_around(img)
    return around.transform((size, size), Image.Transform.AFFINE, matrix, BICUBIC)


def load_mean_landmarks(path=None):
    """(98, 2) float64 of celeba_lm_mean.npz; see read_weights for files and errors."""

    def read(file):
        with np.load(file, allow_pickle=False) as arrays:
            mean = arrays["mean"].astype(np.float64)
        similarity(mean, mean)  # ValueError if it is no face
        return {"mean": mean}

    return read_weights("mean landmarks", path, {"mean": (98, 2)}, read)[0]["mean"]


load_fan = functools.partial(load_frozen, FAN, "FAN")


# =============================================================================
# Projection: a picture's latent
# =============================================================================


def lpips_or_explain(args, size, device):
    """LPIPS, for pictures of this side, or None after a line that says why."""

    def load(vgg_path, lin_path, device):
        if size < VGG16.least:
            raise UserError(f"it takes pictures of {VGG16.least} pixels or more, not {size}.")
        return load_lpips(vgg_path, lin_path, device)

    without = "LPIPS is replaced by a distance of pixels"
    return load_or_explain(without, load, args.vgg, args.lpips, device=device)


def distance_to(target, lpips=None):
    """distance(x) -> scalar, of x to the target, both (1, C, H, W) in [-1, 1], for `project`.

    LPIPS of at most 256 pixels; without it pixel_distance: coarser, but it needs no weights.
    """
    if lpips is None:
        return lambda x: pixel_distance(x, target).sum()
    with torch.no_grad():
        features = lpips.features(at_most_256(target))
    return lambda x: (lpips.features(at_most_256(x)) - features).square().sum()


def pixel_distance(x, y):
    """(N,): the mean squared difference of images (N, C, H, W), of their averages over 2 x 2 pixels
    and so on down to 8 pixels, summed."""
    difference = x - y
    total = difference.square().mean([1, 2, 3])
    while min(difference.shape[2:]) > 8:
        difference = F.avg_pool2d(difference, 2)
        total = total + difference.square().mean([1, 2, 3])
    return total


def lr_ramp(t):
    """The share of the learning rate at t in [0, 1]: linear up over 5%, cosine down from 75%."""
    return min(1, t / 0.05) * (0.5 - 0.5 * math.cos(math.pi * min(1, (1 - t) / 0.25)))


def w_noise_ramp(t):
    """The deviation of the noise on w at t in [0, 1], in units of that of w: 0 from 75%."""
    return 0.05 * max(0, 1 - t / 0.75) ** 2


def noise_regularization(noise):
    """Squared correlation of a noise map (..., H, W) with itself moved by one pixel, summed over a
    pyramid of 2 x 2 averages down to 8 pixels: it keeps the picture out of the noise.

    As the official code does; the paper's text also doubles each average, for a variance of 1.
    """
    noise, total = noise.reshape(-1, 1, *noise.shape[-2:]), 0
    while True:
        for dim in (3, 2):
            total = total + (noise * noise.roll(1, dim)).mean().square()
        if min(noise.shape[2:]) <= 8:
            return total
        noise = F.avg_pool2d(noise, 2)


def project(
    synthesize, distance, w_start, w_std, num_ws, noises=(), *, steps=1000, lr=0.1,
    noise_weight=1e5, w_weight=0.0, generator=None, on_step=None,
):  # fmt: skip
    """Fits w, and noise maps, to a picture (StyleGAN2 appendix D).

    synthesize(ws (1, num_ws, w_dim)) -> image (1, C, H, W) in [-1, 1], with the maps in `noises`
    distance(image) -> scalar, see distance_to
    w_start: (1, w_dim), one row for all layers (W), or (num_ws, w_dim), all rows free (W+)
    w_std: deviation of w over random z, a number; 0: no noise on w
    noises: leaf tensors (..., H, W), drawn anew and then fitted in place; none: noise stays fixed
    w_weight: of mean (w - w_start)^2, not in the paper, for methods that keep w near the mean
    generator: a CPU torch.Generator (default: seed 0); on_step(step, image, distance): tensors
    Returns w after every step, (steps, 1 or num_ws, w_dim), and the distances before it, (steps,).
    Raises UserError if it diverges. Gradients of the network's own weights are left alone.
    """
    generator = generator or torch.Generator().manual_seed(0)
    w = w_start.detach().clone().requires_grad_(True)
    for noise in noises:
        noise.data.copy_(torch.randn(noise.shape, generator=generator))
    variables = [w, *(noise.requires_grad_(True) for noise in noises)]
    adam = torch.optim.Adam(variables, lr=lr, betas=(0.9, 0.999))
    path, distances = [], []
    for step in range(steps):
        t = step / steps
        adam.param_groups[0]["lr"] = lr * lr_ramp(t)
        draw = torch.randn(w.shape, generator=generator).to(w)
        ws = (w + w_std * w_noise_ramp(t) * draw).expand(num_ws, -1)[None]  # (1, num_ws, w_dim)
        image = synthesize(ws)
        distances.append(distance(image))
        loss = distances[-1] + noise_weight * sum(map(noise_regularization, noises))
        loss = loss + w_weight * (w - w_start).square().mean()
        for variable, grad in zip(variables, torch.autograd.grad(loss, variables), strict=True):
            variable.grad = grad
        adam.step()
        with torch.no_grad():
            for noise in noises:
                noise -= noise.mean()
                noise *= noise.square().mean().rsqrt()
        path.append(w.detach().clone())
        distances[-1] = distances[-1].detach()
        if on_step:
            on_step(step, image.detach(), distances[-1])
    for noise in noises:
        noise.requires_grad_(False).grad = None
    path, distances = torch.stack(path), torch.stack(distances)
    if not (path.isfinite().all() and distances.isfinite().all()):
        raise UserError("the projection diverged (NaN or infinite): take a smaller learning rate.")
    return path, distances


# =============================================================================
# Generators: what the StyleGANs' commands share
# =============================================================================
# A generator G here has config (z_dim, c_dim, img_resolution, ...), num_ws, mapping(z, c, psi,
# cutoff) -> ws (N, num_ws, w_dim) and synthesis(ws, noise) -> images in [-1, 1].

MOST_IN_GRID = 64  # of the pictures of `generate`


def count(net):
    """How many parameters a network has."""
    return sum(p.numel() for p in net.parameters())


def latents(seeds, z_dim):
    """z (N, z_dim) of seeds, as the official generate.py draws them."""
    z = np.stack([np.random.RandomState(s % 2**32).randn(z_dim) for s in seeds])
    return torch.from_numpy(z).float()


def sample_inputs(G, labels, seed, n=32):
    """z of n seeds and c, the labels of random images, the same each time."""
    z = latents(range(seed, seed + n), G.config["z_dim"])
    if labels is None:
        return z, None
    return z, torch.from_numpy(labels[np.random.default_rng(seed).integers(len(labels), size=n)])


@torch.no_grad()
def sample(G, z, c=None, batch=32, **options):
    """uint8 images (N, C, H, W) of z, on the CPU; options: of Generator.forward."""
    options, device = {"noise": "const"} | options, next(G.parameters()).device
    return in_batches(lambda z, c: to_uint8(G(z, c, **options)), device, batch, z, c)


def reals_of(N, n, labels):
    """Which n of N pictures samples are compared with: the first ones, as in the papers, whose
    files are in no order; with labels evenly spaced ones, as classes may follow one another."""
    n = min(n, N)
    return range(n) if labels is None else np.linspace(0, N - 1, n).round().astype(int).tolist()


def score_samples(run, G, data, labels, batch, n=500, fid=None, **more):
    """Prints and keeps fd8 of n samples against at most as many pictures, with fid = (network, m,
    real_statistics of all pictures) also FID of m samples, and keeps `more` numbers beside them."""
    if run.rank == 0:
        real = data.some(reals_of(len(data), n, labels))
        fake = sample(G, *sample_inputs(G, labels, 10_000, n), batch)
        row = {"n_real": len(real), "n_fake": n, "fd8": fd8(real, fake)}
        if fid:
            net, m, statistics = fid

            def fakes():
                for k in range(0, m, batch):
                    inputs = sample_inputs(G, labels, 10_000 + k, min(batch, m - k))
                    yield sample(G, *inputs, batch, noise="random")

            row["fid"] = fid_kid(statistics, fakes, net)
        run.save_scores(row | more)
        run.say(describe_scores(row))


@torch.no_grad()
def w_statistics(G, c=None, n=10_000):
    """Mean (w_dim,) of w over n z of seed 123, and deviation, sqrt(E |w - mean|^2) (StyleGAN2,
    appendix D)."""
    device = next(G.parameters()).device
    z = torch.from_numpy(np.random.RandomState(123).randn(n, G.config["z_dim"])).float()
    c = None if c is None else c.expand(n, -1)
    w = G.mapping(z.to(device), c, update_avg=False)[:, 0]
    return w.mean(0), (w - w.mean(0)).square().sum(1).mean().sqrt()


def data_of(args, saved):
    """--data, or what a checkpoint was trained on, of whose options `saved` are."""
    data = args.data or saved.get("data")
    if data is None:
        raise UserError("--data is missing: an official file does not say what it was trained on.")
    return data


def load_generator(args, load_networks):
    """G_ema (else G) of --checkpoint in evaluation mode on the device, the label c (1, c_dim) or
    None of --class, and the options of its training. load_networks(path): as load_gan."""
    nets, saved = load_networks(args.checkpoint)
    G = nets.get("G_ema") or nets.get("G")
    if G is None:
        raise UserError(f"--checkpoint {args.checkpoint} holds no generator.")
    G = G.to(pick_device(args.device), memory_format=torch.channels_last)
    c_dim, label = G.config["c_dim"], vars(args).get("label")
    if label is not None and label >= c_dim:
        has = f"has classes 0 to {c_dim - 1}" if c_dim else "is not conditional"
        raise UserError(f"--class {label}: the checkpoint {has}.")
    if c_dim and label is None and "label" in vars(args):
        raise UserError(f"the checkpoint is conditional: pass --class, 0 to {c_dim - 1}.")
    c = F.one_hot(torch.tensor([label]), c_dim).float() if label is not None else None
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # what is not float16 is float32
    return G.eval().requires_grad_(False), c, saved


@torch.no_grad()
def each_image(G, ws, noise="const", batch=16, generators=()):
    """Yields the uint8 image (C, H, W) of each row of ws, on the CPU, computed `batch` at a time.
    generators: of a `noise` that draws."""
    device = next(G.parameters()).device

    def images(ws):
        return to_uint8(G.synthesis(ws, noise))

    for (batch_of_images,) in each_batch(images, device, batch, ws, generators=generators):
        yield from batch_of_images


def synthesize(G, ws, *args, **options):
    """The images of each_image as one tensor (N, C, H, W)."""
    return torch.stack(list(each_image(G, ws, *args, **options)))


@torch.no_grad()
def ws_of_seeds(G, c, seeds, psi=1.0, cutoff=None):
    """ws (N, num_ws, w_dim) of seeds, truncated by psi in `cutoff` layers."""
    device = next(G.parameters()).device
    z = latents(seeds, G.config["z_dim"]).to(device)
    c = None if c is None else c.to(device).expand(len(z), -1)
    return G.mapping(z, c, psi, cutoff)


def generate(args, G, c):
    """The command `generate`: pictures of seeds or of a file, a style-mixing table, or a film."""
    out_folder(args)
    out, device = Path(args.out), next(G.parameters()).device
    ws_of = functools.partial(ws_of_seeds, G, c, psi=args.psi, cutoff=args.cutoff)

    if args.mix_rows or args.mix_cols or args.mix_layers:  # the table of StyleGAN, Fig. 3
        if args.film or args.projected:
            raise UserError("a mixing table goes without --film and --projected.")
        layers = args.mix_layers or list(range(round(0.39 * G.num_ws)))  # 0-6 of 18, as officially
        if not (args.mix_rows and args.mix_cols and layers) or max(layers) >= G.num_ws:
            raise UserError(
                "a mixing table needs --mix-rows, --mix-cols, and --mix-layers below"
                f" {G.num_ws}, the layers of this model."
            )
        rows, columns = ws_of(args.mix_rows), ws_of(args.mix_cols)
        table = {"": synthesize(G, rows, args.noise)}
        for seed, w in zip(args.mix_cols, columns, strict=True):
            mixed = rows.clone()
            mixed[:, layers] = w[layers]
            table[f"seed {seed}"] = synthesize(G, mixed, args.noise)
        above = [torch.full_like(table[""][:1], 255), *synthesize(G, columns, args.noise).split(1)]
        table = {k: torch.cat([a, v]) for a, (k, v) in zip(above, table.items(), strict=True)}
        save_sheet(out / "mixing.png", table)
        print(f"{out / 'mixing.png'}: layers {layers} of the columns' seeds in the rows'")
        return
    if args.projected:
        if Path(args.projected).resolve() == (out / "latents.npz").resolve() and not args.film:
            raise UserError(f"--projected {args.projected} would be written over: change --out.")
        ws = load_array(args.projected, "w", (None, G.num_ws, G.config["w_dim"]))
        load_noise(args.projected, G)
        ws, names = ws.to(device), [f"projected{k:04d}" for k in range(len(ws))]
    else:
        ws, names = ws_of(args.seeds), [f"seed{seed:04d}" for seed in args.seeds]
    if args.film and len(ws) < 2:
        raise UserError("a film needs two seeds or more.")
    if args.film:
        ends = zip(ws, ws.roll(-1, 0), strict=True)
        path = [a.lerp(b, k / args.frames) for a, b in ends for k in range(args.frames)]
        save_film(out / args.film, map(to_picture, each_image(G, torch.stack(path), args.noise)))
        print(f"{out / args.film}: {len(path)} frames through {len(ws)} latents and back")
        return
    first = []
    for name, image in zip(names, each_image(G, ws, args.noise), strict=True):
        save_png(out / f"{name}.png", to_picture(image))
        if len(first) < MOST_IN_GRID:
            first.append(image)
    save_png(out / "grid.png", grid(torch.stack(first), max(1, round(len(first) ** 0.5))))
    save_arrays(out / "latents.npz", w=ws.cpu().numpy(), names=np.array(names))
    shown = f" of the first {len(first)}" if len(first) < len(ws) else ""
    print(f"{len(ws)} pictures, grid.png{shown} and latents.npz (w) are in {out}")


def timelapse(args):
    """The command `timelapse`: the sample grids of a run as a film, each with its date in kimg."""
    run = Path(args.checkpoint)
    run = run.parent if run.is_file() else run
    batch = read_json(run / "args.json", "--checkpoint").get("batch")
    grids = sorted(p for p in run.glob("samples/*.png") if p.stem.isdecimal())
    if len(grids) < 2 or not isinstance(batch, int):
        raise UserError(f"--checkpoint {run}: a film needs a run with two sample grids or more.")

    def frame(path):
        try:
            picture = decode(path, path)
        except BadImage as e:
            raise UserError(f"--checkpoint {run}: {e}.") from None
        picture = resized(picture, width=min(args.width, picture.width))
        film = Image.new("RGB", (picture.width, picture.height + 20), "white")
        film.paste(picture, (0, 20))
        date = f"{int(path.stem) * batch / 1000:.1f} thousand images"
        ImageDraw.Draw(film).text((4, 3), date, "black", ImageFont.load_default(12))
        return film

    last = frame(grids[-1])
    save_film(args.out, [*map(frame, grids), *[last] * round(args.fps)], args.fps)
    print(f"{args.out}: {len(grids)} grids, the last one for a second more")


def out_folder(args):
    """UserError if --out is a file."""
    if Path(args.out).is_file():
        raise UserError(f"--out {args.out} is a file: name a folder.")


def noise_maps(G):
    """{name: map (res, res)} of G's constant noise."""
    maps = G.synthesis.named_buffers()
    return {name: noise for name, noise in maps if name.endswith("noise_const")}


def load_noise(path, G):
    """Takes the noise maps of an .npz of `project` over into G."""
    with np.load(path, allow_pickle=False) as data:
        names = [name for name in data.files if name.endswith("noise_const")]
    for name, noise in noise_maps(G).items():
        if name in names:
            noise.copy_(load_array(path, name, tuple(noise.shape)))


def number_of_samples(args, source):
    """--samples, or its default."""
    return args.samples or (4000 if source.is_toy else 50_000)


def sample_scores(args, n, fakes, n_real, real, device, pairs=None, paths=PPL2, how=""):
    """The scores in --metrics of n untruncated samples, fakes(rng, m) -> m uint8 images, against
    n_real pictures, real(i) -> uint8 (H, W, C).

    pairs(rng, m, space): as perceptual_path_length's, drawn from rng; paths: {name: its options};
    how: a remark. Without its network a score is left out; path is ppl with a distance of pixels,
    which needs none.
    """
    if min(n, n_real) < 2:
        raise UserError(f"--samples {n}: scores compare at least 2 with 2 pictures, here {n_real}.")

    def all_reals():
        for k in range(0, n_real, args.batch):
            yield stack([real(i) for i in range(k, min(k + args.batch, n_real))])

    def all_fakes():  # the same at every call
        rng = np.random.default_rng(args.seed)
        for k in range(0, n, args.batch):
            torch.manual_seed(args.seed + k)  # of the noise maps
            yield fakes(rng, min(args.batch, n - k))

    print(
        f"protocol: {n} untruncated samples of random noise against {n_real} pictures of"
        f" {args.data} at {args.size}x{args.size}{how}"
    )
    metrics, row = metrics_of(args), {}

    # Networks come first: samples take hours, and what is wrong with a file shows at once.
    inception = vgg = None
    if "fid" in metrics:
        inception = load_inception_or_explain(args.inception, device)
    without_pr = "precision and recall are left out"
    without_ppl = "perceptual path length is left out"
    if "pr" in metrics:
        vgg = load_or_explain(without_pr, load_vgg16, args.vgg, device=device)
    distances = {"path": pixel_distance} if "path" in metrics else {}
    if "ppl" in metrics and args.size < 32:
        print(f"{without_ppl}: it needs images of 32 pixels or more")
    elif "ppl" in metrics:
        lpips = load_or_explain(without_ppl, load_lpips, args.vgg, args.lpips, device=device)
        distances |= {"ppl": lpips} if lpips else {}

    if "fd8" in metrics:
        row["fd8"] = fd8(all_reals, all_fakes)
    if inception:
        row["fid"] = fid_kid(all_reals, all_fakes, inception, args.fid_resize)
    if vgg:
        most = max(200_000 // args.batch, 1)  # batches of pictures, as officially
        some = (itertools.islice(images(), most) for images in (all_reals, all_fakes))
        features = [vgg_features(images, vgg).to(device) for images in some]
        if min(map(len, features)) < 4:
            print(f"{without_pr}: they need 4 images or more on either side")
        else:
            row["precision"], row["recall"] = precision_recall(*features)
    for kind, distance in distances.items():
        for name, options in paths.items():
            torch.manual_seed(args.seed)  # of the noise maps
            draw = functools.partial(
                pairs, np.random.default_rng(args.seed), space=options["space"]
            )
            options = dict(n=n, batch=args.batch, seed=args.seed) | options
            row[name.replace("ppl", kind)] = perceptual_path_length(draw, distance, **options)
            row["n_paths"] = options["n"]
    return row


def evaluate_generator(args, load_networks, build, paths=PPL2, full=False):
    """The command `evaluate`: scores of untruncated samples. load_networks, build: see load_gan;
    paths: see sample_scores; full: against all pictures as they are, not as many as samples,
    flipped at random if training did so."""
    G, _, saved = load_generator(args, load_networks)
    exact = build(G.config | dict(half_res=0)).eval().requires_grad_(False)  # in float32 throughout
    exact.load_state_dict(G.state_dict())
    device, mirror = next(G.parameters()).device, bool(saved.get("mirror")) and not full
    exact.to(device)
    metrics_of(args)
    args.data, args.size = data_of(args, saved), G.config["img_resolution"]
    toy = TOY_CLASSES if G.config["c_dim"] else TOY_FACES
    source = open_images(args.data, args.size, toy)
    images, _ = square_pictures(args, source, G.config["img_channels"])
    labels = one_hot(args, source, G.config["c_dim"]) if G.config["c_dim"] else None
    if labels is not None and labels.shape[1] != G.config["c_dim"]:
        has = f"labels of {labels.shape[1]} numbers or classes"
        raise UserError(f"--data {args.data} has {has}, the checkpoint of {G.config['c_dim']}.")
    n = number_of_samples(args, source)
    chosen = reals_of(len(images), args.reals or (len(images) if full else n), labels)
    if args.samples or source.is_toy:
        paths = {name: options | dict(n=n) for name, options in paths.items()}

    def real(i):
        return crop_and_flip(images[chosen[i]], None, mirror, item_rng(args.seed, 0, chosen[i]))

    def random_z(rng, m):
        """z and the labels of random images."""
        z = torch.from_numpy(rng.standard_normal((m, G.config["z_dim"]))).float()
        of = None if labels is None else labels[rng.integers(len(labels), size=m)]
        return z, None if of is None else torch.from_numpy(of)

    def fakes(rng, m):
        return sample(G, *random_z(rng, m), args.batch, noise="random")

    def pairs(rng, m, space):
        """Ends of m paths in Z or W, and how to render points of them: one label, one noise for
        both."""
        z, c = (None if t is None else t.to(device) for t in random_z(rng, 2 * m))
        c = None if c is None else c[:m]
        for noise in noise_maps(exact).values():
            noise.normal_()
        if space == "z":
            return *z.chunk(2), lambda z: exact(z, c, noise="const")
        a, b = (exact.mapping(half, c) for half in z.chunk(2))
        return a, b, lambda ws: exact.synthesis(ws, "const")

    how = f", {'mirrored at random' if mirror else 'not mirrored'}"
    found = sample_scores(args, n, fakes, len(chosen), real, device, pairs, paths, how)
    if "ls" in metrics_of(args):
        found |= separability(args, G, source, random_z)
    if not found:
        raise UserError("no score is left to compute.")
    row = {"n_real": len(chosen), "n_fake": n} | found
    print(describe_scores(row))
    if args.out:
        write_json(args.out, row)


def edit_generator(args, G, c, saved):
    """The command `edit` of a StyleGAN: latents in W; a segmenter finds the regions."""
    out_folder(args)
    device = next(G.parameters()).device
    data, args.size = data_of(args, saved), G.config["img_resolution"]
    if G.config["img_channels"] != 3:
        raise UserError("edit needs a model of colour pictures.")
    if data == "toy" and G.config["c_dim"] == len(TOY_DOMAINS):
        data = f"toy/{TOY_DOMAINS[args.label]}"
    args.data = data
    source = open_data(data, size=args.size, toy=TOY_LABELLED)
    images, _, classes = labelled_pictures(args, source)
    toy = None
    if source.is_toy:
        toy = dict(size=args.size, device=device, seed=args.seed)
        toy["domain"], _ = source.domain_and_seed(source.names[0])
    attributes = attributes_of(args.direction, classes, toy)
    net = load_segmenter(images, len(classes), args.size, device, args.seed)

    def w_of(z):
        with torch.no_grad():
            label = None if c is None else c.to(device).expand(len(z), -1)
            return G.mapping(z.float().to(device), label)[:, 0]

    def render(w, move, attribute):
        w = w if move is None else w + move
        pictures = synthesize(G, w[:, None].expand(-1, G.num_ws, -1))
        return pictures, segment(net, pictures)

    rng = np.random.default_rng(args.seed)
    w = w_of(torch.from_numpy(rng.standard_normal((args.samples, G.config["z_dim"]))))
    edit_directions(args, attributes, w, w_of(latents(args.seeds, G.config["z_dim"])), render)


def separability(args, G, source, random_z):
    """{"ls": linear separability of z and w (StyleGAN sec. 4.2)} of toy faces, else nothing."""
    if not source.is_toy or G.config["c_dim"] or G.config["img_channels"] != 3:
        known = "attributes are known of toy faces in colour, without labels"
        print(f"linear separability is left out: {known}")
        return {}
    device, n = next(G.parameters()).device, args.samples or 20_000
    print(f"training a classifier of {len(TOY_BINARY)} attributes of toy faces")
    domain = source.domain_and_seed(source.names[0])[0]
    net, accuracy = toy_classifier(args.size, device, args.seed, domain)
    rng, parts = np.random.default_rng(args.seed), []
    torch.manual_seed(args.seed)
    for k in range(0, n, args.batch):
        z = random_z(rng, min(args.batch, n - k))[0].to(device)
        with torch.no_grad():
            ws = G.mapping(z)
            images = to_uint8(G.synthesis(ws, "random"))
            logits = net(to_float(images, device))
        parts.append([t.cpu() for t in (z, ws[:, -1], logits)])
    z, w, logits = map(torch.cat, zip(*parts, strict=True))
    scores, entropies = linear_separability({"z": z, "w": w}, logits)
    if n < 20 * z.shape[1]:
        print(f"of {n} samples only: planes fit so few points by chance; take more --samples")
    for i, name in enumerate(TOY_BINARY):
        bits = ", ".join(f"{space} {entropies[space][i]:.3f}" for space in "zw")
        print(f"{name}: H(Y|X) in bits {bits}; the classifier is right on {accuracy[name]:.1%}")
    return {"ls": {"n": n, **scores}}


# =============================================================================
# The web page
# =============================================================================
# One connection is one request and one answer. A request is read strictly and in limited time, and
# whatever is out of the ordinary is refused: a Refusal reaches the visitor as one line of text.
# Uploads stay in memory, of at most VISITORS at a time; one thread, the model's, decodes and
# translates them, one after the other. No part of a request becomes the name of a file.

VISITORS, WAITING = 32, 4  # connections at once; those of them that may wait for the model
MAX_HEAD, MAX_UPLOAD = 2**14, 2**24  # bytes
HEAD_SECONDS, BODY_SECONDS, SEND_SECONDS, LINGER_SECONDS = 10, 60, 30, 2
LOOPBACK = ("127.0.0.1", "localhost", "::1")

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: #fff; --text: #1c1c21; --soft: #f2f2f5; --line: #7d7d88;
  --main: #2b50b8; --on-main: #fff; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --back: #17171b; --text: #ececf1; --soft: #26262c;
  --line: #8f8f9b; --main: #adc2ff; --on-main: #0f1f4d; --bad: #ffb4ab } }
* { box-sizing: border-box }
[hidden] { display: none !important }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; overflow-wrap: anywhere;
  background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 1rem }
form { display: grid; gap: 1rem; justify-items: start }
.box { width: 100%; min-width: 0; margin: 0; padding: 1rem; border: 1px solid var(--line);
  border-radius: .5rem; background: var(--soft) }
.drop { border-style: dashed }
.over { outline: 3px solid var(--main) }
.drop label, legend { font-weight: 600 }
.row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center }
.row + .row { margin-top: .75rem }
small { display: block; margin-top: .25rem }
input, select, button, a { font: inherit; max-width: 100% }
input[type=file] { display: block; width: 100%; margin-top: .25rem }
input[type=number] { width: 9.5rem }
select, button, a, input[type=number], ::file-selector-button { min-height: 2.75rem;
  padding: .4rem .75rem; border: 1px solid var(--line); border-radius: .5rem; font: inherit;
  color: inherit; background: var(--back) }
.main { display: inline-flex; align-items: center; border-color: var(--main); color: var(--on-main);
  background: var(--main); font-weight: 600; text-decoration: none }
button, a, select, ::file-selector-button { cursor: pointer }
[aria-disabled=true] { opacity: .55; cursor: progress }
:focus-visible { outline: 3px solid var(--main); outline-offset: 2px }
#error { color: var(--bad); font-weight: 600 }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)) }
figure { margin: 0 }
img { display: block; width: 100%; max-height: 75vh; object-fit: contain; margin: .25rem 0 .75rem;
  background: var(--soft) }
</style>
<main>
<h1>{{title}}</h1>
<form id="form" data-limit="{{limit}}" novalidate>
  <div class="box drop" id="drop">
    <label for="picture">Picture</label>
    <input type="file" id="picture" accept="image/*" aria-describedby="kinds">
    <small id="kinds">Choose a file, or drop one here: {{kinds}}, at most {{megabytes}} MB.</small>
  </div>
  <div class="row" {{domains-hidden}}>
    <label for="domain">Translate to</label>
    <select id="domain">{{domains}}</select>
  </div>
  <fieldset class="box" id="style" {{styles-hidden}}>
    <legend>Style</legend>
    <div class="row">
      <label><input type="radio" name="style" id="random" checked> At random, number</label>
      <input type="number" id="seed" min="0" max="4294967295" value="0" required
        aria-label="Style number">
      <button type="button" id="another">Try another</button>
    </div>
    <div class="row">
      <label><input type="radio" name="style" id="guided"> Of another picture</label>
      <input type="file" id="reference" accept="image/*" aria-label="Picture with the style">
    </div>
  </fieldset>
  <button class="main" id="generate">Generate</button>
</form>
<p id="status" role="status"></p>
<p id="error" role="alert"></p>
<div class="pair">
  <figure hidden><figcaption>Your picture</figcaption><img id="before" alt=""></figure>
  <figure hidden><figcaption>Result</figcaption><img id="after" alt="Your picture, translated">
    <a class="main" id="save">Save as PNG</a></figure>
</div>
</main>
<noscript>This page needs JavaScript.</noscript>
<script>
"use strict";
const $ = id => document.getElementById(id);
const picture = $("picture"), reference = $("reference"), limit = Number($("form").dataset.limit);
let request = null;  // the AbortController of a picture that is on its way

function say(text) {
  $("status").textContent = text;
  $("error").textContent = "";
}

function complain(text, field) {
  $("status").textContent = "";
  $("error").textContent = text;
  if (field) field.focus();
}

function show(img, blob) {  // no blob: nothing
  URL.revokeObjectURL(img.src);
  img.closest("figure").hidden = !blob;
  if (blob) img.src = URL.createObjectURL(blob); else img.removeAttribute("src");
}

function problem() {  // [text, field] of what is wrong with the visitor's choices, else null
  const file = picture.files[0], guide = $("guided").checked ? reference.files[0] : null;
  const bytes = (file ? file.size : 0) + (guide ? guide.size : 0), megabytes = 2 ** 20;
  if (!file) return ["Choose a picture first.", picture];
  if (guide === undefined) return ["Choose the picture with the style.", reference];
  if (bytes > limit) return [`The file is too large: ${Math.ceil(bytes / megabytes)} MB, at most ` +
    `${limit / megabytes} MB are accepted.`, picture];
  if (!guide && !$("seed").checkValidity()) return ["The style's number has to be a whole one, " +
    "from 0 to 4294967295.", $("seed")];
  return null;
}

picture.onchange = () => {
  const file = picture.files[0];
  if (request) request.abort();
  say("");
  show($("after"));
  show($("before"), file);
  $("before").alt = file ? `Your picture, ${file.name}` : "";
  if (file && file.size > limit) complain(...problem());
};
$("before").onerror = () => {
  if ($("before").src) $("before").alt = "This browser cannot show this file.";
};
reference.onchange = () => { $("guided").checked = true; };
$("seed").oninput = () => { $("random").checked = true; };
$("another").onclick = () => {
  $("random").checked = true;
  $("seed").value = Math.floor(Math.random() * 2 ** 32);
  $("form").requestSubmit();
};

$("form").onsubmit = async event => {
  event.preventDefault();
  if (request) return;
  const wrong = problem();
  if (wrong) return complain(...wrong);
  const file = picture.files[0], guide = $("guided").checked ? reference.files[0] : null;
  const choices = new URLSearchParams({domain: Math.max(0, $("domain").selectedIndex),
    seed: guide ? 0 : $("seed").value, reference: guide ? guide.size : 0});
  const mine = request = new AbortController();
  $("generate").setAttribute("aria-disabled", true);
  say("Generating\u2026");
  try {
    const body = new Blob(guide ? [file, guide] : [file]);
    const answer = await fetch(`translate?${choices}`, {method: "POST", body, signal: mine.signal});
    if (answer.status === 415 && !guide) return complain(await answer.text(), picture);
    if (!answer.ok) return complain(await answer.text());
    show($("after"), await answer.blob());
    $("save").href = $("after").src;
    $("save").download = file.name.replace(/[.][^.]*$/, "") + "-translated.png";
    say("Done. The result can be saved.");
    await $("after").decode();
    $("save").scrollIntoView({block: "nearest"});
  } catch {
    if (!mine.signal.aborted) complain("The server does not answer. Is it still running?");
  } finally {
    request = null;
    $("generate").removeAttribute("aria-disabled");
  }
};

for (const box of [$("drop"), $("style")]) {
  const mark = over => event => { event.preventDefault(); box.classList.toggle("over", over); };
  box.ondragover = mark(true);
  box.ondragleave = mark(false);
}
document.ondragover = event => event.preventDefault();  // a file beside the box: not opened
document.ondrop = event => {
  event.preventDefault();
  for (const box of [$("drop"), $("style")]) box.classList.remove("over");
  if (!event.dataTransfer.files.length) return;
  const field = $("style").contains(event.target) ? reference : picture;
  field.files = event.dataTransfer.files;
  field.onchange();
};
</script>
"""


class Refusal(Exception):
    """An answer other than what was asked for: Refusal(status, text, further header lines...)."""


def receive(sock, until):
    """The bytes that came, at least one. Raises Refusal at the end of them, or of the time."""
    try:
        sock.settimeout(max(until - time.monotonic(), 1e-3))
        data = sock.recv(2**16)
    except TimeoutError:
        raise Refusal(408, "The request came too slowly. Try again.") from None
    except OSError:
        data = b""
    if not data:
        raise Refusal(400, "The request broke off. Try again.")
    return data


def read_head(sock):
    """(method, path, {parameter: text}, {header: text}, begin of the body) of a request."""
    data, until = b"", time.monotonic() + HEAD_SECONDS
    while (end := data.find(b"\r\n\r\n")) < 0 and len(data) <= MAX_HEAD:
        data += receive(sock, until)
    if not 0 <= end <= MAX_HEAD:
        raise Refusal(431, "The request's head is too long.")
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    request = re.fullmatch(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.[01]", first)
    fields = [re.fullmatch(r"([!-9;-~]+):[ \t]*(.*)", line) for line in lines]
    if request is None or None in fields:
        raise Refusal(400, "This is no request that a browser sends.")
    path, _, query = request[2].partition("?")
    names = [field[1].lower() for field in fields]
    if any(names.count(name) > 1 for name in ("host", "origin", "content-length")):
        raise Refusal(400, "The request has a header more than once.")
    headers = dict(zip(names, (field[2].strip() for field in fields), strict=True))
    return request[1], path, dict(urllib.parse.parse_qsl(query)), headers, data[end + 4 :]


def check_sender(headers, local):
    """Raises Refusal unless the request comes from this page. Another site cannot hide its Origin;
    a foreign name that its owner points at this machine (DNS rebinding) shows in Host."""
    host = headers.get("host", "")
    match = re.fullmatch(r"\[([\w.:]+)\](?::\d+)?|([\w.-]+)(?::\d+)?", host)
    if match is None or (local and (match[1] or match[2]).lower() not in LOOPBACK):
        raise Refusal(403, "Open this page under the address that its server printed.")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise Refusal(403, "Only this page may send pictures here, no other site.")


def read_upload(sock, headers, begun):
    """The body of a request, of which `begun` has been read."""
    length, until = headers.get("content-length"), time.monotonic() + BODY_SECONDS
    if length is None or "transfer-encoding" in headers:
        raise Refusal(411, "The request does not say how long it is.")
    if not re.fullmatch("[0-9]+", length):
        raise Refusal(400, "The request's length is no number.")
    if len(length) > 12 or int(length) > MAX_UPLOAD:
        raise Refusal(413, f"The file is too large: at most {MAX_UPLOAD >> 20} MB are accepted.")
    if int(length) == 0:
        raise Refusal(400, "The file is empty.")
    data = bytearray(begun)
    while len(data) < int(length):
        data += receive(sock, until)
    del data[int(length) :]
    return bytes(data)


def parameter(query, name, below):
    """A whole number from 0 to below - 1, 0 if it is left out."""
    text = query.get(name, "0")
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= below:
        raise Refusal(400, f"{name} has to be a whole number from 0 to {below - 1}.")
    return int(text)


def has_left(sock):
    """Whether a visitor who waits for an answer has closed the connection."""
    try:
        sock.setblocking(False)
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def translated(page, sock, picture, domain, seed, reference):
    """A PNG file made of a visitor's files, bytes each. Runs in the model's thread."""
    if has_left(sock):
        raise Refusal(400, "The request broke off. Try again.")
    try:
        picture = decode(picture, "The picture cannot be read")
        reference = decode(reference, "The style's picture cannot be read") if reference else None
        for image in filter(None, (picture, reference)):
            image.thumbnail((page.max_side, page.max_side), BICUBIC)
        png = io.BytesIO()
        page.translate(picture, domain, seed, reference).save(png, "PNG")
    except BadImage as e:
        raise Refusal(415, f"{str(e).rstrip('.')}.") from None
    except UserError as e:
        raise Refusal(422, str(e)) from None
    return png.getvalue()


def respond(page, sock):
    """(content type, body) for the request that comes through sock. Raises Refusal."""
    method, path, query, headers, begun = read_head(sock)
    check_sender(headers, page.local)
    allowed = {"/": "GET", "/translate": "POST"}.get(path)
    if allowed is None:
        raise Refusal(404, "There is nothing here.")
    if method != allowed:
        raise Refusal(405, f"Only {allowed} is possible here.", f"Allow: {allowed}")
    if path == "/":
        return "text/html; charset=utf-8", page.content
    domain, seed = parameter(query, "domain", page.n_domains), parameter(query, "seed", 2**32)
    upload = read_upload(sock, headers, begun)
    end = len(upload) - parameter(query, "reference", len(upload) if page.styles else 1)
    work = translated, page, sock, upload[:end], domain, seed, upload[end:]
    if not page.places.acquire(blocking=False):
        raise Refusal(503, "The model is busy. Try again in a few seconds.", "Retry-After: 5")
    try:  # a name for the future would tie it, its exception and the upload into a cycle
        return "image/png", page.model.submit(*work).result()
    except concurrent.futures.CancelledError:
        raise Refusal(503, "The server is being stopped.") from None
    finally:
        page.places.release()


def answer(sock, policy, status, kind, body, *headers):
    """Sends an answer and hangs up: not before the visitor has done so, since to close a connection
    with unread bytes in it can destroy the answer on its way, but not much later either."""
    head = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        f"Content-Security-Policy: {policy}",
        "X-Content-Type-Options: nosniff",
        "Cross-Origin-Resource-Policy: same-origin",
        "Cache-Control: no-store",
        "Connection: close",
        *headers,
    ]
    sock.settimeout(SEND_SECONDS)
    sock.sendall("\r\n".join([*head, "", ""]).encode() + body)
    sock.shutdown(socket.SHUT_WR)
    until = time.monotonic() + LINGER_SECONDS
    while time.monotonic() < until:
        receive(sock, until)


def serve_visitor(page, sock):
    """One connection from its first byte to its last. Whatever happens, the server goes on."""
    try:
        try:
            reply = 200, *respond(page, sock)
        except Exception as e:
            if not isinstance(e, Refusal):  # a fault of ours
                fault = " ".join(f"{type(e).__name__}: {e}".split())
                print(f"{Path(sys.argv[0]).name}: {fault}", file=sys.stderr, flush=True)
                e = Refusal(500, "The server failed on this picture. Its console says why.")
            status, text, *headers = e.args
            reply = status, "text/plain; charset=utf-8", text.encode(), *headers
        with sock, contextlib.suppress(OSError, Refusal):  # from here on a visitor may leave
            answer(sock, page.policy, *reply)
    finally:
        page.visitors.release()


def page_html(title, domains, styles):
    """The page as bytes, and the Content-Security-Policy by which only its own parts run."""
    values = {
        "title": html.escape(title),
        "domains": "".join(f"<option>{html.escape(name)}</option>" for name in domains),
        "domains-hidden": "" if domains else "hidden",
        "styles-hidden": "" if styles else "hidden",
        "kinds": ", ".join(FORMATS),
        "limit": str(MAX_UPLOAD),
        "megabytes": str(MAX_UPLOAD >> 20),
    }
    text = re.sub(r"\{\{([a-z-]+)\}\}", lambda match: values[match[1]], PAGE)
    policy = "default-src 'none'; img-src blob: data:; connect-src 'self'; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'"
    for part in ("script", "style"):
        own = re.search(f"<{part}>(.*?)</{part}>", text, re.DOTALL)[1].encode()
        digest = base64.b64encode(hashlib.sha256(own).digest()).decode()
        policy += f"; {part}-src 'sha256-{digest}'"
    return text.encode(), policy


def serve_page(args, title, translate, domains=(), styles=False):
    """A web page at --host and --port, until Ctrl-C: a picture in, a picture out, Save.

    translate(picture, domain, seed, reference) -> PIL picture; never called twice at the same time
        picture: PIL RGB, no side longer than --max-side
        domain: what the visitor chose of `domains`, an index; 0 if there is nothing to choose
        seed: 0 to 2^32 - 1, of a random style
        reference: PIL RGB like picture, whose style is wanted instead of a random one, or None
        A UserError is shown to the visitor; any other exception goes to stderr, in one line.
    domains: names, may be empty; styles: whether visitors choose a seed or a reference
    Raises UserError if the address cannot be had.
    """
    content, policy = page_html(title, domains, styles)
    page = types.SimpleNamespace(
        content=content,
        policy=policy,
        local=args.host in LOOPBACK,
        n_domains=max(1, len(domains)),
        styles=styles,
        max_side=args.max_side,
        translate=translate,
        visitors=threading.Semaphore(VISITORS),
        places=threading.Semaphore(1 + WAITING),
        model=concurrent.futures.ThreadPoolExecutor(1),
    )
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listener = socket.create_server((args.host, args.port), family=family, backlog=128)
    except (OSError, OverflowError, UnicodeError) as e:
        problem = str(getattr(e, "strerror", None) or e).rstrip(".")
        raise UserError(
            f"--host {args.host} --port {args.port}: {problem}. Take another, or --port 0 for any"
            " that is free."
        ) from None
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{title}: http://{host}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
    if not page.local:
        print("Everyone who reaches this address can use it.", flush=True)
    try:
        with listener:
            while True:
                page.visitors.acquire()
                try:
                    sock = listener.accept()[0]
                except OSError:  # the visitor has gone, or this machine has no more files to open
                    page.visitors.release()
                    time.sleep(0.1)
                    continue
                threading.Thread(target=serve_visitor, args=(page, sock), daemon=True).start()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        page.model.shutdown(cancel_futures=True)  # after the picture that is being made

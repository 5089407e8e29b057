"""Data in: downloads, zips, pictures. Bad files are really written, bad servers really answer."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
from common import BadImage, Folder, UserError, Zip, decode, decode_labels, subset

BODY = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as common.py does, which pytest undoes


# ---- helpers ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(common, "WAITS", (0, 0, 0))
    monkeypatch.delenv("GANS_OFFLINE", raising=False)


@contextlib.contextmanager
def server(body=BODY, ranges=True, cut=None, cuts=1, status=200, headers=()):
    """A web server whose first `cuts` answers break off after `cut` bytes: (url, requests)."""
    requests, left = [], [cuts]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.headers.get("Range"))
            start = int(re.findall(r"\d+", requests[-1])[0]) if requests[-1] and ranges else 0
            if start >= len(body) > 0 and start:
                return self.send_error(416)
            self.send_response(206 if start else status)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            stop = len(body)
            if cut is not None and left[0] > 0:
                left[0], stop = left[0] - 1, start + cut
            with contextlib.suppress(OSError):
                self.wfile.write(body[start:stop])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/a.zip", requests
    finally:
        httpd.shutdown()
        httpd.server_close()


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/a.zip"


def encoded(img, kind="PNG", **options):
    file = io.BytesIO()
    img.save(file, kind, **options)
    return file.getvalue()


def noise(mode="RGB", size=(16, 12)):
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    x = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(x.reshape(shape), mode) if mode == "CMYK" else Image.fromarray(x)


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(noise()))
    return folder


def make_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return path


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def png_header(width, height):
    """A real file: signature, IHDR, a few pixels' worth of IDAT, IEND."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---- download --------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [8, 64])
def test_a_download_arrives_whole_and_leaves_nothing_else(tmp_path, digits):
    with server() as (url, requests):
        common.download([url], tmp_path / "a.zip", SHA[:digits], len(BODY))
        common.download([url], tmp_path / "a.zip", SHA[:digits], len(BODY))
    assert (tmp_path / "a.zip").read_bytes() == BODY and requests == [None]
    assert files_below(tmp_path) == ["a.zip"]


def test_a_download_cut_off_half_way_is_resumed_where_it_stopped(tmp_path):
    with server(cut=100_000, cuts=2) as (url, requests):
        common.download([url], tmp_path / "a.zip", SHA, len(BODY))
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert requests == [None, "bytes=100000-", "bytes=200000-"]


def test_a_later_run_resumes_what_an_earlier_one_left(tmp_path):
    with server(cut=50_000, cuts=9) as (url, _), pytest.raises(UserError, match="cut off after"):
        common.download([url], tmp_path / "a.zip", SHA, len(BODY))
    assert (tmp_path / "a.zip.part").read_bytes() == BODY[:150_000]
    with server() as (url, requests):
        common.download([url], tmp_path / "a.zip", SHA, len(BODY))
    assert (tmp_path / "a.zip").read_bytes() == BODY and requests == ["bytes=150000-"]


def test_a_server_that_ignores_range_makes_the_download_start_over(tmp_path):
    with server(cut=100_000, ranges=False) as (url, requests):
        common.download([url], tmp_path / "a.zip", SHA, len(BODY))
    assert (tmp_path / "a.zip").read_bytes() == BODY and len(requests) == 2


def test_a_part_longer_than_the_file_is_thrown_away_and_a_complete_one_is_used(tmp_path):
    (tmp_path / "a.zip.part").write_bytes(BODY + b"more")
    with server() as (url, requests):
        common.download([url], tmp_path / "a.zip", SHA)  # size not known: the server says 416
        assert (tmp_path / "a.zip").read_bytes() == BODY
        (tmp_path / "b.zip.part").write_bytes(BODY)
        common.download([url], tmp_path / "b.zip", SHA, len(BODY))
        (tmp_path / "c.zip.part").write_bytes(BODY + b"more")
        common.download([url], tmp_path / "c.zip", SHA, len(BODY))
        assert requests == [f"bytes={len(BODY) + 4}-", None, None]


def test_a_wrong_hash_is_shown_beside_the_right_one_and_the_file_is_deleted(tmp_path):
    with server(BODY[::-1]) as (url, _), pytest.raises(UserError) as e:
        common.download([url], tmp_path / "a.zip", SHA, len(BODY))
    assert SHA in str(e.value) and hashlib.sha256(BODY[::-1]).hexdigest() in str(e.value)
    assert not list(tmp_path.glob("a.zip*[!k]"))  # at most the lock is left


def test_a_file_put_there_by_hand_is_checked_and_never_deleted(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"something else")
    with pytest.raises(UserError, match="not the published file"):
        common.download([closed_port()], tmp_path / "a.zip", SHA)
    assert (tmp_path / "a.zip").read_bytes() == b"something else"


def test_without_network_the_addresses_and_the_way_by_hand_are_named(tmp_path):
    urls = [closed_port(), closed_port()]
    with pytest.raises(UserError) as e:
        common.download(urls, tmp_path / "a.zip", SHA)
    assert all(url in str(e.value) for url in urls) and "\n" not in str(e.value)
    assert f"save it as {tmp_path / 'a.zip'}" in str(e.value)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (dict(body=b"\n<!DOCTYPE html><html>Sign in</html>"), "a web page"),
        (dict(body=BODY + b"more"), "offers more than 300,000 bytes"),
        (dict(status=404), "404"),
        (dict(status=503), "Service Unavailable"),
        (dict(status=302, headers=[("Location", "file:///etc/passwd")]), "not allowed"),
        (dict(status=302, headers=[("Location", "ftp://127.0.0.1/a.zip")]), "unknown url type"),
    ],
)
def test_the_next_address_is_tried_after(tmp_path, bad, reason):
    with server(**bad) as (wrong, _), server() as (right, _):
        common.download([wrong, right], tmp_path / "a.zip", SHA, len(BODY))
        assert (tmp_path / "a.zip").read_bytes() == BODY
        with pytest.raises(UserError, match=reason):
            common.download([wrong], tmp_path / "b.zip", SHA, len(BODY))
    assert not (tmp_path / "b.zip").exists()


@pytest.mark.parametrize(
    "bad",
    [
        dict(status=429, ranges=False),
        dict(body=b"<html>Sign in</html>", ranges=False),
        dict(body=BODY + b"more"),
    ],
)
def test_what_arrived_is_kept_where_an_address_then_refuses(tmp_path, bad):
    (tmp_path / "a.zip.part").write_bytes(BODY[:150_000])
    with server(**bad) as (url, _), pytest.raises(UserError, match="what has arrived is kept"):
        common.download([url], tmp_path / "a.zip", SHA, len(BODY))
    assert (tmp_path / "a.zip.part").read_bytes() == BODY[:150_000]
    with pytest.raises(UserError) as e:  # parts without a checksum are not gone on with
        common.download([closed_port()], tmp_path / "a.zip")
    assert "has arrived" not in str(e.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_a_download_with_the_folder_and_the_bytes_needed(tmp_path):
    (tmp_path / "a.zip.part").symlink_to("/dev/full")  # every write to it is a real ENOSPC
    with server() as (url, _), pytest.raises(UserError) as e:
        common.download([url], tmp_path / "a.zip", SHA, len(BODY))
    assert f"{tmp_path} cannot be written: {os.strerror(errno.ENOSPC)}" in str(e.value)
    assert "300,000 bytes" in str(e.value)


def download_in_a_process(args):
    common.download(*args)


def test_two_processes_that_fetch_the_same_file_both_end_well(tmp_path):
    fork = multiprocessing.get_context("fork")
    with server() as (url, requests):
        args = ([url], tmp_path / "a.zip", SHA, len(BODY))
        both = [fork.Process(target=download_in_a_process, args=(args,)) for _ in range(2)]
        for p in both:
            p.start()
        for p in both:
            p.join()
    assert [p.exitcode for p in both] == [0, 0] and len(requests) == 1
    assert (tmp_path / "a.zip").read_bytes() == BODY


# ---- unpack ----------------------------------------------------------------------------------


def test_unpack_drops_the_doubled_folder_and_everything_that_is_no_picture_or_text(tmp_path):
    wanted = dict.fromkeys(["h2z/trainA/1.jpg", "h2z/testB/2.PNG", "h2z/read.txt"], b"x")
    others = dict.fromkeys(["h2z/run.py", "h2z/.DS_Store.png", "__MACOSX/h2z/1.jpg"], b"x")
    make_zip(tmp_path / "a.zip", wanted | others)
    put(tmp_path, "h2z.part/old.png")  # left by a run that was killed
    common.unpack(tmp_path / "a.zip", tmp_path / "h2z")
    assert files_below(tmp_path / "h2z") == ["read.txt", "testB/2.PNG", "trainA/1.jpg"]
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "h2z"]


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.png", "/tmp/evil.png", "C:/evil.png", "..\\evil.png"]
)
def test_a_zip_with_a_name_that_leads_out_is_refused_as_a_whole(tmp_path, name):
    make_zip(tmp_path / "a.zip", {"good.png": b"x", name: b"x"})
    with pytest.raises(UserError, match="leads out of the folder") as e:
        common.unpack(tmp_path / "a.zip", tmp_path / "in" / "a")
    assert repr(name) in str(e.value) and files_below(tmp_path) == ["a.zip"]


def test_a_zip_with_a_symlink_is_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    make_zip(tmp_path / "a.zip", {link: "/etc/passwd"})
    with pytest.raises(UserError, match="'link.png' is a link"):
        common.unpack(tmp_path / "a.zip", tmp_path / "a")


def test_zip_bombs_are_refused_unpacked_or_read_in_place(tmp_path, monkeypatch):
    zeros = bytes(50_000_000)
    path = make_zip(tmp_path / "a.zip", {"a.png": zeros}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match="would unpack from"):
        common.unpack(path, tmp_path / "a")
    with pytest.raises(BadImage, match="would unpack from"):
        Zip(path).read("a.png")
    many = {f"{i}.png": zeros[:10_000_000] for i in range(10)}  # each below the limit of one
    with pytest.raises(UserError, match="100,000,000 bytes in all"):
        common.unpack(make_zip(path, many, zipfile.ZIP_DEFLATED), tmp_path / "a")
    monkeypatch.setattr(common, "MAX_MEMBERS", 2)
    with pytest.raises(UserError, match="one of 3"):
        common.unpack(make_zip(path, dict.fromkeys("abc", b"")), tmp_path / "a")
    assert files_below(tmp_path) == ["a.zip"]


def test_a_zip_without_pictures_is_not_unpacked_and_so_not_removed(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"readme.txt": b"hello", "inner.zip": b"PK"})
    with pytest.raises(UserError, match="a.zip holds no pictures of these kinds: .jpg"):
        common.unpack(path, tmp_path / "a")
    assert files_below(tmp_path) == ["a.zip"]


def test_a_file_name_in_another_encoding_can_be_printed():
    code = "import common; common.exit_status(lambda: print('\\udce9.png'))"  # byte e9, not UTF-8
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    how = dict(cwd=Path(__file__).parent.parent, env=strict, text=True)
    assert subprocess.check_output([sys.executable, "-c", code], **how) == "\\udce9.png\n"


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a device or a pipe"):
        common.write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()


def test_a_damaged_zip_leaves_no_folder_behind(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"{i}.png": BODY for i in range(3)})
    whole = path.read_bytes()
    half, flipped = whole[:400_000], whole[:400_000] + b"\0\1\2\3" + whole[400_004:]
    for broken in (half, flipped, b"", b"<html>no</html>"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="a.zip cannot be unpacked"):
            common.unpack(path, tmp_path / "a")
        assert sorted(os.listdir(tmp_path)) == ["a.zip"]
    path.write_bytes(flipped)  # one picture is hurt, the others can be used
    assert Zip(path).read("0.png") == BODY
    with pytest.raises(BadImage, match="1.png: damaged in .*CRC"):
        Zip(path).read("1.png")


def test_random_damage_to_a_zip_is_always_a_user_error_or_a_bad_image(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"{i}.png": encoded(noise()) for i in range(3)}, 8)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for i in range(300):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), 5):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(UserError):
            common.unpack(path, tmp_path / f"a{i}")
        with contextlib.suppress(UserError, BadImage):
            source = Zip(path)
            for name in source.names:
                source.image(name)


def test_a_disk_that_fills_up_while_unpacking_is_named_and_left_clean(tmp_path):
    make_zip(tmp_path / "a.zip", {"0.png": b"x", "1.png": BODY})
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(common.__file__).parent)!r})
import common
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a real error of the write
try:
    common.unpack({str(tmp_path / "a.zip")!r}, {str(tmp_path / "a")!r})
except common.UserError as e:
    sys.exit(str(e))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"{tmp_path} cannot be written" in done.stderr and "300,001 bytes" in done.stderr
    assert os.listdir(tmp_path) == ["a.zip"]


# ---- pictures --------------------------------------------------------------------------------


def test_a_plain_picture_is_decoded_as_pillow_does(tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)
    for file in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert np.array_equal(decode(file, "a.png"), noise())


@pytest.mark.parametrize(
    "content, reason",
    [
        (encoded(noise(size=(64, 64)), "JPEG")[:1500], "truncated"),
        (encoded(noise(size=(64, 64)))[:1500], "truncated|broken"),
        (b"this is a text file\n", "not a picture"),
        (b"", "not a picture"),
        (encoded(noise("L"), "GIF"), "not a picture"),
        (b"P6 0 5 255\n", "not a picture"),
        (png_header(0, 8), "not a picture"),
        (png_header(30_000, 30_000), "limit|at most"),
        (png_header(12_000, 12_000), "12000 x 12000 pixels, at most"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_a_picture_that_cannot_be_used_is_a_bad_image_with_name_and_reason(content, reason):
    with pytest.raises(BadImage, match=reason) as e:
        decode(content, "sub/a.png")
    assert str(e.value).startswith("sub/a.png: ") and len(e.value.reason) > 10


def test_random_damage_to_pictures_is_always_a_bad_image():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"):
        whole = encoded(noise(size=(32, 32)), kind)
        for _ in range(100):
            broken = bytearray(whole)
            for at in rng.integers(0, min(len(whole), 300), 4):
                broken[at] = rng.integers(256)
            with contextlib.suppress(BadImage):
                assert decode(bytes(broken), "a").mode == "RGB"


def test_cmyk_is_turned_into_rgb():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert abs(np.array(decode(encoded(red, "JPEG", quality=100), "a")) - [255, 0, 0]).max() < 4


def test_16_bits_are_divided_by_257_not_clipped():
    x = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        for mode in ("L", "RGB"):
            y = np.array(decode(encoded(Image.fromarray(x), kind), "a", mode)).reshape(6, -1)[:, 0]
            assert y.tolist() == [0, 0, 1, 1, 128, 255]
    ppm = b"P5 3 1 65535\n" + np.array([0, 32768, 65535], ">u2").tobytes()
    assert np.array(decode(ppm, "a", "L")).tolist() == [[0, 128, 255]]


def test_alpha_is_laid_over_white():
    rgba = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
    expected = [[200, 0, 0], [255, 255, 255], [204, 204, 204]]
    for kind in ("PNG", "TIFF"):
        assert np.array(decode(encoded(rgba, kind), "a"))[0].tolist() == expected
    la = Image.fromarray(np.array([[[0, 0], [100, 255]]], np.uint8))
    assert np.array(decode(encoded(la), "a", "L"))[0].tolist() == [255, 100]


def test_palette_grey_and_one_bit_become_rgb_or_grey():
    p = Image.new("P", (3, 1))
    p.putpalette([10, 20, 30, 200, 0, 0, 9, 9, 9])
    p.putdata([0, 1, 2])
    clear = encoded(p, transparency=bytes([255, 0, 255]))  # alpha per colour
    one = encoded(p, transparency=2)  # one colour is clear
    assert np.array(decode(encoded(p), "a"))[0].tolist() == [[10, 20, 30], [200, 0, 0], [9, 9, 9]]
    assert np.array(decode(clear, "a"))[0].tolist() == [[10, 20, 30], [255, 255, 255], [9, 9, 9]]
    assert np.array(decode(one, "a"))[0, 2].tolist() == [255, 255, 255]
    bits = Image.fromarray(np.array([[True, False]]))
    assert np.array(decode(encoded(bits), "a", "L")).tolist() == [[255, 0]]
    assert np.array(decode(encoded(noise("L")), "a")).std(axis=2).max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind, orientation):
    quarters = np.repeat(
        np.repeat(np.array([[0, 80, 160], [240, 40, 120]], np.uint8), 16, 0), 16, 1
    )
    stored = {  # how the upright picture is stored (EXIF 2.3: which sides row 0 and column 0 are)
        1: quarters,
        2: quarters[:, ::-1],
        3: quarters[::-1, ::-1],
        4: quarters[::-1],
        5: quarters.T,
        6: np.rot90(quarters, 1),
        7: quarters[::-1, ::-1].T,
        8: np.rot90(quarters, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert abs(np.array(decode(content, "a", "L")).astype(int) - quarters).max() < 6


def test_damaged_exif_does_not_spoil_a_good_picture():
    content = encoded(noise(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode(content, "a"), noise())


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.array(decode(content, "a"))[0, 0].tolist() == [255, 0, 0]


def test_label_maps_keep_their_indices_whatever_their_palette():
    x = np.array([[0, 1], [2, 18]], np.uint8)
    grey, palette = Image.fromarray(x), Image.fromarray(x)
    palette.putpalette(list(np.random.default_rng(0).bytes(768)))
    assert palette.mode == "P"
    for img in (grey, palette):
        got = decode_labels(encoded(img), "a.png")
        assert got.dtype == np.uint8 and np.array_equal(got, x)
    assert decode_labels(encoded(Image.fromarray(x > 0)), "a").tolist() == [[0, 1], [1, 1]]
    for bits in (2, 4):  # of grey, which Pillow reads but does not write
        header, rows = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0), {2: b"\x1b", 4: b"\x01\x23"}
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + rows[bits])), (b"IEND", b""))
        png = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        assert decode_labels(png, "a.png").tolist() == [[0, 1, 2, 3]]
        tags = {256: 4, 257: 1, 258: bits, 262: 1, 273: 200, 278: 1, 279: len(rows[bits])}
        tiff = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
        tiff += b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
        tiff = tiff.ljust(200, b"\0") + rows[bits]
        assert decode_labels(tiff, "a.tif").tolist() == [[0, 1, 2, 3]]
    with pytest.raises(BadImage, match="a.png: mode RGB; a label map holds indices"):
        decode_labels(encoded(noise()), "a.png")


# ---- sources ---------------------------------------------------------------------------------


def test_a_folder_lists_its_pictures_sorted_and_ignores_the_rest(tmp_path):
    put(tmp_path, "b/2.JPG", "a.png", "b/1.tiff", ".x.png", ".git/a.png", "__MACOSX/a.png", "a.gif")
    (tmp_path / "b" / "around").symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "c").symlink_to(tmp_path / "b")  # another name is no loop
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    source = Folder(tmp_path)
    assert source.names == ["a.png", "b/1.tiff", "b/2.JPG", "c/1.tiff", "c/2.JPG"]
    assert source.read("b/2.JPG") == encoded(noise()) and source.path == str(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="a.png: No such file"):
        source.read("a.png")


def test_a_zip_gives_the_same_names_and_bytes_as_its_folder_to_all_threads(tmp_path):
    folder = put(tmp_path / "f", *[f"d{i % 3}/{i}.png" for i in range(30)])
    for i, name in enumerate(Folder(folder).names):
        (folder / name).write_bytes(BODY[i * 1000 : i * 1000 + 5000])
    files = {name: (folder / name).read_bytes() for name in files_below(folder)}
    source = Zip(make_zip(tmp_path / "a.zip", files | {"__MACOSX/a.png": b"", ".a.png": b""}, 8))
    assert source.names == Folder(folder).names
    with ThreadPoolExecutor(8) as pool:
        assert (
            list(pool.map(source.read, source.names * 5)) == list(map(files.get, source.names)) * 5
        )


def test_batches_are_all_pictures_that_can_be_read_and_need_not_be_held(tmp_path, capsys):
    for i in range(101):
        Image.new("RGB", (4, 3), (i, 0, 0)).save(tmp_path / f"{i:03}.png")
    (tmp_path / "007.png").write_bytes(b"no picture")
    data = common.ImageSet(Folder(tmp_path), lambda img: img, cache="off")
    batches = list(data.batches(20))
    assert [x.shape[0] for x in batches] == [19, 20, 20, 20, 20, 1] and not data.kept
    found = np.concatenate([x.numpy() for x in batches])
    assert found[:, 0, 0, 0].tolist() == [i for i in range(101) if i != 7]
    assert np.array_equal(found, data.all())


def test_a_picture_that_two_threads_load_at_once_takes_its_room_once(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    class Twice(common.ImageSet):
        def load(self, i):
            if self.first.pop("time", False):
                self.array(i)  # what another thread does meanwhile
            return super().load(i)

    data = Twice(Folder(tmp_path), lambda img: img)
    data.first, data.room = {"time": True}, [100]
    data.array(0)
    assert list(data.kept) == [0] and data.room == [100 - 48]


def test_stems_of_files_do_not_coincide():
    names = ["a.jpg", "a.png", "a.jpg.png", "b.bmp"]
    assert common.stems_of(names) == ["a.jpg", "a.png", "a.jpg.png", "b"]


def test_an_encrypted_member_is_a_bad_image(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.png": b"x"})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # flag bits of the local header and of the directory
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(BadImage, match="a.png: is encrypted"):
        Zip(path).read("a.png")


def test_an_empty_folder_or_zip_names_itself_and_the_kinds_looked_for(tmp_path):
    make_zip(tmp_path / "a.zip", {"readme.md": b"x"})
    (tmp_path / "d").mkdir()
    for path in ("a.zip", "d"):
        with pytest.raises(UserError, match=f"{path}: no images found.*jpeg.*webp"):
            common.open_data(str(tmp_path / path))


def test_a_subset_is_the_same_from_a_folder_a_zip_or_one_level_down(tmp_path):
    folder = put(tmp_path / "h2z", "trainA/x/1.png", "trainA/2.png", "trainB/3.png")
    files = {name: (folder / name).read_bytes() for name in files_below(folder)}
    flat = make_zip(tmp_path / "flat.zip", files)
    nested = make_zip(tmp_path / "nested.zip", {f"h2z/{n}": c for n, c in files.items()})
    for source in (Folder(folder), Zip(flat), Zip(nested), Folder(folder.parent)):
        part = subset(source, "trainA")
        assert part.names == ["2.png", "x/1.png"] and part.path.endswith("trainA")
        assert part.read("x/1.png") == files["trainA/x/1.png"]
        assert np.array_equal(part.image("2.png"), noise()) and part.labels() is None
    assert common.top_folders(Folder(folder)) == ["trainA", "trainB"]


def test_one_domain_only_is_reported_with_what_was_found_and_what_is_expected(tmp_path):
    source = Folder(put(tmp_path, "trainA/1.png"))
    with pytest.raises(
        UserError, match="no folder trainB in it, found trainA. Expected: trainA, tr"
    ):
        subset(source, "trainB", "trainA, trainB, testA, testB")
    (tmp_path / "trainB").mkdir()
    with pytest.raises(UserError, match="trainB is empty"):
        subset(source, "trainB")
    path = make_zip(tmp_path / "a.zip", {"trainA/1.png": b"", "trainB/": b"", "trainB/a.txt": b""})
    with pytest.raises(UserError, match="trainB is empty"):
        subset(Zip(path), "trainB")


def test_labels_of_dataset_json_are_classes_or_vectors(tmp_path):
    put(tmp_path, "0/a.png", "1/b.png")
    for labels in ({"0/a.png": 3, "1/b.png": 0}, {"0/a.png": [0.5, 1], "1/b.png": [1, 2]}):
        text = json.dumps({"labels": [*labels.items(), ("other.png", 1)]})
        (tmp_path / "dataset.json").write_text(text)
        path = make_zip(tmp_path / "a.zip", {"dataset.json": text, **dict.fromkeys(labels, b"")})
        assert Folder(tmp_path).labels() == Zip(path).labels() == labels
        assert subset(Zip(path), "1").labels() == {"b.png": labels["1/b.png"]}
    (tmp_path / "dataset.json").write_text('{"labels": [["0/a.png", 3]]}')  # 1 holds label maps
    assert subset(Folder(tmp_path), "0").labels() == {"a.png": 3}
    for unlabelled in ("{}", '{"labels": null}'):
        (tmp_path / "dataset.json").write_text(unlabelled)
        assert Folder(tmp_path).labels() is None


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "\xff", "[" * 100_000, '{"labels": 3}', '{"labels": [["a.png"]]}',
        '{"labels": [["b.png", 1]]}', '{"labels": [["a.png", -1], ["b.png", 1]]}',
        '{"labels": [["a.png", 1], ["b.png", [1]]]}',
        '{"labels": [["a.png", [1]], ["b.png", [1, 2]]]}', '{"labels": [[1, 1]]}',
        '{"labels": [["a.png", "x"], ["b.png", "y"]]}',
        '{"labels": [["a.png", 1e99], ["b.png", 1]]}',
        '{"labels": [["a.png", [NaN]], ["b.png", [1]]]}',
        '{"labels": [["a.png", 945000], ["b.png", 1]]}',
        '{"labels": [["a.png", 10000000000000000000000], ["b.png", 1]]}',
    ],
)  # fmt: skip
def test_a_malformed_dataset_json_is_a_user_error_that_shows_the_form(tmp_path, text):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="dataset.json cannot be used: .*Expected"):
        Folder(tmp_path).labels()


# ---- open_data -------------------------------------------------------------------------------


def test_a_public_set_is_fetched_once_unpacked_and_its_zip_removed(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "made.zip", {"mine/trainA/1.png": encoded(noise())})
    body = path.read_bytes()
    with server(body) as (url, requests):
        public = ([url], len(body), hashlib.sha256(body).hexdigest())
        monkeypatch.setitem(common.PUBLIC, "mine", public)
        for _ in range(2):
            source = common.open_data("mine", tmp_path / "data")
            assert source.names == ["trainA/1.png"]
        assert len(requests) == 1
    assert files_below(tmp_path / "data") == ["mine/trainA/1.png"]


def test_the_public_table_holds_thirteen_sets_with_https_first():
    assert len(common.PUBLIC) == 13
    for name, (urls, size, sha256) in common.PUBLIC.items():
        assert urls[0].startswith("https://")
        assert all(u.removesuffix("?dl=1").endswith(f"/{name}.zip") for u in urls)
        if sha256 is None:  # StarGAN v2's publish neither size nor checksum
            assert name in ("celeba_hq", "afhq", "afhq_v2") and size is None
        else:
            assert size > 10**7 and re.fullmatch("[0-9a-f]{64}", sha256)


def test_a_withdrawn_set_says_how_to_build_it_and_is_used_when_it_was(tmp_path):
    with pytest.raises(UserError, match="gtFine") as e:
        common.open_data("cityscapes", tmp_path)
    assert str(tmp_path / "cityscapes") in str(e.value)
    put(tmp_path, "cityscapes/trainA/1.png")
    assert common.open_data("cityscapes", tmp_path).names == ["trainA/1.png"]


@pytest.mark.parametrize(
    "given, answer",
    [
        ("no/such/folder", "does not exist. Give a folder, a .zip, toy, or .*horse2zebra"),
        ("horse2zebr", "Did you mean horse2zebra"),
        ("Monet2Photo", "Did you mean monet2photo"),
        ("", "does not exist"),
        (__file__, "is a file, but not a .zip"),
    ],
)
def test_a_wrong_data_argument_lists_what_is_accepted(given, answer):
    with pytest.raises(UserError, match=answer) as e:
        common.open_data(given)
    assert "\n" not in str(e.value)


def test_a_zip_that_is_none_is_a_user_error(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"<html>")
    with pytest.raises(UserError, match="a.zip cannot be read as a zip"):
        common.open_data(str(tmp_path / "a.zip"))


def test_available_memory_is_plausible():
    assert (
        2**26
        < common.available_memory()
        <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


def test_a_subset_is_the_seeds_own_and_the_rest_is_held_out():
    chosen, rest = common.split(10, 4, seed=3)
    order = np.arange(10)
    np.random.RandomState(3).shuffle(order)
    assert chosen.tolist() == sorted(order[:4]) and rest.tolist() == sorted(order[4:])
    assert common.split(10, None, 3)[0].tolist() == list(range(10)) and not len(
        common.split(10, None, 3)[1]
    )
    with pytest.raises(common.UserError, match="there are 10 pictures"):
        common.split(10, 11, 3)


def test_a_damaged_first_picture_does_not_decide_the_size(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its 1 pictures can be read"):
        common.first_sides(common.open_data(str(tmp_path)))
    Image.new("RGB", (16, 12)).save(tmp_path / "b.png")
    assert common.first_sides(common.open_data(str(tmp_path))) == ("b.png", (16, 12))

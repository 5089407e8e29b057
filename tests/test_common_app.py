"""The web page of common.py: a real server process, real connections, hostile ones, a browser."""

import contextlib
import functools
import io
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chromium
import numpy as np
import pytest
import torch
from page_server import FAULTY, SLOW, UNSUITABLE
from PIL import Image, ImageOps

import common
import cyclegan

ROOT = Path(__file__).parent.parent


class Server:
    """A process that serves the page; limits: numbers of common.py that differ."""

    def __init__(self, *command, **limits):
        command = command or [ROOT / "tests/page_server.py"]
        command = [sys.executable, *map(str, command), *(f"{k}={v}" for k, v in limits.items())]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes)
        self.said = self.process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/", self.said)
        assert match, self.process.communicate()
        self.url, self.port = match[0], int(match[1])

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send(self, data, half_close=False):
        """(status, {header: text}, body) of the answer to these bytes; (None, {}, b"") of none."""
        with self.connect() as s:
            with contextlib.suppress(ConnectionError):  # answered early
                s.sendall(data)
                if half_close:
                    s.shutdown(socket.SHUT_WR)
            return parse(read_all(s))

    def post(self, body, query="", **headers):
        lines = {"Host": f"127.0.0.1:{self.port}", "Content-Length": len(body)} | headers
        lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in lines.items())
        return self.send(f"POST /translate?{query} HTTP/1.1\r\n{lines}\r\n".encode() + body)

    def translate(self, picture, **choices):
        """PIL picture of the answer, which has to be one."""
        query = "&".join(f"{k}={v}" for k, v in choices.items())
        status, headers, body = self.post(png(picture), query)
        assert status == 200 and headers["content-type"] == "image/png", body
        return Image.open(io.BytesIO(body))

    def status(self, what):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{what}:\s+(\d+)", status)[1])

    def memory(self, what="VmHWM"):
        """Bytes: the peak, or VmRSS, now."""
        return self.status(what) * 1024

    def threads(self):
        return self.status("Threads")

    def stop(self, how=signal.SIGINT):
        """What it had on stderr until it was told to stop."""
        self.process.send_signal(how)
        return self.process.communicate(timeout=20)[1]


def read_all(s):
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := s.recv(2**16):
            data += chunk
    return data


def parse(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head:
        return None, {}, b""
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
    assert int(headers["content-length"]) == len(body)
    return int(first.split()[1]), headers, body


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def plain(color=(10, 20, 30), size=(24, 16)):
    return Image.new("RGB", size, color)


def tell_apart(i):
    """A picture like no other of its kind."""
    return Image.fromarray(np.random.default_rng(i).integers(1, 255, (20, 30, 3), np.uint8))


def same(a, b):
    """Whether pictures agree but for their first pixel, which the trivial model writes."""
    a, b = np.array(a), np.array(b)
    a[0, 0] = b[0, 0]
    return np.array_equal(a, b)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    err = server.stop()
    assert server.process.returncode == 0 and "Traceback" not in err, err
    assert all(line.startswith("page_server.py: RuntimeError: ") for line in err.splitlines()), err


@pytest.fixture(scope="module")
def impatient():
    server = Server(VISITORS=4, HEAD_SECONDS=0.4, BODY_SECONDS=0.8, LINGER_SECONDS=0.3)
    yield server
    assert server.stop() == ""


# ---- a visitor ----


def test_a_picture_goes_in_and_its_translation_comes_out(server):
    assert same(server.translate(tell_apart(0)), ImageOps.invert(tell_apart(0)))


def test_the_choices_of_the_visitor_reach_the_model(server):
    assert server.translate(plain()).getpixel((0, 0)) == (0, 0, 0)
    assert server.translate(plain(), domain=1, seed=2**32 - 1).getpixel((0, 0)) == (1, 255, 0)
    picture, reference = png(tell_apart(1)), png(plain((99, 0, 0), (7, 7)))
    body = server.post(picture + reference, f"domain=1&seed=3&reference={len(reference)}")[2]
    result = Image.open(io.BytesIO(body))
    assert result.getpixel((0, 0)) == (1, 3, 99)
    assert same(result, ImageOps.invert(tell_apart(1)))


@pytest.mark.parametrize("query", ["domain=2", "domain=-1", "seed=4294967296", "seed=", "seed=1e3"])
def test_choices_that_are_not_offered_are_refused(server, query):
    status, _, body = server.post(png(plain()), query)
    assert status in (200, 400) and (status == 400) == (query != "seed="), body


def test_without_styles_there_is_no_reference():
    html, _ = common.page_html("a", [], False)
    assert b'id="style" hidden' in html and b'<select id="domain"></select>' in html


def test_pictures_are_decoded_as_data_is(server):
    turned, see_through = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    tell_apart(2).save(turned, "JPEG", exif=exif)
    tell_apart(3).convert("RGBA").save(see_through, "WEBP", lossless=True)
    for file in (turned, see_through):
        body = server.post(file.getvalue())[2]
        expected = ImageOps.invert(common.decode(file.getvalue(), "a"))
        assert same(Image.open(io.BytesIO(body)), expected)


def test_large_pictures_are_shrunk_and_small_ones_are_not_enlarged(server):
    assert server.translate(plain(size=(2000, 500))).size == (512, 128)
    assert server.translate(plain(size=(3, 1000))).size == (2, 512)
    assert server.translate(plain(size=(1, 1))).size == (1, 1)


def test_the_page_names_what_it_offers_and_runs_nothing_but_its_own_parts(server):
    get = f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\n\r\n".encode()
    status, headers, body = server.send(get)
    text, policy = body.decode(), headers["content-security-policy"]
    assert status == 200 and "Trivial &lt;model&gt;" in text
    assert "<option>cat &amp; &lt;dog&gt;</option><option>anime</option>" in text
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "{{" not in text and not re.search('(src|href)="?(http|//)', text)


# ---- files that are no pictures, and errors of the model ----


def bomb(side):
    """A small PNG file of very many black pixels."""
    data = zlib.compress(bytes(side // 8 + 1) * min(side, 12_000), 9)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))]
    chunks += [(b"IDAT", data), (b"IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        file += struct.pack(">I", len(data)) + name + data
        file += struct.pack(">I", zlib.crc32(name + data))
    return file


def gif():
    file = io.BytesIO()
    plain().save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (b"hello", "not a picture of these kinds: JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture of these kinds"),
        (gif(), "not a picture of these kinds"),
        (png(tell_apart(4))[:900], "runcated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1000), "cannot be read"),
        (bomb(12_000), "12000 x 12000 pixels, at most"),
        (bomb(60_000), "decompression bomb"),
    ],
    ids=["text", "svg", "gif", "cut", "garbage", "bomb", "larger bomb"],
)
def test_a_file_that_is_no_picture_is_refused_in_words(server, file, says):
    status, headers, body = server.post(file)
    assert status == 415 and headers["content-type"].startswith("text/plain")
    assert body.decode().startswith("The picture cannot be read: ") and says in body.decode()
    both = png(plain()) + file
    status, _, body = server.post(both, f"reference={len(file)}")
    assert status == 415 and body.startswith(b"The style's picture cannot be read: ")


def test_an_error_of_the_model_is_one_line_on_stderr_and_no_secret_for_the_visitor(server):
    status, _, body = server.post(png(plain(FAULTY)))
    assert status == 500 and body == b"The server failed on this picture. Its console says why."
    status, _, body = server.post(png(plain(UNSUITABLE)))
    assert status == 422 and body == b"There is no face in this picture."
    assert server.translate(plain())


# ---- requests that no page sends ----

HOST = b"Host: 127.0.0.1:1\r\n"
POST = b"POST /translate HTTP/1.1\r\n" + HOST
ODD = {  # what: (bytes, statuses)
    "unknown path": (b"GET /etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "traversal": (b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "encoded traversal": (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "two slashes": (b"GET //etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "proxy": (b"GET http://example.org/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "tunnel": (b"CONNECT example.org:443 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "get of translate": (b"GET /translate HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "post of page": (b"POST / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "put": (b"PUT / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "made-up method": (b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "long method": (b"A" * 300 + b" / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "next version": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 403),
    "two hosts": (b"GET / HTTP/1.1\r\n" + HOST * 2 + b"\r\n", 400),
    "no colon": (b"GET / HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n", 400),
    "folded header": (b"GET / HTTP/1.1\r\n" + HOST + b" folded\r\n\r\n", 400),
    "bare line feeds": (b"GET / HTTP/1.1\nHost: 127.0.0.1\n\r\n\r\n", 400),
    "long target": (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n", 431),
    "endless header": (b"GET / HTTP/1.1\r\nA: " + b"b" * 40_000, 431),
    "no length": (POST + b"\r\nhello", 411),
    "negative length": (POST + b"Content-Length: -5\r\n\r\nhello", 400),
    "signed length": (POST + b"Content-Length: +5\r\n\r\nhello", 400),
    "foreign digits": (POST + "Content-Length: ٥\r\n\r\nhello".encode(), 400),
    "two lengths": (POST + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\nhello", 400),
    "list of lengths": (POST + b"Content-Length: 5, 5\r\n\r\nhello", 400),
    "length 0": (POST + b"Content-Length: 0\r\n\r\n", 400),
    "huge length": (POST + b"Content-Length: 99999999999\r\n\r\nhello", 413),
    "absurd length": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nhello", 413),
    "chunked": (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 411),
    "chunked with length": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello", 411,
    ),
    "truncated body": (POST + b"Content-Length: 5000\r\n\r\nhello", 400),
    "truncated head": (POST, 400),
    "nothing": (b"", 400),
    "reference of everything": (
        b"POST /translate?reference=5 HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello", 400,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_a_request_that_no_page_sends_is_refused_in_words(server, what):
    data, expected = ODD[what]
    status, headers, body = server.send(data, half_close=True)
    assert status == expected and headers["content-type"].startswith("text/plain"), body
    assert body and b"Traceback" not in body and b"\n" not in body
    assert expected != 405 or headers["allow"] in ("GET", "POST")


def test_a_huge_upload_is_refused_before_it_is_read(server):
    before = server.memory("VmRSS")
    status, _, body = server.post(bytes(common.MAX_UPLOAD + 1))
    assert status == 413 and b"16 MB" in body
    assert server.memory("VmRSS") - before < 8 * 2**20


def test_an_early_answer_does_not_tear_the_connection_down(server):
    with server.connect() as s:
        s.sendall(POST + b"Content-Length: 90000000\r\n\r\n" + bytes(2**23))  # no ConnectionError
        assert s.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:80", "Origin": "http://localhost:80"}, 200),
        ({"Host": "[::1]:9000", "Origin": "http://[::1]:9000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example@127.0.0.1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost.evil.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8001"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
    ],
)
def test_only_the_page_itself_may_send_pictures(server, headers, status):
    assert server.post(png(plain()), **headers)[0] == status


def test_with_another_host_any_name_is_good_but_the_origin_has_to_fit():
    common.check_sender({"host": "gpu.example:8000"}, local=False)
    common.check_sender({"host": "a.example", "origin": "https://a.example"}, local=False)
    with pytest.raises(common.Refusal):
        common.check_sender({"host": "a.example", "origin": "https://b.example"}, local=False)


# ---- many visitors, slow ones, hostile ones ----


def test_slow_clients_are_cut_off(impatient):
    for start in (b"", b"GET / HT", POST + b"Content-Length: 50\r\n\r\nhello"):
        with impatient.connect() as s:
            s.sendall(start)
            begun = time.monotonic()
            assert parse(read_all(s))[0] == 408
            assert time.monotonic() - begun < 2


def test_one_byte_at_a_time_gains_no_time(impatient):
    with impatient.connect() as s, contextlib.suppress(ConnectionError):
        begun = time.monotonic()
        for byte in POST * 10:
            s.sendall(bytes([byte]))
            time.sleep(0.05)
            assert time.monotonic() - begun < 5
    assert 0.3 < time.monotonic() - begun < 5


def test_connections_that_say_nothing_do_not_keep_others_out(impatient):
    before = impatient.threads()
    with contextlib.ExitStack() as idle:
        for _ in range(8):  # twice as many as are served at once
            idle.enter_context(impatient.connect())
        time.sleep(0.1)
        assert impatient.threads() <= before + 4
        assert same(impatient.translate(tell_apart(5)), ImageOps.invert(tell_apart(5)))


def test_a_visitor_who_has_left_is_not_worked_for(server):
    leavers = [server.connect() for _ in range(3)]
    body = png(plain(SLOW))
    for s in leavers:
        s.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    time.sleep(0.2)  # the first is in work, the others wait
    for s in leavers:
        s.close()
    begun = time.monotonic()
    server.translate(plain())
    assert time.monotonic() - begun < 1.2  # with three pictures of 0.7 s before it: 1.9


def test_the_model_works_for_one_visitor_at_a_time(server):
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(server.post, [png(plain(SLOW)), png(plain(SLOW)), png(plain())])
        assert [status for status, _, _ in answers] == [200, 200, 200]


def test_two_visitors_at_once_get_their_own_results(server):
    def visit(i):
        results = [server.translate(tell_apart(i), seed=i) for _ in range(20)]
        return all(
            same(x, ImageOps.invert(tell_apart(i))) and x.getpixel((0, 0))[1] == i for x in results
        )

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(visit, (1, 2))) == [True, True]


def test_50_visitors_at_once_get_a_picture_or_hear_that_the_model_is_busy(server):
    body = png(Image.effect_noise((1000, 1000), 90).convert("RGB"))
    slow = png(plain(SLOW))
    server.post(body)
    before, together = server.memory(), threading.Barrier(50)

    def visit(i):
        together.wait()
        return server.post(body if i else slow)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(visit, range(50)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= common.WAITING, statuses
    for status, headers, text in answers:
        if status == 503:
            assert headers["retry-after"] == "5" and b"busy" in text
        else:
            assert Image.open(io.BytesIO(text)).format == "PNG"
    assert server.memory() - before < common.VISITORS * len(body) + 100 * 2**20
    assert server.translate(plain())


def hostile_request(rng):
    """Bytes of a request with something wrong."""
    kind = rng.randrange(5)
    data, _ = ODD[rng.choice(sorted(ODD))]
    if kind == 0:
        return data
    if kind == 1:  # bytes changed
        data = bytearray(data or b"GET / HTTP/1.1\r\n\r\n")
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 2:  # cut off
        return data[: rng.randrange(len(data) + 1)]
    if kind == 3:
        return rng.randbytes(rng.randrange(3000))
    body = bytearray(png(plain()))  # a damaged picture in a good request
    for _ in range(rng.randrange(1, 20)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_after_500_hostile_requests_a_good_one_still_works(server):
    rng, statuses = random.Random(0), set()
    server.post(bomb(8_000))
    before = server.memory()
    for _ in range(500):
        data = hostile_request(rng)
        if rng.random() < 0.1:  # the client leaves at once
            with server.connect() as s, contextlib.suppress(ConnectionError):
                s.sendall(data)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            continue
        status, _, body = server.send(data, half_close=True)
        statuses.add(status)
        assert b"Traceback" not in body and b"Error" not in body
    assert statuses <= {200, 400, 403, 404, 405, 411, 413, 415, 431} and len(statuses) > 6, statuses
    assert server.memory() - before < 50 * 2**20
    assert same(server.translate(tell_apart(7)), ImageOps.invert(tell_apart(7)))


def test_refused_uploads_leave_no_memory_behind(server):
    garbage = bytes(2**23)
    server.post(garbage)
    before = server.memory()
    for _ in range(30):
        assert server.post(garbage)[0] == 415
    assert server.memory() - before < 40 * 2**20


# ---- start and end ----


def test_ctrl_c_ends_it_cleanly_after_the_picture_in_work():
    server = Server()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, png(plain(SLOW)))
        time.sleep(0.3)
        assert server.stop() == "" and server.process.returncode == 0
        assert answer.result()[0] in (200, None)  # whether it still goes out is a matter of luck


def test_an_address_that_cannot_be_had_is_a_users_mistake(capsys, server):
    def fails(host, port):
        options = ["--checkpoint", "x", "--host", host, "--port", port]
        command = common.CommandLine("a.py", "a", {})
        p = command.command("app", None, "a")
        common.add_app_options(p)
        args = command.parse(["app", *options])
        with pytest.raises(common.UserError) as e:
            common.serve_page(args, "a", None)
        return str(e.value)

    assert "in use" in fails("127.0.0.1", str(server.port))
    for host, port in (("127.0.0.1", "65536"), ("no such host", "0"), ("a" * 99 + ".b", "0")):
        assert "--port" in fails(host, port)
    assert capsys.readouterr().out == ""


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.PATH is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    browser = chromium.Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    violations = [e for e in browser.events if "Content Security Policy" in json.dumps(e)]
    browser.close()
    assert not violations


def text(browser, name):
    return browser.value(f"document.getElementById('{name}').textContent")


def generate(browser):
    """Presses the button; what the page says in the end, and whether that is an error."""
    browser.value("document.getElementById('generate').click()")
    return outcome(browser)


def outcome(browser):
    busy = "document.getElementById('generate').hasAttribute('aria-disabled')"
    browser.wait(f"!{busy}")
    return text(browser, "error") or text(browser, "status")


def shown(browser, name="after"):
    """The picture on the page, or None."""
    data = browser.value(f"""(() => {{
        const img = document.getElementById("{name}"), canvas = document.createElement("canvas");
        if (img.closest("figure").hidden) return null;
        const [W, H] = [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(img, 0, 0);
        return [W, H, Array.from(context.getImageData(0, 0, W, H).data)];
    }})()""")
    if data is None:
        return None
    W, H, values = data
    return Image.fromarray(np.array(values, np.uint8).reshape(H, W, 4)[:, :, :3])


def saved(path, picture):
    picture.save(path)
    return path


def test_upload_compare_and_save_in_a_browser(server, browser, tmp_path):
    browser.tab(server.url)
    assert shown(browser, "before") is None and shown(browser) is None
    browser.choose("picture", saved(tmp_path / "my.face.png", tell_apart(10)))
    browser.wait("document.getElementById('before').complete")
    assert same(shown(browser, "before"), tell_apart(10)) and shown(browser) is None
    assert generate(browser) == "Done. The result can be saved."
    assert same(shown(browser), ImageOps.invert(tell_apart(10)))
    browser.value("document.getElementById('save').click()")
    file = browser.downloads / "my.face-translated.png"
    end = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert same(Image.open(file), ImageOps.invert(tell_apart(10)))


def test_everything_can_be_done_with_the_keyboard(server, browser, tmp_path):
    browser.tab(server.url)

    def tab_to(name):
        for _ in range(12):
            browser.press("Tab")
            if browser.value("document.activeElement.id") == name:
                return
        raise AssertionError(f"Tab does not reach {name}")

    tab_to("picture")
    browser.press(" ")
    node = browser.event("Page.fileChooserOpened")["backendNodeId"]
    file = saved(tmp_path / "keys.png", tell_apart(11))
    browser("DOM.setFileInputFiles", files=[str(file)], backendNodeId=node)
    tab_to("domain")
    browser.press("ArrowDown")
    tab_to("generate")
    browser.press("Enter")
    assert outcome(browser).startswith("Done")
    assert shown(browser).getpixel((0, 0)) == (1, 0, 0)
    assert browser.value("document.activeElement.id") == "generate"  # focus stays where it was
    tab_to("save")
    browser.press("Enter")
    browser.event("Page.downloadWillBegin")


def test_a_wrong_or_huge_or_missing_file_is_said_in_the_page(server, browser, tmp_path):
    browser.tab(server.url)
    assert generate(browser) == "Choose a picture first."
    assert browser.value("document.activeElement.id") == "picture"
    (tmp_path / "a.png").write_text("no picture")
    browser.choose("picture", tmp_path / "a.png")
    assert "not a picture of these kinds" in generate(browser)
    assert browser.value("document.activeElement.id") == "picture" and shown(browser) is None
    with open(tmp_path / "b.png", "wb") as f:
        f.truncate(common.MAX_UPLOAD + 1)
    browser.choose("picture", tmp_path / "b.png")
    assert text(browser, "error") == "The file is too large: 17 MB, at most 16 MB are accepted."
    assert "too large" in generate(browser)
    browser.choose("picture", saved(tmp_path / "c.png", plain(FAULTY)))
    assert text(browser, "error") == "" and "server failed" in generate(browser)
    browser.choose("picture", saved(tmp_path / "c.png", plain()))
    assert generate(browser).startswith("Done")


def test_styles_come_from_numbers_and_pictures_chosen_or_dropped(server, browser, tmp_path):
    browser.tab(server.url)
    picture = saved(tmp_path / "a.png", tell_apart(12))
    reference = saved(tmp_path / "b.png", plain((77, 0, 0)))
    for box, file in (("drop", picture), ("style", reference)):
        where = browser.value(f"document.getElementById('{box}').getBoundingClientRect().toJSON()")
        data = dict(items=[], files=[str(file)], dragOperationsMask=1)
        for step in ("dragEnter", "dragOver", "drop"):
            at = dict(x=where["x"] + 9, y=where["y"] + where["height"] - 9)
            browser("Input.dispatchDragEvent", type=step, data=data, **at)
    assert browser.value("document.getElementById('guided').checked")
    assert generate(browser).startswith("Done") and shown(browser).getpixel((0, 0))[2] == 77
    browser.value("document.getElementById('another').click()")
    seed = int(browser.value("document.getElementById('seed').value"))
    assert outcome(browser).startswith("Done")
    assert shown(browser).getpixel((0, 0)) == (0, seed % 256, 0)
    browser.value("document.getElementById('seed').value = '-1'")
    assert "from 0 to 4294967295" in generate(browser)
    assert browser.value("document.activeElement.id") == "seed"


def test_a_busy_model_and_a_server_that_went_away_are_said_in_the_page(browser, tmp_path):
    server = Server()
    browser.tab(server.url)
    browser.choose("picture", saved(tmp_path / "a.png", plain()))
    slow = png(plain(SLOW))
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.post, slow) for _ in range(common.WAITING + 1)]
        time.sleep(0.3)
        assert generate(browser) == "The model is busy. Try again in a few seconds."
        server.stop(signal.SIGKILL)
        assert generate(browser) == "The server does not answer. Is it still running?"
    assert len(waiting) == common.WAITING + 1


def test_two_tabs_at_once_show_their_own_results(server, browser, tmp_path):
    tabs = {browser.tab(server.url): i for i in (20, 21)}
    for browser.session, i in tabs.items():
        browser.choose("picture", saved(tmp_path / f"{i}.png", tell_apart(i)))
    for browser.session in tabs:
        browser.value("document.getElementById('generate').click()")
    for browser.session, i in tabs.items():
        assert outcome(browser).startswith("Done")
        assert same(shown(browser), ImageOps.invert(tell_apart(i)))


def test_another_picture_chosen_meanwhile_is_not_shown_with_the_old_result(
    server, browser, tmp_path
):
    browser.tab(server.url)
    browser.choose("picture", saved(tmp_path / "a.png", plain(SLOW)))
    browser.value("document.getElementById('generate').click()")
    browser.choose("picture", saved(tmp_path / "b.png", tell_apart(22)))
    time.sleep(0.9)
    assert shown(browser) is None and outcome(browser) == ""
    assert generate(browser).startswith("Done")
    assert same(shown(browser), ImageOps.invert(tell_apart(22)))


@pytest.mark.parametrize("width", [320, 360, 1200])
def test_the_page_fits_its_window_and_names_every_control(server, browser, tmp_path, width):
    browser.tab(server.url, width)
    browser.choose("picture", saved(tmp_path / "a.png", plain(size=(300, 200))))
    assert generate(browser).startswith("Done")
    assert browser.value("document.documentElement.scrollWidth") <= width
    tops = [f"document.getElementById('{name}').offsetTop" for name in ("before", "after")]
    side_by_side = browser.value(tops[0]) == browser.value(tops[1])
    assert side_by_side == (width > 600)
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    controls = ("button", "combobox", "radio", "spinbutton", "link", "image", "textbox")
    found = {n["role"]["value"]: n["name"]["value"] for n in nodes if not n["ignored"]}
    unnamed = [n for n in nodes if n.get("role", {}).get("value") in controls
               and not n["ignored"] and not n["name"]["value"]]  # fmt: skip
    assert {"main", "heading", "status", "alert", "combobox", "spinbutton"} <= set(found)
    assert not unnamed
    small = """[...document.querySelectorAll("button, a, select, input[type=number]")]
        .filter(e => e.offsetHeight < 44).map(e => e.id)"""
    assert browser.value(small) == []


# ---- cyclegan.py app ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a minute training."""
    folder = tmp_path_factory.mktemp("trained")
    for part, domain in (("trainA", 0), ("trainB", 1)):
        (folder / "face2mask" / part).mkdir(parents=True)
        for i in range(2):
            common.toy_face(i, domain, 40).save(folder / f"face2mask/{part}/{i}.png")
    options = "--load-size 36 --crop-size 32 --ngf 4 --ndf 4 --blocks 1 --epochs 1 --workers 0"
    options += f" --data {folder}/face2mask --out {folder}/runs --device cpu"
    cyclegan.main(options.split())
    return folder / "runs/cyclegan-face2mask-000"


def test_the_page_of_cyclegan_does_what_translate_does_in_both_directions(trained, tmp_path):
    app = Server(ROOT / "cyclegan.py", "app", "--checkpoint", trained, "--port", 0)
    try:
        page = app.send(f"GET / HTTP/1.1\r\nHost: localhost:{app.port}\r\n\r\n".encode())[2]
        assert b"<h1>CycleGAN face2mask</h1>" in page
        assert b"<option>mask</option><option>face</option>" in page
        picture = common.toy_face(9, 0, 45)
        picture.save(tmp_path / "a.png")
        for domain, direction in enumerate(("AtoB", "BtoA")):
            options = f"translate --checkpoint {trained} --input {tmp_path}/a.png --device cpu"
            cyclegan.main(
                [*options.split(), "--out", f"{tmp_path}/b.png", "--direction", direction]
            )
            result = np.asarray(app.translate(picture, domain=domain), int)
            assert np.abs(result - np.asarray(Image.open(tmp_path / "b.png"), int)).max() <= 1
        assert app.translate(plain(size=(700, 5))).size == (512, 4)
    finally:
        assert app.stop() == "" and app.process.returncode == 0


def test_mistakes_of_cyclegan_app_end_in_one_line(trained, capsys, tmp_path):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    torch.save(state["nets"]["G_AB"], tmp_path / "latest_net_G_A.pth")
    cases = [
        (["--checkpoint", "none.pt"], "none.pt"),
        (["--checkpoint", tmp_path / "latest_net_G_A.pth", "--direction", "BtoA"], "no generator"),
        (["--checkpoint", trained, "--port", "65536"], "--port 65536"),
        (["--checkpoint", trained, "--max-side", "0"], "--max-side"),
        ([], "--checkpoint"),
    ]
    for options, message in cases:
        arguments = ["app", *map(str, options)]
        assert common.exit_status(functools.partial(cyclegan.main, arguments)) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out

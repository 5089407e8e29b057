"""Headless Chromium through the DevTools protocol, which it speaks on two pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
OPTIONS += " --disable-background-networking --disable-extensions --hide-scrollbars"
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}


class Chromium:
    """One browser with one tab in front; Chromium.tab() opens and shows another."""

    def __init__(self, folder):
        to_it, from_it = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_it[0], from_it[1])]
        start = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        command = [PATH, *OPTIONS.split(), "--remote-debugging-pipe"]
        command += [f"--user-data-dir={folder}/profile"]
        self.process = subprocess.Popen(
            ["bash", "-c", start, "bash", *command], pass_fds=ends, stderr=subprocess.DEVNULL
        )
        for fd in (*ends, to_it[0], from_it[1]):
            os.close(fd)
        self.output, self.input = os.fdopen(to_it[1], "wb", 0), os.fdopen(from_it[0], "rb")
        self.count, self.events, self.session, self.rest = 0, [], None, b""
        self.downloads = Path(folder)
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def __call__(self, method, **params):
        """The result of a command; events that come before it are kept."""
        self.count += 1
        message = dict(id=self.count, method=method, params=params)
        if self.session and not method.startswith(("Browser.", "Target.")):
            message["sessionId"] = self.session
        self.output.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def receive(self):
        while b"\0" not in self.rest:
            data = self.input.read1(2**20)
            assert data, "Chromium has ended"
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def tab(self, url, width=1200, height=900):
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self(f"{domain}.enable")
        self("Page.setInterceptFileChooserDialog", enabled=True)
        self.resize(width, height)
        self("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return self.session

    def resize(self, width, height=900):
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Emulation.setDeviceMetricsOverride", **size)

    def value(self, expression):
        """The value of a JavaScript expression in the page; a promise is waited for."""
        options = dict(awaitPromise=True, returnByValue=True, userGesture=True)
        result = self("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, expression, seconds=15):
        end = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def choose(self, field, path):
        """A file for the file field of this id, as if chosen in the dialog."""
        node = self("Runtime.evaluate", expression=f"document.getElementById('{field}')")
        object_id = node["result"]["objectId"]
        self("DOM.setFileInputFiles", files=[str(path)], objectId=object_id)

    def press(self, key, modifiers=0):
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = dict(key=key, code="Space" if key == " " else key, windowsVirtualKeyCode=KEYS[key])
        code |= dict(modifiers=modifiers)
        self("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **code)
        self("Input.dispatchKeyEvent", type="keyUp", **code)

    def event(self, name, seconds=10):
        """The parameters of the next event of this name."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for i, event in enumerate(self.events):
                if event.get("method") == name:
                    return self.events.pop(i)["params"]
            self.value("new Promise(done => setTimeout(done, 20))")
        raise AssertionError(f"no {name}")

    def screenshot(self, path):
        data = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.output.close()
        self.input.close()

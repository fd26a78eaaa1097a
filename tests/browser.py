"""A headless Chromium, spoken to by its debugging protocol through two pipes."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SOON_S = 60


class Browser:
    """One page in a browser of its own; `with Browser() as browser`.

    Attributes:
        errors: what its console said of errors and warnings, and what was raised in its scripts.
    """

    def __init__(self):
        self.errors = []
        self._numbers = itertools.count(1)
        self._profile = tempfile.mkdtemp(prefix="learnax-browser-")
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"),
            *("--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={self._profile}", "about:blank"),
        ]
        # The browser reads file 3 and writes file 4. Debian's sh knows no files beyond 9.
        command = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", CHROMIUM, *options]
        self._process = subprocess.Popen(command, pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self._rest, self._loaded, self._session = b"", False, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method, **params):
        """Asks for something, and waits for the answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._until(lambda told: told.get("id") == number)["result"]

    def look(self, width, height=900, *, dark=False, paper=False):
        """As wide a window, or paper, and the colours that its user prefers."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + phone, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])

    def open(self, path):
        """Opens a file, and waits until it is drawn."""
        self._loaded = False
        self.call("Page.navigate", url=Path(path).absolute().as_uri())
        if not self._loaded:
            self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def value(self, script):
        """What a line of JavaScript gives."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def screenshot(self, path):
        """The whole page as a PNG."""
        told = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(told["data"]))

    def _until(self, wanted):
        end = time.monotonic() + SOON_S
        while time.monotonic() < end:
            while b"\0" not in self._rest:
                part = os.read(self._from, 1 << 20)
                assert part, "the browser has ended"
                self._rest += part
            message, _, self._rest = self._rest.partition(b"\0")
            told = json.loads(message)
            method, params = told.get("method"), told.get("params", {})
            if method == "Page.loadEventFired":
                self._loaded = True
            if method == "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "raised"))
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                self.errors.append(str(params["args"]))
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])
            if wanted(told):
                assert "error" not in told, told
                return told
        raise TimeoutError

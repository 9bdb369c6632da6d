"""A Chromium that a test drives through its DevTools protocol, over two pipes: pages, keys, pictures."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage --disable-extensions".split()
FLAGS += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
CODES = {"Enter": 13, "Backspace": 8, "Tab": 9, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}


def chromium() -> str:
    """Its path; a test without one is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip("no Chromium here (apt-get install chromium): pages are not clicked through")


class Browser:
    """A page of a Chromium of its own, which has its files and its downloads in ``folder``."""

    def __init__(self, folder: Path):
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, answers)]  # not in the way of 3 and 4
        line = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        line = ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash", *line]  # the numbers that it expects
        self.process = subprocess.Popen(line, pass_fds=high, stderr=subprocess.DEVNULL)
        for end in (theirs, answers, *high):
            os.close(end)
        self._rest, self._number, self._session, self.events = b"", 0, None, []
        self.anew()

    def anew(self) -> None:
        """A page that knows nothing of those before, in a profile of its own: what was kept in the browser is gone."""
        self._session = None
        profile = self("Target.createBrowserContext")
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads), **profile)
        page = self("Target.createTarget", url="about:blank", **profile)["targetId"]
        self._session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self("Emulation.setFocusEmulationEnabled", enabled=True)
        self.events.clear()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self("Browser.close")
            self.process.wait(20)
        finally:
            self.process.kill()
        os.close(self._write)
        os.close(self._read)

    def __call__(self, method: str, **params):
        """The protocol's answer to one call."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session and not method.startswith("Browser."):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._message()
            if got.get("id") == self._number:
                assert "error" not in got, got
                return got["result"]
            self.events.append(got)

    def _message(self) -> dict:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "Chromium says nothing for a minute"
            part = os.read(self._read, 1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        whole, _, self._rest = self._rest.partition(b"\0")
        return json.loads(whole)

    def until(self, expression: str):
        """The value of a JavaScript expression once it is true."""
        end = time.monotonic() + 30
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"not within 30 s: {expression}"
            time.sleep(0.02)
        return value

    def value(self, expression: str):
        got = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def open(self, path: Path) -> None:
        self("Page.navigate", url=path.resolve().as_uri())
        self.until(f"document.readyState === 'complete' && location.href === {json.dumps(path.resolve().as_uri())}")

    def reload(self, expression: str) -> None:
        """Again, until the expression is true. On a busy machine a page that is reloaded within milliseconds of a write
        to its storage may see the storage of before; the next time it sees the write."""
        for _ in range(10):
            time.sleep(0.2)
            self.value("window.before = true")
            self("Page.reload")
            self.until("document.readyState === 'complete' && !window.before")
            if self.value(expression):
                return
        raise AssertionError(f"not after ten reloads: {expression}")

    def press(self, *keys: str) -> None:
        """Keys as a keyboard sends them: characters, or names as in CODES."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            about = {"key": key, "windowsVirtualKeyCode": CODES.get(key, ord(key[0].upper()))}
            self("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
            self("Input.dispatchKeyEvent", type="keyUp", **about)

    def look(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """The window's size in CSS pixels, and its colours."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def said(self) -> list[str]:
        """Errors of the page, and what its policy refused."""
        self.value("0")
        errors = [e["params"]["exceptionDetails"] for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]
        return [str(e) for e in errors] + [e["text"] for e in entries if e["level"] in ("warning", "error")]

    def fetched(self) -> list[str]:
        """What the page asked for over a network or from other files."""
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("blob:", "data:"))]

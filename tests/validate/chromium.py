"""Headless Chromium over the DevTools protocol's pipe: pages opened, measured and photographed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find() -> str | None:
    """The browser's path, if one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile and one page; gone with the block."""
    (commands, give), (take, answers) = os.pipe(), os.pipe()
    # High numbers, so that 3 and 4 are free in the child.
    ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in (commands, answers)]
    for fd in (commands, answers):
        os.close(fd)

    def attach() -> None:
        os.dup2(ours[0], 3)
        os.dup2(ours[1], 4)

    process = subprocess.Popen(
        [find() or "", *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=attach,
        pass_fds=(3, 4),
        env={**os.environ, "HOME": str(profile)},
    )
    for fd in ours:
        os.close(fd)
    try:
        yield Page(give, take)
    finally:
        with contextlib.suppress(OSError):
            os.write(give, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for fd in (give, take):
            os.close(fd)


class Page:
    """A tab. `requests` and `complaints` are what the page open now asked for and wrote to the console."""

    def __init__(self, give: int, take: int) -> None:
        self._give, self._take, self._buffer = give, take, b""
        self._numbers, self._session = itertools.count(1), ""
        self._events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(found["targetId"] for found in targets if found["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """A command's result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._give, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        """The next message; events are kept, too."""
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._take], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            if not (chunk := os.read(self._take, 1 << 20)):
                raise RuntimeError("the browser ended")
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message

    def open(self, path: Path, width: int, *, dark: bool = False, height: int = 900) -> None:
        """A file, in a window of `width` CSS pixels; a narrow one is a phone's."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._next(60)
        # Fonts and layout are done when a frame has been drawn.
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def evaluate(self, script: str) -> Any:
        """A script's value, as JSON would have it."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """Addresses asked for since `open`, but for data within the page."""
        addresses = [
            event["params"]["request"]["url"]
            for event in self._events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in addresses if not address.startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """Errors, warnings and messages on the console since `open`."""
        found = []
        for event in self._events:
            params = event["params"]
            if event["method"] == "Log.entryAdded":
                found.append(params["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(str([argument.get("value") for argument in params["args"]]))
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["text"])
        return found

    def photograph(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(picture["data"]))

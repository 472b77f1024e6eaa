"""A real browser without a window, spoken to over pipes in Chrome's DevTools protocol: no package and no driver is needed."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell", "msedge")


def find() -> str | None:
    """A Chromium on the PATH, or one that Playwright fetched."""
    fetched = sorted(Path.home().glob(".cache/ms-playwright/chromium*/*/*"))
    fetched = [path for path in fetched if path.name in ("chrome", "headless_shell", "chrome-headless-shell")]
    return next(filter(None, map(shutil.which, NAMES)), None) or next((str(path) for path in reversed(fetched)), None)


class Tab:
    """A page in the browser. ``requests``: every address that it asked for."""

    def __init__(self, write: int, read: int):
        self._write, self._read, self._rest, self._count, self._session = write, read, b"", 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self, seconds: float = 60) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser has not answered for {seconds:.0f} s")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(message["params"]["exceptionDetails"]))
        return message

    def open(self, file: Path) -> None:
        self.call("Page.navigate", url=file.resolve().as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Click into an element, at parts of its width and height."""
        box = self.run(
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); "
            f"return [b.x, b.y, b.width, b.height]}})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=box[0] + x * box[2], y=box[1] + y * box[3], button="left", clickCount=1
            )


@contextlib.contextmanager
def opened(browser: str, profile: Path) -> Iterator[Tab]:
    """A tab of a browser that is started for it, with a profile of its own."""
    (read_by_it, write), (read, written_by_it) = os.pipe(), os.pipe()
    options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # it refuses root otherwise
    pipes = f'exec "$0" "$@" 3<&{read_by_it} 4>&{written_by_it}'
    process = subprocess.Popen(
        ["bash", "-c", pipes, browser, *options], pass_fds=(read_by_it, written_by_it), stderr=subprocess.DEVNULL
    )
    os.close(read_by_it)
    os.close(written_by_it)
    try:
        yield Tab(write, read)
    finally:
        process.kill()
        process.wait()
        os.close(write)
        os.close(read)

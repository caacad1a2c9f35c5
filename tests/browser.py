"""A real browser for tests: headless Chromium, driven by the DevTools protocol over two pipes; no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds that anything may take
# Quiet where nothing is asked, and no calls home.
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which root in a container cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
)


def chromium() -> str | None:
    """The program, where there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One Chromium process. `tab()` gives windows that share nothing with each other."""

    def __init__(self, profile: Path) -> None:
        program = chromium()
        assert program is not None
        ours, theirs = os.pipe(), os.pipe()
        words = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        script = f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}'  # it reads from 3 and writes to 4
        self.process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *words],
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = ours[1], theirs[0]
        self._rest, self._last = b"", 0
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError, AssertionError):
            self.ask("Browser.close")
        os.close(self._to)
        os.close(self._from)
        try:
            self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                self.process.kill()

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a call of the protocol; events that come before it are kept."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._to, rest) :]
        limit = time.monotonic() + PATIENCE
        while True:
            answer = self._read(limit, method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _read(self, limit: float, what: str) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, limit - time.monotonic()))
            assert ready, f"no answer to {what}"
            got = os.read(self._from, 1 << 20)
            assert got, "the browser has ended"
            self._rest += got
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def tab(self, url: str, width: int = 1200, height: int = 1000) -> Tab:
        """A window with cookies and cache of its own, at this address."""
        context = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask(
            "Target.createTarget", url="about:blank", browserContextId=context, width=width, height=height
        )["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.ask(f"{domain}.enable")
        tab.ask("Page.navigate", url=url)
        return tab


class Tab:
    """A window of the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a call of the protocol in this window."""
        return self.browser.ask(method, self.session, **params)

    def run(self, script: str) -> Any:
        """What an expression of JavaScript gives; promises are waited for."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, accepts: Callable[[Any], bool] = bool, patience: float = PATIENCE) -> Any:
        """The first value of an expression that is accepted."""
        limit = time.monotonic() + patience
        while not accepts(value := self.run(script)):
            assert time.monotonic() < limit, f"{script} is still {value!r}"
            time.sleep(0.1)
        return value

    def click(self, selector: str) -> None:
        """Click in the middle of an element with the mouse, once it stands still and nothing lies over it."""
        script = (
            f"(() => {{const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();"
            " const x = r.x + r.width / 2, y = r.y + r.height / 2, top = document.elementFromPoint(x, y);"
            " return top && (e.contains(top) || top.contains(e)) ? [x, y] : null})()"
        )
        seen: list[Any] = [None]

        def stands(place: Any) -> bool:
            seen.append(place)
            return place is not None and place == seen[-2]

        x, y = self.wait(script, stands)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Replace what an input holds by text, with the keyboard, and leave it."""
        self.click(selector)
        self.run("document.activeElement.select()")
        self.ask("Input.insertText", text=text)
        self.key("Tab", 9)

    def key(self, name: str, code: int) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def bytes_of(self, url: str) -> bytes:
        """What lies at an address, fetched by the page."""
        text = self.run(
            f"fetch({json.dumps(url)}).then(r => r.arrayBuffer()).then(b => {{let s = '';"
            " for (const c of new Uint8Array(b)) s += String.fromCharCode(c); return btoa(s)})"
        )
        return base64.b64decode(text)

    def screenshot(self, full: bool = False) -> bytes:
        """The window as a PNG; full: all of the page."""
        return base64.b64decode(
            self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        )

    def events(self, method: str) -> list[dict[str, Any]]:
        """The parameters of the events of this kind so far."""
        self.run("0")  # takes in what is there
        return [
            event["params"]
            for event in self.browser.events
            if event.get("method") == method and event.get("sessionId") == self.session
        ]

    def wait_for(self, method: str, accepts: Callable[[dict[str, Any]], bool]) -> None:
        """Return once there was an event of this kind that is accepted."""
        limit = time.monotonic() + PATIENCE
        while not any(map(accepts, self.events(method))):
            assert time.monotonic() < limit, f"no such {method}"
            time.sleep(0.1)


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser, ended afterwards."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()

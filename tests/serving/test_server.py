"""The gate before the page: what it lets through and what not; where the page listens; what it says without Gradio."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from dit.errors import UserError
from dit.serving import server
from dit.serving.setting import Limits

OPEN = [
    ("GET", "/"),
    ("HEAD", "/"),
    ("GET", "/config"),
    ("GET", "/assets/index-1a2b.js"),
    ("GET", "/static/fonts/x.woff2"),
    ("GET", "/theme.css"),
    ("GET", "/gradio_api/queue/data"),
    ("GET", "/gradio_api/heartbeat/abc123"),
    ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/run/predict"),
    ("GET", "/gradio_api/file={folder}/ab/picture.png"),
]
SHUT = [
    ("GET", "/gradio_api/file=/etc/passwd"),
    ("HEAD", "/gradio_api/file=/etc/passwd"),
    ("GET", "/file=/etc/passwd"),
    ("GET", "/gradio_api/file/etc/passwd"),
    ("GET", "/gradio_api/file={folder}/../run/config.yaml"),
    ("GET", "/gradio_api/file={folder}-other/x"),
    ("GET", "/gradio_api/file={folder}/link/config.yaml"),
    ("GET", "/gradio_api/file=ab/picture.png"),
    ("GET", "/gradio_api/file=http://example.com/x.png"),
    ("GET", "/gradio_api/proxy=http://example.com"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/call/draw"),
    ("POST", "/gradio_api/api/draw"),
    ("POST", "/gradio_api/component_server"),
    ("GET", "/gradio_api/runs"),
    ("GET", "/gradio_api/deep_link"),
    ("GET", "/monitoring"),
    ("GET", "/custom_component/1/client/x/y.js"),
    ("PUT", "/"),
    ("DELETE", "/gradio_api/file={folder}/ab/picture.png"),
    ("POST", "/login"),
    ("GET", "/docs"),
]


async def passed(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers everything."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"passed"})


def answer(folder: Path, method: str, path: str, headers: tuple[tuple[bytes, bytes], ...]) -> int:
    sent: list[dict[str, Any]] = []

    async def ask() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(dict(message))

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        await server.gated(passed, folder)(scope, receive, send)

    asyncio.run(ask())
    return int(sent[0]["status"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's folder, beside a run, with a link to it inside."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("secret: 1\n")
    made = tmp_path / "page"
    made.mkdir()
    (made / "link").symlink_to(tmp_path / "run")
    return made


SMALL = ((b"content-length", b"300"),)


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_what_the_page_needs_passes(folder: Path, method: str, path: str) -> None:
    assert answer(folder, method, path.format(folder=folder), SMALL) == 200


@pytest.mark.parametrize(("method", "path"), SHUT)
def test_all_else_is_refused(folder: Path, method: str, path: str) -> None:
    assert answer(folder, method, path.format(folder=folder), SMALL) == 404


@pytest.mark.parametrize(
    "headers", [(), ((b"content-length", b"65537"),), ((b"content-length", b"-1"),)], ids=str
)
def test_large_requests_are_refused(folder: Path, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    assert answer(folder, "POST", "/gradio_api/queue/join", headers) == 413


def test_a_websocket_is_refused(folder: Path) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(server.gated(passed, folder)({"type": "websocket", "path": "/"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_it_listens_on_loopback_and_says_where() -> None:
    with server.listening(server.LOOPBACK[0], 0) as held:
        host, port = held.getsockname()
        assert (host, server.address(held)) == ("127.0.0.1", f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("host", ["127.0.0.1", "no such host"])
def test_a_place_where_it_cannot_listen_is_named(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen at {host}, port {port}: .*--port"):
            server.listening(host, port)


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(UserError, match=rf"--port is {port}, expected a number in \[0, 65535\]"):
        server.listening("127.0.0.1", port)


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"the page needs Gradio, and fastapi is not installed: .*demo"):
        server.application(None, Limits(), tmp_path)  # type: ignore[arg-type]

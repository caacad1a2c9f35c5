"""Serves the page: on loopback unless told otherwise, and nothing but what the page is made of."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.errors import Notice, UserError
from dit.experiments.loaded import TrainedModel
from dit.serving.setting import Limits

LOOPBACK = ("127.0.0.1", "::1", "localhost")
FILE = "/gradio_api/file="
# What the page's own script asks for. Gradio has much more: uploads, a proxy, fetching of URLs, histories.
GET = re.compile(
    r"/|/config/?|/theme\.css|/gradio_api/theme\.css|/(assets|static|svelte)/.+|/favicon\.ico|/manifest\.json|/robots\.txt"
    r"|/gradio_api/(queue/data|heartbeat/[\w-]+|startup-events|app_id/?|info/?)"
)
# Gradio runs what has to wait in the queue by way of the queue alone, and the rest, such as the slider, by run/predict.
POST = re.compile(r"/gradio_api/(queue/join|run/predict|cancel|reset/?)")
LARGEST = 64 * 1024  # bytes of a request; the fields of the page take some hundred
GRACE = 2  # seconds that open connections have when the server ends

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def gated(app: App, folder: Path) -> App:
    """An ASGI application that passes on what the page needs, and answers 404 to all else.

    folder: the only one of which files are served. A request whose body is large, or of unknown size, gets 413.
    """
    top = folder.resolve()

    def is_open(method: str, path: str) -> bool:
        if method == "POST":
            return POST.fullmatch(path) is not None
        if method not in ("GET", "HEAD"):
            return False
        if path.startswith(FILE):
            named = path.removeprefix(FILE)
            return os.path.isabs(named) and Path(named).resolve().is_relative_to(top)
        return GET.fullmatch(path) is not None

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        elif scope["type"] != "http":  # a websocket, which the page has no use for
            await send({"type": "websocket.close", "code": 1008})
        elif not is_open(scope["method"], scope["path"]):
            await _refuse(send, 404)
        elif scope["method"] == "POST" and not _is_small(scope):
            await _refuse(send, 413)
        else:
            await app(scope, receive, send)

    return gate


def _is_small(scope: Scope) -> bool:
    size = dict(scope["headers"]).get(b"content-length", b"")
    return size.isdigit() and int(size) <= LARGEST


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def application(model: TrainedModel, limits: Limits, folder: Path) -> App:
    """The page as an ASGI application, gate included. Raises UserError where the demo's packages are not installed."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when it is imported, and when components are made
    try:
        import fastapi
        import gradio as gr
    except ImportError as error:
        raise UserError(
            f"the page needs Gradio, and {error.name} is not installed: pip install gradio, or '.[demo]' here"
        ) from None
    from dit.serving.page import CSS, build

    page = build(model, limits)
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        page,
        path="",
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        show_error=False,
        css=CSS,
        theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("monospace",)),
    )
    return gated(app, folder)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises UserError where there is none to be had."""
    if not 0 <= port <= 65535:  # which getaddrinfo would take modulo 2^16
        raise UserError(f"--port is {port}, expected a number in [0, 65535], 0 being any that is free")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(place)
        held.listen()  # so that a browser that comes before the server runs waits, and is not refused
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen at {host}, port {port}: {error}; give another --port (0 is any free one)"
        ) from None
    return held


def address(held: socket.socket) -> str:
    """What to open in a browser."""
    host, port = held.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


@dataclass(frozen=True)
class Serving:
    """A page that is ready to be served. url: what to open in a browser."""

    url: str
    server: Any  # uvicorn.Server
    held: socket.socket

    def run(self) -> None:
        """Serve, until `stop` is called or the process is told to end."""
        self.server.run(sockets=[self.held])

    def stop(self) -> None:
        """Let `run` end, soon. From any thread."""
        self.server.should_exit = True


@contextlib.contextmanager
def serving(model: TrainedModel, limits: Limits, host: str = LOOPBACK[0], port: int = 0) -> Iterator[Serving]:
    """Make the page ready: its codec open, its socket listening. Port 0 is any that is free.

    Pictures lie in a temporary folder until the end. Warns where others than this machine reach it. Raises UserError.
    """
    with tempfile.TemporaryDirectory(prefix="dit-page-") as name:
        app = application(model, limits, Path(name))
        _ = model.codec  # opened before anybody waits for it
        import uvicorn

        with contextlib.closing(listening(host, port)) as held:
            if host not in LOOPBACK:
                warnings.warn(
                    f"the page listens at {host}: whoever reaches this machine can draw, and nothing asks who it is",
                    Notice,
                    stacklevel=3,
                )
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, ws="none")
            yield Serving(address(held), uvicorn.Server(config), held)

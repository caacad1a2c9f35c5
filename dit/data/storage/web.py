"""Files of web servers, by byte range."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from dit.data.storage.remote import NO_RANGES, RefusedError, RemoteStorage, join, truncated

T = TypeVar("T")

SILENCE = 30  # seconds without a byte after which a request has failed


class HttpStorage(RemoteStorage):
    """A folder of a web server that answers byte ranges.

    With fsspec's session but not its reader, which keeps the whole file where a server ignores the range, takes an
    answer of any length, and makes bytes that would only be copied again.
    """

    def _fill(self, name: str, offset: int, buffer: memoryview) -> None:
        self._run(self._get_range, name, offset, buffer)

    def _whole(self, name: str) -> bytes:
        return self._run(self._get, name)

    def _size(self, name: str) -> int:
        return self._run(self._get_size, name)

    def _run(self, method: Callable[..., Awaitable[T]], name: str, *arguments: Any) -> T:
        from fsspec.asyn import sync

        system, _ = self._system()
        found: T = sync(system.loop, method, system, join(self.root, name), *arguments)
        return found

    async def _get_range(self, system: Any, url: str, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        async with await self._ask(system, url, offset, offset + length) as answer:
            start, size = content_range(answer)
            if answer.status == 416 or (size is not None and size < offset + length):
                raise EOFError(
                    truncated(size) if size is not None else f"the file ends before byte {offset + length}"
                )
            self._check(answer)
            whole = answer.status == 200 and offset == 0 and answer.content_length == length
            if answer.status != 206 and not whole:
                what = f"the server ignores byte ranges ({answer.status} for a part of the file)"
                raise RefusedError(what, NO_RANGES)
            if start not in (None, offset):
                raise OSError(f"the answer begins at byte {start}, not {offset}")
            await receive(answer.content, buffer)

    async def _get(self, system: Any, url: str) -> bytes:
        async with await self._ask(system, url) as answer:
            self._check(answer)
            return bytes(await answer.read())

    async def _get_size(self, system: Any, url: str) -> int:
        """Ask for one byte: what an answer to HEAD says is not always true, or not said at all."""
        async with await self._ask(system, url, 0, 1) as answer:
            _, size = content_range(answer)
            if answer.status != 416:
                self._check(answer)
                size = answer.content_length if answer.status == 200 else size
            if size is None:
                raise RefusedError("its size is not known")
            return int(size)

    async def _ask(self, system: Any, url: str, start: int | None = None, stop: int | None = None) -> Any:
        import aiohttp
        import yarl

        # As it was written: by itself yarl would decode what a signature may cover.
        written = url.isascii() and " " not in url
        session = await system.set_session()
        more = {"Accept-Encoding": "identity"} | (
            {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        )
        options = {
            "timeout": aiohttp.ClientTimeout(total=None, connect=SILENCE, sock_read=SILENCE),
            "read_bufsize": 1 << 20,
            **system.kwargs,
            "headers": {**system.kwargs.get("headers", {}), **more},
        }
        return await session.get(yarl.URL(url, encoded=written), **options)

    def _check(self, answer: Any) -> None:
        """Raise what the status means, unless the answer is there."""
        if answer.status < 400:
            return
        what = f"{answer.status} {answer.reason}"
        if answer.status in (404, 410):
            raise FileNotFoundError(what)
        if answer.status in (401, 403, 407):
            raise PermissionError(what)
        raise (OSError if answer.status in (408, 425, 429) or answer.status >= 500 else RefusedError)(what)


def content_range(answer: Any) -> tuple[int | None, int | None]:
    """Return (first byte, size of the file) as far as the answer's Content-Range tells them."""
    match = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else None


async def receive(stream: Any, buffer: memoryview) -> None:
    """Fill a buffer from an aiohttp stream, with no more copies than this one."""
    done = 0
    while done < len(buffer):
        piece = await stream.read(len(buffer) - done)
        if not piece:
            raise OSError(f"the answer broke off {len(buffer) - done} bytes early")
        buffer[done : done + len(piece)] = piece
        done += len(piece)

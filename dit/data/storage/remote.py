"""Files behind URLs, read by byte range through fsspec: http(s), s3, gs, memory, and what else it has a package for.

Options of a protocol (endpoints, keys, proxies) come from fsspec's own configuration: ~/.config/fsspec/*.json or
variables such as FSSPEC_S3_ENDPOINT_URL. What a URL says of users, passwords and signatures is never printed.

A request that fails is made again, after growing and jittered pauses: see `Retry`. What no repetition can mend is
not repeated: a file that is not there, one that may not be read, one that ends too early, ranges that are ignored.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from dit.data import DataError
from dit.errors import Notice

T = TypeVar("T")

WEB = ("http://", "https://")
NO_ANSWER = "the storage does not answer; start the same command again when it does"
NO_RANGES = "this server cannot send parts of files: use nginx, Caddy, S3, or copy the folder"
TOLD_EVERY = 60  # seconds between two lines that requests are being repeated
TIMEOUT = 300  # seconds that a request of another protocol may take
FINAL = (
    EOFError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError,
    NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Retry:
    """How often a request is made, and the pauses between, in seconds: first, doubled up to longest, each ±50%.

    As it stands an outage of about a minute is survived. total: no attempt begins later than this after the first.
    """

    attempts: int = 10
    first: float = 0.25
    longest: float = 15.0
    total: float = 180.0

    def pause(self, attempt: int) -> float:
        """Return the seconds to wait after attempt 1, 2, ...: no two readers come back at the same moment."""
        seconds = min(self.longest, self.first * 2.0 ** (attempt - 1))
        return seconds * random.SystemRandom().uniform(0.5, 1.5)


BLOCKS = Retry()
WHOLE_FILES = Retry(attempts=4)  # read at the start, when somebody may have mistyped the host: 2 seconds


def is_remote(root: str) -> bool:
    """Whether a folder's name is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]*://", root) is not None


def has_own_root(name: str) -> bool:
    """Whether a file's name is a whole path or a URL, so that it lies in no folder."""
    return name.startswith("/") or is_remote(name)


def join(root: str, name: str) -> str:
    """Return where a file of a folder or URL lies; a query (a signature for all the folder) stays at the end.

    A name that is a whole path or URL says so itself.
    """
    if has_own_root(name):
        return name
    name = quote(name) if root.startswith(WEB) else name
    base, mark, query = root.partition("?") if is_remote(root) else (root, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def split(location: str) -> tuple[str, str]:
    """Split a file's whole path or URL into (folder or URL, name), which `join` makes it of."""
    base, mark, query = location.partition("?") if is_remote(location) else (location, "", "")
    folder, _, name = base.rpartition("/")
    return (folder or "/") + mark + query, unquote(name) if location.startswith(WEB) else name


def public(location: str) -> str:
    """Return a folder or URL for messages, without what it says of user, password and signature."""
    if not is_remote(location):
        return location
    return re.sub(r"\?.*", "?***", re.sub(r"(?<=://)[^/?]*@", "***@", location), flags=re.DOTALL)


class RefusedError(OSError):
    """An answer that will not change. advice: what helps."""

    def __init__(self, what: str, advice: str = ""):
        super().__init__(what)
        self.advice = advice


def advice_of(error: BaseException) -> str:
    """Say what helps against a storage's error, where the storage and not the file is at fault; or ""."""
    return getattr(error, "advice", "")


def advised(error: OSError) -> str:
    """Say what went wrong, without the file's name, and what helps where that is known."""
    return "; ".join(filter(None, (error.strerror or str(error), advice_of(error))))


class RemoteStorage:
    """A folder behind a URL. Threads may share one, also with the child of a fork. retry: of reads of blocks.

    Raises DataError where a protocol is unknown or its package missing. `retries` counts the repeated requests.
    Errors have `advice` (advice_of) where the storage does not answer, or cannot send parts of files.
    """

    def __init__(self, root: str, retry: Retry = BLOCKS):
        self.root, self.retry, self.retries = root, retry, 0
        self._told = -float(TOLD_EVERY)  # when it was last said that requests are repeated
        # By process: an event loop does not live on in a fork's child, and closing it there would harm the parent's.
        self._systems: dict[int, tuple[Any, str]] = {}
        self._system()

    def read(self, name: str, offset: int, buffer: memoryview) -> Hashable:
        """Fill the buffer; no state comes twice, so that everything which came over a network is checked."""
        self._repeat(name, self.retry, lambda: self._fill(name, offset, buffer))
        return object()

    def size(self, name: str) -> int:
        return self._repeat(name, WHOLE_FILES, lambda: self._size(name))

    # --- one request ---------------------------------------------------------------------------------------

    def _fill(self, name: str, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        try:
            data = memoryview(self._call("cat_file", name, start=offset, end=offset + length))
        except OSError as error:
            if error.errno == errno.EINVAL:  # how s3fs says that the range begins beyond the end
                self._reaches(name, offset + length)
            raise
        if len(data) < length:
            self._reaches(name, offset + length)
            raise OSError(f"{len(data)} bytes came where {length} were asked for")
        if len(data) > length:
            raise RefusedError(f"{len(data)} bytes came where {length} were asked for", NO_RANGES)
        buffer[:] = data

    def _reaches(self, name: str, end: int) -> None:
        """EOFError where the file ends before."""
        size = self._size(name)
        if size < end:
            raise EOFError(truncated(size))

    def _whole(self, name: str) -> bytes:
        return bytes(self._call("cat_file", name))

    def _size(self, name: str) -> int:
        size = self._call("info", name)["size"]
        if size is None:
            raise RefusedError("its size is not known")
        return int(size)

    def _call(self, method: str, name: str, **arguments: Any) -> Any:
        system, base = self._system()
        if system.async_impl:
            arguments["timeout"] = TIMEOUT
        return getattr(system, method)(f"{base.rstrip('/')}/{name}", **arguments)

    def _system(self) -> tuple[Any, str]:
        """(fsspec's file system of this process, the folder in it)."""
        process = os.getpid()
        if process not in self._systems:
            import fsspec.core

            try:
                self._systems[process] = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
            except ImportError as error:
                missing = getattr(error.__cause__ or error, "name", None) or self.root.split(":")[0]
                raise DataError(
                    f"{public(self.root)}: needs a package that is not installed ({missing}): pip install {missing}"
                ) from None
            except ValueError as error:
                raise DataError(f"{public(self.root)}: {scrubbed(str(error))}") from None
        return self._systems[process]

    # --- many ----------------------------------------------------------------------------------------------

    def _repeat(self, name: str, retry: Retry, request: Callable[[], T]) -> T:
        began, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                return request()
            except (*FINAL, RefusedError) as error:
                raise self._error(name, error, advice=advice_of(error)) from None
            except Exception as error:  # noqa: BLE001 (every protocol has its own, and the last is raised)
                pause = retry.pause(attempt)
                if attempt == retry.attempts or time.monotonic() - began + pause > retry.total:
                    last = f", at attempt {attempt}, the last"
                    raise self._error(name, error, last, NO_ANSWER) from None
                if attempt == 4 and time.monotonic() - self._told >= TOLD_EVERY:
                    self._told = time.monotonic()
                    warnings.warn(
                        f"{self._where(name)}: {text_of(error)}; trying again", Notice, stacklevel=2
                    )
            self.retries += 1
            time.sleep(pause)

    def _error(self, name: str, error: Exception, more: str = "", advice: str = "") -> Exception:
        """The error to raise: OSError with the URL, of the kind that local files would give."""
        if isinstance(error, EOFError):
            return error
        code = error.errno if isinstance(error, OSError) and error.errno else None
        for kind, number in ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES)):
            code = number if isinstance(error, kind) else code
        what = "no such file" if code == errno.ENOENT else text_of(error)
        raised = OSError(code or errno.EIO, what + more, self._where(name))
        raised.advice = advice  # type: ignore[attr-defined]
        return raised

    def _where(self, name: str) -> str:
        return public(join(self.root, name))

    def bytes(self, name: str) -> bytes:  # here, because it hides the type in what follows
        return self._repeat(name, WHOLE_FILES, lambda: self._whole(name))


def truncated(size: int) -> str:
    """Say what is wrong with a file that ends at this byte."""
    return f"truncated: the file ends at byte {size}"


def text_of(error: Exception) -> str:
    """Return what an error says, without secrets."""
    plain = type(error) in (OSError, RefusedError, PermissionError)
    return scrubbed(str(error) if plain and str(error) else f"{type(error).__name__}: {error}".rstrip(": "))


def scrubbed(text: str) -> str:
    """Return a message with the URLs in it made public."""
    return re.sub(r"[a-z][a-z0-9+.-]*://[^\s'\"]+", lambda match: public(match[0]), text)

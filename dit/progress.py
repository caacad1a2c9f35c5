"""How work under way is shown: a bar on a terminal, and elsewhere (a log file, a pipe) a plain line now and then.

    with Bar(total=steps, unit="step", desc="train", hidden=not world.is_main) as bar:
        bar.update()
    for batch in Bar(batches, total=8, unit="batch", desc="held-out loss"): ...

A line is never written over: without a terminal there are no carriage returns and no escape sequences.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Generic, Self, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS = 30.0  # between two plain lines of one bar
_ARE_SHOWN: ContextVar[bool] = ContextVar("bars are shown", default=True)


class Bar(Generic[T]):
    """Progress of one piece of work, on stderr; with an iterable it counts what that gives.

    total, initial: pieces of work in all (None = not known), and those that were done before. unit, desc: their name,
    the work's. scale: write large numbers as 12.3M. hidden: show nothing, as on all ranks but one. leave: let a bar
    stand when it is done, or write a last line. delay: seconds until it shows at all.
    """

    def __init__(
        self,
        iterable: Iterable[T] = (),
        *,
        total: float | None = None,
        initial: float = 0,
        unit: str = "it",
        desc: str = "",
        scale: bool = False,
        hidden: bool = False,
        leave: bool = True,
        delay: float = 0.0,
        file: TextIO | None = None,
    ):
        stream = sys.stderr if file is None else file
        hidden = hidden or not _ARE_SHOWN.get()
        self._iterable, self._hidden, self._leave, self._delay = iterable, hidden, leave, delay
        self.total, self.initial, self.n, self.unit, self.desc = total, initial, initial, unit, desc
        self._scale, self._file, self._note = scale, stream, ""
        self._begun = self._told = time.monotonic()
        self._is_open, self._has_told = not hidden, False
        self._shown: tuple[float, str] | None = None  # when a line was written
        self._tqdm: tqdm[Any] | None = None
        if not hidden and stream.isatty():
            self._tqdm = tqdm(
                total=total, initial=initial, unit=unit, desc=desc or None, unit_scale=scale, leave=leave,
                delay=delay, file=stream, smoothing=0.05,
            )  # fmt: skip

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, count: float = 1) -> None:
        """So many more are done."""
        self.n += count
        if self._tqdm is not None:
            self._tqdm.update(count)
        elif self._is_open and time.monotonic() - self._told >= max(SECONDS, self._delay):
            self._tell()

    def expect(self, total: float | None) -> None:
        """So many will be done in all, as is known only now."""
        self.total = total
        if self._tqdm is not None:
            self._tqdm.total = total

    def note(self, text: str = "") -> None:
        """What stands behind the figures from now on. The first one is shown at once where there is no terminal."""
        is_first = bool(text) and not self._note and not self._has_told
        self._note = text
        if self._tqdm is not None:
            self._tqdm.set_postfix_str(text)
        elif self._is_open and is_first and not self._delay:
            self._tell()

    def close(self) -> None:
        """The end of the work, or of what will be done of it now."""
        if self._tqdm is not None:
            self._tqdm.close()
        elif self._is_open and self._has_news:
            self._tell()
        self._is_open = False

    @property
    def _has_news(self) -> bool:
        """Whether the last line is still to be written."""
        lasted = time.monotonic() - self._begun >= self._delay
        return self._leave and lasted and self._shown != (self.n, self._note)

    def _tell(self) -> None:
        self._told, self._has_told, self._shown = time.monotonic(), True, (self.n, self._note)
        print(self, file=self._file, flush=True)

    def __str__(self) -> str:
        """As "train: 120/2400 step (5%), 3.21 step/s, 11:50 left, loss=0.7312"."""
        elapsed = time.monotonic() - self._begun
        rate = (self.n - self.initial) / elapsed if elapsed > 0 else 0.0
        whole = "" if self.total is None else f"/{self._number(self.total)}"
        parts = [f"{self._number(self.n)}{whole} {self.unit}"]
        if self.total:
            parts[0] += f" ({100 * self.n / self.total:.0f}%)"
        if rate:
            parts.append(f"{self._number(rate, whole=False)} {self.unit}/s")
        if self.total is not None and self.n >= self.total:
            parts.append(f"{tqdm.format_interval(elapsed)} in all")
        elif rate and self.total is not None:
            parts.append(f"{tqdm.format_interval((self.total - self.n) / rate)} left")
        head = f"{self.desc}: " if self.desc else ""
        return head + ", ".join([*parts, *([self._note] if self._note else [])])

    def _number(self, value: float, whole: bool = True) -> str:
        if self._scale:
            return str(tqdm.format_sizeof(value))
        return f"{value:g}" if whole and value < 1e6 else f"{value:.0f}" if whole else f"{value:.3g}"


@contextlib.contextmanager
def bars(are_shown: bool) -> Iterator[None]:
    """Show the bars that are made inside, or none of them, whoever makes them in this thread."""
    token = _ARE_SHOWN.set(are_shown and _ARE_SHOWN.get())
    try:
        yield
    finally:
        _ARE_SHOWN.reset(token)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line beside whatever bar there is; on stdout, unless another file is given."""
    tqdm.write(text, file=sys.stdout if file is None else file)
    (sys.stdout if file is None else file).flush()

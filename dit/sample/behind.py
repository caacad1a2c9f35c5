"""Work done in one thread while the next is made ready: decoding and writing of a block while the next is drawn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch


class Behind:
    """One thread, one piece of work behind the caller; a context, which is left when all is done.

    What the work raises is raised by the next `do`, or at the end: there before what the caller raised itself, as it
    came first. Modes that torch has of a thread (gradients, autocast) are as new in it: work sets its own. device: that
    the caller computes on, which is the thread's current one too.
    """

    def __init__(self, device: torch.device):
        def begin() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)

        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind", initializer=begin)
        self._under_way: Future[None] | None = None

    def do(self, work: Callable[..., None], *args: Any) -> None:
        """Wait for what is under way, and start the next."""
        self._wait()
        self._under_way = self._pool.submit(work, *args)

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._pool:
            self._wait()

"""The batches under way: read ahead by a rank's stream, without the blocks that no rank can read."""

from __future__ import annotations

from collections.abc import Callable, Generator

from dit.data.loading.stream import Batch, Stream
from dit.train.shared_quarantine import SharedQuarantine


class Feed:
    """Gives a rank's batches in the order of the steps.

    prefetch: batches read ahead. say: prints on rank 0.
    """

    def __init__(self, stream: Stream, prefetch: int, say: Callable[[str], object]):
        self.stream, self.prefetch = stream, prefetch
        self.quarantine = SharedQuarantine(stream.quarantine, say)
        self._under_way: Generator[Batch] | None = None

    def next(self, step: int, last: int) -> Batch:
        """Give the batch of `step`, which follows the one before. last: steps of the run; none beyond is read ahead."""
        if self._under_way is None:
            self._under_way = self.stream.iterate(step, last, self.prefetch)
        return next(self._under_way)

    def forget(self) -> None:
        """Let go of batches that were read ahead; the next may be that of any step."""
        if self._under_way is not None:
            self._under_way.close()
            self._under_way = None

    def agree(self) -> list[tuple[int, int, str]]:
        """Have all ranks leave out the same blocks from here on, and list them for a checkpoint. Collective."""
        return self.quarantine.agree(self.forget)

    def counts(self) -> dict[str, int]:
        """Count the blocks left out, for the log, where some may be. Collective."""
        return {"quarantined": len(self.quarantine.known())} if self.stream.quarantine.budget else {}

    def close(self) -> None:
        """End the threads that read; the feed is of no use afterwards."""
        self.forget()
        self.stream.close()

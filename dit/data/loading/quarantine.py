"""Blocks that cannot be read, within a budget: their samples keep their slots and count for nothing."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from dit.data import DataError
from dit.data.shards.blocks import BlockError


class Quarantine:
    """The broken blocks of a stream's data sets, by (number of the data set, block). Threads may share one.

    budget: blocks that may be broken before it is an error.
    """

    def __init__(self, budget: int = 0):
        self.budget = budget
        self.reasons: dict[tuple[int, int], str] = {}
        self._lock = threading.Lock()

    def holds(self, data_set: int, block: int) -> bool:
        """Whether a block is known to be broken."""
        return (data_set, block) in self.reasons

    def add(self, data_set: int, block: int, error: BlockError) -> None:
        """Take in a broken block; beyond the budget raises a DataError that names it and those before."""
        with self._lock:
            known = dict(self.reasons)
            if len(known | {(data_set, block): ""}) > self.budget:
                raise error if not self.budget else _over(error, known, self.budget)
            self.reasons[data_set, block] = str(error)

    def load(self, reasons: Mapping[tuple[int, int], str]) -> None:
        """Take over blocks that another rank or a checkpoint says are broken: they stay so, whatever files hold now."""
        with self._lock:
            self.reasons = {**reasons, **self.reasons}


def _over(error: BlockError, known: dict[tuple[int, int], str], budget: int) -> DataError:
    before = "".join(f"\n  {reason}" for reason in list(known.values())[:10])
    return DataError(
        f"{error}\nThat is more than data.max_quarantined = {budget} broken block(s); those before:{before}"
    )

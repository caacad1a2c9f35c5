"""The batches that are being filled: memory for their samples, and where in it a block's rows belong."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit.data.loading.memory import Memory
from dit.data.storage.pieces import Pieces


@dataclass
class Rows:
    """Rows of a block, ascending, and the steps and the rank's slots that they are for: (m,) each."""

    row: np.ndarray
    step: np.ndarray
    slot: np.ndarray

    @classmethod
    def of(cls, parts: list[Rows]) -> Rows:
        """Those of several windows together."""
        if len(parts) == 1:
            return parts[0]
        joined = cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("row", "step", "slot")))
        order = np.argsort(joined.row, kind="stable")
        return cls(joined.row[order], joined.step[order], joined.slot[order])


class Coming:
    """A rank's share of steps [s, s + depth): the big arrays step by step, the small ones in a ring of `depth` steps.

    big: {name: (shape, dtype)} of a sample in a batch. rows: the rank's slots. memory: where the big arrays come from.
    label, id, view: (depth, rows) int64; valid: (depth, rows) bool. Of step s at s % depth.
    """

    def __init__(
        self, big: dict[str, tuple[tuple[int, ...], torch.dtype]], rows: int, depth: int, memory: Memory
    ):
        self.big, self.rows, self.depth, self.memory = big, rows, depth, memory
        self.unit = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in big.items()}  # bytes
        self.frames: dict[int, dict[str, Tensor]] = {}
        self._address = {name: np.zeros(depth, np.int64) for name in big}
        self._spare = threading.local()  # memory of each thread for what nobody wants
        self.label, self.id = np.empty((depth, rows), np.int64), np.empty((depth, rows), np.int64)
        self.view, self.valid = np.zeros((depth, rows), np.int64), np.ones((depth, rows), bool)

    def add(self, step: int, view: np.ndarray | int) -> None:
        """Make room for a step whose samples are to be taken in these views, (rows,)."""
        self.frames[step] = {
            name: self.memory.empty((self.rows, *shape), dtype) for name, (shape, dtype) in self.big.items()
        }
        for name, tensor in self.frames[step].items():
            self._address[name][step % self.depth] = tensor.data_ptr()
        self.view[step % self.depth], self.valid[step % self.depth] = view, True

    def pop(self, step: int) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """The big and the small arrays of a step, which is forgotten."""
        small = {
            name: getattr(self, name)[step % self.depth].copy() for name in ("label", "id", "view", "valid")
        }
        return self.frames.pop(step), small

    def body(self, name: str, rows: Rows, samples: int, views: int) -> Pieces:
        """Memory for the bytes of a block's array of samples x views, in turn: wanted ones go to their batch.

        It stays until every read of these steps has ended, or this object goes.
        """
        unit, at = self.unit[name], rows.step % self.depth
        view = self.view[at, rows.slot] if views > 1 else 0
        place = (rows.row * views + view) * unit  # (m,) of the first wanted byte
        size = samples * views * unit
        address = self._address[name][at] + rows.slot * unit
        if len(place) * unit == size:  # all of it is wanted
            whole = np.full((len(place), 2), unit, np.uint64)
            whole[:, 0] = address
            return Pieces(whole)
        # what lies between, (m + 1,)
        before, after = np.concatenate([[0], place + unit]), np.concatenate([place, [size]])
        gap = after > before
        shift = np.cumsum(gap)  # (m + 1,) pieces of it up to here
        vectors = np.empty((len(place) + shift[-1], 2), np.uint64)
        mine = np.arange(len(place)) + shift[:-1]
        vectors[mine, 0], vectors[mine, 1] = address, unit
        gaps = np.flatnonzero(gap)
        spare = gaps + shift[gaps] - 1
        vectors[spare, 0], vectors[spare, 1] = (
            self._nowhere(name, size) + before[gaps],
            (after - before)[gaps],
        )
        return Pieces(vectors)

    def _nowhere(self, name: str, size: int) -> int:
        """The address of so many bytes of this thread's memory for what nobody wants."""
        held: np.ndarray | None = self._spare.__dict__.get(name)
        if held is None or held.nbytes < size:
            held = self._spare.__dict__[name] = np.empty(size, np.uint8)
        return held.ctypes.data

    def blank(self, rows: Rows) -> None:
        """Zeros without a label in the place of samples that cannot be had."""
        for step, slot in zip(rows.step.tolist(), rows.slot.tolist(), strict=True):
            for tensor in self.frames[step].values():
                tensor[slot].zero_()
        at = rows.step % self.depth
        self.label[at, rows.slot], self.id[at, rows.slot], self.valid[at, rows.slot] = -1, -1, False

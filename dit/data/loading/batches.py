"""The batches that are being filled: a ring of steps, and where in it a block's rows belong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALL = ("label", "id", "view", "valid")


@dataclass
class Rows:
    """Rows of a block, and the steps and the rank's slots that they are for: (m,) each."""

    row: np.ndarray
    step: np.ndarray
    slot: np.ndarray

    @classmethod
    def of(cls, parts: list[Rows]) -> Rows:
        """Join those of several windows."""
        return cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("row", "step", "slot")))


class BatchRing:
    """A rank's share of steps [s, s + depth): arrays of `depth` batches, that of step s at s % depth.

    big: {name: (shape, dtype)} of a sample in a batch. slots: the rank's. label, id, view: (depth, slots) int64; valid:
    (depth, slots) bool. Threads fill it, each its own places.
    """

    def __init__(self, big: dict[str, tuple[tuple[int, ...], np.dtype]], slots: int, depth: int):
        self.depth = depth
        self.big = {name: np.empty((depth, slots, *shape), dtype) for name, (shape, dtype) in big.items()}
        self.label, self.id = np.empty((depth, slots), np.int64), np.empty((depth, slots), np.int64)
        self.view, self.valid = np.zeros((depth, slots), np.int64), np.ones((depth, slots), bool)

    def add(self, step: int, view: np.ndarray | int) -> None:
        """Begin a step whose samples are to be taken in these views, (slots,). Another was there before."""
        self.view[step % self.depth], self.valid[step % self.depth] = view, True

    def put(self, rows: Rows, arrays: dict[str, np.ndarray], label: np.ndarray, identity: np.ndarray) -> None:
        """Copy rows of a block to where they belong.

        arrays: (n, views, ...) each, of which a slot's view is taken where there are several. label, identity: (n,).
        """
        at, slot = rows.step % self.depth, rows.slot
        for name, ring in self.big.items():
            view = self.view[at, slot] if arrays[name].shape[1] > 1 else 0
            ring[at, slot] = arrays[name][rows.row, view].reshape(-1, *ring.shape[2:])
        self.label[at, slot], self.id[at, slot] = label[rows.row], identity[rows.row]

    def blank(self, rows: Rows) -> None:
        """Put zeros without a label in the place of samples that cannot be had."""
        at, slot = rows.step % self.depth, rows.slot
        for ring in self.big.values():
            ring[at, slot] = 0
        self.label[at, slot], self.id[at, slot], self.valid[at, slot] = -1, -1, False

    def take(self, step: int, pin: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return copies of a step's big and small arrays. pin: the big ones in page-locked memory."""
        at = step % self.depth
        big = {}
        for name, ring in self.big.items():
            held = torch.from_numpy(ring[at])
            big[name] = torch.empty(held.shape, dtype=held.dtype, pin_memory=pin).copy_(held)
        return big, {name: torch.from_numpy(getattr(self, name)[at].copy()) for name in SMALL}

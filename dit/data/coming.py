"""The batches that are being filled: memory for their samples, and where in it a block's rows belong."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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

    big: {name: (shape, dtype)} of a sample in a batch. rows: the rank's slots. pin: page-locked memory, for GPUs.
    label, id, view: (depth, rows) int64; valid: (depth, rows) bool. Of step s at s % depth.
    """

    def __init__(self, big: dict[str, tuple[tuple[int, ...], torch.dtype]], rows: int, depth: int, pin: bool):
        self.big, self.rows, self.depth, self.pin = big, rows, depth, pin
        self.unit = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in big.items()}  # bytes
        self.frames: dict[int, dict[str, Tensor]] = {}
        self._bytes: dict[str, dict[int, memoryview]] = {name: {} for name in big}
        self._spare = threading.local()  # memory of each thread for what nobody wants
        self.label, self.id = np.empty((depth, rows), np.int64), np.empty((depth, rows), np.int64)
        self.view, self.valid = np.zeros((depth, rows), np.int64), np.ones((depth, rows), bool)

    def add(self, step: int, view: np.ndarray | int) -> None:
        """Make room for a step whose samples are to be taken in these views, (rows,)."""
        self.frames[step] = {
            name: torch.empty((self.rows, *shape), dtype=dtype, pin_memory=self.pin)
            for name, (shape, dtype) in self.big.items()
        }
        for name, tensor in self.frames[step].items():
            self._bytes[name][step] = tensor.numpy().reshape(-1).view(np.uint8).data
        self.view[step % self.depth], self.valid[step % self.depth] = view, True

    def pop(self, step: int) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """The big and the small arrays of a step, which is forgotten."""
        for held in self._bytes.values():
            del held[step]
        small = {
            name: getattr(self, name)[step % self.depth].copy() for name in ("label", "id", "view", "valid")
        }
        return self.frames.pop(step), small

    def body(self, name: str, rows: Rows, samples: int, views: int) -> list[memoryview]:
        """Memory for the bytes of a block's array of samples x views, in turn: wanted ones go to their batch."""
        unit, held = self.unit[name], self._bytes[name]
        view = self.view[rows.step % self.depth, rows.slot] if views > 1 else 0
        place = (rows.row * views + view) * unit  # (m,) of the first wanted byte
        begins = (rows.slot * unit).tolist()
        wanted = [
            held[step][begin : begin + unit] for step, begin in zip(rows.step.tolist(), begins, strict=True)
        ]
        return _between(wanted, place, unit, self._spare_bytes(name, samples * views * unit))

    def _spare_bytes(self, name: str, size: int) -> memoryview:
        held = self._spare.__dict__.setdefault(name, bytearray())
        if len(held) < size:
            held = self._spare.__dict__[name] = bytearray(size)
        return memoryview(held)[:size]

    def blank(self, rows: Rows) -> None:
        """Zeros without a label in the place of samples that cannot be had."""
        for step, slot in zip(rows.step.tolist(), rows.slot.tolist(), strict=True):
            for tensor in self.frames[step].values():
                tensor[slot].zero_()
        at = rows.step % self.depth
        self.label[at, rows.slot], self.id[at, rows.slot], self.valid[at, rows.slot] = -1, -1, False


def _between(wanted: list[memoryview], place: np.ndarray, unit: int, spare: memoryview) -> list[memoryview]:
    """Pieces of `unit` bytes that belong at (m,) ascending places, with parts of `spare` for what lies between."""
    before = np.append(0, place + unit)  # where each gap begins
    after = np.append(place, len(spare))  # and ends
    gaps = np.flatnonzero(after > before)
    body, done = [], 0
    for i, start, stop in zip(gaps.tolist(), before[gaps].tolist(), after[gaps].tolist(), strict=True):
        body += wanted[done:i]
        body.append(spare[start:stop])
        done = i
    return body + wanted[done:]

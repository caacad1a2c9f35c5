"""Stateless random draws: every number is a pure function of (seed, purpose, step, slot in the global batch).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer torch
operations. The integers are bitwise the same on every device, rank, micro-batch and version; normals agree to
float32 rounding of log and cos. There is no generator state: resuming at a step needs the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


class Purpose(IntEnum):
    """What a number is drawn for. The values are part of every run's identity: never renumber them."""

    POSTERIOR = 1  # noise of the VAE posterior draw
    VIEW = 2  # which stored view (original, flipped)
    TIME = 3
    EPS = 4
    DROP = 5  # label dropout
    COUPLING = 6
    PRIOR = 7  # a sampler's initial noise
    SOLVER = 8  # a sampler's per-step noise
    BLOCKS = 9  # order of blocks in an epoch
    SAMPLES = 10  # order of samples in a window
    ENCODE = 11  # order in which samples are written
    PROBE = 12  # the checkpoint's probe batch
    VAL = 13  # held-out loss
    STRATA = 14  # dealing of stratified times
    KEY = 15  # the key of batch_hash
    # 16 was the initialisation of models: never to be given again
    LIKELIHOOD = 17  # its probes and noisy latents
    CROP = 18  # random crops of images that are encoded
    ROTATION = 19  # at which row of a block an epoch begins
    RESAMPLE = 20  # resamples of a bootstrap
    DIRECTIONS = 21  # on which features are projected
    SUBSET = 22  # the reference samples that some figures are taken of
    LABEL = 23  # classes of images that are drawn


def philox(
    counter: tuple[Tensor, Tensor | int, Tensor, Tensor | int], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, ...]:
    """Philox4x32-10: counter and key words in [0, 2^32) -> four int64 tensors in [0, 2^32), broadcast together.

    Words 0 and 2 of the counter must be int64 tensors. A product of two 32-bit numbers wraps in int64, but its
    bit pattern is right, so the high word is a masked shift.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def _key(seed: int, purpose: int) -> tuple[int, int]:
    """The Philox key of (seed, purpose): itself a Philox output, so that near seeds share nothing."""
    words = philox(
        (torch.tensor(seed & _MASK), (seed >> 32) & _MASK, torch.tensor(int(purpose)), 0), (_W0, _W1)
    )
    return int(words[0]), int(words[1])


@dataclass(frozen=True)
class Draws:
    """The random numbers of some slots of one step's global batch.

    seed: of the run. step: index of the batch (or of the solver's step); a scalar int64 tensor on the slots' device
    gives the same numbers. slots: (B,) int64, positions in the global batch (or image indices), on the device where
    numbers are wanted. batch: size of the global batch.
    """

    seed: int
    step: int | Tensor
    slots: Tensor
    batch: int

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self.slots.device

    def select(self, index: slice | Tensor) -> Draws:
        """The draws of some of these slots (a micro-batch): the same numbers as in the whole."""
        return Draws(self.seed, self.step, self.slots[index], self.batch)

    def _words(self, purpose: Purpose, count: int) -> Tensor:
        """(B, 4, ceil(count / 4)) int64 in [0, 2^32)."""
        index = torch.arange(-(-count // 4), device=self.device)
        counter = (index, self.step & _MASK, self.slots.unsqueeze(1), self.step >> 32)
        return torch.stack(philox(counter, _key(self.seed, purpose)), dim=1)

    def bits(self, purpose: Purpose, count: int) -> Tensor:
        """(B, count) int64, uniform on [0, 2^32)."""
        return self._words(purpose, count).flatten(1)[:, :count]

    def uniform(self, purpose: Purpose) -> Tensor:
        """(B,) float32, uniform on the open interval (0, 1): multiples of 2^-24, all exact in float32."""
        return ((self.bits(purpose, 1)[:, 0] >> 9).float() + 0.5) * 2.0**-23

    def integers(self, purpose: Purpose, high: int) -> Tensor:
        """(B,) int64, uniform on [0, high) up to a bias of high / 2^32."""
        return (self.bits(purpose, 1)[:, 0] * high) >> 32

    def normal(self, purpose: Purpose, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32, standard normal (Box and Muller, 1958); |x| < 6.67."""
        count = math.prod(shape)
        words = self._words(purpose, count)  # (B, 4, n)
        radius = torch.sqrt(-2.0 * torch.log((words[:, :2] + 1).float() * 2.0**-32))  # of u in (0, 1]
        angle = words[:, 2:].float() * (2.0 * math.pi * 2.0**-32)
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)  # (B, 4, n)
        return both.flatten(1)[:, :count].reshape(len(self.slots), *shape)

    def fingerprint(self, ids: Tensor, views: Tensor, drops: Tensor) -> Tensor:
        """(B,) int64 in [0, 2^63): a hash of (seed, step, slot, sample id, view, drop bit), for batch_hash.

        ids, views: (B,) int64; drops: (B,) bool. Summed mod 2^63 over any set of slots it is independent of how
        the slots are spread over ranks and micro-batches.
        """
        key = _key(self.seed, Purpose.KEY)
        mixed = ((key[0] ^ self.step) & _MASK, (key[1] ^ (self.step >> 32)) & _MASK)
        counter = (ids & _MASK, (ids >> 32) & _MASK, self.slots, views * 2 + drops.long())
        words = philox(counter, mixed)
        return ((words[0] & 0x7FFFFFFF) << 32) | words[1]


def permutation(seed: int, purpose: Purpose, step: int, n: int, lane: int = 0) -> np.ndarray:
    """A permutation of range(n), (n,) int64: the same on every machine and version, for (seed, purpose, step, lane)."""
    draws = Draws(seed, step, torch.tensor([lane]), 1)
    words = draws.bits(purpose, 2 * n).reshape(2, n)
    return np.argsort(((words[0] << 31) ^ words[1]).numpy(), kind="stable")

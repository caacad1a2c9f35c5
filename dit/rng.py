"""Stateless random draws: every number is a pure function of (seed, purpose, step, slot in the global batch).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer torch
operations. The integers are bitwise the same on every device, rank, micro-batch and version; normals agree to
float32 rounding of log and cos. There is no generator state: resuming at a step needs the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.compiling import compile_for_one_size

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

    Words 0 and 2 of the counter must be int64 tensors. What lies on the CPU is computed by numpy, which takes a third
    of the time for it and gives the same words.
    """
    if not torch.compiler.is_compiling() and all(map(_is_on_host, (*counter, *key))):
        return _rounds_on_host(counter, key)
    return _rounds(counter, key)


def _rounds(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Tensor, ...]:
    """Compute the words in int64, where a product of two 32-bit numbers wraps, but its bit pattern is right.

    So the high word is a masked shift.
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
    return c0, c1, c2, c3


def _is_on_host(word: Tensor | int) -> bool:
    return isinstance(word, int) or (type(word) is Tensor and word.device.type == "cpu")


def _rounds_on_host(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Tensor, ...]:
    """Compute the words in numpy's uint64, in which such a product fits."""
    m0, m1, half, mask = (np.uint64(n) for n in (_M0, _M1, 32, _MASK))
    c0, c1, c2, c3 = (
        np.uint64(word) if isinstance(word, int) else np.atleast_1d(word.numpy()).view(np.uint64)
        for word in counter
    )
    k0, k1 = (int(word) for word in key)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            (p1 >> half) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> half) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    shape = torch.broadcast_shapes(*(word.shape for word in counter if isinstance(word, Tensor)))
    return tuple(torch.from_numpy(word.view(np.int64)).reshape(shape) for word in (c0, c1, c2, c3))


@lru_cache(maxsize=4096)
def _key(seed: int, purpose: int) -> tuple[int, int]:
    """The Philox key of (seed, purpose): itself a Philox output, so that near seeds share nothing."""
    words = philox(
        (torch.tensor(seed & _MASK), (seed >> 32) & _MASK, torch.tensor(int(purpose)), 0), (_W0, _W1)
    )
    return int(words[0]), int(words[1])


def _words(
    slots: Tensor, step: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...], count: int
) -> Tensor:
    """(B, 4, count) int64 in [0, 2^32). step, key: low and high word each."""
    index = torch.arange(count, device=slots.device)
    counter = (index, step[0], slots.unsqueeze(1), step[1])
    return torch.stack(philox(counter, (key[0], key[1])), dim=1)


def _polar(words: Tensor) -> tuple[Tensor, Tensor]:
    """Two (B, 2, n) float32 of (B, 4, n) words: u in (0, 1] of Box and Muller's radius, and their angle."""
    return (words[:, :2] + 1).float() * 2.0**-32, words[:, 2:].float() * (2.0 * math.pi * 2.0**-32)


def _words_of(slots: Tensor, numbers: Tensor, count: int) -> Tensor:
    """The same words from the row of a table of `keyed`."""
    low, high, first, second = numbers.unbind()
    return _words(slots, (low, high), (first, second), count)


def _polar_of(slots: Tensor, numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return _polar(_words_of(slots, numbers, count))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compile_for_one_size(function)


@lru_cache(maxsize=64)
def _keys(seed: int) -> Tensor:
    """(purposes, 2) int64: the Philox keys of a seed, a row for each number up to the last purpose."""
    return torch.tensor([_key(seed, purpose) for purpose in range(max(Purpose) + 1)])


def keyed(seed: int, step: int) -> Tensor:
    """(purposes, 4) int64 on the CPU: low and high word of the step, and the key of each purpose.

    What `Draws` need as a tensor, where compiled functions are to serve all steps and purposes.
    """
    words = torch.tensor([[step & _MASK, step >> 32]])
    keys = _keys(seed)
    return torch.cat([words.expand(len(keys), 2), keys], dim=1)


@dataclass(frozen=True)
class Draws:
    """The random numbers of some slots of one step's global batch.

    seed: of the run. step: index of the batch (or of the solver's step); a scalar int64 tensor on the slots' device
    gives the same numbers. slots: (B,) int64, positions in the global batch (or image indices), on the device where
    numbers are wanted. batch: size of the global batch.
    table: of `keyed`, on that device: integers are then made by compiled functions, bit for bit the same, of which
    each size of slots and shape of numbers is one. Logarithm, root, sine and cosine are not compiled: a compiler's
    are other functions than torch's, and round otherwise.
    """

    seed: int
    step: int | Tensor
    slots: Tensor
    batch: int
    table: Tensor | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self.slots.device

    def select(self, index: slice | Tensor) -> Draws:
        """The draws of some of these slots (a micro-batch): the same numbers as in the whole."""
        return self.of(self.slots[index])

    def of(self, slots: Tensor) -> Draws:
        """The draws of other slots (B,) of the same step and device."""
        return replace(self, slots=slots)

    def _words(self, purpose: Purpose, count: int) -> Tensor:
        """(B, 4, ceil(count / 4)) int64 in [0, 2^32)."""
        groups = -(-count // 4)
        if self.table is not None:
            words: Tensor = _compiled(_words_of)(self.slots, self.table[purpose], groups)
            return words
        return _words(self.slots, (self.step & _MASK, self.step >> 32), _key(self.seed, purpose), groups)

    def _polar(self, purpose: Purpose, count: int) -> tuple[Tensor, Tensor]:
        """Two (B, 2, ceil(count / 4)) float32: as `_polar`."""
        if self.table is not None:
            both: tuple[Tensor, Tensor] = _compiled(_polar_of)(
                self.slots, self.table[purpose], -(-count // 4)
            )
            return both
        return _polar(self._words(purpose, count))

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
        u, angle = self._polar(purpose, count)  # (B, 2, n) each
        radius = torch.sqrt(-2.0 * torch.log(u))
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

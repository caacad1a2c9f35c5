"""Features of many images on many ranks: fixed blocks by number, gathered in order, so that ranks change nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch

from dit.data.sources.decode import count_lines, in_order
from dit.errors import Notice
from dit.evals.features.network import FeatureNetwork
from dit.evals.metrics.metric import FeatureSet, Statistics
from dit.evals.pictures.pictures import Pictures, Seen, digests
from dit.progress import Bar
from dit.ranks import group
from dit.ranks.asked import EndAsked

T = TypeVar("T")

CHUNK = 4096  # rows whose products are summed at once: fixed, so that the sum is the same on any ranks
Arrays = dict[
    str, np.ndarray
]  # features (B, D), logits (B, K), spatial (B, S) of a block; what there is of them


class Sink(Protocol):
    """What becomes of features on rank 0; blocks come in the order of the images."""

    def add(self, arrays: Arrays) -> None: ...


class Kept:
    """All features of `count` images, in float32 (float64 where the network computes in that)."""

    def __init__(self, count: int):
        self._count, self._done = count, 0
        self.arrays: Arrays = {}

    def add(self, arrays: Arrays) -> None:
        """Put a block behind the others."""
        for name, rows in arrays.items():
            if name not in self.arrays:
                self.arrays[name] = np.empty((self._count, rows.shape[1]), rows.dtype)
            self.arrays[name][self._done : self._done + len(rows)] = rows
        self._done += len(arrays["features"])

    def set(self, name: str) -> FeatureSet:
        """The set; name: in messages."""
        return FeatureSet(**self.arrays, name=name)


class Summed:
    """Mean and covariance alone, of features and spatial ones, in float64: memory does not grow with the images."""

    def __init__(self) -> None:
        self._sums = {name: _Sums() for name in ("features", "spatial")}

    def add(self, arrays: Arrays) -> None:
        """Add a block."""
        for name, sums in self._sums.items():
            if name in arrays:
                sums.add(arrays[name])

    def statistics(self, name: str) -> Statistics | None:
        """Of `features` or `spatial`; None where the network gives none."""
        return self._sums[name].statistics()


class _Sums:
    """Count, mean and centred products of rows, merged chunk by chunk (Chan et al., 1983)."""

    def __init__(self) -> None:
        self._waiting: list[np.ndarray] = []
        self._count, self._mean, self._products = 0, np.zeros(0), np.zeros((0, 0))

    def add(self, rows: np.ndarray) -> None:
        self._waiting.append(rows)
        while sum(map(len, self._waiting)) >= CHUNK:
            held = np.concatenate(self._waiting)
            self._merge(held[:CHUNK])
            self._waiting = [held[CHUNK:]]

    def _merge(self, rows: np.ndarray) -> None:
        x = rows.astype(np.float64)
        mean = x.mean(0)
        x -= mean
        if not self._count:
            self._count, self._mean, self._products = len(x), mean, x.T @ x
            return
        total, step = self._count + len(x), mean - self._mean
        self._products += x.T @ x + np.outer(step, step) * (self._count * len(x) / total)
        self._mean = self._mean + step * (len(x) / total)
        self._count = total

    def statistics(self) -> Statistics | None:
        """Mean and unbiased covariance of all rows."""
        if self._waiting and sum(map(len, self._waiting)):
            self._merge(np.concatenate(self._waiting))
            self._waiting = []
        if not self._count:
            return None
        return Statistics(self._mean, self._products / max(1, self._count - 1), self._count)


@dataclass(frozen=True)
class Pass:
    """How images are gone through. batch_size: images at a time and rank (the last filled up). workers: threads.

    asked: looked at before every block: where a signal has come to any rank, all raise Stopped.
    """

    batch_size: int = 64
    workers: int = 1
    asked: EndAsked = field(default_factory=EndAsked)


def extract(
    pictures: Pictures,
    index: np.ndarray,
    networks: Mapping[str, FeatureNetwork],
    sinks: Mapping[str, Sink],
    how: Pass,
    world: group.World,
    desc: str,
) -> Seen:
    """Compute the features of images `index` (ascending) by each network into rank 0's sinks. Collective.

    Block k of the images is computed on rank k mod ranks, always in the same batch, and added in the order of blocks:
    sinks see the same whatever the ranks. Gives which images they were. What fails on a rank is every rank's.
    """
    blocks = np.array_split(index, range(how.batch_size, len(index), how.batch_size))
    with (
        Bar[None](total=len(index), unit="image", desc=desc, hidden=not world.is_main) as bar,
        ThreadPoolExecutor(how.workers) as pool,
    ):
        loaded = _ahead(pool, pictures, blocks[world.rank :: world.size], how.workers)
        rounds = math.ceil(len(blocks) / world.size)
        seen = collect((lambda _: next(loaded, None)), rounds, networks, sinks, how, world, bar)
    _tell(pictures, index, world)
    return seen


@dataclass(frozen=True)
class Extracted:
    """Features of a set by space, on rank 0 alone, and which images they are of."""

    sets: Mapping[str, FeatureSet]
    seen: Seen


def extracted(
    pictures: Pictures,
    index: np.ndarray,
    networks: Mapping[str, FeatureNetwork],
    how: Pass,
    world: group.World,
    what: str,
) -> Extracted:
    """The features of a set by every network, on rank 0, and which images they are of. Collective."""
    sinks = {name: Kept(len(index)) for name in networks}
    seen = extract(pictures, index, networks, sinks, how, world, what)
    if not world.is_main:
        return Extracted({}, seen)
    return Extracted({name: sink.set(pictures.named) for name, sink in sinks.items()}, seen)


def collect(
    give: Callable[[int], np.ndarray | None],
    rounds: int,
    networks: Mapping[str, FeatureNetwork],
    sinks: Mapping[str, Sink],
    how: Pass,
    world: group.World,
    bar: Bar[None],
) -> Seen:
    """Compute the features of images that ranks give into rank 0's sinks, round by round, in the order of ranks.

    give: this rank's images of a round, (B, H, W, 3) uint8 of at most how.batch_size, or None; it may be collective.
    Collective itself; gives which images they were. What fails on a rank is every rank's.
    """

    def work(number: int) -> tuple[bytes, dict[str, Arrays]] | None:
        how.asked.look()
        images = give(number)
        return None if images is None else block_features(images, networks, how.batch_size)

    found: list[bytes] = []
    for part in in_turn(rounds, work):
        found.append(part[0])
        for name, arrays in part[1].items() if world.is_main else ():
            sinks[name].add(arrays)
        bar.update(len(part[0]) // 16)
    return Seen.of(b"".join(found))


def in_rounds(count: int, work: Callable[[int], T], world: group.World) -> Iterator[T]:
    """What `work` gives of blocks 0 ... count - 1, in their order, on every rank. Collective.

    Block k is worked on by rank k mod ranks. What fails on a rank is every rank's.
    """

    def mine(number: int) -> T | None:
        block = number * world.size + world.rank
        return work(block) if block < count else None

    yield from in_turn(math.ceil(count / world.size), mine)


def in_turn(rounds: int, work: Callable[[int], T | None]) -> Iterator[T]:
    """What ranks' `work` gives of rounds 0, 1, ..., in the order of ranks, on every rank; what is None is left out.

    Collective: every rank works in every round. What fails on a rank is every rank's.
    """
    for number in range(rounds):
        everywhere = group.gather_objects(group.together(partial(work, number)))
        yield from (part for part in everywhere if part is not None)


def _tell(pictures: Pictures, index: np.ndarray, world: group.World) -> None:
    """Say what was done to files to get their pixels, as encoding does: it is part of what is measured. Collective."""
    taken = set(index.tolist())
    done: dict[str, set[int]] = {}
    for told in group.gather_objects(dict(pictures.told())):
        for name, numbers in told.items():
            done.setdefault(name, set()).update(numbers & taken)
    counts = in_order({name: len(numbers) for name, numbers in done.items()})
    if counts and world.is_main:
        warnings.warn(f"{pictures.named}: {', '.join(count_lines(counts))}", Notice, stacklevel=2)


def _ahead(
    pool: ThreadPoolExecutor, pictures: Pictures, blocks: Sequence[np.ndarray], workers: int
) -> Iterator[np.ndarray]:
    """The images of each block, the next one being read while one is worked on."""

    def begin(block: np.ndarray) -> list[Future[np.ndarray]]:
        parts = np.array_split(block, min(workers, len(block)))
        return [pool.submit(pictures.block, part.tolist()) for part in parts]

    waiting = [begin(block) for block in blocks[:1]]
    for number in range(len(blocks)):
        now = waiting.pop(0)
        waiting += [begin(block) for block in blocks[number + 1 : number + 2]]
        yield np.concatenate([future.result() for future in now])


def block_features(
    images: np.ndarray, networks: Mapping[str, FeatureNetwork], batch_size: int
) -> tuple[bytes, dict[str, Arrays]]:
    """The images' digests, and their features by each network, in a batch of full size."""
    count = len(images)
    filled = images if count == batch_size else np.resize(images, (batch_size, *images.shape[1:]))
    batch = torch.from_numpy(np.require(filled, requirements="W"))
    given: dict[str, Arrays] = {}
    for name, network in networks.items():
        made = network(batch)._asdict()
        given[name] = {kind: rows[:count].cpu().numpy() for kind, rows in made.items() if rows is not None}
    return digests(images), given

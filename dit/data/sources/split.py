"""Holding a share of the images out of training: of each class alike, and the same whoever asks.

Which images are held out follows from (names, labels, share, seed): of each class those whose hashed names come first.
So it depends neither on the order of files nor on ranks, and a set that grows keeps nearly all of its choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from dit.config import ConfigError
from dit.data import DataError
from dit.data.origin import Split
from dit.data.sources.decode import ImageFileOrPixels
from dit.data.sources.source import ImageSource
from dit.files import beside

HELD_OUT = "-val"  # behind the name of the training set's folder


def held_out_folder(out: Path) -> Path:
    """Where the images go that are held out of the set in `out`."""
    return beside(out, HELD_OUT)


def check_share(share: float) -> None:
    """ConfigError for a share that leaves one side without images; 0 holds none out."""
    if not 0 <= share < 1:
        raise ConfigError(f"holdout is {share}, expected the share of images to hold out: 0.1 for a tenth")


def split(source: ImageSource, share: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """(those to train on, those held out) of the images, each in the source's order and with all of its classes.

    round(share * images) are held out, of each class (and of those without one) its share up to one image; of each at
    least one is left. Raises DataError where none would be held out.
    """
    held = _chosen(source, share, seed)
    if not held.any():
        raise DataError(
            f"--holdout={share:g} of {len(source)} images holds none out (of each class at least one is left): "
            "raise it, or leave it out"
        )
    train = Split(part="train", share=share, seed=seed, images=len(source))
    return _part(source, ~held, train), _part(source, held, replace(train, part="held out"))


def _chosen(source: ImageSource, share: float, seed: int) -> np.ndarray:
    """(N,) bool: which images are held out."""
    stratum = source.labels + 1  # (N,), 0: without a label
    sizes = np.bincount(stratum, minlength=len(source.classes) + 1)
    keys = _hashes(source.names, seed)
    order = np.lexsort((keys, stratum))
    rank = np.empty(len(source), np.int64)  # of each image within its class, by its key
    rank[order] = np.arange(len(source)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen: np.ndarray = rank < _counts(sizes, share, seed)[stratum]
    return chosen


def _counts(sizes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """How many of each class are held out: its share, by largest remainders; between equal ones a hash decides."""
    exact = share * sizes
    counts = np.floor(exact + 1e-9).astype(np.int64)
    ties = _hashes([f"class {i}" for i in range(len(sizes))], seed)
    order = np.lexsort((ties, -np.round(exact - counts, 9)))
    order = order[counts[order] < sizes[order] - 1]
    counts[order[: max(0, round(share * int(sizes.sum())) - int(counts.sum()))]] += 1
    return np.asarray(np.minimum(counts, np.maximum(sizes - 1, 0)))


def _hashes(texts: list[str] | tuple[str, ...], seed: int) -> np.ndarray:
    """(n,) uint64, XXH3 of each."""
    of = partial(xxhash.xxh3_64_intdigest, seed=seed % 2**64)
    return np.fromiter((of(text.encode()) for text in texts), np.uint64, len(texts))


def _part(source: ImageSource, chosen: np.ndarray, part: Split) -> ImageSource:
    places = np.flatnonzero(chosen)
    names = tuple(source.names[i] for i in places.tolist())
    opener = partial(_open, source.open, places)
    return replace(source, names=names, labels=source.labels[places], open=opener, split=part)


def _open(
    open_image: Callable[[int], ImageFileOrPixels], places: np.ndarray, index: int
) -> ImageFileOrPixels:
    return open_image(int(places[index]))

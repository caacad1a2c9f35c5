"""A set of images that is evaluated: how many, of what size, their labels, and blocks of them by number."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit.errors import UserError
from dit.evals.metrics.metric import Statistics


class PicturesError(UserError):
    """A set of images that cannot be evaluated as it is."""


@dataclass(frozen=True)
class Pictures:
    """Images in a fixed order, all of one size. `block` is called from any thread.

    named: what was typed, for messages. size: (height, width). labels: (N,) int64, −1 where there is none, or None
    where no image has one. classes: names of the labels, where they are known. about: JSON values of what the set is,
    known without reading its pixels; converted: what is done to its pixels, "" where nothing. spec: the record of what
    drew them (tools/sample.py's spec.json), where there is one. moments: features' statistics that lie beside the
    images, under "features" and "spatial".
    """

    named: str
    size: tuple[int, int]
    labels: np.ndarray | None
    about: Mapping[str, Any]
    classes: tuple[str, ...] = ()
    converted: str = ""
    spec: Mapping[str, Any] | None = None
    moments: Mapping[str, Statistics] = field(default_factory=dict)

    def __len__(self) -> int:
        raise NotImplementedError

    def block(self, index: Sequence[int]) -> np.ndarray:
        """Images of these numbers, ascending: (n, H, W, 3) uint8. Raises PicturesError or BadImage naming the image."""
        raise NotImplementedError

    def told(self) -> Mapping[str, set[int]]:
        """What was done to which of the images that `block` has given, under the names of data.sources' COUNTED."""
        return {}

    def need_labels(self, what: str) -> np.ndarray:
        """The labels; PicturesError where an image has none."""
        if self.labels is None:
            raise PicturesError(
                f"{self.named}: no labels, which {what} needs: in an npz they are arr_1, of a folder the names of its "
                "folders"
            )
        missing = np.flatnonzero(self.labels < 0)
        if len(missing):
            raise PicturesError(
                f"{self.named}: {len(missing)} of {len(self.labels)} images have no label (first: image {missing[0]}), "
                f"which {what} needs"
            )
        return self.labels


def digests(images: np.ndarray) -> bytes:
    """16 bytes of each image (n, H, W, 3) uint8, its size among what they are of."""
    import xxhash

    size = str(images.shape[1:]).encode()
    return b"".join(xxhash.xxh3_128_digest(size + image.tobytes()) for image in images)


def content(found: bytes) -> str:
    """The hash of a set from its images' digests in order, 16 hexadecimal digits, whatever file they lay in."""
    return hashlib.sha256(found).hexdigest()[:16]


@dataclass(frozen=True)
class Seen:
    """Which images a set is of. content: the hash of all in their order.

    digests: 16 bytes of each image, as `digests` gives them; b"" where the hash alone is on file.
    """

    content: str
    digests: bytes = b""

    @classmethod
    def of(cls, found: bytes) -> Seen:
        """Of the digests of images in their order."""
        return cls(content(found), found)

    def __len__(self) -> int:
        return len(self.digests) // 16

    def shared(self, other: Seen) -> int:
        """How many of these images are among the others too; of others whose hash alone is on file, all or none."""
        if not other.digests:
            return len(self) if self.content == other.content else 0
        mine, theirs = (np.frombuffer(each.digests, "S16") for each in (self, other))
        return int(np.isin(mine, theirs).sum())


def labels_hash(labels: np.ndarray | None) -> str | None:
    """12 hexadecimal digits of labels in their order; None of none."""
    if labels is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(labels, "<i8").tobytes()).hexdigest()[:12]

"""Several data sets as one: each fills its share of every batch, by weight or by how often it is repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field

from dit.config import ConfigError, config
from dit.data import DataError
from dit.data.shards.manifest import Manifest, Names
from dit.errors import shown


@config
class PartConfig:
    """One data set of a mixture: a share of every batch by `weight`, or by `repeat` times its samples."""

    path: str  # folder or URL with a manifest.json
    weight: Annotated[float, Field(gt=0)] | None = None  # of each batch, relative to the other data sets
    repeat: Annotated[float, Field(gt=0)] | None = None  # passes over it for one pass of a set with repeat 1


@dataclass(frozen=True)
class Mixture:
    """Data sets with the fraction of each batch that is theirs; fractions add up to 1.

    numbered: names of classes in the order that gives them their numbers; by default that of their first appearance.
    """

    parts: tuple[tuple[Manifest, float], ...]
    numbered: tuple[str, ...] | None = None

    @classmethod
    def of(cls, manifest: Manifest, numbered: tuple[str, ...] | None = None) -> Mixture:
        """Make a mixture of one data set alone."""
        return cls(((manifest, 1.0),), numbered)

    @classmethod
    def load(cls, parts: Sequence[PartConfig]) -> Mixture:
        """Open the data sets. ConfigError where weights and repeats are mixed, DataError where sets do not fit."""
        by_weight = [p.path for p in parts if p.weight is not None]
        by_repeat = [p.path for p in parts if p.repeat is not None]
        if set(by_weight) & set(by_repeat) or (by_weight and len(by_weight) < len(parts)):
            raise ConfigError(
                "data.mix: give every data set a weight, or a repeat (1 where there is none), and none both"
            )
        manifests = [Manifest.load(p.path) for p in parts]
        sizes = [p.weight or m.samples * (p.repeat or 1.0) for p, m in zip(parts, manifests, strict=True)]
        mixture = cls(tuple((m, size / sum(sizes)) for m, size in zip(manifests, sizes, strict=True)))
        mixture.check()
        return mixture

    def check(self) -> None:
        """Raise DataError where the data sets hold different kinds of latents."""
        first = self.parts[0][0]
        for other, _ in self.parts[1:]:
            for name in ("codec", "array", "dtype", "channels", "input_size", "eps", "image_size"):
                ours, theirs = getattr(first, name), getattr(other, name)
                if ours != theirs:
                    values = "" if name == "codec" else f" ({shown(ours)} against {shown(theirs)})"
                    raise DataError(
                        f"data.mix: {first.root} and {other.root} differ in {name}{values}; encode both with the same "
                        "codec and options"
                    )
            if first.eps and (first.mean, first.std) != (other.mean, other.std):
                raise DataError(
                    f"data.mix: {first.root} and {other.root} are pairs of models that see other normalisations; mix "
                    "pairs of one model"
                )

    def shares(self, global_batch: int) -> list[tuple[Manifest, int]]:
        """Return each data set with its slots of a global batch: the fractions, rounded by largest remainders."""
        exact = np.array([fraction * global_batch for _, fraction in self.parts])
        counts = np.floor(exact + 1e-9).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: global_batch - counts.sum()]] += 1
        for (manifest, fraction), count in zip(self.parts, counts.tolist(), strict=True):
            if not count:
                raise ConfigError(
                    f"data.mix: {manifest.root} would fill {fraction * global_batch:.2g} slots of a global batch of "
                    f"{global_batch}; raise its weight or the batch"
                )
        return [(m, n) for (m, _), n in zip(self.parts, counts.tolist(), strict=True)]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of all data sets, each once, in the order of their first appearance."""
        if self.numbered is not None:
            return self.numbered
        if len(self.parts) == 1:  # as it has them, should two be called the same
            return self.parts[0][0].classes
        return tuple(dict.fromkeys(name for manifest, _ in self.parts for name in manifest.classes))

    def label_of(self, manifest: Manifest) -> np.ndarray:
        """Return the mixture's label of each class of one of its data sets, (classes,) int64: that of the same name."""
        if manifest.classes == self.classes:
            return np.arange(len(self.classes))
        place = {name: i for i, name in enumerate(self.classes)}
        return np.array([place[name] for name in manifest.classes], np.int64)

    @cached_property
    def manifest(self) -> Manifest:
        """The mixture as if it were one data set, without blocks; of a set alone that set's own manifest.

        mean and std are those of a sample of a batch: E[mean] and Var by the law of total variance.
        """
        if len(self.parts) == 1:
            return self.parts[0][0]
        manifests = [m for m, _ in self.parts]
        fraction = np.array([f for _, f in self.parts])[:, None]
        # (parts, C) each
        mean, std = (np.array([getattr(m, name) for m in manifests]) for name in ("mean", "std"))
        center = (fraction * mean).sum(0)
        spread = np.sqrt((fraction * (std**2 + (mean - center) ** 2)).sum(0))
        counts = np.zeros(len(self.classes), np.int64)
        for m in manifests:
            np.add.at(counts, self.label_of(m), m.class_counts)
        parts = "".join(f"{m.digest} {f!r}\n" for m, f in self.parts)
        return replace(
            manifests[0],
            samples=sum(m.samples for m in manifests),
            classes=self.classes,
            class_counts=tuple(counts.tolist()),
            unlabelled=sum(m.unlabelled for m in manifests),
            mean=tuple(center.tolist()),
            std=tuple(spread.tolist()),
            names=Names(
                count=sum(m.names.count for m in manifests), sha256=hashlib.sha256(parts.encode()).hexdigest()
            ),
            shards=(),
            blocks=(),
            root=" + ".join(m.root for m in manifests),
        )

"""The reference's side of a comparison in one feature space: its features, or their statistics, and its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dit.config import to_dict
from dit.evals.extraction import Kept, Pass, extract
from dit.evals.features.network import FeatureError, FeatureNetwork, FeatureSpace
from dit.evals.features.spaces import FEATURES
from dit.evals.metrics.measuring import ALL, choose_metrics
from dit.evals.metrics.metric import FeatureSet, Metric, Statistics
from dit.evals.pictures.choice import described
from dit.evals.pictures.pictures import Pictures, PicturesError, Seen
from dit.evals.reference import ReferenceFile, as_bytes, space_name
from dit.ranks import group


@dataclass(frozen=True)
class Sides:
    """What a reference is in one space. protocol: JSON values. On ranks other than 0 only the network is there.

    set: all its features. features, spatial: statistics that are compared with in place of the set, where they are of
    more images than it, or there is none. seen: which images it is of, where that is known.
    """

    network: FeatureNetwork
    protocol: Mapping[str, Any]
    set: FeatureSet | None = None
    features: Statistics | None = None
    spatial: Statistics | None = None
    seen: Seen | None = None

    def for_metric(self, metric: Metric) -> FeatureSet | Statistics:
        """What a metric compares with. PicturesError where it needs features and there are statistics alone."""
        held = self.spatial if metric.needs == "spatial" else self.features
        if not metric.looks_at_reference:
            return self.any
        if metric.takes_statistics and held is not None:
            return held
        if self.set is None:
            raise PicturesError(
                f"{metric.figures[0]} needs the reference's features, and there are a mean and a covariance alone: "
                "give images, or a file made by `evaluate.py reference IMAGES OUT --keep_features`"
            )
        return self.set

    def can(self, metric: Metric) -> bool:
        """Whether `for_metric` has something for it."""
        held = self.spatial if metric.needs == "spatial" else self.features
        return (
            not metric.looks_at_reference
            or self.set is not None
            or (metric.takes_statistics and held is not None)
        )

    @property
    def any(self) -> FeatureSet | Statistics:
        """The features where they are there, else their statistics."""
        held = self.set if self.set is not None else self.features
        assert held is not None  # on rank 0
        return held


def check_needs(sides: Mapping[str, Sides], wanted: str, keys: Mapping[str, str]) -> None:
    """PicturesError where a figure needs more of the reference than there is: before samples are drawn, for hours.

    wanted, keys: as `choose_metrics` has them; of "all", figures that cannot be had are left out later. On rank 0.
    """
    if wanted == ALL:
        return
    anything = FeatureSet(np.eye(2))
    for metric in choose_metrics(wanted, keys, anything, anything)[0].values():
        for side in sides.values():
            side.for_metric(metric)


def built(
    spaces: Sequence[FeatureSpace], pictures: Pictures | None, world: group.World
) -> list[FeatureNetwork]:
    """The network of each space; what is fitted is fitted on rank 0, for all. Collective."""
    networks = []
    for space in spaces:
        if space.fitted:
            sample = None if pictures is None else partial(_evenly, pictures)
            networks.append(group.on_main(partial(space.build, world.device, sample)))
        else:
            networks.append(group.together(partial(space.build, world.device)))
    names = [space_name(network.identity) for network in networks]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise FeatureError(f"--features names {twice[0]} twice")
    return networks


def _evenly(pictures: Pictures, count: int) -> np.ndarray:
    """So many images, from the whole of the set."""
    index = np.unique(np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int))
    return pictures.block(index.tolist())


def sides_of_file(
    file: ReferenceFile, spaces: Sequence[FeatureSpace], device: torch.device
) -> dict[str, Sides]:
    """The reference of a statistics file."""
    found = {}
    for space in spaces:
        if space.fitted:
            kind = FEATURES.name_of(space)
            held = next((s for s in file.spaces.values() if s.identity["name"] == kind), None)
            held = held or file.of({"name": kind})
            network = space.restore(held.state, held.identity)
            wanted = {k: v for k, v in to_dict(space).items() if k in held.identity}
            if any(
                held.identity[k] < v if k == "components" else held.identity[k] != v
                for k, v in wanted.items()
            ):
                raise PicturesError(
                    f"{file.path} was fitted with {dict(held.identity)}, and {wanted} is asked for"
                )
        else:
            network = space.build(device)
            held = file.of(network.identity)
        protocol = {
            key: file.about[key] for key in ("content", "images", "chosen", "size", "converted", "labels")
        }
        kept = held.set(str(file.path))
        features, spatial = (None, None) if kept is not None else (held.features, held.spatial)
        found[space_name(network.identity)] = Sides(network, protocol, kept, features, spatial, file.seen)
    return found


def sides_of_images(
    pictures: Pictures, index: np.ndarray, spaces: Sequence[FeatureSpace], how: Pass, world: group.World
) -> dict[str, Sides]:
    """The reference of a set of images, and of the statistics that ADM's files hold beside them. Collective."""
    networks = {space_name(n.identity): n for n in built(spaces, pictures if len(pictures) else None, world)}
    sinks = {name: Kept(len(index)) for name in networks}
    protocol: dict[str, Any] = {}
    seen = None
    if len(index):
        seen = extract(pictures, index, networks, sinks, how, world, "reference")
        protocol = {"content": seen.content, **described(pictures, index)}
        protocol.pop("sampler")
    found = {}
    for name, network in networks.items():
        stored = _stored(pictures, network)
        if not len(index) and "features" not in stored:
            raise PicturesError(
                f"{pictures.named} has statistics of Inception's features alone, and no images for {name}: take "
                "--features=inception, or images"
            )
        own = {"statistics": _hash_of(stored)} if stored else {}
        kept = sinks[name].set(pictures.named) if world.is_main and len(index) else None
        statistics = stored.get("features"), stored.get("spatial")
        found[name] = Sides(network, {**protocol, **own}, kept, *statistics, seen=seen)
    return found


def _stored(pictures: Pictures, network: FeatureNetwork) -> Mapping[str, Statistics]:
    """The statistics that lie beside a set's images: they are of Inception."""
    return pictures.moments if network.identity["name"] == "inception" else {}


def _hash_of(stored: Mapping[str, Statistics]) -> str:
    found = hashlib.sha256()
    for kind in sorted(stored):
        found.update(as_bytes(stored[kind].mean) + as_bytes(stored[kind].cov))
    return found.hexdigest()[:16]

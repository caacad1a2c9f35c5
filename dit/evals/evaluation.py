"""From two sets of images to figures, each with the protocol that it is comparable by. Collective over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from dit.config import ConfigError, config, to_dict
from dit.data import DataError
from dit.errors import Notice
from dit.evals.accuracy import class_accuracy
from dit.evals.extraction import Kept, Pass, extract
from dit.evals.features.network import FeatureNetwork, FeatureSpace
from dit.evals.features.spaces import FEATURES
from dit.evals.figures import ACCURACY, FLOOR, RATIO, names_in, own_names, protocol_of
from dit.evals.metrics.measuring import ALL, check_counts, check_resamples, choose_metrics, measure
from dit.evals.metrics.metric import METRICS, FeatureSet, Metric
from dit.evals.metrics.resampling import LEVEL, Resampled, Resampling
from dit.evals.pictures.choice import chosen, described
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import Pictures
from dit.evals.protocol import protocol_hash
from dit.evals.reference import ReferenceFile, is_reference, load
from dit.evals.sides import Sides, check_needs, sides_of_file, sides_of_images
from dit.files import expand
from dit.ranks import group


@config
class Options:
    """How sets are evaluated."""

    metrics: str = ALL  # figures or metrics, comma-separated; all = those that can be computed
    bootstrap: Annotated[int, Field(ge=0)] = 0  # resamples for 95% intervals, 200 are usual; 0 = no intervals
    seed: Annotated[int, Field(ge=0)] = 0  # of the resamples alone
    num_samples: int | None = None  # samples that are taken, at random; none = all
    num_reference: int | None = None  # reference images that are taken, at random; none = all
    held_out: str | None = None  # real images beside the reference: also distance / theirs, and fdr
    class_accuracy: bool = False  # the share of samples that an ImageNet classifier takes for their class
    image_size: Annotated[int, Field(ge=1)] | None = (
        None  # pixels a side files are cropped and resized to; none = as is
    )
    batch_size: Annotated[int, Field(ge=1)] = 64  # images at a time and rank


@dataclass(frozen=True)
class Order:
    """What is to be evaluated against what, in which features, and how.

    samples, reference: what `open_pictures` opens; the reference may be a statistics file. metric_keys: as
    `choose_metrics` has them. workers: threads that read images.
    """

    samples: str
    reference: str
    spaces: Sequence[FeatureSpace]
    options: Options = Options()  # noqa: RUF009
    metric_keys: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1

    @property
    def how(self) -> Pass:
        """How images are gone through."""
        return Pass(self.options.batch_size, self.workers)


@dataclass(frozen=True)
class InSpace:
    """The figures in one feature space. protocol: JSON values, of which each figure depends on its part."""

    name: str
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocol: dict[str, Any]
    metrics: dict[str, Any]
    missing: dict[str, str] = field(default_factory=dict)
    ratio: float | None = None  # distance ÷ held-out images'
    resamples: dict[str, Resampled] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the protocol."""
        return protocol_hash(self.protocol)

    @property
    def hashes(self) -> dict[str, str]:
        """For each figure the hash of what it depends on of the protocol."""
        return {name: protocol_hash(protocol_of(name, self.protocol)) for name in self.figures}

    def as_json(self) -> dict[str, Any]:
        """As it is recorded."""
        intervals = {name: list(ends) for name, ends in self.intervals.items()}
        return {
            "features": self.name, "figures": self.figures, "intervals": intervals, "protocol": self.protocol,
            "hash": self.hash, "hashes": self.hashes, "metrics": self.metrics,
        }  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """All that was measured of a set of samples. fdr: mean over spaces of distance ÷ held-out images' distance."""

    spaces: list[InSpace]
    samples: Pictures
    content: str  # hash of the samples' pixels
    sets: dict[str, tuple[FeatureSet, FeatureSet | None]]  # (generated, reference) by space
    fdr: float | None = None
    bootstrap: dict[str, Any] | None = None  # what the intervals come from


def evaluate(order: Order, world: group.World) -> Evaluation | None:
    """Compute what is ordered: on rank 0, None on the others. Collective.

    Raises PicturesError, FeatureError, DataError, ConfigError, with what is amiss with which set.
    """
    options = order.options
    order = _renamed(order)
    check_names(order.options.metrics, order.metric_keys)
    check_resamples(options.bootstrap)
    samples = group.together(lambda: open_pictures(order.samples, options.image_size))
    ours = group.together(lambda: chosen(samples, options.num_samples, "num_samples"))
    held_out = group.together(lambda: _held_out(order))
    sides = sides_of(order, world, samples.named, len(ours))
    networks = {name: side.network for name, side in sides.items()}
    found = extracted(samples, ours, networks, order.how, world, "samples")
    floor = None if held_out is None else _floors(order, held_out, len(ours), networks, world)
    if not world.is_main:
        return None
    spaces = [
        in_space(
            name, Compared(samples, ours, found.sets[name], side, floor.of(name) if floor else None), order
        )
        for name, side in sides.items()
    ]
    ratios = [space.ratio for space in spaces if space.ratio is not None]
    kept = {name: (found.sets[name], side.set) for name, side in sides.items()}
    how = (
        {"resamples": options.bootstrap, "seed": options.seed, "level": LEVEL} if options.bootstrap else None
    )
    return Evaluation(spaces, samples, found.content, kept, float(np.mean(ratios)) if ratios else None, how)


@dataclass(frozen=True)
class Extracted:
    """Features of a set by space, on rank 0 alone, and the hash of the images."""

    sets: Mapping[str, FeatureSet]
    content: str

    def of(self, space: str) -> tuple[FeatureSet, str]:
        """The features in one space, and the hash."""
        return self.sets[space], self.content


@dataclass(frozen=True)
class Compared:
    """What is compared in one space. held_out: features of real images, and their hash."""

    samples: Pictures
    index: np.ndarray
    found: FeatureSet
    side: Sides
    held_out: tuple[FeatureSet, str] | None = None


def _renamed(order: Order) -> Order:
    """The order with figures by the names that they have in all spaces. ConfigError for a name that one cannot have."""
    metrics = own_names(order.options.metrics, [FEATURES.name_of(space) for space in order.spaces])
    return replace(order, options=replace(order.options, metrics=metrics))


def sides_of(order: Order, world: group.World, samples: str, count: int) -> dict[str, Sides]:
    """The reference in every space, for so many samples of this name. PicturesError where figures need more of it."""
    against = group.together(lambda: _reference(order))
    if isinstance(against, ReferenceFile):
        sides = group.together(lambda: sides_of_file(against, order.spaces, world.device))
    else:
        few, is_empty = order.options.num_reference, not len(against)
        index = group.together(lambda: np.arange(0) if is_empty else chosen(against, few, "num_reference"))
        if not is_empty:
            sizes = {samples: count}, {against.named: len(index)}
            group.together(lambda: check_counts(order.options.metrics, order.metric_keys, *sizes))
        sides = sides_of_images(against, index, order.spaces, order.how, world)
    group.on_main(lambda: check_needs(sides, order.options.metrics, order.metric_keys))
    return sides


def _held_out(order: Order) -> Pictures | None:
    named = order.options.held_out
    return None if named is None else open_pictures(named, order.options.image_size)


def _floors(
    order: Order, pictures: Pictures, count: int, networks: Mapping[str, FeatureNetwork], world: group.World
) -> Extracted:
    """The features of held-out images, of as many as there are samples where there are as many."""
    named = pictures.named
    index = group.together(lambda: chosen(pictures, min(len(pictures), count) or None, "held_out"))
    if len(index) < count and world.is_main:
        warnings.warn(
            f"{named} has {len(index)} images, and there are {count} samples: distances are larger for fewer images, "
            "so the ratio is too small",
            Notice,
            stacklevel=2,
        )
    return extracted(pictures, index, networks, order.how, world, "held-out")


def check_names(metrics: str, keys: Mapping[str, str]) -> None:
    """ConfigError for figures, and fields of them, that there are not: before hours of work."""
    anything = FeatureSet(np.eye(2))
    choose_metrics(metrics, keys, anything, anything)


def _reference(order: Order) -> Pictures | ReferenceFile:
    place = Path(expand(order.reference))
    if not is_reference(place):
        return open_pictures(order.reference, order.options.image_size)
    if order.options.num_reference is not None:
        raise ConfigError("--num_reference is of images; a statistics file has been made of its own number")
    return load(place)


def extracted(
    pictures: Pictures,
    index: np.ndarray,
    networks: Mapping[str, FeatureNetwork],
    how: Pass,
    world: group.World,
    what: str,
) -> Extracted:
    """The features of a set by every network, on rank 0, and the hash of its content."""
    sinks = {name: Kept(len(index)) for name in networks}
    content = extract(pictures, index, networks, sinks, how, world, what)
    if not world.is_main:
        return Extracted({}, content)
    return Extracted({name: sink.set(pictures.named) for name, sink in sinks.items()}, content)


def in_space(name: str, what: Compared, order: Order) -> InSpace:
    """All figures in one space, under the names that they may have there; of an order its options and metric keys."""
    names = names_in(what.side.network)
    options, side = order.options, what.side
    metrics, missing = metrics_of(order, what.found, side)
    figures: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    resamples: dict[str, Resampled] = {}
    resampling = Resampling(options.bootstrap, options.seed)
    for kind, metric in metrics.items():
        measured = measure({kind: metric}, what.found, side.for_metric(metric), resampling)
        figures |= {names.get(key, key): value for key, value in measured.figures.items()}
        intervals |= {names.get(key, key): ends for key, ends in measured.intervals.items()}
        resamples |= {names.get(key, key): drawn for key, drawn in measured.resamples.items()}
    protocol: dict[str, Any] = {
        "features": dict(side.network.identity),
        "samples": described(what.samples, what.index),
        "reference": dict(side.protocol),
    }
    if options.class_accuracy:
        figures[ACCURACY] = class_accuracy(what.found, what.samples, what.index, side.network)
    ratio = None
    if what.held_out is not None:
        distance, ratio = _ratio(what, what.held_out[0])
        word = names.get("frechet", "frechet")
        figures |= {f"{word}{FLOOR}": distance, f"{word}{RATIO}": ratio}
        protocol["held_out"] = {"content": what.held_out[1], "images": len(what.held_out[0])}
    own = {kind: to_dict(metric) for kind, metric in metrics.items()}
    protocol["metrics"] = {kind: own[kind] for kind, metric in metrics.items() if metric != type(metric)()}
    return InSpace(name, figures, intervals, protocol, own, missing, ratio, resamples)


def metrics_of(order: Order, found: FeatureSet, side: Sides) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that are asked for, by name; and, of all, the figures that cannot be had, with why."""
    metrics, missing = choose_metrics(order.options.metrics, order.metric_keys, found, side.any)
    if order.options.metrics != ALL:
        return metrics, missing
    if side.network.identity["name"] != "inception":  # a score by another classifier is asked for by its name
        metrics = {kind: metric for kind, metric in metrics.items() if metric.needs != "logits"}
        missing = {key: why for key, why in missing.items() if key != "inception_score"}
    lacking = [kind for kind, metric in metrics.items() if not side.can(metric)]
    missing |= {figure: "needs spatial ones" for kind in lacking for figure in metrics[kind].figures}
    if side.set is None:
        missing = dict.fromkeys(
            missing, "needs the reference's features: images, or a file with --keep_features"
        )
    return {kind: metric for kind, metric in metrics.items() if kind not in lacking}, missing


def _ratio(what: Compared, held_out: FeatureSet) -> tuple[float, float]:
    """The distance of real held-out images, and that of the samples divided by it."""
    metric = METRICS["frechet"]()
    reference = what.side.for_metric(metric)
    ours, theirs = (metric(each, reference)["frechet"] for each in (what.found, held_out))
    if theirs <= 0:
        raise DataError(
            f"{held_out.name}: held-out images have the distance {theirs} to the reference: the same ones?"
        )
    return theirs, ours / theirs

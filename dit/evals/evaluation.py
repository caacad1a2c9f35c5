"""From two sets of images to figures, each with the protocol that it is comparable by. Collective over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit.config import ConfigError, to_dict
from dit.evals.accuracy import class_accuracy
from dit.evals.extraction import extracted
from dit.evals.figures import ACCURACY, FLOOR, RATIO, names_in, protocol_of
from dit.evals.held_out import HeldOut, held_out_features, open_held_out, ratio_of, tell_shared
from dit.evals.metrics.measuring import ALL, check_counts, check_resamples, choose_metrics, measure
from dit.evals.metrics.metric import FeatureSet, Metric
from dit.evals.metrics.resampling import LEVEL, Resampled, Resampling
from dit.evals.order import Order, check_names, renamed
from dit.evals.pictures.choice import chosen, described
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import Pictures
from dit.evals.protocol import protocol_hash
from dit.evals.reference import ReferenceFile, is_reference, load
from dit.evals.sides import Sides, check_needs, sides_of_file, sides_of_images
from dit.files import expand
from dit.ranks import group


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
    order = renamed(order)
    check_names(order.options.metrics, order.metric_keys)
    check_resamples(options.bootstrap)
    samples = group.together(lambda: open_pictures(order.samples, options.image_size))
    ours = group.together(lambda: chosen(samples, options.num_samples, "num_samples"))
    held_out = group.together(lambda: open_held_out(order))
    sides = sides_of(order, world, samples.named, len(ours))
    networks = {name: side.network for name, side in sides.items()}
    found = extracted(samples, ours, networks, order.how, world, "samples")
    floor = None if held_out is None else held_out_features(order, held_out, len(ours), networks, world)
    if not world.is_main:
        return None
    real_seen = None if floor is None else floor.seen
    useless = tell_shared(found.seen, next(iter(sides.values())).seen, real_seen)
    spaces = []
    for name, side in sides.items():
        real = None if floor is None else HeldOut(floor.sets[name], floor.seen.content, useless)
        spaces.append(in_space(name, Compared(samples, ours, found.sets[name], side, real), order))
    ratios = [space.ratio for space in spaces if space.ratio is not None]
    kept = {name: (found.sets[name], side.set) for name, side in sides.items()}
    how = (
        {"resamples": options.bootstrap, "seed": options.seed, "level": LEVEL} if options.bootstrap else None
    )
    return Evaluation(
        spaces, samples, found.seen.content, kept, float(np.mean(ratios)) if ratios else None, how
    )


@dataclass(frozen=True)
class Compared:
    """What is compared in one space."""

    samples: Pictures
    index: np.ndarray
    found: FeatureSet
    side: Sides
    held_out: HeldOut | None = None


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


def _reference(order: Order) -> Pictures | ReferenceFile:
    place = Path(expand(order.reference))
    if not is_reference(place):
        return open_pictures(order.reference, order.options.image_size)
    if order.options.num_reference is not None:
        raise ConfigError("--num_reference is of images; a statistics file has been made of its own number")
    return load(place)


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
        order.asked.look()  # resamples take minutes
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
    word = names.get("frechet", "frechet")
    if what.held_out is not None and what.held_out.useless:
        missing[f"{word}{RATIO}"] = what.held_out.useless
    elif what.held_out is not None:
        distance, ratio = ratio_of(what.found, what.held_out.found, side)
        figures |= {f"{word}{FLOOR}": distance, f"{word}{RATIO}": ratio}
        protocol["held_out"] = {"content": what.held_out.content, "images": len(what.held_out.found)}
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

"""Real images beside the reference: how far they are from it, and sets that have images in common."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from dit.data import DataError
from dit.errors import Notice
from dit.evals.extraction import Extracted, extracted
from dit.evals.features.network import FeatureNetwork
from dit.evals.metrics.metric import METRICS, FeatureSet
from dit.evals.order import Order
from dit.evals.pictures.choice import chosen
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import Pictures, Seen
from dit.evals.sides import Sides
from dit.ranks import group


@dataclass(frozen=True)
class HeldOut:
    """Held-out images in one space. content: their hash. useless: why no distance is divided by theirs, or ""."""

    found: FeatureSet
    content: str
    useless: str = ""


def open_held_out(order: Order) -> Pictures | None:
    """The held-out images of an order; None where it has none."""
    named = order.options.held_out
    return None if named is None else open_pictures(named, order.options.image_size)


def held_out_features(
    order: Order, pictures: Pictures, count: int, networks: Mapping[str, FeatureNetwork], world: group.World
) -> Extracted:
    """The features of held-out images, of as many as there are samples where there are as many. Collective."""
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


def ratio_of(found: FeatureSet, held_out: FeatureSet, side: Sides) -> tuple[float, float]:
    """The distance of real held-out images, and that of the samples divided by it."""
    metric = METRICS["frechet"]()
    reference = side.for_metric(metric)
    ours, theirs = (metric(each, reference)["frechet"] for each in (found, held_out))
    if theirs <= 0:
        raise DataError(
            f"{held_out.name}: held-out images have the distance {theirs} to the reference: the same ones?"
        )
    return theirs, ours / theirs


# --- images in common --------------------------------------------------------------------------------------


def tell_shared(samples: Seen | None, reference: Seen | None, held_out: Seen | None) -> str:
    """Give a Notice of sets that have images in common; why held-out images are useless, or "". On rank 0.

    None: there is no such set; or it is statistics alone, of nobody knows which images.
    """
    if samples is None or reference is None:
        pass
    elif samples.content == reference.content:
        _warn("the samples and the reference are the same images: what is measured is a set beside itself")
    elif count := samples.shared(reference):
        some = _some(samples, count)
        _warn(f"{some} samples are images of the reference, pixel for pixel: distances are smaller for it")
    if held_out is None:
        return ""
    useless = ""
    for name, other in (("among the samples", samples), ("of the reference", reference)):
        count = 0 if other is None else held_out.shared(other)
        if count:
            some = _some(held_out, count)
            _warn(
                f"{some} held-out images are {name}, and so not held out: what is compared with theirs means less"
            )
        if count == len(held_out):
            useless = f"all held-out images are {name}"
    return useless


def _some(of: Seen, count: int) -> str:
    return f"all {count:,}" if count == len(of) else f"{count:,} of {len(of):,}"


def _warn(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=4)

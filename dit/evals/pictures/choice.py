"""Which images of a set are taken, and how that and the set are described in a protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dit.config import ConfigError
from dit.evals.pictures.pictures import Pictures, PicturesError
from dit.evals.protocol import protocol_hash
from dit.rng import Purpose, permutation

# Of a record of drawn images, what does not decide about the kind of images: which weights drew them, how many, where,
# at what cost (of a solver that chooses its steps this is another for other weights).
NOT_PROTOCOL = (
    "checkpoint", "digest", "step", "weights", "guidance_checkpoints", "device", "code", "num_samples", "batch_size",
    "codec", "nfe", "network_evaluations", "formats",
)  # fmt: skip
UNSAID = {"label_order": "balanced", "preview": False}  # what records mean that lack these keys


def chosen(pictures: Pictures, count: int | None, flag: str) -> np.ndarray:
    """Numbers of the images that are taken, ascending: all, or `count` of them at random, always the same ones.

    flag: that says the count, for messages. ConfigError where there are not as many.
    """
    if not len(pictures):
        raise PicturesError(f"{pictures.named}: no images in it")
    if count is None:
        return np.arange(len(pictures))
    if not 1 <= count <= len(pictures):
        raise ConfigError(
            f"--{flag}={count}: {pictures.named} has {len(pictures)} images; expected 1 to that many"
        )
    return np.sort(permutation(0, Purpose.SUBSET, 0, len(pictures))[:count])


def sampler_hash(spec: Mapping[str, Any] | None) -> str | None:
    """The hash of how images were drawn, whoever's weights drew them and from whichever seed; None of others."""
    if spec is None:
        return None
    kept = {
        key: value
        for key, value in spec.items()
        if key not in NOT_PROTOCOL and (key not in UNSAID or value != UNSAID[key])
    }
    sampler = kept.get("sampler")
    if isinstance(sampler, Mapping):
        kept["sampler"] = {key: value for key, value in sampler.items() if key != "seed"}
    return protocol_hash(kept)


def described(pictures: Pictures, index: np.ndarray) -> dict[str, Any]:
    """What of a set's kind belongs to a protocol: counts, size, conversion, balance of labels, how it was drawn."""
    return {
        "images": len(index),
        "chosen": "all"
        if len(index) == len(pictures)
        else f"{len(index)} of {len(pictures)} at random, seed 0",
        "size": list(pictures.size),
        "converted": pictures.converted,
        "labels": _balance(pictures.labels, index),
        "sampler": sampler_hash(pictures.spec),
    }


def _balance(labels: np.ndarray | None, index: np.ndarray) -> str:
    """Whether every class has as many images, which makes distances smaller than labels drawn at random do."""
    if labels is None or (labels[index] < 0).any():
        return "none" if labels is None else "some missing"
    counts = np.unique(labels[index], return_counts=True)[1]
    return f"{'balanced' if counts.max() - counts.min() <= 1 else 'uneven'} over {len(counts)} classes"

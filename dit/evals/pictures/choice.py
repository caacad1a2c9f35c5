"""Which images of a set are taken, and how that and the set are described in a protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit.config import ConfigError, from_dict, to_dict
from dit.evals.pictures.pictures import Pictures, PicturesError
from dit.evals.protocol import protocol_hash
from dit.rng import Purpose, permutation
from dit.sample.generate import SamplerSpec

# Of a record of drawn images, what decides about the kind of images, and what older records mean that lack it. Which
# weights drew them, how many, on what, into which forms, is no part of it, nor what was counted meanwhile.
KIND: Mapping[str, Any] = {
    "sampler": None,
    "classes": None,
    "label_order": "balanced",
    "precision": "fp32",
    "codec": {},
}
# The same of keys that came later: a record that has the older meaning is told as one that lacks the key.
LATER: Mapping[str, Any] = {"compile": False, "share_encoder": 1}
PLACES = ("checkpoint", "path")  # of other weights: where these lie on a machine


def chosen(pictures: Pictures, count: int | None, flag: str) -> np.ndarray:
    """Numbers of the images that are taken, ascending: all, or `count` of them, always the same ones.

    Of drawn images the first ones, which are those of a drawing of so many; of others at random. flag: that says the
    count, for messages. ConfigError where there are not as many.
    """
    if not len(pictures):
        raise PicturesError(f"{pictures.named}: no images in it")
    if count is None:
        return np.arange(len(pictures))
    if not 1 <= count <= len(pictures):
        raise ConfigError(
            f"--{flag}={count}: {pictures.named} has {len(pictures)} images; expected 1 to that many"
        )
    if _is_drawn(pictures):
        return np.arange(count)
    return np.sort(permutation(0, Purpose.SUBSET, 0, len(pictures))[:count])


def _is_drawn(pictures: Pictures) -> bool:
    """Whether image i is what the record's seed and i make, whatever the number of images."""
    return ((pictures.spec or {}).get("sampler") or {}).get("seed") is not None


def drawn_how(spec: Mapping[str, Any]) -> dict[str, Any]:
    """How images were drawn, by their record: JSON values, the same ones for settings that are typed otherwise.

    Of whichever weights and seed.
    """
    kept = {key: spec.get(key, older) for key, older in KIND.items()}
    kept |= {key: spec[key] for key, older in LATER.items() if spec.get(key, older) != older}
    kept["sampler"] = {k: v for k, v in _normal(kept["sampler"] or {}).items() if k != "seed"}
    return json.loads(json.dumps(_placeless(kept)))  # type: ignore[no-any-return]


def sampler_hash(spec: Mapping[str, Any] | None) -> str | None:
    """The hash of how images were drawn, whoever's weights drew them and from whichever seed; None of others."""
    return None if spec is None else protocol_hash(drawn_how(spec))


def _normal(sampler: Mapping[str, Any]) -> Mapping[str, Any]:
    """A sampler's settings in their one form."""
    if not sampler:  # none are on file
        return {}
    try:
        normal: dict[str, Any] = to_dict(from_dict(SamplerSpec, sampler).normal)
    except ConfigError:  # another version's, or another program's: they are told as they are
        return sampler
    return normal


def _placeless(value: Any) -> Any:
    """JSON values without the keys of PLACES, plain or at the end of dotted ones."""
    if isinstance(value, Mapping):
        return {k: _placeless(v) for k, v in value.items() if re.split(r"[._]", k)[-1] not in PLACES}
    return [_placeless(each) for each in value] if isinstance(value, list | tuple) else value


def described(pictures: Pictures, index: np.ndarray) -> dict[str, Any]:
    """What of a set's kind belongs to a protocol: counts, size, conversion, balance of labels, how it was drawn."""
    return {
        "images": len(index),
        "chosen": _chosen_words(pictures, index),
        "size": list(pictures.size),
        "converted": pictures.converted,
        "labels": _balance(pictures, index),
        "sampler": sampler_hash(pictures.spec),
    }


def _chosen_words(pictures: Pictures, index: np.ndarray) -> str:
    """Which images are taken; the first of a drawing are all of a smaller one."""
    is_beginning = len(index) > 0 and int(index[-1]) + 1 == len(index)
    if len(index) == len(pictures) or (is_beginning and _is_drawn(pictures)):
        return "all"
    return f"{len(index)} of {len(pictures)} at random, seed 0"


def _balance(pictures: Pictures, index: np.ndarray) -> str:
    """Whether every class has as many images, which makes distances smaller than labels drawn at random do."""
    labels, spec = pictures.labels, pictures.spec or {}
    if labels is None or (labels[index] < 0).any():
        return "none" if labels is None else "some missing"
    if spec.get("label_order") == "random":  # how many of the classes came up is chance, and of the seed
        return f"random over {len(spec['classes'])} classes"
    counts = np.unique(labels[index], return_counts=True)[1]
    return f"{'balanced' if counts.max() - counts.min() <= 1 else 'uneven'} over {len(counts)} classes"

"""What a manifest says of where its samples come from: shards that it is an index of, or a larger set of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dit.config import config


@config
class Foreign:
    """How an index of shards made elsewhere (foreign.py) has samples: one by one, as members KEY.EXTENSION of a tar.

    array: extension of the member that holds the array; flipped: of its flipped view, where there is one; label: of
    the label (cls: text; json: an object with the label under `label_key`), where samples have one. named: labels are
    names of classes; else whole numbers. dotted: a key ends at its last dot, not at its first.
    shape, dtype: of these arrays. spread: what the second half of stored moments is. scale: stored = latents * scale.
    """

    array: str
    flipped: str | None = None
    label: Literal["cls", "json"] | None = None
    shape: tuple[int, ...]
    dtype: Literal["float16", "bfloat16", "float32"]
    spread: Literal["std", "logvar"] = "std"
    scale: float = 1.0
    label_key: str = "label"
    named: bool = False
    dotted: bool = False


@config
class Split:
    """Which part of a set of images a data set is, where some were held out (sources/split.py).

    share: of the images that was to be held out, of each class. seed: of the choice. images: of the whole set.
    """

    part: Literal["train", "held out"]
    share: float
    seed: int
    images: int


# Keys that data sets of before do not have, by what they hold: with these values they are left out of the file too, so
# that what is the same data set has the same digest. `a.b`: in an object.
ADDED: Mapping[str, Any] = {
    "counted": {},
    "split": None,
    "foreign.label_key": "label",
    "foreign.named": False,
    "foreign.dotted": False,
}


def leave_out_unsaid(plain: dict[str, Any]) -> None:
    """Remove the keys that data sets of before do not have from a manifest's values, where they say nothing."""
    for key, value in ADDED.items():
        *above, name = key.split(".")
        holder = plain.get(above[0]) if above else plain
        if holder is not None and holder[name] == value:
            del holder[name]

"""What is not the same in two encodes, in the words of whoever started them: causes first, and no more than those."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dit import errors
from dit.config import flatten

SHOWN = 8  # differences in a message
WIDTH = 40  # characters of a value
BEFORE = 8  # of them that stand before the first that differs, where two values begin alike
DIGEST = re.compile(r"[0-9a-f]{16,}")
# The manifest's words for what the command line calls otherwise.
FLAGS = {"views": "flip", "transform": "crop, exif, icc or background"}
# What follows from others, or is spoken of otherwise: shown where no cause is found.
FOLLOWS = (
    "samples",
    "class_counts",
    "unlabelled",
    "shards.",
    "shape",
    "array",
    "images.",
    "names.",
    "classes",
    "split",
)


def differences(there: Any, here: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, or two manifests, a line each: images, codec, options, else what follows."""
    theirs = flatten(there) if isinstance(there, Mapping) else {}
    ours = flatten(json.loads(json.dumps(here)))
    theirs = flatten(json.loads(json.dumps(theirs)))
    keys = [k for k in [*ours, *(k for k in theirs if k not in ours)] if theirs.get(k) != ours.get(k)]
    values = {k: (theirs.get(k), ours.get(k)) for k in keys}
    causes = [*(_split(values) or _images(values)), *_codec(values), *_options(values)]
    return causes or [f"{k}: {_pair(*v)}" for k, v in values.items()]


def is_of_images(lines: list[str]) -> bool:
    """Whether nothing but the images differs."""
    return bool(lines) and all(line.startswith("other ") for line in lines)


def shown(lines: list[str]) -> str:
    """The first of them, as one."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "; ".join([*lines[:SHOWN], *more])


Values = Mapping[str, tuple[Any, Any]]  # by key: there, here


def _split(values: Values) -> list[str]:
    """Tell of another share that is held out nothing but that; the images are others then."""
    shares = values.get("split.share")
    return [f"holdout: {_pair(*(share or 0.0 for share in shares))}"] if shares else []


def _images(values: Values) -> list[str]:
    """Tell of other images the number; else whether their names differ, or only the labels."""
    for key in ("images.count", "names.count"):
        if key in values:
            return [f"other images: {_pair(*values[key])}"]
    if "images.names" in values or "names.sha256" in values:
        return ["other images: as many, with other names"]
    if "classes" in values:
        return [f"other classes of the same images: {_pair(*values['classes'])}"]
    return ["other labels of the same images"] if "images.labels" in values else []


def _codec(values: Values) -> list[str]:
    """Tell of another codec its name; of one of the same name the settings, or else its weights."""
    keys = {k.split(".", 1)[1]: v for k, v in values.items() if k.startswith(("codec.", "computes."))}
    if "name" in keys:
        return [f"another codec: {_pair(*keys['name'])}"]
    settings = {k.removeprefix("config."): _pair(*v) for k, v in keys.items() if k != "sha256"}
    named = [f"{'' if k == 'device' else 'another codec, its '}{k}: {v}" for k, v in settings.items()]
    return named or [f"another codec, its weights: {_pair(*v)}" for v in keys.values()]


def _options(values: Values) -> list[str]:
    """By their flags."""
    keys = [k for k in values if not k.startswith(("codec.", "computes.", *FOLLOWS))]
    keys = [k for k in keys if k != "posterior" or "none" not in values[k]]  # that is the codec's
    return [f"{_flag(k)}: {_pair(*_plain(k, values[k]))}" for k in keys]


def _flag(key: str) -> str:
    return FLAGS.get(key, key.removeprefix("options.").removeprefix("decode."))


def _plain(key: str, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """A flag's values, from what the manifest says in another way."""
    return (len(pair[0] or ()) == 2, len(pair[1] or ()) == 2) if key == "views" else pair


def _pair(there: Any, here: Any) -> str:
    """Both values; of long ones the part in which they differ."""
    left, right = _text(there), _text(here)
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), 0)
    start = max(0, same - BEFORE) if same >= WIDTH - BEFORE else 0
    return f"{_cut(left, start)} there, {_cut(right, start)} here"


def _text(value: Any) -> str:
    is_digest = isinstance(value, str) and DIGEST.fullmatch(value)
    return value[:8] if is_digest else errors.shown(value)


def _cut(text: str, start: int) -> str:
    head, rest = "..." if start else "", text[start:]
    return head + (rest if len(rest) <= WIDTH else f"{rest[: WIDTH - 3]}...")

"""Data sets begun before there was a choice of how files become pixels: they are gone on with as they were begun."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from dit.data import DataError
from dit.data.encoding.job import EncodeOptions
from dit.data.shards.manifest import FILE, Manifest
from dit.data.shards.write import PLAN
from dit.data.sources.decode import MAX_PIXELS, Decode

BEFORE = (
    "is of an older version and stays as it was begun: no image is turned upright, transparent places show the colours "
    "hidden there, ICC profiles are ignored, 32-bit grey is cut off; choose another OUT to have that otherwise"
)


def as_begun(out: Path, options: EncodeOptions) -> EncodeOptions:
    """The options that go on with what is in `out` or beside it: those of before (decode None) where it is older.

    DataError where older data are asked to go on in another way than by default.
    """
    if options.decode is None or not _is_older(out, options):
        return options
    if replace(options.decode, max_pixels=MAX_PIXELS) != Decode():
        raise DataError(
            f"{out} was begun by an older version, which had no --exif, --background and --icc: repeat the command "
            "without them, or choose another OUT"
        )
    return replace(options, decode=None)


def _is_older(out: Path, options: EncodeOptions) -> bool:
    if (out / FILE).exists():
        return Manifest.load(out).transform == options.crop.text
    try:
        plan = json.loads((out.with_name(out.name + ".partial") / PLAN).read_bytes())
    except (OSError, ValueError):  # none is there, or it is damaged: said where the plan is needed
        return False
    begun = plan.get("options") if isinstance(plan, dict) else None
    return isinstance(begun, dict) and "decode" not in begun

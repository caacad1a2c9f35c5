"""Data sets that an older version began or wrote: they are gone on with as they were begun.

Before there was a choice of how files become pixels there was one way; and class folders that are called by numbers
were sorted as text.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit.data import DataError
from dit.data.encoding.job import EncodeOptions, Job
from dit.data.shards.manifest import FILE, Manifest
from dit.data.shards.write import PLAN
from dit.data.sources.decode import MAX_PIXELS, Decode

BEFORE = (
    "is of an older version and stays as it was begun: no image is turned upright, transparent places show the colours "
    "hidden there, ICC profiles are ignored, 32-bit grey is cut off; choose another OUT to have that otherwise"
)


def as_begun(job: Job, out: Path) -> Job:
    """Make of a job the one that goes on with what is in `out` or beside it: files become pixels, and classes are
    numbered, as they were there. DataError as of `options_as_begun`.
    """
    options = options_as_begun(out, job.options)
    job = job if options == job.options else replace(job, options=options)
    before = job.as_before()
    if before is None:
        return job
    if (out / FILE).is_file():
        return before if Manifest.load(out).classes == before.source.classes else job
    return before if _begun(out).get("images") == before.plan()["images"] else job


def options_as_begun(out: Path, options: EncodeOptions) -> EncodeOptions:
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
    begun = _begun(out).get("options")
    return isinstance(begun, dict) and "decode" not in begun


def _begun(out: Path) -> dict[str, Any]:
    """The plan of what was begun in OUT.partial; nothing where there is none, or a damaged one: that is said where the
    plan is needed."""
    try:
        plan = json.loads((out.with_name(out.name + ".partial") / PLAN).read_bytes())
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}

"""What of an order lies there already: complete, in part, damaged, or of another spec."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.data.shards.verify import check_manifest
from dit.data.shards.verify import verify as find_faults
from dit.errors import Notice
from dit.experiments.draw_order import DrawOrder
from dit.outputs import RECORD, OutputError, claim
from dit.sample.formats import format_of
from dit.sample.intact import FILES, broken, damaged
from dit.sample.pictures import GRID, OLD_FORMATS, Pictures, is_placing, refuse_foreign

GROWING = "num_samples"  # of pictures: more may be drawn to those that are there
NOT_COMPARED = (
    "checkpoint",
    "device",
    "code",
    "formats",
)  # where the checkpoint lies, and what drew: `digest` says what it is
# what records mean that lack these keys
OLDER = {"label_order": "balanced", "preview": False, "compile": False, "share_encoder": 1}


@dataclass(frozen=True)
class Unmade:
    """A folder that is not complete. held: the record of what is complete of it. damaged: what there is not whole."""

    held: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()


def unmade_of(order: DrawOrder, record: Mapping[str, Any]) -> dict[Path, Unmade]:
    """The folders that are not complete, or not as they were written. OutputError, as `claim`."""
    found: dict[Path, Unmade] = {}
    spec = compared(record)
    if order.out is not None:
        held = _claim_pictures(order.out, order, spec)
        hurt = () if held is None else _damaged(order.out, held)
        is_less = (
            held is None or held[GROWING] < order.num_samples or not {*order.forms} <= {*formats_of(held)}
        )
        if is_less or hurt:
            found[order.out] = Unmade(held, hurt)
    if order.save_pairs is not None:
        out, file = order.save_pairs, order.save_pairs / RECORD
        held = claim([file], spec, record=file, overwrite=order.overwrite, kind="data set", older=OLDER)
        if out.exists() and not file.is_file() and any(out.iterdir()):
            raise OutputError(f"{out} exists already: remove it or choose another name")
        if held is None or _is_broken_set(out):
            found[out] = Unmade()
    return found


def _damaged(out: Path, held: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what is not as it was written in a finished result, each of which is said. held: its record."""
    forms = formats_of(held)
    names = [*(name for form in forms for name in format_of(form).names), GRID]
    found = damaged(out, held, names)
    if FILES not in held:
        ways = {format_of(form).names[0]: broken(out, form, held[GROWING]) for form in forms}
        found = {name: way for name, way in ways.items() if way} | found
    for name, way in found.items():
        warnings.warn(f"{out / name} {way}: what is damaged is made anew", Notice, stacklevel=2)
    return tuple(found)


def _is_broken_set(out: Path) -> bool:
    """Whether a finished data set of pairs is not as it was written, which is said."""
    manifest, faults = check_manifest(out)
    faults += find_faults(manifest) if manifest is not None else []
    for fault in faults[:1]:
        warnings.warn(
            f"{out / fault.file} {fault.part} {fault.what}: the pairs are made anew", Notice, stacklevel=2
        )
    return bool(faults)


def _claim_pictures(out: Path, order: DrawOrder, spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """As `claim`; what a job that was killed left while it gave the files their places is replaced."""
    overwrite = order.overwrite or is_placing(out)
    files = Pictures.files(out, order.forms)
    how: dict[str, Any] = {"growing": GROWING, "kind": Pictures.KIND, "older": OLDER}
    held = claim(files, spec, record=files[-1], overwrite=overwrite, **how)
    if not is_placing(out):
        refuse_foreign(out, order.forms, overwrite)
    return held


def formats_of(held: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The forms of what a record is of."""
    return () if held is None else tuple(held.get("formats", OLD_FORMATS))


def compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record decides about the images."""
    return {key: value for key, value in record.items() if key not in NOT_COMPARED}

"""Where the results of tools go: a place is claimed before work begins.

No result is replaced in silence: what is there is the same, and is gone on with, or the work is refused unless it is
told to overwrite.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit.config import flatten
from dit.errors import UserError, shown
from dit.files import sync, write_atomically

RECORD = "spec.json"  # in a folder of results, and in OUT.partial: how they were, or are being, made
MENDING = "give --overwrite to replace it, or another place to write to"
REPORTS = {"figures", "spaces", "protocol"}  # a file of figures has one of these keys
# What a folder may be, and how that shows: all files of one of these patterns are in it.
KINDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "folder of a scaling experiment": (("plan.json", "plan.csv"),),
    "data set": (("manifest.json",), ("plan.json",)),
    "run directory": (("config.yaml", "checkpoints"), ("config.yaml", "history.jsonl")),
    "folder of checkpoints": (("step-*/COMPLETE",), ("meta.json", "COMPLETE")),
    "folder of drawn images": (("samples.npz", RECORD), ("grid.png", RECORD)),
    "folder of a sweep": (("sweep.json", "sweep.csv"),),
    "folder for diffusers": (("model_index.json",), ("transformer/config.json",)),
}


class OutputError(UserError):
    """A result cannot go where it was told to, because of what lies there."""


# --- claiming ----------------------------------------------------------------------------------------------


def claim(
    files: Sequence[Path],
    spec: Mapping[str, Any] | None = None,
    *,
    record: Path | None = None,
    overwrite: bool = False,
    growing: str = "",
    kind: str = "",
    older: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Look at where a result will be written: what `record` says of the same result, or None where nothing is there.

    files: all that will be written. record: the JSON file among them that says how the others were made; None where
    none does. spec: JSON values that decide about the result, under the record's keys. growing: the key of a number
    in it of which there may be fewer now than wanted: such a result is returned too, to go on from. kind: what the
    record's folder becomes, one of KINDS; "" for files in a folder of anything. overwrite: what the files hold is not
    looked at, and None returned. older: what keys mean that records of older versions lack.

    Raises OutputError where anything else is there, where a folder above them is none, and where the record's folder
    belongs to something else.
    """
    for folder in {file.absolute().parent for file in (*files, *([record] if record else []))}:
        nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if not nearest.is_dir():
            raise OutputError(f"{nearest} is there and is no folder: give another place to write to")
    folders = [file for file in files if file.is_dir()]
    if folders:
        raise OutputError(
            f"{folders[0]} is a folder, and a file is to be written: give another place to write to"
        )
    if kind and record:
        refuse_other(record.parent, kind)
    there = [file for file in files if file.exists()]
    if overwrite or not there:
        return None
    if record is None or not record.is_file():
        raise OutputError(f"{there[0]} is there already, and nothing says how it was made: {MENDING}")
    held = {**(older or {}), **read_record(record)}
    rows = differences(held, spec or {}, growing)
    if rows:
        is_other = len(rows) > len(_lacking(held, spec or {}))
        what = "is of another result" if is_other else "does not say whether it is of the same result"
        raise OutputError("\n".join([f"{record} {what}:", *rows, MENDING.capitalize() + "."]))
    return held


def claim_file(file: Path, is_same: Callable[[], bool], *, overwrite: bool = False) -> bool:
    """Look at where a file will be written that has no record beside it: whether the same one is there already.

    is_same: compares what is there. overwrite: nothing is compared, and False returned. Raises OutputError as `claim`.
    """
    claim([file], overwrite=True)
    if overwrite or not file.exists():
        return False
    if not is_same():
        raise OutputError(f"{file} is there already, and holds something else: {MENDING}")
    return True


def claim_report(file: Path) -> None:
    """Look at where figures will be written as JSON; earlier ones are replaced. OutputError where anything else is.

    A slip of the shell's completion would cost the samples that figures are of, or the record of a result.
    """
    claim([file], overwrite=True)
    if not file.exists() or not file.stat().st_size:
        return
    with file.open("rb") as beginning:
        is_object = beginning.read(1) == b"{"  # what it is else may be larger than memory
    if not is_object or not REPORTS & set(read_record(file)):
        raise OutputError(f"{file} is there and holds no figures: it is kept; give another place to write to")


def refuse_other(folder: Path, kind: str) -> None:
    """OutputError where a folder belongs to something else than this, both of KINDS; told to overwrite or not."""
    found = [name for name, ways in KINDS.items() if any(_has_all(folder, patterns) for patterns in ways)]
    if found and kind not in found:
        raise OutputError(
            f"{folder} is a {found[0]}, and a {kind} is to be written: give another place to write to. Nothing in it "
            "was touched"
        )


def _has_all(folder: Path, patterns: Sequence[str]) -> bool:
    return all(any(folder.glob(pattern)) for pattern in patterns)


def read_record(path: Path) -> dict[str, Any]:
    """The JSON values in a record; OutputError where it holds none."""
    try:
        held = json.loads(path.read_bytes())
    except ValueError as error:
        raise OutputError(f"{path} is not JSON ({error}): {MENDING}") from None
    if not isinstance(held, dict):
        raise OutputError(f"{path} is not the record of a result: {MENDING}")
    return held


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON values as a record, whole or not at all."""
    write_atomically(path, (json.dumps(dict(values), indent=1) + "\n").encode())


def differences(held: Mapping[str, Any], spec: Mapping[str, Any], growing: str = "") -> list[str]:
    """One line for each key of `spec` of which a record holds another value; of `growing`, where it holds more.

    Of a key that the record lacks altogether, because an older version made it, the line says that.
    """
    now = json.loads(json.dumps(dict(spec)))
    lacking = _lacking(held, now)
    there = {key: held.get(key) for key in now if key not in lacking}
    wanted, found = now.pop(growing, None), there.pop(growing, None)
    too_many = isinstance(wanted, int) and (not isinstance(found, int) or found > wanted)
    rows = (
        [f"  {growing}: {shown(found)} there, {shown(wanted)} now"]
        if too_many and growing not in lacking
        else []
    )
    before, after = flatten(there), flatten({key: value for key, value in now.items() if key not in lacking})
    keys = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    rows += [f"  {key}: {shown(before.get(key))} there, {shown(after.get(key))} now" for key in keys]
    return rows + [f"  {key}: not recorded there, as it was made by an older version" for key in lacking]


def _lacking(held: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """The keys of which a record says nothing at all."""
    return [key for key, value in spec.items() if key not in held and value is not None]


def replace_folder(new: Path, out: Path) -> None:
    """Give a finished folder its name. What was at `out`, an empty folder or an earlier result, is moved away first.

    Raises OutputError where that is neither: a folder of something else is not removed, whatever was told.
    """
    old = new.with_name(f"{new.name}.old")
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file()):
            raise OutputError(
                f"{out} exists already and holds something else: remove it or choose another name"
            )
        out.rename(old)
    new.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)

"""What can be said of an encode before an image is listed: whether OUT can be written, and is not something else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dit.config import to_dict
from dit.data import DataError
from dit.data.codecs.base import Codec
from dit.data.encoding.differences import differences, shown
from dit.data.encoding.job import EncodeOptions, check_fit, planned, views
from dit.data.encoding.older import options_as_begun
from dit.data.encoding.parts import refuse_other
from dit.data.shards.manifest import FILE, Manifest
from dit.data.shards.write import PLAN
from dit.files import beside


def check_out(out: Path) -> None:
    """DataError where no data set can be written to the folder `out`, and none is there."""
    partial = beside(out, ".partial")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file: remove it or choose another name")
    if out.is_dir() and any(out.iterdir()) and not (out / FILE).is_file():
        raise DataError(f"{out} exists already, and is no data set: remove it or choose another name")
    if partial.exists() and not partial.is_dir():
        raise DataError(f"{partial} is a file: remove it or choose another OUT")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir():
        raise DataError(f"{parent} is a file, and no folder can be made in it: choose another OUT")
    if not out.exists() and not os.access(parent, os.W_OK | os.X_OK):
        raise DataError(f"no right to write in {parent}: choose another OUT")


def check_early(out: Path, codec: Codec, options: EncodeOptions, share: float = 0.0) -> None:
    """ConfigError where codec and options do not go together, DataError where `out` is of others, done or begun.

    share: of the images that is held out (sources/split.py).
    """
    check_fit(codec, options)
    check_out(out)
    options = options_as_begun(out, options)
    if (out / FILE).exists():
        there = to_dict(Manifest.load(out))
        here = {
            "codec": codec.identity(),
            "dtype": options.dtype,
            "views": views(options),
            "image_size": options.image_size,
            "transform": options.transform,
            "seed": options.seed,
        }
        refuse_something_else(
            out, {**{k: there[k] for k in here}, **_share(there)}, {**here, "split.share": share}
        )
    plan = out.with_name(out.name + ".partial") / PLAN
    if plan.exists():
        try:
            begun = json.loads(plan.read_bytes())
        except ValueError:  # which is said when it is needed
            return
        here = planned(codec, options)
        known = {**{k: begun.get(k) for k in here}, **_share(begun)} if isinstance(begun, dict) else {}
        refuse_other(plan.parent, known, {**here, "split.share": share})


def _share(said: dict[str, Any]) -> dict[str, float]:
    """Which share was held out, as a manifest or a plan says it."""
    return {"split.share": (said.get("split") or {}).get("share", 0.0)}


def refuse_something_else(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """DataError where the data set in `out` is said to be something else."""
    differing = differences(there, here)
    if differing:
        raise DataError(
            f"{out} exists already, and is something else ({shown(differing)}): remove it or choose another name"
        )

"""What an evaluation says: lines to read, JSON to keep, features to go on with, and rows beside the run."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit.evals.evaluation import Evaluation, InSpace
from dit.evals.pictures.archive import Archive
from dit.evals.record import append, bracket, draw_curves, drawn_by, run_of
from dit.outputs import OutputError, claim
from dit.version import code_version


def lines(found: Evaluation) -> list[str]:
    """The figures of each space, with the hash of their protocol; of those that depend on a part of it, their own."""
    text = [line for space in found.spaces for line in _of_space(space)]
    if found.fdr is not None:
        of = f"{len(found.spaces)} feature space{'s' * (len(found.spaces) > 1)}"
        text.append(f"fdr {found.fdr:.6g}: mean over {of} of the distance divided by held-out images' own")
    return text


def _of_space(space: InSpace) -> list[str]:
    samples, reference = space.protocol["samples"], space.protocol["reference"]
    count = reference.get("images")
    against = "stored statistics" if "statistics" in reference else f"{count:,} images"
    head = (
        f"in {space.name}: {samples['images']:,} samples (labels: {samples['labels']}) against {against}; "
        f"protocol {space.hash}"
    )
    width, hashes = max(map(len, space.figures | space.missing), default=0), space.hashes
    rows = [
        f"  {name:{width}s}  {value:.6g}{bracket(space.intervals.get(name))}"
        + (f"  protocol {hashes[name]}" if hashes[name] != space.hash else "")
        for name, value in space.figures.items()
    ]
    return [head, *rows, *(f"  {name:{width}s}  -  {why}" for name, why in space.missing.items())]


def as_json(found: Evaluation) -> dict[str, Any]:
    """All of it as JSON values: a list of spaces, each with figures, intervals, protocol and its hash."""
    return {
        "samples": {"named": found.samples.named, "content": found.content, "size": list(found.samples.size)},
        "spaces": [space.as_json() | {"missing": space.missing} for space in found.spaces],
        "fdr": found.fdr,
        "bootstrap": found.bootstrap,
        "code": code_version(),
    }


def claim_features(path: Path) -> None:
    """Look at where features will be written; earlier ones are replaced. OutputError where anything else is."""
    claim([path], overwrite=True)
    if not path.exists() or not path.stat().st_size:
        return
    if not zipfile.is_zipfile(path) or "generated" not in Archive(path):
        raise OutputError(
            f"{path} is there and holds no features: it is kept; give another place to write to"
        )


def save_features(found: Evaluation, path: Path) -> None:
    """Write the features of both sets as `evaluate.py features` reads them: generated, reference, logits.

    Of several spaces each has a file: NAME.npz becomes NAME-SPACE.npz.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for space, (ours, theirs) in found.sets.items():
        name = path if len(found.sets) == 1 else path.with_name(f"{path.stem}-{space.replace(':', '-')}.npz")
        claim_features(name)
        held: dict[str, np.ndarray | None] = {"generated": ours.features, "logits": ours.logits}
        held["reference"] = None if theirs is None else theirs.features
        with name.open("wb") as file:
            np.savez(file, **{key: value for key, value in held.items() if value is not None})  # type: ignore[arg-type]


def record(found: Evaluation) -> Path | None:
    """Add the figures to the run that drew the samples: the run; None where they are of none that is here."""
    run = run_of(found.samples.spec)
    if run is None:
        return None
    rows = rows_of(found)
    append(run, rows)
    draw_curves(run, rows)
    return run


def rows_of(found: Evaluation) -> list[dict[str, Any]]:
    """What is recorded of an evaluation of images that a checkpoint drew: a row for each feature space."""
    spec: Mapping[str, Any] = found.samples.spec or {}
    beside = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": spec.get("step", 0),
        "digest": spec.get("digest"),
        "weights": spec.get("weights"),
        "samples": {"named": found.samples.named, "content": found.content},
        **drawn_by(found.samples.spec),
        "code": code_version(),
    }
    return [{**beside, "bootstrap": found.bootstrap, **space.as_json()} for space in found.spaces]

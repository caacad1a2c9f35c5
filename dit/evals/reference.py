"""A statistics file: what figures need of a reference, so that it is gone through once."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit.evals.metrics.metric import FeatureSet, Statistics
from dit.evals.pictures.archive import Archive
from dit.evals.pictures.pictures import PicturesError, Seen
from dit.files import sync
from dit.outputs import differences

FORMAT = "dit reference statistics 1"
KINDS = ("features", "logits", "spatial")
DIGESTS = "digests"  # (N, 16) uint8, of each image


@dataclass(frozen=True)
class SpaceStatistics:
    """Of one feature network: its identity, mean and covariance, all features where they were kept, what was fitted."""

    identity: Mapping[str, Any]
    features: Statistics
    spatial: Statistics | None = None
    kept: Mapping[str, np.ndarray] = field(default_factory=dict)  # KINDS → (N, ...)
    state: Mapping[str, np.ndarray] = field(default_factory=dict)

    def set(self, name: str) -> FeatureSet | None:
        """All features; None where they were not kept."""
        return FeatureSet(**self.kept, name=name) if self.kept else None


@dataclass(frozen=True)
class ReferenceFile:
    """What a statistics file holds. about: JSON values of the images; spaces: by `space_name` of their identities.

    seen: which images it is of; files of older versions have the hash alone.
    """

    path: Path
    about: Mapping[str, Any]
    spaces: Mapping[str, SpaceStatistics]
    seen: Seen

    def of(self, identity: Mapping[str, Any]) -> SpaceStatistics:
        """The statistics of a network. PicturesError where the file has none, or those of another."""
        name = space_name(identity)
        if name not in self.spaces:
            raise PicturesError(
                f"{self.path} has statistics of {', '.join(self.spaces)}, and not of {name}: make them by `evaluate.py "
                f"reference IMAGES OUT --features={identity['name']}`"
            )
        held = self.spaces[name]
        rows = differences(held.identity, identity)
        if rows:
            raise PicturesError("\n".join([f"{self.path} is of another {name}:", *rows]))
        return held


def space_name(identity: Mapping[str, Any]) -> str:
    """How a network's space is called: by its name, and the model's where the name is of many."""
    model = identity.get("model")
    return f"{identity['name']}:{model}" if model else str(identity["name"])


def save(path: Path, about: Mapping[str, Any], spaces: Mapping[str, SpaceStatistics], seen: Seen) -> None:
    """Write a statistics file, whole or not at all."""
    held = {name: dict(space.identity) for name, space in spaces.items()}
    arrays = {"about": np.array(json.dumps({"format": FORMAT, **about, "spaces": held}))}
    arrays[DIGESTS] = np.frombuffer(seen.digests, np.uint8).reshape(-1, 16)
    for name, space in spaces.items():
        for kind, moments in (("features", space.features), ("spatial", space.spatial)):
            if moments is not None:
                arrays |= {f"{name}/{kind}/mean": moments.mean, f"{name}/{kind}/cov": moments.cov}
        arrays |= {f"{name}/kept/{kind}": values for kind, values in space.kept.items()}
        arrays |= {f"{name}/state/{key}": values for key, values in space.state.items()}
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def is_reference(path: Path) -> bool:
    """Whether a file is a whole npz made by `save`."""
    return path.suffix.lower() == ".npz" and path.is_file() and "about" in Archive(path)


def load(path: Path) -> ReferenceFile:
    """Read a statistics file. PicturesError where it is damaged or none."""
    about = read_about(path)
    archive = Archive(path)
    parts = [key for key in archive.members if "/" in key]
    spaces = {}
    for name, identity in about["spaces"].items():
        own = {k.removeprefix(f"{name}/"): archive.whole(k) for k in parts if k.startswith(f"{name}/")}
        moments = {
            kind: Statistics(own[f"{kind}/mean"], own[f"{kind}/cov"], about["count"])
            for kind in ("features", "spatial")
            if f"{kind}/mean" in own
        }
        kept = {kind: own[f"kept/{kind}"] for kind in KINDS if f"kept/{kind}" in own}
        state = {k.removeprefix("state/"): v for k, v in own.items() if k.startswith("state/")}
        spaces[name] = SpaceStatistics(identity, moments["features"], moments.get("spatial"), kept, state)
    digests = archive.whole(DIGESTS).tobytes() if DIGESTS in archive else b""
    return ReferenceFile(path, about, spaces, Seen(about["content"], digests))


def read_about(path: Path) -> dict[str, Any]:
    """What a statistics file is of. PicturesError where it is none."""
    archive = Archive(path)
    held = json.loads(str(archive.whole("about"))) if "about" in archive else {}
    if held.get("format") != FORMAT:
        raise PicturesError(
            f"{path} is no statistics file of `evaluate.py reference`, or of a newer version: it holds "
            f"{', '.join(archive.members)}"
        )
    return dict(held)


def as_bytes(array: np.ndarray) -> bytes:
    """An array as numpy writes it, to be hashed."""
    held = io.BytesIO()
    np.save(held, np.ascontiguousarray(array))
    return held.getvalue()

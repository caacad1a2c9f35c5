"""Checkpoints that load at any number of ranks and any ZeRO stage: what is in one, finding and reading them.

One safetensors file per rank holds that rank's fragments, addressed by parameter name and offset; `meta.json` lists the
files with their checksums; a directory without COMPLETE is not a checkpoint. `saver.py` beside this file writes them,
and `retention.py` says which stay. Works on fragments; knows nothing of engines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dit.config import flatten
from dit.errors import UserError, shown
from dit.files import expand, sought
from dit.train.checkpoints.nearby import no_run, suggestion
from dit.train.engines.base import Fragment
from dit.train.engines.optimizers import OPTIMIZERS

EXPORT = "dit"  # key of an exported file's metadata
_PREFIX = "step-"
NAME = re.compile(rf"{_PREFIX}\d{{8,}}")  # a copy that somebody made beside it is not ours


class CheckpointError(UserError):
    """A checkpoint cannot be written, found, trusted or used here."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. meta: what meta.json holds."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return int(self.meta["step"])

    @property
    def updates(self) -> int:
        """Updates applied when it was saved."""
        return int(self.meta.get("updates", self.step))

    @property
    def digest(self) -> str:
        """sha256 over all that it holds: of meta.json, with the files' checksums in it, or of an exported file."""
        return sha256(self.path / "meta.json" if self.is_sharded else self.path)

    @property
    def weights(self) -> tuple[str, ...]:
        """The sets of weights that it holds."""
        return tuple(self.meta.get("weights", ("model", "ema")))

    @property
    def is_sharded(self) -> bool:
        """Whether it is a checkpoint of a run, and not one set of weights that was exported."""
        return "buffers" not in self.meta

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it holds of parameters that are trained: the weights of each, and what its optimizer keeps of it."""
        optim = self.meta.get("config", {}).get("optim", {})
        name = optim.get("name", "adamw")  # not there: from before there was another
        return (*self.weights, *OPTIMIZERS[name].state)


@dataclass(frozen=True)
class State:
    """What of a run goes into a checkpoint, on this rank.

    averages: name -> a tensor beside each fragment. module: for its buffers. is_whole: whether the weights and the
    optimizer's state go with the averages.
    """

    fragments: list[Fragment]
    averages: Mapping[str, list[Tensor]]
    module: nn.Module
    is_whole: bool = True

    def pieces(self) -> Iterator[tuple[Fragment, dict[str, Tensor]]]:
        """Each fragment with what is kept of it: kind -> (numel,) tensor."""
        for i, fragment in enumerate(self.fragments):
            averages = {name: tensors[i] for name, tensors in self.averages.items()}
            own = {"model": fragment.weight, **fragment.state} if self.is_whole else {}
            yield fragment, {**own, **averages}

    @property
    def weights(self) -> tuple[str, ...]:
        """The sets of weights among it."""
        return (*(("model",) if self.is_whole else ()), *self.averages)

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to the model's state; those made anew from its shapes do not."""
        kept = self.module.state_dict()
        return {name: b for name, b in self.module.named_buffers() if name in kept}


# --- finding and reading -----------------------------------------------------------------------------------


def path_of(directory: Path, step: int) -> Path:
    """Say where the checkpoint of a step lies."""
    return directory / f"{_PREFIX}{step:08d}"


def snapshots(directory: Path) -> list[Checkpoint]:
    """Read every checkpoint below `directory`, oldest first. Raises CheckpointError if one is broken."""
    return [read(path) for path in reversed(candidates(directory))]


def candidates(directory: Path) -> list[Path]:
    """List the directories that have a checkpoint's final name, broken ones too, newest first."""
    found = [p for p in directory.glob(f"{_PREFIX}*") if NAME.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Read the step from a checkpoint's name."""
    return int(path.name.removeprefix(_PREFIX))


def exists(directory: Path) -> bool:
    """Whether there is a checkpoint below `directory`, be it broken."""
    return bool(candidates(directory))


def read(path: Path, verify: bool = True) -> Checkpoint:
    """Read the checkpoint in `path`, and verify its checksums. Raises CheckpointError naming what is broken."""
    try:
        text = (path / "meta.json").read_bytes()
        if (path / "COMPLETE").read_bytes().strip() != hashlib.sha256(text).hexdigest().encode():
            raise CheckpointError(f"{path}/meta.json: does not match its checksum in COMPLETE")
        meta = json.loads(text)
        for entry in meta["files"]:
            file = path / entry["file"]
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{file}: missing or cut short (expected {entry['bytes']} bytes)")
            if verify and sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{file}: its content does not match its checksum")
    except OSError as error:
        raise CheckpointError(f"{path}: not a complete checkpoint: {error}") from None
    return Checkpoint(path, meta)


def sha256(path: Path) -> str:
    """Compute the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latest(directory: Path, report: Any = print, up_to: int | None = None) -> Checkpoint | None:
    """Find the newest good checkpoint below `directory`; a broken one is named through `report` and passed over.

    None where there never was one; an error where all that are there are broken, because starting afresh would
    overwrite them. up_to: of this step or an earlier one.
    """
    broken = []
    for path in [p for p in candidates(directory) if up_to is None or step_of(p) <= up_to]:
        try:
            return read(path)
        except CheckpointError as error:
            broken.append(str(error))
            report(f"passing over a broken checkpoint: {error}")
    if broken:
        raise CheckpointError(
            "no checkpoint here is usable: " + "; ".join(broken) + ". Move them away to start afresh."
        )
    return None


def resolve(run_or_checkpoint: str | Path) -> Checkpoint:
    """Find a run directory's newest good checkpoint, or the one checkpoint named, or weights that were exported."""
    path = Path(expand(str(run_or_checkpoint)))
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing{sought(path)}; expected a run directory, a checkpoint in it or an exported file"
        )
    if path.is_file():
        return exported(path)
    if (path / "meta.json").is_file():
        return read(path)
    found = latest(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint here{no_run(path)}{suggestion(path)}")
    return found


def exported(path: Path) -> Checkpoint:
    """Read one set of weights in a safetensors file, as `export.py` writes it. CheckpointError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})[EXPORT])
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no weights that tools/convert.py export wrote ({type(error).__name__}: {error}); expected a run "
            "directory, a checkpoint in one, or such a file"
        ) from None
    parameters = {n: [s, 0, torch.Size(s).numel()] for n, s in shapes.items() if n not in meta["buffers"]}
    return Checkpoint(path, {**meta, "files": [{"file": "", "fragments": parameters}]})


class Reader:
    """Reads any run of elements of any tensor, from whichever ranks' files hold them."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._files = [
            safe_open(checkpoint.path / e["file"], framework="pt") for e in checkpoint.meta["files"]
        ]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # name -> (offset, numel, file)
        for i, entry in enumerate(checkpoint.meta["files"]):
            for name, (shape, offset, numel) in entry["fragments"].items():
                self.shapes[name] = tuple(shape)
                self._pieces.setdefault(name, []).append((offset, numel, i))

    def elements(self, kind: str, name: str, offset: int, numel: int) -> Tensor:
        """(numel,) fp32: elements [offset, offset + numel) of a flattened tensor."""
        out, filled = torch.empty(numel), 0
        for start, length, i in sorted(set(self._pieces.get(name, []))):
            low, high = max(offset + filled, start), min(offset + numel, start + length)
            if low < high and low == offset + filled:
                piece = self._slice(i, f"{kind}/{name}")
                out[filled : filled + high - low] = piece[low - start : high - start]
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"{self.checkpoint.path}: {kind}/{name} lacks elements {offset + filled}..{offset + numel}"
            )
        return out

    def _slice(self, file: int, key: str) -> Any:
        try:
            return self._files[file].get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.checkpoint.path / self.checkpoint.meta['files'][file]['file']}: lacks {key} ({error})"
            ) from None

    def whole(self, kind: str, name: str) -> Tensor:
        """A tensor in its full shape."""
        if not self.checkpoint.is_sharded:
            found: Tensor = self._files[0].get_tensor(name)
            return found
        shape = self.shapes[name]
        return self.elements(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers."""
        file, plain = self._files[0], self.checkpoint.meta.get("buffers")
        if plain is not None:
            return {name: file.get_tensor(name) for name in plain}
        keys = [k for k in file.keys() if k.startswith("buffer/")]  # noqa: SIM118 (safe_open is no dict)
        return {k.removeprefix("buffer/"): file.get_tensor(k) for k in keys}

    def outline(self, kind: str) -> dict[str, Tensor]:
        """Names and shapes of `state_dict(kind)`: tensors on the meta device, for which no weights are read."""
        self._check(kind)
        shapes = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        return {**shapes, **{name: buffer.to("meta") for name, buffer in self.buffers().items()}}

    def state_dict(self, kind: str) -> dict[str, Tensor]:
        """The whole model's weights ("model", "ema" or another average) with its buffers, for load_state_dict."""
        self._check(kind)
        return {**{name: self.whole(kind, name) for name in self.shapes}, **self.buffers()}

    def _check(self, kind: str) -> None:
        weights = self.checkpoint.weights
        if kind not in weights:
            raise CheckpointError(
                f"{self.checkpoint.path} holds the weights {', '.join(weights)}; got '{kind}'"
            )


def check_same_data(found: Checkpoint, identity: Mapping[str, Any]) -> None:
    """CheckpointError where data, statistics or a codec are not the checkpoint's. identity: what a new one holds."""
    there, here = ({k: d[k] for k in ("data", "contract")} for d in (found.meta, identity))
    before, now = flatten(there), flatten(json.loads(json.dumps(here)))
    rows = [
        f"  {k}: {shown(before.get(k))} there, {shown(now.get(k))} here"
        for k in sorted({*before, *now})
        if before.get(k) != now.get(k)
    ]
    if rows:
        raise CheckpointError(
            f"{found.path} was trained on other data than the ones given:\n" + "\n".join(rows) + "\n"
            "Set data.path (or data.mix) to the data of this run, or another run_dir to start a new one."
        )


@torch.no_grad()
def load_into(checkpoint: Checkpoint, state: State) -> None:
    """Fill fragments, their optimizer state, averages and buffers from a checkpoint of any topology."""
    reader = Reader(checkpoint)
    for fragment, pieces in state.pieces():
        if reader.shapes.get(fragment.name) != fragment.shape:
            raise CheckpointError(
                f"{checkpoint.path}: parameter {fragment.name} is {reader.shapes.get(fragment.name, 'nothing')} there "
                f"and {fragment.shape} in this model"
            )
        for kind, target in pieces.items():
            target.copy_(reader.elements(kind, fragment.name, fragment.offset, fragment.numel))
    saved = reader.buffers()
    for name, buffer in state.buffers().items():
        buffer.copy_(saved[name])

"""Foreign weights as a checkpoint that sampling and training take, and a checkpoint as foreign weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.config import ConfigError, from_dict, to_dict
from dit.configfile import write_yaml
from dit.data.codecs.base import CodecConfig
from dit.experiments.diffusion import Experiment
from dit.experiments.trained import Trained
from dit.files import expand, sync
from dit.flow.objective import Objective
from dit.interop.files import read_weights, write_weights
from dit.interop.format import Format, KnownArguments, RunArguments
from dit.interop.latents import Choices, contract_of
from dit.interop.weights import StateDict, WeightsError, network
from dit.model.dit import DiT, DiTConfig
from dit.outputs import claim, claim_file
from dit.ranks.group import World
from dit.train.checkpoints import saver
from dit.train.checkpoints.checkpoint import State
from dit.train.checkpoints.tensorfile import same_bits
from dit.train.ema import MAIN
from dit.train.engines.base import Fragment
from dit.train.run_dir import CONFIG
from dit.version import code_version

# --- in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """What became of a file: the folder, the model's arguments, and the config."""

    folder: Path
    arguments: RunArguments
    experiment: Experiment

    def told(self) -> list[str]:
        """Lines for a person: what it is, what to know of it, and how to sample from it."""
        model: Any = self.experiment.model
        rows = [f"{self.folder}: {self.arguments}"]
        if model.stored_position:
            rows.append(
                "note: the position table is not the computed one and is kept as it is; training from these weights "
                "needs model.stored_position=true"
            )
        if not self.arguments.has_null:
            rows.append("note: these weights know no null class: sample them with --cfg_scale=1")
        codec = "" if self.experiment.codec else " --codec.path=VAE"
        return [*rows, f"Sample from it: python tools/sample.py {self.folder} --out=SAMPLES{codec}"]


def to_run(
    source: str | Path, out: str | Path, format: Format[KnownArguments], choices: Choices
) -> Converted:
    """A run directory with one checkpoint, of step 0, made of a foreign file; there whole or not at all.

    Raises WeightsError for weights that do not fit, ConfigError where `out` is not a new folder.
    """
    new_folder(out)
    states = read_weights(source)
    arguments = format.infer(states["ema"], choices.num_heads, choices.num_classes)
    kept, ema = format.ours(states["ema"], arguments)
    live = ema if states["model"] is states["ema"] else format.ours(states["model"], arguments)[1]
    del states  # gigabytes
    contract = contract_of(kept, choices, format.factor, format.scale)
    model, norm = kept.model("position" in ema), "dataset" if choices.latents_stats else "codec"
    experiment = experiment_of(out, format.objective(kept), model, choices.codec, norm)
    weights = Weights(live, ema, network(ema, kept))
    return Converted(write_run(out, weights, experiment, contract, source), arguments, experiment)


def new_folder(out: str | Path) -> Path:
    """A place for a run directory; ConfigError where something is there."""
    folder = Path(expand(str(out)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; give a new folder")
    return folder


@dataclass(frozen=True)
class Weights:
    """Weights from elsewhere under our names: those that were trained, their average, a network for its buffers."""

    live: dict[str, Tensor]
    ema: dict[str, Tensor]
    network: DiT


def write_run(
    out: str | Path, weights: Weights, experiment: Experiment, contract: Mapping[str, Any], source: str | Path
) -> Path:
    """Write a run directory with one checkpoint, of step 0; there whole or not at all. source: what is it of."""
    folder, partial = new_folder(out), Path(expand(f"{out}.partial"))
    meta = {
        "config": to_dict(experiment),
        "contract": dict(contract),
        "data": {"digest": f"of converted weights, from {Path(source).name}"},
        "code": code_version(),
        "torch": torch.__version__,
        "updates": 0,
        "world_size": 1,
    }
    live, ema = weights.live, weights.ema
    pieces = [Fragment(n, tuple(w.shape), 0, live[n].view(-1)) for n, w in ema.items() if n != "position"]
    averages = [ema[piece.name].view(-1) for piece in pieces]
    shutil.rmtree(partial, ignore_errors=True)
    state = State(pieces, {MAIN: averages}, weights.network)
    saver.save(partial / "checkpoints", 0, state, meta, World())
    write_yaml(partial / CONFIG, experiment)
    partial.rename(folder)
    sync(folder.absolute().parent)
    return folder


def experiment_of(
    out: str | Path, objective: Objective, model: DiTConfig, codec: CodecConfig | None, norm: str = "codec"
) -> Experiment:
    """A config that the weights could have been trained with; the data are not known. norm: of the latents."""
    values = {
        "data": {"path": "unknown"},
        "run_dir": str(out),
        "model": to_dict(model),
        "objective": to_dict(objective),
        "latents": {"norm": norm},
        "codec": to_dict(codec) if codec else None,
    }
    return from_dict(Experiment, values)


# --- out ---------------------------------------------------------------------------------------------------


def from_run(
    run_or_checkpoint: str, out: str | Path, format: Format[Any], weights: str, overwrite: bool = False
) -> tuple[str, bool]:
    """Write weights ("ema", "model" or another average) of a checkpoint as a file for the project: .pt or .safetensors.

    Gives the line that says which weights they are, and False where the same file was there already. Raises
    WeightsError for a model that the project does not have, OutputError where `out` is of something else (overwrite: it
    is replaced).
    """
    path = Path(expand(str(out)))
    claim([path], overwrite=True)  # before anything is read
    trained, model = load_dit(run_or_checkpoint, weights)
    state = format.theirs(model, trained.experiment.objective)
    is_there = claim_file(path, lambda: _holds(path, state), overwrite=overwrite)
    if not is_there:
        write_weights(path, state)
    trained.average.warn()
    return trained.weights_line(), not is_there


def load_dit(run_or_checkpoint: str, weights: str) -> tuple[Trained, DiT]:
    """A trained model on the CPU, and its network. WeightsError where that is of another kind."""
    trained = Trained.load(run_or_checkpoint, weights, torch.device("cpu"))
    if not isinstance(trained.model, DiT):
        raise WeightsError(f"{trained.path} holds no DiT, but a {type(trained.model).__name__}")
    return trained, trained.model


def _holds(path: Path, state: StateDict) -> bool:
    """Whether a file holds just this state dict, bit for bit."""
    try:
        there = read_weights(path)["ema"]
    except WeightsError:  # something else, or damaged
        return False
    return there.keys() == state.keys() and all(same_bits(there[name], state[name].cpu()) for name in state)

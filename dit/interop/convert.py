"""Foreign weights as a checkpoint that sampling and training take, and a checkpoint as foreign weights."""

from __future__ import annotations

import argparse
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit.config import ConfigError, config, from_dict, to_dict
from dit.configfile import write_yaml
from dit.data.codecs.autoencoders import unknown_vae
from dit.data.codecs.base import CodecConfig
from dit.data.codecs.codec import CODECS
from dit.data.codecs.norm import LatentNorm, codec_norm
from dit.experiments.diffusion import Experiment
from dit.experiments.trained import Trained
from dit.files import expand, sync
from dit.flow.objective import Objective
from dit.interop.weights import Arguments, Count, StateDict, WeightsError, infer, network
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

SCALE = 0.18215  # of Stable Diffusion's first VAEs, which DiT and SiT were trained with
FACTOR = 8  # pixels a latent pixel, of the same


class Format(Protocol):
    """A project whose weights are known: `FacebookDiT`, `SiT`."""

    def ours(self, state: StateDict, arguments: Arguments) -> tuple[Arguments, dict[str, Tensor]]:
        """(arguments of our network, its weights)."""

    def objective(self, arguments: Arguments) -> Objective:
        """What the weights were trained with."""

    def theirs(self, model: DiT, objective: Objective) -> dict[str, Tensor]:
        """The project's state dict of our network."""


# --- foreign files -----------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, StateDict]:
    """{"ema": ..., "model": ...} from a .safetensors or a .pt file.

    The file holds a state dict, or the dictionary that the projects' training scripts save, with "ema" and "model"
    in it; one of them stands for both. Wrappers' prefixes (module., _orig_mod.) are taken off. No pickle is trusted.
    """
    path = Path(expand(str(path)))
    try:
        if path.suffix == ".safetensors":
            held: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # of training scripts: plain values
                held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).split(".", 1)[0]  # torch's goes on to advise that the file be trusted
        raise WeightsError(
            f"cannot read weights from {path}: expected a .safetensors file, or a .pt of tensors as torch.save writes "
            f"it ({type(error).__name__}: {reason})"
        ) from error
    trained = isinstance(held, dict) and ("ema" in held or "model" in held)
    states = [_bare(held[kind]) for kind in ("ema", "model") if kind in held] if trained else [_bare(held)]
    if not all(state and all(isinstance(t, Tensor) for t in state.values()) for state in states):
        raise WeightsError(f"{path} holds no state dict, nor one under 'ema' or 'model'")
    return {"ema": states[0], "model": states[-1]}


def _bare(state: Any) -> dict[str, Tensor]:
    """Without what DistributedDataParallel and torch.compile put before names; empty if it is no state dict."""
    names = dict(state) if isinstance(state, dict) else {}
    for prefix in ("module.", "_orig_mod."):
        names = {str(name).removeprefix(prefix): tensor for name, tensor in names.items()}
    return names


def write_weights(path: Path, state: StateDict) -> None:
    """A state dict as .safetensors, or as a .pt that torch.load reads; whole or not at all."""
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}
    partial = path.with_name(f".{path.name}.partial")
    write: Callable[[Any, Path], None] = save_file if path.suffix == ".safetensors" else torch.save
    write(tensors, partial)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


# --- in ----------------------------------------------------------------------------------------------------


@config
class Choices:
    """What the weights do not say. None: as is known of the project's own models."""

    num_heads: Count | None = None  # of the attention; null = as usual for the width
    # classes without the null row; null = as the table says
    num_classes: Annotated[int, Field(ge=0)] | None = None
    codec: Annotated[CodecConfig, CODECS] | None = None  # the VAE that they go with
    scaling_factor: Annotated[float, Field(gt=0)] | None = None  # what its latents were multiplied with


@dataclass(frozen=True)
class Converted:
    """What became of a file: the folder, the model's arguments, and the config."""

    folder: Path
    arguments: Arguments
    experiment: Experiment


def to_run(source: str | Path, out: str | Path, format: Format, choices: Choices) -> Converted:
    """A run directory with one checkpoint, of step 0, made of a foreign file; there whole or not at all.

    Raises WeightsError for weights that do not fit, ConfigError where `out` is not a new folder.
    """
    new_folder(out)
    states = read_weights(source)
    arguments = infer(states["ema"], choices.num_heads, choices.num_classes)
    kept, ema = format.ours(states["ema"], arguments)
    live = ema if states["model"] is states["ema"] else format.ours(states["model"], arguments)[1]
    del states  # gigabytes
    experiment = experiment_of(out, format.objective(kept), kept.model("position" in ema), choices.codec)
    weights = Weights(live, ema, network(ema, kept))
    return Converted(
        write_run(out, weights, experiment, contract_of(kept, choices), source), arguments, experiment
    )


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
    out: str | Path, objective: Objective, model: DiTConfig, codec: CodecConfig | None
) -> Experiment:
    """A config that the weights could have been trained with; the data are not known."""
    values = {
        "data": {"path": "unknown"},
        "run_dir": str(out),
        "model": to_dict(model),
        "objective": to_dict(objective),
        "latents": {"norm": "codec"},
        "codec": to_dict(codec) if codec else None,
    }
    return from_dict(Experiment, values)


def contract_of(arguments: Arguments, choices: Choices) -> dict[str, Any]:
    """What sampling must know of the latents: see `Parts.contract`."""
    identity, factor = unknown_vae(arguments.in_channels, choices.scaling_factor or SCALE), FACTOR
    if choices.codec:
        codec = choices.codec.build()
        identity, factor = codec.identity(), codec.factor
        if codec.channels != arguments.in_channels:
            raise ConfigError(
                f"the codec has {codec.channels} channels, the model {arguments.in_channels}; give the codec that "
                "the weights were trained with"
            )
    norm = codec_norm(identity)
    if choices.scaling_factor:
        scale = (1.0 / choices.scaling_factor,) * arguments.in_channels
        norm = LatentNorm(mean=(0.0,) * arguments.in_channels, std=scale)
    return {
        "norm": to_dict(norm),
        "codec": identity,
        "shape": [arguments.in_channels, arguments.input_size, arguments.input_size],
        "image_size": arguments.input_size * factor,
        "classes": [f"class_{i}" for i in range(arguments.num_classes)],
    }


# --- out ---------------------------------------------------------------------------------------------------


def from_run(
    run_or_checkpoint: str, out: str | Path, format: Format, weights: str, overwrite: bool = False
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

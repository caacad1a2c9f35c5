"""A checkpoint as a folder for diffusers: a whole DiTPipeline where there is one for it, else its parts."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.data.codecs.autoencoders import VaeCodec
from dit.errors import Notice
from dit.experiments.trained import Trained
from dit.files import expand, sync, write_atomically
from dit.flow.predict import usable
from dit.interop import card
from dit.interop.convert import load_dit
from dit.interop.files import write_weights
from dit.interop.pipeline import loading, time_layer, transformer
from dit.interop.pipeline.schedulers import FILE, Scheduler, scheduler_for
from dit.interop.pipeline.taken import INDEX, PIPELINE
from dit.interop.pipeline.vae import normalised
from dit.model.dit import DiT
from dit.outputs import RECORD, claim, refuse_other, replace_folder, write_record

NULL = 1000  # the class that DiTPipeline takes for none, and so the most classes that it knows
OUTPUT, TIME = ("proj_out_2.weight", "proj_out_2.bias"), "norm1.emb.timestep_embedder.linear_1.weight"
KIND = "folder for diffusers"


@dataclass(frozen=True)
class Given:
    """What was written, or was there already: the folder, which weights, and what to know of it."""

    folder: Path
    line: str
    notes: tuple[str, ...]
    is_new: bool


@dataclass(frozen=True)
class _Parts:
    """What a folder will hold. fitted: how far the time layer is off after its fit; None where it needs none."""

    trained: Trained
    model: DiT
    scheduler: Scheduler | None
    vae: Any
    is_pipeline: bool
    num_classes: int  # of the label table, padded
    num_steps: int
    notes: tuple[str, ...]
    fitted: time_layer.Fitted | None = None


def from_run(
    run_or_checkpoint: str,
    out: str | Path,
    *,
    weights: str = "ema",
    num_steps: int = 50,
    codec: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Given:
    """Write weights of a checkpoint as a folder of diffusers: model_index.json and what it names, and a README.md.

    num_steps: of the sampling that the time layer is fitted for, where the network's sinusoids are not those of
    diffusers; any number can be taken where they are. codec: keys over where training had the VAE.

    Raises WeightsError for a network that diffusers does not have, ConfigError where so many steps cannot be fitted or
    nothing says where the VAE is, OutputError where `out` is of something else (overwrite: it is replaced).
    """
    folder = Path(expand(str(out)))
    refuse_other(folder, KIND)
    trained, model = load_dit(run_or_checkpoint, weights)
    parts = _parts(trained, model, num_steps, dict(codec or {}))
    spec = _spec(parts)
    files = [folder / "transformer" / transformer.CONFIG, folder / RECORD]
    is_new = claim(files, spec, record=folder / RECORD, overwrite=overwrite) is None
    if is_new:
        _write(folder, parts, spec)
    trained.average.warn()
    return Given(folder, trained.weights_line(), parts.notes, is_new)


def _parts(trained: Trained, model: DiT, num_steps: int, codec: Mapping[str, Any]) -> _Parts:
    """Everything that goes into the folder, computed before anything is written."""
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}")
    objective, classes = trained.experiment.objective, model.dims.num_classes
    scheduler, identity = scheduler_for(objective), trained.contract["codec"]
    lacks = []
    if scheduler is None or not scheduler.in_pipeline:
        lacks.append(
            f"it samples eps, v and data on discrete paths, this is {objective.prediction} on {objective.path}"
        )
    if classes > NULL:
        lacks.append(f"it knows {NULL} classes, these are {classes}")
    if identity["name"] == "pixels":
        lacks.append("it decodes by a VAE, and this model makes pixels")
    vae, notes = None, []
    if identity["name"] != "pixels" and (codec or trained.experiment.codec is not None or not lacks):
        opened = trained.codec(codec, torch.device("cpu"))
        if isinstance(opened, VaeCodec) and type(opened.vae).__name__ == "AutoencoderKL":
            vae = normalised(opened.vae, trained.norm)
        else:
            lacks.append(f"it decodes by an AutoencoderKL, this codec is a {_kind(opened)}")
    if lacks:
        notes.append(
            f"diffusers' {PIPELINE} cannot sample this model: {'; '.join(lacks)}. README.md says what can"
        )
    if error := transformer.position_error(model):
        warnings.warn(
            f"the position table is off the computed one by up to {error:.2g}, and diffusers has the computed one: its "
            "samples will differ a little",
            Notice,
            stacklevel=2,
        )
    parts = _Parts(
        trained, model, scheduler, vae, not lacks, classes if lacks else NULL, num_steps, (*notes,)
    )
    return _fitted(parts)


def _kind(opened: Any) -> str:
    return type(opened.vae).__name__ if isinstance(opened, VaeCodec) else type(opened).__name__


def _fitted(parts: _Parts) -> _Parts:
    """With the time layer that gives at the steps of a run what ours does, where the sinusoids are other ones."""
    objective = parts.trained.experiment.objective
    path = objective.path
    if parts.scheduler is not None:
        timesteps = parts.scheduler.timesteps(parts.num_steps)
        times = parts.scheduler.times(timesteps)
    else:  # the network is handed what ours is
        lo, hi = usable(path, objective.prediction)
        times = path.snap(torch.linspace(hi, lo, parts.num_steps + 1, dtype=torch.float64)[:-1])
        timesteps = path.model_time(times).float()
    if time_layer.is_alike(parts.model, path, timesteps, times):
        return parts
    fitted = time_layer.fit(parts.model, path, timesteps, times)
    note = (
        "diffusers' sinusoids of time are others than this model's. Its time layer is fitted to them at "
        f"{parts.num_steps} steps (an error of {fitted.error:.1g}): sample with {parts.num_steps} steps, or a number "
        "that divides them"
    )
    return replace(parts, notes=(*parts.notes, note), fitted=fitted)


def _spec(parts: _Parts) -> dict[str, Any]:
    """What decides about the folder's content, and what reading it again needs beyond what diffusers keeps."""
    trained = parts.trained
    return {
        "digest": trained.digest,
        "weights": trained.weights,
        "step": trained.step,
        "num_steps": parts.num_steps if parts.fitted is not None else None,
        "pipeline": parts.is_pipeline,
        "vae": parts.vae is not None,
        "objective": to_dict(trained.experiment.objective),
        "contract": dict(trained.contract),
    }


# --- the folder --------------------------------------------------------------------------------------------


def _write(folder: Path, parts: _Parts, spec: Mapping[str, Any]) -> None:
    """Write it beside its place, and give it its name when it is whole. What can fail is computed first."""
    config, state = transformer.config_of(parts.model, parts.num_classes), _state(parts)
    readme = card.text(parts.trained, folder.name, _use(folder.name, parts))
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "transformer").mkdir(parents=True)
    _write_json(partial / "transformer" / transformer.CONFIG, config)
    write_weights(partial / "transformer" / f"{transformer.STEM}.safetensors", state)
    if parts.scheduler is not None:
        (partial / "scheduler").mkdir()
        _write_json(partial / "scheduler" / FILE, parts.scheduler.config())
    if parts.vae is not None:
        parts.vae.save_pretrained(partial / "vae", safe_serialization=True)
    if parts.is_pipeline:
        _write_json(partial / INDEX, _index(parts.trained))
    write_atomically(partial / card.FILE, readme.encode())
    write_record(partial / RECORD, spec)
    sync(partial)
    replace_folder(partial, folder)


def _state(parts: _Parts) -> dict[str, Tensor]:
    """The transformer's weights: with the fitted time layer, and the output's sign as the scheduler takes it."""
    state = transformer.state_of(parts.model, parts.num_classes)
    if parts.fitted is not None:
        state |= {name: parts.fitted.weight for name in state if name.endswith(TIME)}
    if parts.scheduler is not None and parts.scheduler.negated:
        state |= {name: _negated(state[name], parts.model) for name in OUTPUT}
    return state


def _negated(rows: Tensor, model: DiT) -> Tensor:
    """The output layer's rows (p q C', ...), those of the prediction's C channels with the other sign."""
    d = model.dims
    signs = rows.new_ones(d.out_channels)
    signs[: d.channels] = -1.0
    split = rearrange(rows, "(k c) ... -> k ... c", c=d.out_channels)
    return rearrange(split * signs, "k ... c -> (k c) ...").contiguous()


def _index(trained: Trained) -> dict[str, Any]:
    import diffusers

    return {
        "_class_name": PIPELINE,
        "_diffusers_version": diffusers.__version__,
        "transformer": ["diffusers", transformer.CLASSES[0]],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {str(number): name for number, name in enumerate(trained.contract["classes"])},
    }


def _use(name: str, parts: _Parts) -> card.Use:
    """How the folder is loaded, for its card."""
    code = loading.code(name, parts.scheduler, parts.is_pipeline, _numbers(parts))
    return card.Use("diffusers", code, parts.notes)


def _numbers(parts: _Parts) -> dict[str, Any]:
    channels, height, width = parts.trained.contract["shape"]
    return {
        "classes": [0, 1][: parts.model.dims.num_classes] or [parts.num_classes],
        "null": parts.num_classes,
        "shape": (channels, height, width),
        "steps": parts.num_steps,
        "norm": parts.trained.norm if parts.vae is None else None,
        "codec": parts.trained.contract["codec"]["name"],
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n").encode())

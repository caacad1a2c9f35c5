"""A pipeline folder of diffusers, or a transformer's, as a run of ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit.config import ConfigError, from_dict, to_dict
from dit.data.codecs.autoencoders import Vae
from dit.data.codecs.norm import LatentNorm
from dit.files import expand
from dit.flow.objective import Objective
from dit.interop.convert import Converted, Weights, experiment_of, write_run
from dit.interop.latents import Choices, contract_of
from dit.interop.pipeline import schedulers, transformer
from dit.interop.pipeline.transformer import Transformer
from dit.interop.weights import LABELS, WeightsError, network, to_ours
from dit.outputs import RECORD

INDEX = "model_index.json"
PIPELINE = "DiTPipeline"


@dataclass(frozen=True)
class _Folder:
    """What a folder holds: paths of its parts, None for what is not there, and what was recorded when we wrote it."""

    path: Path
    transformer: Path
    scheduler: Path | None
    vae: Path | None
    labels: dict[int, str]
    record: dict[str, Any]


def to_run(source: str | Path, out: str | Path, choices: Choices) -> Converted:
    """A run directory with one checkpoint of step 0, made of a pipeline folder that diffusers' save_pretrained wrote.

    A folder without a scheduler is read where we wrote it. Raises WeightsError for what is no DiT or cannot be
    one of ours, ConfigError where `out` is not a new folder or nothing says what the network was trained with.
    """
    folder = _look(Path(expand(str(source))))
    found = _with_classes(transformer.read(folder.transformer), folder, choices.num_classes)
    objective = _objective(folder, found)
    ours = to_ours(found.state, found.arguments)
    choices = _choices(str(source), folder, choices)
    experiment = experiment_of(out, objective, found.model(), choices.codec)
    contract = _contract(folder, found, choices)
    weights = Weights(ours, ours, network(ours, found.arguments))
    return Converted(write_run(out, weights, experiment, contract, source), found.arguments, experiment)


def _look(path: Path) -> _Folder:
    """Find the parts: of a pipeline, or of a folder with `transformer` in it, or of a transformer's own."""
    index: dict[str, Any] = {}
    if (path / INDEX).is_file():
        index = transformer.read_json(path / INDEX)
        if index.get("_class_name") != PIPELINE:
            raise WeightsError(
                f"{path / INDEX} is of a {index.get('_class_name')}; expected a {PIPELINE}, whose transformer is a DiT"
            )
    own = path if not (path / "transformer").is_dir() else path / "transformer"
    parts = {name: path / name for name in ("scheduler", "vae") if (path / name).is_dir()}
    record = transformer.read_json(path / RECORD) if (path / RECORD).is_file() else {}
    labels = {int(number): str(name) for number, name in (index.get("id2label") or {}).items()}
    return _Folder(path, own, parts.get("scheduler"), parts.get("vae"), labels, record)


def _with_classes(found: Transformer, folder: _Folder, asked: int | None) -> Transformer:
    """With the classes that are asked for; else without rows of zeros at the table's end, which fill it up.

    No training leaves a row of zeros, so that what was filled up is known without names too.
    """
    has = found.arguments.num_classes
    used = found.state[LABELS][:has].any(dim=1).nonzero()
    filled = max([int(used.max()) + 1 if len(used) else 0, *(n + 1 for n in folder.labels if n < has)])
    count = filled if asked is None else asked
    if count > has:
        raise WeightsError(f"num_classes is {count}, and {folder.transformer} has {has} classes")
    return found.with_classes(count)


def _objective(folder: _Folder, found: Transformer) -> Objective:
    """What it was trained with: as the scheduler says, else as our own record does."""
    if folder.scheduler is not None:
        return schedulers.objective_of(folder.scheduler, found.arguments.learn_sigma)
    if "objective" in folder.record:
        return from_dict(Objective, folder.record["objective"])
    raise ConfigError(
        f"{folder.path} has no folder scheduler/, and nothing else says what its network predicts: give a whole "
        f"pipeline, with a scheduler's {schedulers.FILE}"
    )


def _choices(source: str, folder: _Folder, choices: Choices) -> Choices:
    """With the folder's own VAE, unless another one is given."""
    if choices.codec is not None or folder.vae is None:
        return choices
    return replace(choices, codec=Vae(path=source, subfolder="vae"))


def _contract(folder: _Folder, found: Transformer, choices: Choices) -> dict[str, Any]:
    """What sampling must know of the latents. DiTPipeline divides them by scaling_factor and shifts nothing."""
    held = folder.record.get("contract")
    if held is not None and folder.vae is None and choices.codec is None:
        return dict(held)
    contract = contract_of(found.arguments, choices)
    if folder.vae is not None and choices.scaling_factor is None:
        scale = transformer.read_json(folder.vae / transformer.CONFIG).get("scaling_factor") or 1.0
        channels = found.arguments.in_channels
        norm = LatentNorm(mean=(0.0,) * channels, std=(1.0 / scale,) * channels)
        contract["norm"] = to_dict(norm)
    classes = [folder.labels.get(i, f"class_{i}") for i in range(found.arguments.num_classes)]
    return {**contract, "classes": classes}

"""`dit` as a library: what `import dit` offers (docs/python.md).

    model = dit.load("runs/quickstart/dit", weights="ema")
    images = model.sample(num_samples=8, classes=[3], cfg_scale=2, num_steps=16)   # uint8 (8, H, W, 3)

The command lines' own parts, called as they call them: the same options draw the same pixels, and errors are the same.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from dit.ambient import as_it_comes
from dit.config import ConfigError, config, from_dict, to_dict
from dit.configfile import load as load_config
from dit.data import DataError
from dit.data.codecs.base import CodecConfig
from dit.data.codecs.codec import CODECS
from dit.data.encoding.encode import EncodeOptions, Report
from dit.data.sources.classes import LabelChoice, LabelType
from dit.data.sources.crops import Crop
from dit.data.sources.decode import Decode
from dit.data.sources.parquet import Columns
from dit.errors import Notice, Stopped, UserError
from dit.experiments.arguments import Choice, check_arguments
from dit.experiments.diffusion import Experiment
from dit.experiments.encoding import EncodeOrder, encode_images
from dit.experiments.loaded import Place, TrainedModel, load
from dit.experiments.parts import make_parts
from dit.files import expand, path_text
from dit.flow.objective import Objective
from dit.flow.predict import Endpoints
from dit.model.dit import DiTConfig
from dit.progress import bars
from dit.ranks.devices import chosen_device
from dit.ranks.group import World
from dit.rng import Draws
from dit.sample.generate import Sampler, SamplerSpec
from dit.train.start import train

__all__ = [
    "ConfigError",
    "DataError",
    "DiTConfig",
    "Draws",
    "Endpoints",
    "Experiment",
    "Notice",
    "Objective",
    "Sampler",
    "SamplerSpec",
    "Stopped",
    "TrainedModel",
    "UserError",
    "encode",
    "fit",
    "load",
]


_FITTING = threading.Lock()  # held while this process trains


class HowToEncode(TypedDict, total=False):
    """The fields of EncodeOptions, each with its default there."""

    image_size: int
    flip: bool
    block: int
    shard_mb: float
    seed: int
    batch_size: int
    max_bad: int
    posterior: Literal["moments", "sample"]
    workers: int
    dtype: Literal["float16", "float32"]
    crop: Choice | Crop
    decode: Mapping[str, Any] | Decode


@config
class _Said:
    holdout: float  # share of the images, of each class
    classes: str | None  # name of a standard list
    label_key: str | None  # of the label, in JSON or in a head
    label_type: LabelType  # how labels are taken
    label_column: str | None  # of Parquet: where labels stand
    image_column: str | None  # of Parquet: where images stand


@as_it_comes()
def encode(
    images: Place,
    out: Place,
    codec: Choice | CodecConfig = "vae",
    *,
    holdout: float = 0.0,
    classes: str | None = None,
    labels: Place | None = None,
    label_key: str | None = None,
    label_type: LabelType = "auto",
    label_column: str | None = None,
    image_column: str | None = None,
    device: str | None = None,
    progress: bool = True,
    **options: Unpack[HowToEncode],
) -> Report:
    """Encode images once, into latent shards and a manifest in the new folder `out`, as `tools/encode.py` does.

    images: a folder of class folders, a tar, Parquet, "digits:train", ... codec: "pixels", or {"name": "vae", "path":
    FOLDER}. holdout: the share of the images, of each class, that is kept from training in OUT-val. classes, labels and
    those after them: of the labels, as the command's flags. progress: show what is found and a bar. options:
    image_size (256), flip (True: a mirrored view too), crop, ..., as in EncodeOptions.

    Returns the report of `out`, whose `manifest` says what is there. Called again with the same arguments it goes on
    with what is done, and leaves what is complete. Raises ConfigError for an option that is none, DataError where
    images cannot be read or `out` is something else.
    """
    check_arguments(encode, EncodeOptions, options)
    words: dict[str, Any] = {"classes": classes, "label_key": label_key, "label_type": label_type}
    words |= {"holdout": holdout, "label_column": label_column, "image_column": image_column}
    said = from_dict(_Said, words)
    order = EncodeOrder(
        images=expand(path_text(images, "images")),
        out=Path(expand(path_text(out, "out"))).resolve(),
        codec=CODECS.parse(codec),
        options=from_dict(EncodeOptions, dict(options)),
        classes=said.classes,
        labels=None if labels is None else path_text(labels, "labels"),
        columns=Columns(said.image_column, said.label_column),
        choice=LabelChoice(said.label_key, said.label_type),
        holdout=said.holdout,
    )
    world, tell = World.from_env(), partial(print, flush=True) if progress else _unheard
    with bars(progress):
        return encode_images(order, chosen_device(device, world, "device"), world, tell=tell)[-1]


def _unheard(text: str) -> None:
    """Nobody wants to know."""


def fit(
    experiment: Place | Mapping[str, Any] | Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
) -> Path:
    """Train a diffusion or flow model in this process, or go on with its run, as `tools/train.py` does.

    experiment: a YAML file, a dictionary with the keys of one (`base`, relative to where the process runs, too), or an
    Experiment. overrides: dotted keys over it, {"train.steps": 100, "objective.path": "vp"}. progress: show a bar.

    Returns the run directory, which `load` takes. Called again with the same arguments it resumes what is there.
    Raises ConfigError for keys that are wrong, DataError for data that cannot be read, TrainingError where it cannot
    go on, and Stopped where a signal or the first Ctrl-C ended it, once it has saved. For several processes: launch/.
    """
    if not _FITTING.acquire(blocking=False):  # ranks, signals and DeepSpeed are the whole process's
        raise UserError(
            "another training is under way in this process: wait for it, or start this one in another"
        )
    try:
        with as_it_comes(), bars(progress):
            cfg = _experiment(experiment, overrides)
            train(cfg, make_parts, owns_process=False)
            return cfg.folder
    finally:
        _FITTING.release()


def _experiment(given: Any, overrides: Mapping[str, Any] | None) -> Experiment:
    if isinstance(given, Experiment):
        given = to_dict(given) if overrides else given
    if isinstance(given, Experiment):
        return given
    if not isinstance(given, str | os.PathLike | Mapping):
        raise ConfigError(f"expected a YAML file, a dictionary or an Experiment, got {type(given).__name__}")
    if not isinstance(overrides, Mapping | None) or not all(isinstance(key, str) for key in overrides or ()):
        raise ConfigError(f"overrides: expected a dictionary with dotted keys, got {overrides!r}")
    source = given if isinstance(given, Mapping) else Path(given)
    return load_config(Experiment, source, overrides, said="the overrides")

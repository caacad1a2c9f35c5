"""A trained model as an object to draw from and to call: what `dit.load` gives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from dit.ambient import as_it_comes, numbers_of, plain_numbers
from dit.config import ConfigError
from dit.data.codecs.base import Codec
from dit.errors import UserError, shown
from dit.experiments.arguments import HowToDraw, amount_of, check_arguments, spec_of
from dit.experiments.diffusion import Experiment
from dit.experiments.drawing import check_labelled
from dit.experiments.trained import Precision, Trained
from dit.files import path_text
from dit.flow.objective import Objective
from dit.flow.predict import Endpoints, usable
from dit.progress import Bar, bars
from dit.ranks.devices import chosen_device
from dit.ranks.group import World
from dit.sample.drawing import Batch, draw_batches, in_batches, warn_if_far
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.labels import LabelOrder, Labels
from dit.sample.solve import time_dtype

Place = str | os.PathLike[str]
Classes = int | str | Sequence[int | str] | Tensor
ROUNDING = 1e-6  # by which a time may miss its interval


@as_it_comes()
def load(
    run_or_checkpoint: Place,
    weights: str = "ema",
    *,
    device: str | None = None,
    precision: Literal["run", "fp32", "bf16"] = "run",
    codec: Mapping[str, Any] | None = None,
) -> TrainedModel:
    """Load a trained model, to draw from it or to call it.

    run_or_checkpoint: a run directory (its newest good checkpoint), one checkpoint in it, or weights that
    `tools/convert.py export` wrote. weights: "ema", "model", or another average, as "ema_0.999". device: "cpu", "cuda"
    or "cuda:1"; None is the GPU where there is one. precision: of matrix products; "run" is as in training. codec: keys
    over where training had the codec, such as {"path": FOLDER, "dtype": "bfloat16"}; it is opened when first needed.

    Raises UserError (CheckpointError) where there is no such model or its files are damaged, ConfigError for another
    precision or codec. Warns where the average still holds much of the first weights.
    """
    _check_keys(codec)
    place = chosen_device(device, World.from_env(), "device")
    trained = Trained.load(path_text(run_or_checkpoint, "run_or_checkpoint"), weights, place)
    trained.average.warn()
    return TrainedModel(trained, place, trained.precision(precision), dict(codec or {}))


def _check_keys(codec: Any) -> None:
    if not isinstance(codec, Mapping | None):
        raise ConfigError(f'codec: expected keys of it, as {{"path": FOLDER}}, got {shown(codec)}')


@dataclass(frozen=True, repr=False, eq=False)
class TrainedModel:
    """A trained model with its objective, its latents' normalisation and its codec. `load` makes it.

    Latents here are as the network sees them: normalised, (C, H, W) = `shape` each, float32.
    """

    trained: Trained
    device: torch.device
    precision: Precision = "fp32"
    codec_keys: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Which weights these are, of what, and where."""
        count, size = len(self.classes), " x ".join(map(str, self.shape))
        return f"<{self.trained.weights_line()}; latents {size}, {count} classes, on {self.device}>"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by number; none for a model that was trained without."""
        return tuple(self.trained.contract["classes"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        channels, height, width = self.trained.contract["shape"]
        return channels, height, width

    @property
    def image_size(self) -> int:
        """Pixels on a side of an image."""
        return int(self.trained.contract["image_size"])

    @property
    def step(self) -> int:
        """Steps of training done when these weights were saved."""
        return self.trained.step

    @property
    def path(self) -> Path:
        """The checkpoint, or the exported file, that they are from."""
        return self.trained.path

    @property
    def network(self) -> torch.nn.Module:
        """The network itself: (x (B, C, H, W), model_time (B,), {"label": (B,)}) -> what `objective.prediction` is.

        `call_network` of dit.flow.predict scales x and t as the path wants them, and `denoise` calls that.
        """
        return self.trained.model

    @property
    def objective(self) -> Objective:
        """What it was trained on: path, prediction and the rest."""
        return self.trained.experiment.objective

    @property
    def config(self) -> Experiment:
        """The whole configuration of its run."""
        return self.trained.experiment

    @cached_property
    def codec(self) -> Codec:
        """What makes images of latents, opened when first used. Raises ConfigError or DataError, as `Trained.codec`."""
        return self.trained.codec(self.codec_keys, self.device)

    # --- drawing -------------------------------------------------------------------------------------------

    @plain_numbers()
    def sample(
        self,
        num_samples: int = 64,
        classes: Classes = "all",
        *,
        batch_size: int | None = None,
        label_order: LabelOrder = "balanced",
        shift: float | None = None,
        progress: bool = True,
        **how: Unpack[HowToDraw],
    ) -> np.ndarray:
        """Draw images, (N, H, W, 3) uint8: the pixels that `tools/sample.py` writes for the same options.

        classes: "all", a number, a name, or a list of them, -1 being no class. label_order: "balanced", image i is of
        classes[i mod n], or "random", of one drawn by (seed, i). batch_size: images at a time. shift: of the grid's
        times, 1 is none. progress: show a bar. how: solver ("heun", or {"name": "sde", ...}), num_steps (50), grid
        ("uniform"), cfg_scale (1 = no guidance), seed (0; image i has its own noise), guidance ([{"name": "cfg",
        "scale": 2, "interval": [0.2, 0.7]}, ...]), as in SamplerSpec.

        Raises ConfigError for an option or a class that is none, DataError where the codec cannot be opened,
        NotFiniteError naming the first image that is none. Warns where latents are far from those of data.
        """
        given = (num_samples, classes, batch_size, label_order, shift, progress, how)
        with self._drawn(True, *given) as (sampler, drawn):
            return np.concatenate([sampler.pictures(b.latents, b.index, b.label, b.wanted) for b in drawn])

    @plain_numbers()
    def sample_latents(
        self,
        num_samples: int = 64,
        classes: Classes = "all",
        *,
        batch_size: int | None = None,
        label_order: LabelOrder = "balanced",
        shift: float | None = None,
        progress: bool = True,
        **how: Unpack[HowToDraw],
    ) -> Tensor:
        """Draw latents, (N, C, H, W) float32 on the model's device, as the network sees them; opens no codec.

        Arguments and errors as for `sample`; `decode` makes its images of them.
        """
        given = (num_samples, classes, batch_size, label_order, shift, progress, how)
        with self._drawn(False, *given) as (_, drawn):
            return torch.cat([batch.latents[: batch.wanted] for batch in drawn])

    @contextlib.contextmanager
    def _drawn(
        self,
        decodes: bool,
        num_samples: int,
        classes: Classes,
        batch_size: int | None,
        label_order: LabelOrder,
        shift: float | None,
        progress: bool,
        how: HowToDraw,
    ) -> Iterator[tuple[Sampler, Iterator[Batch]]]:
        """The sampler, and the batches that it draws while they are taken. A codec is opened after what is cheaper."""
        check_arguments(self.sample, SamplerSpec, how)
        amount = amount_of(num_samples, batch_size)
        spec, chosen = spec_of(how, shift), self.trained.classes(classes)
        check_labelled(spec, chosen, self.trained)
        codec = self.codec if decodes else None
        sampler = self.trained.sampler(spec, codec, self.device, self.precision)
        wanted = in_batches(amount.num_samples, amount.batch_size)
        labels = Labels(chosen, label_order, spec.seed)
        reach = [0.0]

        def looked_at() -> Iterator[Batch]:
            for batch in draw_batches(sampler, labels, wanted, amount.batch_size):
                reach.append(batch.reach)
                yield batch
                bar.update(batch.wanted)

        with bars(progress), Bar[None](total=amount.num_samples, unit="image", desc="sampling") as bar:
            yield sampler, looked_at()
        warn_if_far(max(reach))

    @plain_numbers()
    def decode(
        self, latents: Tensor | np.ndarray, *, batch_size: int | None = None, progress: bool = True
    ) -> np.ndarray:
        """Make images of latents (N, C, H, W), as `sample_latents` gives them: (N, H, W, 3) uint8.

        batch_size: images at a time, as for `sample`; at an equal one its pixels are those of `sample` to the bit.
        Raises UserError for another shape, DataError where the codec cannot be opened, NotFiniteError naming the first
        image that is none.
        """
        x = self._latents(latents)
        amount = amount_of(len(x), batch_size)
        sampler = self.trained.sampler(SamplerSpec(), self.codec, self.device, self.precision)
        images, none = [], torch.full((amount.batch_size,), -1)
        with bars(progress), Bar[None](total=len(x), unit="image", desc="decoding") as bar:
            for numbers in in_batches(len(x), amount.batch_size):
                index = torch.arange(numbers.start, numbers.start + amount.batch_size)
                filled = x[index.clamp(max=len(x) - 1)]  # a whole batch, as `sample` decodes it
                images.append(sampler.pictures(filled, index, none, len(numbers)))
                bar.update(len(numbers))
        return np.concatenate(images)

    # --- the network ---------------------------------------------------------------------------------------

    @plain_numbers()
    def denoise(self, x: Tensor | np.ndarray, t: float | Tensor, label: Classes | None = None) -> Endpoints:
        """What the network, unguided, takes noisy latents for: `data` and `eps`, each of the shape of x, float32.

        x: (B, C, H, W) = alpha·data + sigma·eps of `objective.path` at t. t: 0 at the data, 1 at the noise; a number,
        or (B,). label: a class's number or name for all, or B of them; None is no class. Gradients flow to x.

        Raises UserError for another shape, and for times at which the prediction does not determine data and eps;
        ConfigError for a class that is none.
        """
        x = self._latents(x)
        chosen = [-1] if label is None else self.trained.classes(label)
        if len(chosen) not in (1, len(x)):
            raise UserError(
                f"label has {len(chosen)} classes for {len(x)} latents: give one, or one for each"
            )
        labels = torch.tensor(chosen, device=self.device).expand(len(x))
        denoiser = self.trained.denoiser(self.device, self.precision)
        return denoiser(x, self._times(t, x), {"label": labels})

    def _times(self, t: float | Tensor, x: Tensor) -> Tensor:
        """(B,) times in the dtype that the network takes. Raises UserError."""
        times = numbers_of(t, "t", torch.float64, self.device)
        if times.ndim > 1 or times.numel() not in (1, len(x)):
            raise UserError(
                f"t has the shape {tuple(times.shape)}: give a number, or one of {len(x)} for each latent"
            )
        lo, hi = usable(self.objective.path, self.objective.prediction)
        wrong = times[~((times >= lo - ROUNDING) & (times <= hi + ROUNDING))]
        if len(wrong):
            raise UserError(
                f"t = {float(wrong.flatten()[0]):g}: this network says something for times in [{lo:.6g}, {hi:.6g}], 0 "
                "being the data and 1 the noise"
            )
        return times.clamp(lo, hi).to(time_dtype(x)).expand(len(x))

    def _latents(self, given: Tensor | np.ndarray) -> Tensor:
        """Latents on the model's device, float32. Raises UserError for another shape."""
        x = numbers_of(given, "latents", torch.float32, self.device)
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape or not len(x):
            channels, height, width = self.shape
            raise UserError(
                f"latents have the shape {tuple(x.shape)}, expected (N, {channels}, {height}, {width}) with N of 1 or "
                "more: normalised latents, as sample_latents gives them"
            )
        return x

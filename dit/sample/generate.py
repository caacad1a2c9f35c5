"""From noise to images: what a checkpoint's model, a sampler's spec and an image's index determine together.

Image i depends on (checkpoint, spec, i) alone: its noise is keyed by (seed, i), its label is classes[i mod n].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from dit.config import ConfigError, config, one_or_more
from dit.flow.path import NoisePath
from dit.flow.predict import Model, Prediction, check_labels
from dit.flow.times import BASE_DIMENSION
from dit.rng import Draws, Purpose
from dit.sample.denoise import DenoiseFn, Denoiser
from dit.sample.finite import NotFiniteError, check_finite, first_not_finite
from dit.sample.grid import GRIDS, Grid, UniformGrid
from dit.sample.guide import GUIDANCES, ClassifierFree, Context, Guidance, Opener, cfg
from dit.sample.sharing import Sharing, telling
from dit.sample.solve import SOLVERS, Heun, Solver
from dit.sample.tally import CountedOpener, Tally


@config
class SamplerSpec:
    """Everything that decides about the images besides the weights.

    `cfg_scale: S` is short for guidance that begins with {name: cfg, scale: S}. Where guidance names cfg itself, that
    holds, at its place in turn, and cfg_scale is left out (or is the same).
    """

    solver: Annotated[Solver, SOLVERS] = Heun()  # method that steps from noise to data
    num_steps: Annotated[int, Field(ge=1)] = 50  # steps of the solver for each image
    grid: Annotated[Grid, GRIDS] = UniformGrid()  # how the times of the steps are spaced
    cfg_scale: Annotated[float, Field(ge=0)] = 1.0  # short for guidance {name: cfg, scale: ...}; 1 = none
    seed: int = 0  # of the noise; image i has its own
    guidance: Annotated[  # in turn, after that of cfg_scale; one alone needs no brackets
        tuple[Annotated[Guidance, GUIDANCES], ...], BeforeValidator(one_or_more)
    ] = ()

    def __post_init__(self) -> None:
        named = [g for g in self.guidance if isinstance(g, ClassifierFree)]
        names = [GUIDANCES.name_of(g) for g in named]
        if len(named) > 1:
            raise ConfigError(
                f"guidance names {' and '.join(names)}, which would guide twice: keep one of them"
            )
        if named and self.cfg_scale not in (1.0, named[0].scale):
            raise ConfigError(
                f"cfg_scale = {self.cfg_scale:g} is short for guidance {{name: cfg, scale: {self.cfg_scale:g}}}, and "
                f"guidance has {names[0]} with scale {named[0].scale:g}: set cfg_scale to 1, or take {names[0]} out of "
                "guidance"
            )
        jumping = [g for g in self.guidance if g.jumps]
        if jumping and self.solver.nfe(1) is None:
            raise ConfigError(
                f"solver {SOLVERS.name_of(self.solver)} chooses its steps by an error that it cannot see where "
                f"guidance begins or ends within {jumping[0]}: take a solver of fixed steps, such as unipc"
            )

    @property
    def needs_label(self) -> bool:
        """Whether there is guidance that has an effect on samples of a known class alone."""
        return any(g.needs_label for g in self.in_turn)

    @property
    def in_turn(self) -> tuple[Guidance, ...]:
        """All the guidance, from the one that sees the network itself on."""
        is_named = any(isinstance(g, ClassifierFree) for g in self.guidance)
        return self.guidance if is_named else (cfg(self.cfg_scale), *self.guidance)

    @property
    def normal(self) -> SamplerSpec:
        """The spec that draws the same images and is written in one way.

        Guidance that changes nothing is left out, and a plain cfg that comes first is cfg_scale.
        """
        guidance = tuple(g for g in self.in_turn if not g.is_neutral)
        first = guidance[0] if guidance else None
        if isinstance(first, ClassifierFree) and first == cfg(first.scale):
            return replace(self, cfg_scale=first.scale, guidance=guidance[1:])
        return replace(self, cfg_scale=1.0, guidance=guidance)

    def check(self, path: NoisePath, prediction: Prediction, learns_variance: bool) -> None:
        """ConfigError for what cannot draw from a model of this path and prediction."""
        if self.solver.uses_variance and not learns_variance:
            raise ConfigError(
                f"solver {self.solver} takes the learned variance of the network, and it has none "
                "(model.learn_sigma: false); take the variance small or large"
            )
        self.grid.sized(BASE_DIMENSION)(self.num_steps, path, prediction)

    def times(self, path: NoisePath, prediction: Prediction, dimension: int) -> Tensor:
        """The grid for latents of so many numbers, (num_steps + 1,) float64."""
        return self.grid.sized(dimension)(self.num_steps, path, prediction)

    def nfe(self, path: NoisePath, prediction: Prediction, dimension: int) -> int | None:
        """Calls of the guided denoiser an image; None where the solver chooses its own steps."""
        end = self.times(path, prediction, dimension)[-1:]
        return self.solver.nfe(self.num_steps, to_data=float(path.alpha_sigma(end)[1][0]) != 0.0)

    def guided(self, denoise: DenoiseFn, context: Context) -> DenoiseFn:
        """The denoiser under all the guidance; the very same one where there is none."""
        for guidance in self.in_turn:
            denoise = guidance(denoise, context)
        return denoise


@dataclass(frozen=True)
class Sampler:
    """Draws images. shape: (C, H, W) of a latent. decode: model-side latents (B, C, H, W) to images in [-1, 1].

    open: opens the checkpoints that guidance names. tally: counts what was evaluated. model_advice, codec_advice: what
    to try where latents, or the pictures made of them, are not finite; empty where nothing is known to help. classes:
    that the model knows, where labels are to be checked. sharing: told of each batch and evaluation, where the model
    keeps something between them.
    """

    model: Model
    path: NoisePath
    prediction: Prediction
    decode: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    spec: SamplerSpec
    device: torch.device
    open: Opener | None = None
    tally: Tally = field(default_factory=Tally, compare=False)
    model_advice: str = ""
    codec_advice: str = ""
    classes: int | None = None
    sharing: Sharing | None = None

    @cached_property
    def denoise(self) -> DenoiseFn:
        """The guided denoiser. The first time opens the checkpoints that the guidance names."""
        network = self.tally.of_evaluations(Denoiser(self.model, self.path, self.prediction))
        opener = None if self.open is None else CountedOpener(self.open, self.tally)
        guided = self.spec.guided(network, Context(self.path, opener))
        return self.tally.of_calls(guided if self.sharing is None else telling(guided, self.sharing))

    @property
    def nfe(self) -> int | None:
        """Calls of the guided denoiser an image; None where the solver chooses its own steps."""
        return self.spec.nfe(self.path, self.prediction, math.prod(self.shape))

    def times(self) -> Tensor:
        """The grid, (num_steps + 1,) float64."""
        return self.spec.times(self.path, self.prediction, math.prod(self.shape))

    def noise(self, index: Tensor) -> Tensor:
        """(B, C, H, W) the standard normal noise that images `index` (B,) are made from, before the path scales it."""
        return Draws(self.spec.seed, 0, index.to(self.device), 1).normal(Purpose.PRIOR, self.shape)

    @torch.no_grad()
    def latents(
        self,
        index: Tensor,
        label: Tensor,
        wanted: int | None = None,
        *,
        noise: Tensor | None = None,
        denoise: DenoiseFn | None = None,
    ) -> Tensor:
        """(B, C, H, W) for images `index` (B,) of classes `label` (B,), both int64; label -1 = no class.

        wanted: so many of them, the first, are looked at; the rest fill the batch up. None: all. noise: (B, C, H, W) to
        start from in place of the images' own. denoise: what the solver calls in place of the guided denoiser.

        Raises NotFiniteError naming the first image whose latents are not finite, ValueError for labels that the
        model does not know.
        """
        for name, given in (("index", index), ("label", label)):
            if not isinstance(given, Tensor) or given.ndim != 1:
                raise ValueError(f"{name}: expected a tensor (B,) of whole numbers, got {given!r}")
        if len(index) != len(label):
            raise ValueError(f"there are {len(label)} labels for {len(index)} images; -1 is no class")
        if self.classes is not None:
            check_labels(label, self.classes)
        index, label = index.to(self.device), label.to(self.device)

        def added(draw: int) -> Tensor:
            return Draws(self.spec.seed, draw, index, 1).normal(Purpose.SOLVER, self.shape)

        self.tally.images += len(index)
        if self.sharing is not None:
            self.sharing.begin()
        times = self.times()
        x = self.path.prior(self.noise(index) if noise is None else noise, float(times[0]))
        drawn = self.spec.solver(denoise or self.denoise, x, times, self.path, added, {"label": label})
        check_finite(drawn[:wanted], index, label, "its latents", self._advice(self.model_advice))
        return drawn

    @torch.no_grad()
    def pictures(
        self, latents: Tensor, index: Tensor, label: Tensor, wanted: int | None = None
    ) -> np.ndarray:
        """(B, H, W, 3) uint8 of latents (B, C, H, W) that were drawn for images `index` of classes `label`, (B,) each.

        wanted: all are decoded, and so many, the first, are looked at and returned. None: all.

        Raises NotFiniteError naming the first image that the codec cannot make of its latents.
        """
        decoded = self.decode(latents)[:wanted]
        what = f"its pixels, decoded from latents of up to {float(latents[:wanted].abs().max()):.3g},"
        return to_uint8(check_finite(decoded, index, label, what, self._advice(self.codec_advice)))

    def images(self, index: Tensor, label: Tensor) -> np.ndarray:
        """(B, H, W, 3) uint8. Raises NotFiniteError, as `latents` and `pictures` do."""
        return self.pictures(self.latents(index, label), index, label)

    def _advice(self, known: str) -> str:
        """What to try: what is known to help, and less guidance where there is any."""
        scales = [f"cfg_scale (it is {self.spec.cfg_scale:g})"] * (self.spec.cfg_scale != 1.0)
        scales += [f"the strength of guidance {GUIDANCES.name_of(g)}" for g in self.spec.guidance]
        lower = f"lower {' and '.join(scales)}" if scales else ""
        found = ", or ".join(part for part in (known, lower) if part)
        return found or "try another solver, more steps, or an earlier checkpoint"


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8, rounded to the nearest. NotFiniteError where one is not finite."""
    images = images.float()
    place = first_not_finite(images)
    if place is not None:
        raise NotFiniteError(f"image {place} of {len(images)} has pixels that are not finite")
    scaled = ((images.clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def labels_for(indices: Tensor, classes: Sequence[int]) -> Tensor:
    """(B,) int64: classes[i mod n]."""
    return torch.tensor(list(classes), dtype=torch.int64)[indices % len(classes)]


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """(N, H, W, 3) uint8 laid out row by row on white: (rows * (H + gap) + gap, ..., 3) uint8."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        canvas[y : y + h, x : x + w] = image
    return canvas

"""From noise to images: what a checkpoint's model, a sampler's spec and an image's index determine together.

Image i depends on (checkpoint, spec, i) alone: its noise is keyed by (seed, i), its label is classes[i mod n].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from dit.config import ConfigError, config
from dit.flow.path import NoisePath
from dit.flow.predict import Model, Prediction
from dit.model.cond import check_labels
from dit.rng import Draws, Purpose
from dit.sample.denoise import DenoiseFn, Denoiser
from dit.sample.grid import GRIDS, Grid, UniformGrid
from dit.sample.guide import GUIDANCES, ClassifierFree, Context, Guidance, Opener, cfg
from dit.sample.solve import SOLVERS, Heun, Solver
from dit.sample.tally import CountedOpener, Tally


def _in_turn(value: Any) -> Any:
    return (value,) if isinstance(value, str | Mapping | Guidance) else value


@config
class SamplerSpec:
    """Everything that decides about the images besides the weights."""

    solver: Annotated[Solver, SOLVERS] = Heun()
    num_steps: Annotated[int, Field(ge=1)] = 50
    grid: Annotated[Grid, GRIDS] = UniformGrid()
    cfg_scale: Annotated[float, Field(ge=0)] = 1.0  # null + scale * (cond - null); 1 = no guidance
    seed: int = 0
    guidance: Annotated[  # more of it, in turn, after cfg_scale; one alone needs no brackets
        tuple[Annotated[Guidance, GUIDANCES], ...], BeforeValidator(_in_turn)
    ] = ()

    def __post_init__(self) -> None:
        if (self.cfg_scale != 1.0) + sum(isinstance(g, ClassifierFree) for g in self.guidance) > 1:
            raise ConfigError(
                f"cfg_scale = {self.cfg_scale:g} and guidance named cfg guide twice or more: leave all but one out"
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
        return self.cfg_scale != 1.0 or any(g.needs_label for g in self.guidance)

    def check(self, path: NoisePath, prediction: Prediction, learns_variance: bool) -> None:
        """ConfigError for what cannot draw from a model of this path and prediction."""
        if self.solver.uses_variance and not learns_variance:
            raise ConfigError(
                f"solver {self.solver} takes the learned variance of the network, and it has none "
                "(model.learn_sigma: false); take the variance small or large"
            )
        self.grid(self.num_steps, path, prediction)

    def guided(self, denoise: DenoiseFn, context: Context) -> DenoiseFn:
        """The denoiser under all the guidance; the very same one where there is none."""
        for guidance in (cfg(self.cfg_scale), *self.guidance):
            denoise = guidance(denoise, context)
        return denoise


@dataclass(frozen=True)
class Sampler:
    """Draws images. shape: (C, H, W) of a latent. decode: model-side latents (B, C, H, W) to images in [-1, 1].

    open: opens the checkpoints that guidance names. tally: counts what was evaluated. classes: that the
    model knows, where labels are to be checked.
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
    classes: int | None = None

    @cached_property
    def denoise(self) -> DenoiseFn:
        """The guided denoiser. The first time opens the checkpoints that the guidance names."""
        network = self.tally.of_evaluations(Denoiser(self.model, self.path, self.prediction))
        opener = None if self.open is None else CountedOpener(self.open, self.tally)
        return self.tally.of_calls(self.spec.guided(network, Context(self.path, opener)))

    @property
    def nfe(self) -> int | None:
        """Calls of the guided denoiser an image; None where the solver chooses its own steps."""
        times = self.times()
        ends_clean = float(self.path.alpha_sigma(times[-1:])[1][0]) == 0.0
        return self.spec.solver.nfe(self.spec.num_steps, to_data=not ends_clean)

    def times(self) -> Tensor:
        """The grid, (num_steps + 1,) float64."""
        return self.spec.grid(self.spec.num_steps, self.path, self.prediction)

    def noise(self, index: Tensor) -> Tensor:
        """(B, C, H, W) the standard normal noise that images `index` (B,) are made from, before the path scales it."""
        return Draws(self.spec.seed, 0, index.to(self.device), 1).normal(Purpose.PRIOR, self.shape)

    @torch.no_grad()
    def latents(self, index: Tensor, label: Tensor) -> Tensor:
        """(B, C, H, W) for images `index` (B,) of classes `label` (B,), both int64; label -1 = no class.

        ValueError for labels that the model does not know.
        """
        if self.classes is not None:
            check_labels(label, self.classes)
        index, label = index.to(self.device), label.to(self.device)

        def noise(draw: int) -> Tensor:
            return Draws(self.spec.seed, draw, index, 1).normal(Purpose.SOLVER, self.shape)

        self.tally.images += len(index)
        times = self.times()
        x = self.path.prior(self.noise(index), float(times[0]))
        return self.spec.solver(self.denoise, x, times, self.path, noise, {"label": label})

    @torch.no_grad()
    def images(self, index: Tensor, label: Tensor) -> np.ndarray:
        """(B, H, W, 3) uint8."""
        return to_uint8(self.decode(self.latents(index, label)))


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8, rounded to the nearest."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def labels_for(indices: Tensor, classes: Sequence[int]) -> Tensor:
    """(B,) int64: classes[i mod n]."""
    return torch.tensor(list(classes), dtype=torch.int64)[indices % len(classes)]


def check_classes(classes: Sequence[int], num_classes: int) -> None:
    """ConfigError for labels that the model has never seen."""
    wrong = [c for c in classes if not -1 <= c < num_classes]
    if wrong:
        raise ConfigError(
            f"classes {wrong} are out of range: this model knows 0..{num_classes - 1} (-1 = no class)"
        )


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """(N, H, W, 3) uint8 laid out row by row on white: (rows * (H + gap) + gap, ..., 3) uint8."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        canvas[y : y + h, x : x + w] = image
    return canvas

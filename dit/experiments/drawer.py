"""Drawing from a model while it is trained: what is known before training of the pictures that it will draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.experiments.diffusion import Experiment
from dit.experiments.latents import latent_contract
from dit.experiments.trained import Checkpoints
from dit.flow.path import NoisePath
from dit.flow.predict import Cond, Endpoints, Prediction
from dit.progress import Bar
from dit.ranks import group
from dit.ranks.group import World
from dit.sample.denoise import DenoiseFn
from dit.sample.drawing import draw_batches, in_batches
from dit.sample.finite import NotFiniteError
from dit.sample.generate import Sampler, SamplerSpec, labels_for
from dit.sample.guide import Context
from dit.sample.tally import CountedOpener, Tally
from dit.train.engines.base import Engine


@dataclass(frozen=True)
class Drawer:
    """Draws from the weights that an engine has at the time. advice: the codec's, where it cannot decode.

    classes: labels of images 0, 1, ... in turn; [-1] of a model without classes.
    """

    path: NoisePath
    prediction: Prediction
    decode: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    spec: SamplerSpec
    open: Checkpoints
    classes: list[int]
    advice: str = ""

    @classmethod
    def of(
        cls, cfg: Experiment, spec: SamplerSpec, manifest: Manifest, norm: LatentNorm, world: World
    ) -> Drawer:
        """Open codec and guidance. Raises as `Experiment.open_codec`, and what the guidance's checkpoints raise."""
        codec, contract = cfg.open_codec(manifest, world.device), latent_contract(manifest, norm)
        opener = Checkpoints(
            cfg.objective.path, contract, cfg.run_dir, "ema", world.device, cfg.train.precision
        )
        for guidance in spec.guidance:  # what it names is opened now, and not after hours
            guidance.check(manifest.channels)
            guidance(lambda x, t, cond: Endpoints(x, x), Context(cfg.objective.path, opener))
        return cls(
            cfg.objective.path,
            cfg.objective.prediction,
            lambda x: codec.decode(norm.invert(x)),
            (manifest.channels, *manifest.input_size),
            spec,
            opener,
            list(range(len(manifest.classes))) if manifest.classes else [-1],
            codec.advice,
        )

    def sampler(self, engine: Engine, tally: Tally | None = None) -> Sampler:
        """What draws from the engine's weights."""
        how = (engine, self.path, self.prediction, self.decode, self.shape, self.spec, self.open.device)
        rest: dict[str, Any] = {"classes": len(self.classes) * (self.classes != [-1])}
        return Sampler(*how, open=self.open, tally=tally or Tally(), codec_advice=self.advice, **rest)

    def labels(self, index: Tensor) -> Tensor:
        """(B,) int64: the classes of images `index` (B,)."""
        return labels_for(index, self.classes)

    def evaluations(self) -> float | None:
        """Networks' evaluations for an image, guidance's and its other models' too; None where the solver chooses.

        Counted at each time of the grid on one image, with a network that does nothing in place of the model.
        """
        sampler, tally = self.sampler_of_nothing(), Tally()
        if sampler.nfe is None:
            return None
        network = tally.of_evaluations(lambda x, t, cond: Endpoints(x, x))
        guided = self.spec.guided(network, Context(self.path, CountedOpener(self.open, tally)))
        x, times = torch.zeros(1, *self.shape, device=self.open.device), sampler.times()[:-1]
        for t in times:
            here = t.float().expand(1).to(self.open.device)
            guided(x, here, {"label": self.labels(torch.zeros(1, dtype=torch.int64)).to(self.open.device)})
        return sampler.nfe * tally.evaluations / len(times)

    def sampler_of_nothing(self) -> Sampler:
        """A sampler without a model, for what is known of it alone: its times, how many calls it makes."""

        def model(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            raise NotImplementedError

        how = (model, self.path, self.prediction, self.decode, self.shape, self.spec, self.open.device)
        return Sampler(*how)


@dataclass(frozen=True)
class Blocks:
    """Images 0 to count in blocks of `size`, the last filled up: block k is drawn by rank k mod ranks.

    In a round all ranks draw, one that has no block left again its first: the layers of a sharded model need as many
    calls of each. A solver that chooses its own steps makes more calls for some images than for others, so that there
    all ranks of a sharded model draw the same blocks.
    """

    drawer: Drawer
    engine: Engine
    count: int
    size: int

    @property
    def number(self) -> int:
        """How many blocks there are."""
        return -(-self.count // self.size)

    @property
    def are_shared_out(self) -> bool:
        """Whether each rank draws blocks of its own."""
        return self.engine.stage < 3 or self.drawer.sampler_of_nothing().nfe is not None

    @property
    def rounds(self) -> int:
        """How often ranks draw."""
        return -(-self.number // self.engine.world.size) if self.are_shared_out else self.number

    def give(self, turn: int) -> np.ndarray | None:
        """This rank's images of a round, None where another rank gives them. Collective.

        Raises NotFiniteError on all ranks where one of their images is none.
        """
        world = self.engine.world
        block = turn * world.size + world.rank if self.are_shared_out else turn
        drawn = group.together(partial(self._drawn, block % self.number))
        bad = [text for text in group.gather_objects(drawn if isinstance(drawn, str) else None) if text]
        if bad:
            raise NotFiniteError(bad[0])
        is_mine = block < self.number and (self.are_shared_out or world.is_main)
        return drawn if is_mine and not isinstance(drawn, str) else None

    def _drawn(self, block: int) -> np.ndarray | str:
        """The images of a block (≤ size, H, W, 3) uint8; in words which one is not finite."""
        sampler, numbers = self.drawer.sampler(self.engine), in_batches(self.count, self.size)[block]
        try:
            (batch,) = draw_batches(sampler, self.drawer.labels, [numbers], self.size)
            return sampler.pictures(batch.latents, batch.index, batch.label, batch.wanted)
        except NotFiniteError as error:
            return str(error)


@dataclass
class ShownTally(Tally):
    """Counts, and moves a bar on at each call of the guided denoiser."""

    bar: Bar[None] = field(kw_only=True)

    def of_calls(self, denoise: DenoiseFn) -> DenoiseFn:
        counted = super().of_calls(denoise)

        def shown(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            self.bar.update()
            return counted(x, t, cond)

        return shown

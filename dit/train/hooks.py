"""What happens between steps now and then, and grids of samples with the EMA weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dit.errors import Notice
from dit.progress import say
from dit.sample.finite import NotFiniteError
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.meters import RunLog


class Hook(Protocol):
    """Something to do every `every` steps; collective, so that sharded models may be run in it."""

    every: int

    @property
    def name(self) -> str:
        """What it makes, in words."""

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        """step: steps done."""


@dataclass
class SampleGrid:
    """A grid of images from the same noise each time: watch them sharpen.

    Where one is not finite there is no picture of that step, a Notice says so, and the run goes on.
    """

    every: int
    draw: Callable[[Engine], np.ndarray]  # -> (H, W, 3) uint8
    folder: Path
    name: ClassVar[str] = "pictures"

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        used = ema.for_use()
        try:
            with ema.swapped_in(), torch.no_grad():
                grid = self.draw(engine)
        except NotFiniteError as error:  # after all that ranks do together
            if engine.world.is_main:
                warnings.warn(f"no picture of step {step}: {error}. The run goes on", Notice, stacklevel=2)
            return
        log.image(step, "samples", grid, str(used))
        if engine.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            file, about = self.folder / f"step-{step:08d}.png", PngInfo()
            about.add_text("Title", f"step {step}, {used}")
            Image.fromarray(grid).save(file, pnginfo=about)
            say(f"step {step}: pictures of {used} in {file}")

"""The way from noise to images, seen by watching the guided denoiser while a solver calls it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit.config import ConfigError
from dit.files import write_atomically
from dit.flow.predict import Cond, Endpoints
from dit.sample.generate import Sampler, image_grid, to_uint8
from dit.sample.solve import SOLVERS, time_dtype

SHOWN = 16  # images at most
FRAMES = 64  # at most, evenly spaced over those of the grid; the first and the last among them
COLUMNS = 8
SMALL = 4_000_000  # pixels in all: up to it no pixel is lost, as one would see in images of few pixels
QUALITY = 85  # of WebP, from 0 to 100, beyond that
STEP_MS, LAST_MS = 100, 2000  # how long a frame and the last one stand


@dataclass(frozen=True)
class Frame:
    """What a time of the grid shows: x / (alpha + sigma) and the guided estimate of the data, (B, C, H, W) each."""

    t: float
    x: Tensor
    data: Tensor


def check_followed(sampler: Sampler) -> None:
    """ConfigError where the solver chooses its own steps: its images stand at different times in each call."""
    if sampler.nfe is None:
        raise ConfigError(
            f"--trajectory with the solver {SOLVERS.name_of(sampler.spec.solver)}: each image has its own times in it, "
            "so there are no frames of one time; take a solver of fixed steps, such as heun"
        )


def trajectory(
    sampler: Sampler, index: Tensor, label: Tensor, done: Callable[[], Any] = lambda: None
) -> list[Frame]:
    """Frames of drawing images `index` of classes `label`, (B,) int64 each: one a time of the grid, from noise on.

    Where the denoiser is called more than once at a time, the last call counts: behind Heun's corrector. Times at which
    it is not called have no frame. The last frame is the result. done: is called with each of `sampler.nfe`. Raises
    ConfigError where the solver chooses its own steps, NotFiniteError.
    """
    check_followed(sampler)
    seen: dict[float, tuple[Tensor, Tensor]] = {}

    def watched(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        ends = sampler.denoise(x, t, cond)
        seen[float(t[0])] = x, ends.data
        done()
        return ends

    latents = sampler.latents(index, label, denoise=watched)
    times = sampler.times()
    alpha, sigma = sampler.path.alpha_sigma(times)
    frames = []
    for t, scale in zip(times.tolist(), (alpha + sigma).tolist(), strict=True):
        held = seen.get(float(torch.tensor(t, dtype=time_dtype(latents))))
        if held is not None:
            frames.append(Frame(t, held[0] / scale, held[1]))
    last = float(times[-1])
    return [frame for frame in frames if frame.t > last] + [Frame(last, latents, latents)]


@torch.no_grad()
def write_animation(path: Path, frames: list[Frame], sampler: Sampler) -> int:
    """Write an animated WebP, x in its upper half and the data below it, both decoded; the number of its frames."""
    pictures = [Image.fromarray(pictured(frames[i], sampler)) for i in spaced(len(frames), FRAMES)]
    times = [STEP_MS] * (len(pictures) - 1) + [LAST_MS]
    held = io.BytesIO()
    width, height = pictures[0].size
    how: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0}
    how |= {"lossless": width * height * len(pictures) <= SMALL, "quality": QUALITY}
    pictures[0].save(held, "WEBP", **how)
    write_atomically(path, held.getvalue())
    return len(pictures)


def spaced(count: int, most: int) -> list[int]:
    """At most so many of range(count), evenly spaced, the first and the last among them."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(most, count)).round())]


@torch.no_grad()
def pictured(frame: Frame, sampler: Sampler) -> np.ndarray:
    """A frame as uint8 (H, W, 3): two grids, x above the data, both decoded.

    Noise may decode to anything: what is not finite there is grey.
    """
    halves = []
    for latents in (frame.x, frame.data):
        decoded = sampler.decode(latents).float()
        images = to_uint8(torch.where(decoded.isfinite(), decoded, 0.0))
        halves.append(image_grid(images, columns=min(COLUMNS, len(images))))
    return np.concatenate(halves)

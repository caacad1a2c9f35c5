"""How good reconstructions of held-out images are: PSNR, SSIM, a Fréchet distance, use of the codebook."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dit.data.codecs.base import in_range
from dit.evals.metrics.frechet import Statistics, frechet_distance
from dit.evals.protocol import protocol_hash
from dit.files import read_text
from dit.progress import say
from dit.ranks import group
from dit.stage1.autoencoder import code_perplexity, count_codes
from dit.stage1.autoencoder_task import AutoencoderTask
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.held_out import HeldOut
from dit.train.meters import RunLog
from dit.train.task import Samples

PROTOCOL = {
    "images": "[0, 1], clamped, not rounded",
    "latents": "posterior mean, or nearest entry",
    "psnr": "dB, data range 1, mean over images",
    "ssim": "torchmetrics, 11x11 Gaussian of sigma 1.5, data range 1, mean over images",
    "frechet": "of originals to reconstructions in means over places of the last layer of the perceptual backbone",
}
SSIM_SIDE = 6  # pixels at least: the window reflects 5 at the border


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) in dB, of images (B, 3, H, W) in [0, 1]: 10 log10(1 / mean squared error) of each."""
    return peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(B,) in [-1, 1], of images (B, 3, H, W) in [0, 1] (Wang et al., 2004, eq. 13)."""
    found: Tensor = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")  # type: ignore[assignment]
    return found.view(-1)


@dataclass
class ReconstructionFigures:
    """Figures of held-out images' reconstructions with EMA weights, a line in held_out.jsonl beside the loss's."""

    every: int
    task: AutoencoderTask
    held_out: HeldOut
    name: ClassVar[str] = "reconstructions"

    @property
    def protocol(self) -> str:
        """Hash of what has to be the same for two of these figures to be compared."""
        perceptual = self.task.perceptual
        measured = {**PROTOCOL, "backbone": None if perceptual is None else perceptual.identity}
        return protocol_hash({**self.held_out.protocol, **measured})

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        used = ema.for_use()
        with ema.swapped_in(), torch.no_grad():
            each = partial(self.of_batch, engine)
            values = self.measure(self.held_out.each(self.task, engine, "reconstructions", each))
        row = {**values, **used.row, "protocol": self.protocol}
        log.held_out(step, row)
        if engine.world.is_main:
            say(f"{figures_line({**row, 'step': step})} of {used}")

    def of_batch(self, engine: Callable[..., Any], samples: Samples) -> dict[str, np.ndarray]:
        """Values (B, ...) float64 of each image. engine: images and noise to outputs."""
        images = samples.moments[:, 0].float()  # (B, 3, H, W)
        outputs = engine(images, torch.zeros(len(images), *self.task.latent, device=images.device))
        found = self._of_each(images, outputs)
        return {name: value.double().cpu().numpy() for name, value in found.items()}

    def measure(self, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
        """Figures over all ranks. batches: what `of_batch` gave of this rank's share. Collective."""
        perceptual = self.task.perceptual
        rows = [found for share in group.gather_objects(list(batches)) for found in share]
        whole = {name: np.concatenate([found[name] for found in rows]) for name in rows[0]}
        figures: dict[str, float] = {
            name: float(whole[name].mean()) for name in ("psnr", "ssim") if name in whole
        }
        if perceptual is not None:
            fitted = [Statistics.fit(whole[name]) for name in ("features", "features_of_original")]
            figures[f"frechet_{perceptual.name}"] = frechet_distance(*fitted)
        if "codes" in whole:
            counts = torch.from_numpy(whole["codes"]).sum(0)
            figures["codebook_used"] = float((counts > 0).double().mean())
            figures["codebook_perplexity"] = float(code_perplexity(counts))
        return figures

    def _of_each(self, images: Tensor, outputs: Any) -> dict[str, Tensor]:
        """Values (B, ...) of each image."""
        shown = in_range(outputs[0])
        a, b = (shown + 1) / 2, (images + 1) / 2
        found = {"psnr": psnr(a, b)}
        if min(images.shape[-2:]) >= SSIM_SIDE:
            found["ssim"] = ssim(a, b)
        if self.task.perceptual is not None:
            found["features"] = self.task.perceptual.features(shown)
            found["features_of_original"] = self.task.perceptual.features(images)
        if self.task.autoencoder.codebook:
            found["codes"] = count_codes(self.task.autoencoder.codes(outputs), self.task.autoencoder.codebook)
        return found


def newest(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The last figures in a run's held_out.jsonl up to `step`, or None."""
    path = run_dir / "held_out.jsonl"
    rows = [json.loads(line) for line in read_text(path).splitlines()] if path.is_file() else []
    return next((row for row in reversed(rows) if "psnr" in row and row["step"] <= step), None)


def figures_line(row: dict[str, Any]) -> str:
    """One line of figures for a person."""
    units = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}"}
    figures = {k: v for k, v in row.items() if isinstance(v, float) and k != "start_share"}
    parts = [units.get(k, k + " {:.4g}").format(v) for k, v in figures.items()]
    return f"{', '.join(parts)} (held out, step {row['step']}, protocol {row['protocol']})"

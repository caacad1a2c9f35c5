"""PSNR, SSIM, the Fréchet distance and use of the codebook, against closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit.ranks.group import World
from dit.rng import Draws
from dit.stage1.autoencoder import AutoencoderConfig, Kl, Vq
from dit.stage1.autoencoder_task import AutoencoderTask
from dit.stage1.figures import ReconstructionFigures, figures_line, newest, psnr, ssim
from dit.stage1.perceptual import Backbone, Perceptual
from dit.train.held_out import HeldOut
from dit.train.task import Samples


def some(count: int = 6, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_psnr_of_a_constant_error(error: float) -> None:
    images = some() * 0.5
    torch.testing.assert_close(
        psnr(images + error, images), torch.full((6,), -20 * math.log10(error)), rtol=1e-4, atol=0
    )


def test_psnr_is_of_each_image() -> None:
    a, b = some(), some().flip(0)
    expected = [10 * math.log10(1 / float((x - y).square().mean())) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(psnr(a, b), torch.tensor(expected))


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.6), (0.0, 1.0), (0.5, 0.5)])
def test_ssim_of_flat_images_is_that_of_their_luminance(a: float, b: float) -> None:
    """Wang et al. (2004), eq. 6 with C1 = 0.01²: their variances and covariance are 0."""
    flat = torch.ones(2, 3, 16, 16)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    torch.testing.assert_close(ssim(a * flat, b * flat), torch.full((2,), expected), rtol=1e-3, atol=1e-5)


def test_ssim_of_an_image_with_itself_and_with_others() -> None:
    a = some()
    torch.testing.assert_close(ssim(a, a), torch.ones(6))
    one_bad = a.clone()
    one_bad[2] = 1 - a[2]  # the negative: structure turned round
    found = ssim(one_bad, a)
    assert found[2] < 0
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], torch.ones(5))


# --- over held-out data ------------------------------------------------------------------------------------


class Look(nn.Module):
    """Two maps; the last is the picture."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :1], x]


def look() -> Perceptual:
    return Perceptual(1.0, {"backbone": "the:eye", "sha256": "0"}, Backbone(Look(), (0.5,) * 3, (0.5,) * 3))


def figures(
    autoencoder: AutoencoderConfig | None = None, perceptual: Perceptual | None = None
) -> ReconstructionFigures:
    task = AutoencoderTask(autoencoder or Kl(), 0.1, (2, 4, 4), perceptual=perceptual)
    return ReconstructionFigures(1, task, held_out())


def held_out(samples: int = 64) -> HeldOut:
    """Some data of so many samples, which nobody opens."""
    data: Any = SimpleNamespace(digest="some")
    return HeldOut(data, (), World(), samples, 1, samples)


def measured(
    figures: ReconstructionFigures, model: Callable[..., Any], parts: Iterator[Samples]
) -> dict[str, float]:
    return figures.measure(figures.of_batch(model, part) for part in parts)


def batches(images: Tensor, size: int) -> Iterator[Samples]:
    slots = torch.arange(len(images))
    whole = Samples(images[:, None] * 2 - 1, slots, slots < 0, Draws(0, 0, slots, len(images)))
    return whole.micro_batches(size)


def test_figures_are_means_over_images_however_they_are_cut() -> None:
    images, seen = some(), []

    def model(x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        seen.append(noise)
        return x * 1.5, x, x  # beyond [-1, 1]: what is shown is clamped

    whole = measured(figures(), model, batches(images, 6))
    parts = measured(figures(), model, batches(images, 4))
    assert whole == pytest.approx(parts, rel=1e-6)
    shown = ((images * 2 - 1) * 1.5).clamp(-1, 1) / 2 + 0.5
    assert whole["psnr"] == pytest.approx(float(psnr(shown, images).mean()), rel=1e-5)
    assert whole["ssim"] == pytest.approx(float(ssim(shown, images).mean()), rel=1e-5)
    assert set(whole) == {"psnr", "ssim"}
    assert not any(noise.any() for noise in seen)  # of the posterior's mean
    assert seen[0].shape == (6, 2, 4, 4)


def test_images_smaller_than_its_window_have_no_ssim() -> None:
    found = measured(figures(), lambda x, noise: (x * 0.9,), batches(some(size=5), 3))
    assert set(found) == {"psnr"}


def test_the_frechet_distance_of_a_shift_is_its_square() -> None:
    """Features are means of pixels in [-1, 1]: a shift of 0.1 moves the mean by 0.1 in 3 channels and nothing else."""
    images = 0.2 + some(40) * 0.5
    shifted = measured(figures(perceptual=look()), lambda x, noise: (x + 0.1,), batches(images, 20))
    same = measured(figures(perceptual=look()), lambda x, noise: (x,), batches(images, 20))
    assert shifted["frechet_the_eye"] == pytest.approx(3 * 0.1**2, rel=1e-3)
    assert same["frechet_the_eye"] == pytest.approx(0.0, abs=1e-9)


def test_use_of_the_codebook_is_over_all_images() -> None:
    codes = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [0, 0], [1, 1]]).view(6, 1, 2)
    places = iter(codes.split(3))
    found = measured(figures(Vq(codebook=8)), lambda x, noise: (x, x, x, next(places)), batches(some(), 3))
    assert found["codebook_used"] == 4 / 8
    share = np.array([4, 4, 2, 2]) / 12
    assert found["codebook_perplexity"] == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def test_the_protocol_says_what_was_measured_and_on_what() -> None:
    plain = figures()
    assert plain.protocol == figures(Vq()).protocol  # the same figures of another model
    assert plain.protocol != figures(perceptual=look()).protocol
    assert plain.protocol != ReconstructionFigures(1, plain.task, held_out(32)).protocol


def test_the_newest_figures_are_told(tmp_path: Path) -> None:
    assert newest(tmp_path, 10) is None
    rows: list[dict[str, Any]] = [
        {"step": 5, "loss": 1.0, "protocol": "a"},
        {"step": 5, "psnr": 30.0, "ssim": 0.5, "protocol": "b"},
        {"step": 10, "loss": 0.5, "protocol": "a"},
        {"step": 10, "psnr": 31.234, "ssim": 0.54321, "frechet_the_eye": 0.012345, "protocol": "b"},
    ]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert newest(tmp_path, 9) == rows[1]
    found = newest(tmp_path, 10)
    assert found == rows[3]
    assert (
        figures_line(found)
        == "PSNR 31.23 dB, SSIM 0.5432, frechet_the_eye 0.01235 (held out, step 10, protocol b)"
    )

"""The autoencoder's shapes, and its loss by closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict
from dit.data.codec import VaeCodec
from dit.rng import Draws, Purpose
from dit.stage1.autoencoder import AutoencoderConfig, AutoencoderTask
from dit.train.task import Samples

SMALL = AutoencoderConfig(widths=(8, 16), groups=4, latent_channels=3)


def samples(images: Tensor, step: int = 0) -> Samples:
    slots = torch.arange(len(images))
    draws = Draws(0, step, slots, len(images))
    return Samples(images[:, None], slots, torch.zeros(len(images), dtype=torch.bool), draws)


@pytest.mark.parametrize(("widths", "factor"), [((8,), 1), ((8, 8), 2), ((8, 16, 16), 4)])
def test_each_width_after_the_first_halves_the_image(widths: tuple[int, ...], factor: int) -> None:
    cfg = AutoencoderConfig(widths=widths, groups=4, latent_channels=3)
    assert cfg.factor == factor
    latent = (2, 3, 8 // factor, 8 // factor)
    output, mean, log_variance = cfg.build()(torch.zeros(2, 3, 8, 8), torch.zeros(latent))
    assert output.shape == (2, 3, 8, 8)
    assert mean.shape == log_variance.shape == latent


@pytest.mark.parametrize(
    "bad",
    [{"widths": []}, {"widths": [16, 20], "groups": 8}, {"layers": 0}, {"groups": 0}, {"latent_channels": 0}],
)
def test_impossible_shapes_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        from_dict(AutoencoderConfig, bad)


def test_the_noise_is_scaled_by_the_posteriors_std_and_decoded() -> None:
    torch.manual_seed(0)
    module = SMALL.build().eval()
    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        output, mean, log_variance = module(images, noise)
        expected = module.vae.decode(mean + (0.5 * log_variance).exp() * noise).sample
        torch.testing.assert_close(output, expected)
        without, _, _ = module(images, torch.zeros_like(noise))
    codec = VaeCodec(module.vae)  # the codec that will use it sees the same posterior and the same picture
    moments = codec.encode(images)
    torch.testing.assert_close(moments[:, 0], mean)
    torch.testing.assert_close(moments[:, 1], (0.5 * log_variance).exp())
    torch.testing.assert_close(codec.decode(mean), without.clamp(-1, 1))


class Fixed:
    """A network that gives the picture back with an error, and a posterior of given mean and log-variance."""

    def __init__(self, error: float, mean: float, log_variance: float):
        self.error, self.mean, self.log_variance = error, mean, log_variance
        self.noise: list[Tensor] = []

    def __call__(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.noise.append(noise)
        like = torch.ones_like(noise)
        return images + self.error, self.mean * like, self.log_variance * like


@pytest.mark.parametrize(
    ("mean", "log_variance", "kl"),
    [
        (0.0, 0.0, 0.0),
        (2.0, 0.0, 2.0),
        (0.0, math.log(4.0), 0.5 * (4 - 1 - math.log(4.0))),
        (1.0, -2.0, 0.5 * (1 + math.exp(-2) - 1 + 2)),
    ],
)
def test_the_loss_is_squared_error_plus_weighted_kl(mean: float, log_variance: float, kl: float) -> None:
    task = AutoencoderTask(kl_weight=0.1, latent=(3, 4, 4))
    loss = task.loss(Fixed(0.5, mean, log_variance), samples(torch.zeros(4, 3, 8, 8)))
    torch.testing.assert_close(loss.per_sample, torch.full((4,), 0.25 + 0.1 * kl), rtol=1e-6, atol=1e-7)
    assert loss.mean.item() == pytest.approx(0.25 + 0.1 * kl, rel=1e-6)
    assert float(loss.metrics["pixel_mse"]) == pytest.approx(0.25)
    assert float(loss.metrics["kl"]) == pytest.approx(kl, rel=1e-6, abs=1e-7)
    assert loss.t is None


def test_its_noise_depends_on_step_and_slot_alone() -> None:
    task, images = AutoencoderTask(0.1, (3, 4, 4)), torch.zeros(6, 3, 8, 8)
    whole, parts, later = (Fixed(0, 0, 0) for _ in range(3))
    task.loss(whole, samples(images))
    for part in samples(images).micro_batches(2):
        task.loss(parts, part)
    task.loss(later, samples(images, step=1))
    assert torch.equal(torch.cat(parts.noise), whole.noise[0])
    assert not torch.equal(later.noise[0], whole.noise[0])
    expected = Draws(0, 0, torch.arange(6), 6).normal(Purpose.POSTERIOR, (3, 4, 4))
    assert torch.equal(whole.noise[0], expected)


def test_it_has_no_labels_to_drop_and_no_first_loss_to_predict() -> None:
    task = AutoencoderTask(0.1, (3, 4, 4))
    drops = task.drops(Draws(0, 0, torch.arange(5), 5))
    assert drops.dtype == torch.bool
    assert not drops.any()
    loss = task.loss(Fixed(9.0, 0, 0), samples(torch.zeros(16, 3, 8, 8)))
    assert task.check_first_loss([loss], 192) is None
    assert task.group == 1
    assert task.uncoupled() is task

"""The loss of stage 1: closed forms, each sample's own, and each part's gradient on its own side alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from dit.rng import Draws, Purpose
from dit.stage1.autoencoder import AUTOENCODERS, Kl
from dit.stage1.autoencoder_task import PIXEL_LOSSES, AutoencoderTask
from dit.stage1.discriminator import DiscriminatorConfig, Opposed
from dit.stage1.perceptual import Backbone, Perceptual
from dit.train.task import Samples

START = 5


def samples(images: Tensor, step: int = 0) -> Samples:
    slots = torch.arange(len(images))
    draws = Draws(0, step, slots, len(images))
    return Samples(images[:, None], slots, torch.zeros(len(images), dtype=torch.bool), draws)


def some(count: int = 6, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Fixed:
    """A network that gives the picture back with an error, and a posterior of given mean and log-variance."""

    def __init__(self, error: float, mean: float, log_variance: float):
        self.error, self.mean, self.log_variance = error, mean, log_variance
        self.noise: list[Tensor] = []

    def __call__(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.noise.append(noise)
        like = torch.ones_like(noise)
        return images + self.error, self.mean * like, self.log_variance * like


def perceptual() -> Perceptual:
    """Two convolutions that see more than a pixel."""
    torch.manual_seed(5)
    nets = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3, 2)])

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nets

        def forward(self, x: Tensor) -> list[Tensor]:
            return [net(x).tanh() for net in self.nets]

    return Perceptual(0.3, {"backbone": "two"}, Backbone(Both(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


def opposed(name: str, **settings: Any) -> tuple[Opposed, AutoencoderTask]:
    """A small module and its task with everything turned on."""
    torch.manual_seed(0)
    autoencoder = AUTOENCODERS.parse({"name": name, "widths": (8, 8), "groups": 4, "latent_channels": 2})
    discriminator = DiscriminatorConfig(width=8, layers=1, groups=4, start=START, weight=0.7, scale=0.2)
    module = Opposed(autoencoder.build(), discriminator.build(8, 8))
    with torch.no_grad():  # away from the first weights, which see next to nothing
        for p in module.discriminator.parameters():
            p.add_(0.2 * torch.randn_like(p))
    task = AutoencoderTask(autoencoder, 0.1, (2, 4, 4), perceptual=perceptual(), discriminator=discriminator)
    return module, replace(task, **settings)


# --- without a discriminator -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "error"), [("l2", 0.25), ("l1", 0.5)])
def test_the_loss_is_pixel_error_plus_weighted_kl(name: str, error: float) -> None:
    pixel = PIXEL_LOSSES.parse(name)
    task = AutoencoderTask(Kl(), 0.1, (3, 4, 4), pixel=pixel)
    loss = task.loss(Fixed(-0.5, 2.0, 0.0), samples(torch.zeros(4, 3, 8, 8)))
    torch.testing.assert_close(loss.per_sample, torch.full((4,), error + 0.1 * 2.0), rtol=1e-6, atol=1e-7)
    assert loss.mean.item() == pytest.approx(error + 0.1 * 2.0, rel=1e-6)
    assert float(loss.metrics[pixel.metric]) == pytest.approx(error)
    assert float(loss.metrics["kl"]) == pytest.approx(2.0)
    assert set(loss.metrics) == {pixel.metric, "kl"}
    assert loss.t is None


@pytest.mark.parametrize("name", PIXEL_LOSSES.names())
def test_a_pixel_loss_is_a_mean_over_elements_and_nought_for_no_error(name: str) -> None:
    pixel = PIXEL_LOSSES.parse(name)
    error = some()
    assert pixel(torch.zeros_like(error)).tolist() == [0.0] * 6
    torch.testing.assert_close(pixel(error), pixel(error.repeat(1, 1, 2, 2)))
    torch.testing.assert_close(pixel(error), pixel(-error))


def test_its_noise_depends_on_step_and_slot_alone() -> None:
    task, images = AutoencoderTask(Kl(), 0.1, (3, 4, 4)), torch.zeros(6, 3, 8, 8)
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
    task = AutoencoderTask(Kl(), 0.1, (3, 4, 4))
    drops = task.drops(Draws(0, 0, torch.arange(5), 5))
    assert drops.dtype == torch.bool
    assert not drops.any()
    loss = task.loss(Fixed(9.0, 0, 0), samples(torch.zeros(16, 3, 8, 8)))
    assert task.check_first_loss([loss], 192) is None
    assert task.group == 1
    assert task.uncoupled() is task


def test_a_discriminator_rests_where_the_task_has_none() -> None:
    module, task = opposed("kl", discriminator=None)
    beside = task.loss(module, samples(some(), START))
    alone = task.loss(module.autoencoder, samples(some(), START))
    assert torch.equal(beside.per_sample, alone.per_sample)
    assert beside.metrics.keys() == alone.metrics.keys()


# --- with one ----------------------------------------------------------------------------------------------


def gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, weights, found, strict=True)}


def reference(module: Opposed, task: AutoencoderTask, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The generator's loss, the discriminator's and the adaptive weights, (B,) each, from plain autograd: a sample
    at a time, the discriminator's weights detached where the generator looks at it."""
    noise = Draws(0, START, torch.arange(len(images)), len(images)).normal(Purpose.POSTERIOR, task.latent)
    outputs = module.autoencoder(images, noise)
    fake = outputs[0]
    frozen = {n: p.detach() for n, p in module.discriminator.named_parameters()}
    fidelity = task.pixel(fake - images) + task.perceptual.weight * task.perceptual(fake, images)
    adversarial = -functional_call(module.discriminator, frozen, (fake,)).mean(1)
    penalty, _ = task.autoencoder.penalty(outputs)
    weights = []
    for i in range(len(images)):
        norms = [
            torch.autograd.grad(v[i], fake, retain_graph=True)[0].norm() for v in (fidelity, adversarial)
        ]
        weights.append(norms[0] / (norms[1] + 1e-4 / images[0].numel() ** 0.5))
    adaptive = torch.stack(weights).detach()
    generator = fidelity + task.discriminator.weight * adaptive * adversarial + task.weight * penalty
    real, false = module.discriminator(images), module.discriminator(fake.detach())
    return generator, 0.5 * ((1 - real).relu().mean(1) + (1 + false).relu().mean(1)), adaptive


@pytest.mark.parametrize("name", AUTOENCODERS.names())
def test_each_part_reaches_its_own_side_alone(name: str) -> None:
    """One backward pass gives the autoencoder the generator's gradient and the discriminator its own."""
    module, task = opposed(name)
    images = some()
    generator, opposition, adaptive = reference(module, task, images)
    loss = task.loss(module, samples(images, START))
    torch.testing.assert_close(loss.per_sample, generator + 0.2 * opposition)
    torch.testing.assert_close(loss.metrics["adaptive_weight"], adaptive.mean())
    torch.testing.assert_close(loss.metrics["discriminator"], opposition.mean())
    assert float(adaptive.std()) > 0  # each sample has its own
    found = gradients(module, loss.mean)
    of_generator, of_discriminator = (
        gradients(module, generator.mean()),
        gradients(module, 0.2 * opposition.mean()),
    )
    for key, gradient in found.items():
        own, other = of_generator[key], of_discriminator[key]
        if key.startswith("discriminator."):
            own, other = other, own
        assert not other.any()
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in module.parameters())  # weighing leaves nothing behind


@pytest.mark.parametrize("name", AUTOENCODERS.names())
def test_before_its_start_the_discriminator_learns_and_is_not_heard(name: str) -> None:
    module, task = opposed(name)
    images = some()
    loss = task.loss(module, samples(images, START - 1))
    quiet = replace(task, discriminator=None).loss(module, samples(images, START - 1))
    torch.testing.assert_close(loss.mean, quiet.mean + 0.2 * loss.metrics["discriminator"])
    assert float(loss.metrics["adaptive_weight"]) == 0.0
    heard, alone = gradients(module, loss.mean), gradients(module, quiet.mean)
    for key, gradient in heard.items():
        if key.startswith("discriminator."):
            assert gradient.any()
        else:
            torch.testing.assert_close(gradient, alone[key])


@pytest.mark.parametrize("step", [START - 1, START])
def test_without_gradients_the_discriminator_is_still_judged(step: int) -> None:
    """The probe of a checkpoint covers its weights too; nothing weighs the adversarial term then."""
    module, task = opposed("kl")
    with torch.no_grad():
        loss = task.loss(module, samples(some(), step))
        module.discriminator.net[0].weight.add_(0.1)
        other = task.loss(module, samples(some(), step))
    assert float(loss.metrics["adaptive_weight"]) == 0.0
    assert float(loss.mean) != float(other.mean)


@pytest.mark.parametrize("name", AUTOENCODERS.names())
@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4), step=st.integers(START - 1, START + 1))
def test_how_the_batch_is_cut_does_not_show(name: str, cuts: list[int], step: int) -> None:
    """A sample's loss, and the sum of gradients, are the same in any micro-batch."""
    module, task = opposed(name)
    batch = samples(some(sum(cuts)), step)
    whole = task.loss(module, batch)
    parts, start = [], 0
    for size in cuts:
        cut = slice(start, start := start + size)
        draws = batch.draws.select(cut)
        parts.append(task.loss(module, Samples(batch.moments[cut], batch.label[cut], batch.drop[cut], draws)))
    each = torch.cat([part.per_sample for part in parts])
    torch.testing.assert_close(each, whole.per_sample, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(part.mean, part.per_sample.mean()) for part in [whole, *parts])
    summed, at_once = gradients(module, each.mean()), gradients(module, whole.mean)
    for key, gradient in summed.items():
        torch.testing.assert_close(gradient, at_once[key], rtol=1e-3, atol=1e-6)


def test_bad_samples_stay_by_themselves() -> None:
    """A sample that is not finite spoils neither the others' losses nor their weights."""
    module, task = opposed("kl")
    images = some()
    images[2] = float("nan")
    found = task.loss(module, samples(images, START)).per_sample.detach()
    clean = task.loss(module, samples(some(), START)).per_sample.detach()
    assert found.isnan().tolist() == [i == 2 for i in range(6)]
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])

"""What an autoencoder is trained on: pixel error, perceptual distance, its own penalty and a discriminator."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit.config import Registry, config
from dit.flow.loss import Loss
from dit.rng import Purpose
from dit.stage1.autoencoder import AutoencoderConfig, Terms
from dit.stage1.discriminator import DiscriminatorConfig, WithGradient, adaptive_weight, hinge
from dit.stage1.perceptual import Perceptual
from dit.train.task import Network, PlainTask, Samples


class PixelLoss:
    """Error of a reconstruction, pixel by pixel."""

    metric: str  # its name in the log

    def __call__(self, error: Tensor) -> Tensor:
        """Differences (B, 3, H, W) of images in [-1, 1] -> (B,), a mean over elements."""
        raise NotImplementedError


PIXEL_LOSSES: Registry[PixelLoss] = Registry("pixel loss")


@PIXEL_LOSSES.register("l2")
@config
class L2(PixelLoss):
    """Squared error."""

    metric = "pixel_mse"

    def __call__(self, error: Tensor) -> Tensor:
        return error.square().flatten(1).mean(1)


@PIXEL_LOSSES.register("l1")
@config
class L1(PixelLoss):
    """Absolute error: sharper, as VQGAN takes it."""

    metric = "pixel_mae"

    def __call__(self, error: Tensor) -> Tensor:
        return error.abs().flatten(1).mean(1)


@dataclass(frozen=True)
class AutoencoderTask(PlainTask):
    """Fidelity (pixel loss and perceptual distance) plus the autoencoder's penalty plus the adversarial terms.

    weight: of the penalty. latent: (C, h, w). Every term is each sample's own: (B,). With a discriminator the model is
    `Opposed`; without one the model may be either, and its discriminator rests.
    """

    autoencoder: AutoencoderConfig
    weight: float
    latent: tuple[int, int, int]
    pixel: PixelLoss = field(default_factory=L2)
    perceptual: Perceptual | None = None
    discriminator: DiscriminatorConfig | None = None

    def loss(self, network: Network, samples: Samples) -> Loss:
        images = samples.moments[:, 0].float()  # (B, 3, H, W)
        noise = samples.draws.normal(Purpose.POSTERIOR, self.latent)
        if self.discriminator is None:
            outputs = network(images, noise)
            fidelity, terms = self.fidelity(outputs[0].float(), images)
            opposition: Tensor | float = 0.0
        else:
            # without gradients (the probe, held-out data) there is none to weigh the adversarial term by
            push = samples.draws.step >= self.discriminator.start and torch.is_grad_enabled()
            outputs, *verdict = network(images, noise, judge=True, push=push)
            fidelity, opposition, terms = self._opposed(outputs[0].float(), images, verdict)
        penalty, more = self.autoencoder.penalty(outputs)
        per_sample = fidelity + self.weight * penalty + opposition
        metrics = {name: value.detach().mean() for name, value in (terms | more).items()}
        return Loss(per_sample.mean(), per_sample, None, metrics)

    def fidelity(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, Terms]:
        """(B,) from two (B, 3, H, W), and terms to log."""
        pixel = self.pixel(reconstruction - images)  # (B,)
        if self.perceptual is None:
            return pixel, {self.pixel.metric: pixel}
        distance = self.perceptual(reconstruction, images)  # (B,)
        return pixel + self.perceptual.weight * distance, {self.pixel.metric: pixel, "perceptual": distance}

    def _opposed(
        self, reconstruction: Tensor, images: Tensor, verdict: list[Tensor]
    ) -> tuple[Tensor, Tensor, Terms]:
        """Fidelity with the adversarial term, the discriminator's scaled loss, and terms to log; each (B,)."""
        assert self.discriminator is not None
        real, fake, *pushes = verdict
        opposition = hinge(real, fake)
        seen = {
            "discriminator": opposition,
            "score_real": real.float().mean(1),
            "score_fake": fake.float().mean(1),
        }
        if not pushes:
            fidelity, terms = self.fidelity(reconstruction, images)
            return (
                fidelity,
                self.discriminator.scale * opposition,
                terms | seen | {"adaptive_weight": torch.zeros_like(opposition)},
            )
        score, towards_real = pushes
        leaf = reconstruction.detach().requires_grad_()
        fidelity, terms = self.fidelity(leaf, images)
        (gradient,) = torch.autograd.grad(fidelity.sum(), leaf)
        adaptive = adaptive_weight(gradient, towards_real, self.discriminator.limit)  # (B,)
        factor = self.discriminator.weight * adaptive
        gradient = gradient - factor.view(-1, 1, 1, 1) * towards_real
        both = WithGradient.apply(fidelity.detach() - factor * score, reconstruction, gradient)
        return both, self.discriminator.scale * opposition, terms | seen | {"adaptive_weight": adaptive}

"""A KL autoencoder (diffusers' AutoencoderKL) as a model to train, and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor, nn

from dit.config import ConfigError, config
from dit.flow.objective import Loss
from dit.rng import Draws, Purpose
from dit.train.task import Samples


@config
class AutoencoderConfig:
    """The shape of the autoencoder: each width after the first halves the image."""

    widths: tuple[int, ...] = (16, 32, 32)  # channels of each level
    layers: Annotated[int, Field(ge=1)] = 1  # residual blocks a level
    groups: Annotated[int, Field(ge=1)] = 8  # of the group norms; divides every width
    latent_channels: Annotated[int, Field(ge=1)] = 4
    mid_attention: bool = False

    def __post_init__(self) -> None:
        if not self.widths or any(w % self.groups for w in self.widths):
            raise ConfigError(
                f"autoencoder.groups = {self.groups} must divide every one of widths {self.widths}"
            )

    @property
    def factor(self) -> int:
        """Image pixels a latent pixel, on a side."""
        return int(2 ** (len(self.widths) - 1))

    def build(self) -> Autoencoder:
        """The autoencoder with random weights, from torch's global generator."""
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(self.widths),
            up_block_types=("UpDecoderBlock2D",) * len(self.widths),
            block_out_channels=self.widths,
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=self.groups,
            mid_block_add_attention=self.mid_attention,
            scaling_factor=1.0,  # the manifest's statistics normalise, not a constant
        )
        return Autoencoder(vae)


class Autoencoder(nn.Module):
    """Encode, draw from the posterior with given noise, decode."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae  # AutoencoderKL, which is not typed

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1], noise (B, C, h, w) -> reconstruction, posterior mean and log-variance."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise  # (B, C, h, w)
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


@dataclass(frozen=True)
class AutoencoderTask:
    """Squared pixel error plus kl_weight times the KL divergence to N(0, I), each a mean over elements.

    (Kingma & Welling, arXiv 1312.6114, eq. 10.) latent: (C, h, w).
    """

    kl_weight: float
    latent: tuple[int, int, int]

    @property
    def group(self) -> int:
        return 1

    def uncoupled(self) -> AutoencoderTask:
        return self

    def drops(self, draws: Draws) -> Tensor:
        return torch.zeros(len(draws.slots), dtype=torch.bool)

    def loss(self, model: Any, samples: Samples) -> Loss:
        images = samples.moments[:, 0].float()  # (B, 3, H, W)
        noise = samples.draws.normal(Purpose.POSTERIOR, self.latent)
        reconstruction, mean, log_variance = model(images, noise)
        pixel = (reconstruction.float() - images).square().flatten(1).mean(1)  # (B,)
        mean, log_variance = mean.float(), log_variance.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)  # (B,)
        per_sample = pixel + self.kl_weight * kl
        metrics = {"pixel_mse": pixel.detach().mean(), "kl": kl.detach().mean()}
        return Loss(per_sample.mean(), per_sample, None, metrics)

    def check_first_loss(self, losses: list[Loss], numel: int) -> str | None:
        return None  # no closed form for an untrained autoencoder

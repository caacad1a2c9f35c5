"""The autoencoders that can be trained: one class of settings each, and diffusers' model as what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer
from pydantic import Field
from torch import Tensor, nn

from dit.config import ConfigError, Registry, config

Outputs = Sequence[Tensor]  # of a forward pass: the reconstruction, then what the penalty is made of
Terms = dict[str, Tensor]  # name -> (B,)


@config
class AutoencoderConfig:
    """The shape of an autoencoder: each width after the first halves the image."""

    # channels of each level; each level after the first halves the image
    widths: tuple[int, ...] = (16, 32, 32)
    layers: Annotated[int, Field(ge=1)] = 1  # residual blocks of each level
    groups: Annotated[int, Field(ge=1)] = 8  # of the group norms; divides every width
    latent_channels: Annotated[int, Field(ge=1)] = 4  # channels of a latent
    mid_attention: bool = False  # self-attention in the middle, where the image is smallest

    has_posterior = False  # whether the penalty is a KL divergence, weighted by kl_weight
    codebook = 0  # entries that a latent pixel is chosen from; 0 = latents are continuous

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
        raise NotImplementedError

    def penalty(self, outputs: Outputs) -> tuple[Tensor, Terms]:
        """What is added to the error of the reconstruction, (B,), and terms (B,) to log. outputs: of a forward pass."""
        raise NotImplementedError

    def codes(self, outputs: Outputs) -> Tensor:
        """(B, N) int64 entries of the codebook that were chosen; N = 0 without one."""
        return torch.zeros(len(outputs[0]), 0, dtype=torch.int64, device=outputs[0].device)

    def _shape(self) -> dict[str, Any]:
        """Arguments that diffusers' autoencoders share."""
        return {
            "down_block_types": ("DownEncoderBlock2D",) * len(self.widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(self.widths),
            "block_out_channels": self.widths,
            "layers_per_block": self.layers,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.groups,
            "mid_block_add_attention": self.mid_attention,
            "scaling_factor": 1.0,  # the manifest's statistics normalise, not a constant
        }


AUTOENCODERS: Registry[AutoencoderConfig] = Registry("autoencoder", default="kl")


class Autoencoder(nn.Module):
    """What is trained. `vae` is diffusers' model, whose save_pretrained exports it."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae  # not typed

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """images (B, 3, H, W) in [-1, 1], noise (B, C, h, w) -> the reconstruction (B, 3, H, W) and more."""
        raise NotImplementedError


# --- KL ----------------------------------------------------------------------------------------------------


@AUTOENCODERS.register("kl")
@config
class Kl(AutoencoderConfig):
    """A Gaussian posterior held near N(0, I) (Kingma & Welling, arXiv 1312.6114, eq. 10): diffusers' AutoencoderKL."""

    has_posterior = True

    def build(self) -> KlAutoencoder:
        return KlAutoencoder(AutoencoderKL(**self._shape()))

    def penalty(self, outputs: Outputs) -> tuple[Tensor, Terms]:
        """The KL divergence to N(0, I) in nats, a mean over elements."""
        mean, log_variance = outputs[1].float(), outputs[2].float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)  # (B,)
        return kl, {"kl": kl}


class KlAutoencoder(Autoencoder):
    """Encode, draw from the posterior with given noise, decode."""

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """-> reconstruction, posterior mean and log-variance (B, C, h, w)."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise  # (B, C, h, w)
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


# --- VQ ----------------------------------------------------------------------------------------------------


@AUTOENCODERS.register("vq")
@config
class Vq(AutoencoderConfig):
    """Latents chosen from a codebook (van den Oord et al., arXiv 1711.00937, eq. 3): diffusers' VQModel."""

    codebook: Annotated[int, Field(ge=2)] = 512  # entries, of latent_channels numbers each
    beta: Annotated[float, Field(ge=0)] = 0.25  # weight of the commitment term

    def build(self) -> VqAutoencoder:
        vae: Any = VQModel(**self._shape(), num_vq_embeddings=self.codebook)
        vae.quantize = Quantizer(self.codebook, self.latent_channels, beta=self.beta)
        return VqAutoencoder(vae)

    def penalty(self, outputs: Outputs) -> tuple[Tensor, Terms]:
        """|entry - encoded|² towards the codebook plus beta times the same towards the encoder, means over elements."""
        encoded, entry = outputs[1].float(), outputs[2].float()
        codebook = (entry - encoded.detach()).square().flatten(1).mean(1)  # (B,)
        commitment = (entry.detach() - encoded).square().flatten(1).mean(1)  # (B,)
        perplexity = code_perplexity(count_codes(self.codes(outputs), self.codebook))  # (B,)
        return codebook + self.beta * commitment, {"commitment": commitment, "image_perplexity": perplexity}

    def codes(self, outputs: Outputs) -> Tensor:
        return outputs[3].flatten(1)


class Quantizer(VectorQuantizer):
    """diffusers' quantizer with the same weights, which gives what a loss per sample is made of."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """z (B, C, h, w) -> nearest entries with z's gradient ("straight through"), with their own; codes (B, h, w)."""
        z = z.float()
        flat = z.permute(0, 2, 3, 1)  # (B, h, w, C)
        distance = torch.cdist(flat.flatten(0, 2), self.embedding.weight)  # autocast leaves it in float32
        codes = distance.argmin(1).view(flat.shape[:3])
        entry = self.embedding(codes).permute(0, 3, 1, 2)  # (B, C, h, w)
        return z + (entry - z).detach(), entry, codes


class VqAutoencoder(Autoencoder):
    """Encode, take the nearest entries of the codebook, decode."""

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """-> reconstruction, encoded and entry (B, C, h, w), codes (B, h, w) int64. noise: nothing is drawn."""
        encoded = self.vae.encode(images).latents
        latents, entry, codes = self.vae.quantize(encoded)
        return self.vae.decode(latents, force_not_quantize=True).sample, encoded, entry, codes


def count_codes(codes: Tensor, codebook: int) -> Tensor:
    """codes (B, N) int64 -> (B, codebook) float64: how often each entry was chosen. Does not wait for the device."""
    counts = torch.zeros(len(codes), codebook, dtype=torch.float64, device=codes.device)
    return counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float64))


def code_perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of counts (..., K): how many entries of a codebook are in use, 1 to K. (...)"""
    share = counts / counts.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)  # nats
    return entropy.exp()

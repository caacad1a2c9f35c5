"""A discriminator of patches, trained beside the autoencoder in the same module, optimizer and backward pass.

What the autoencoder hears of it is the gradient of its score with respect to the reconstruction alone, so that
its own weights never see that term, at any ZeRO stage. There are no batch statistics: every term is a sample's own.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dit.config import ConfigError, config
from dit.stage1.autoencoder import Autoencoder

STABILITY = 1e-4  # added to a gradient's norm that is divided by (arXiv 2012.09841, eq. 7: delta)


@config
class DiscriminatorConfig:
    """A PatchGAN (Isola et al., arXiv 1611.07004, section 3.2.2) with group norms in place of batch norms.

    It learns from the first step; the autoencoder hears it from step `start` on. Adam's steps do not depend on
    `scale`, but the norm that optim.clip bounds is of both gradients: unscaled, the discriminator's is some hundred
    times larger, and the autoencoder would be clipped to a standstill.
    """

    weight: Annotated[float, Field(ge=0)] = 0.5  # of the adversarial term, on top of its adaptive weight
    start: Annotated[int, Field(ge=0)] = 1000  # step from which the autoencoder hears it
    lr_factor: Annotated[float, Field(gt=0)] = 1.0  # of optim.lr, for the discriminator's weights
    scale: Annotated[float, Field(gt=0)] = 1e-3  # factor on the discriminator's own loss
    limit: Annotated[float, Field(gt=0)] = 1e4  # largest adaptive weight
    # channels of its first layer, doubled by each after it, up to 8 times
    width: Annotated[int, Field(ge=1)] = 64
    layers: Annotated[int, Field(ge=1)] = 3  # convolutions that halve the image
    groups: Annotated[int, Field(ge=1)] = 8  # of the group norms; divides width

    def __post_init__(self) -> None:
        if self.width % self.groups:
            raise ConfigError(
                f"discriminator.groups = {self.groups} must divide discriminator.width = {self.width}"
            )

    def build(self, height: int, width: int) -> PatchDiscriminator:
        """A discriminator of height x width images, from torch's global generator. ConfigError for too small ones."""
        if min(height, width) // 2**self.layers < 3:
            raise ConfigError(
                f"images of {height}x{width} are too small for a discriminator that halves them {self.layers} times "
                "and looks at 3x3 of what is left: set discriminator.layers lower"
            )
        return PatchDiscriminator(self)


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches: above 0 for real ones."""

    def __init__(self, cfg: DiscriminatorConfig):
        super().__init__()
        widths = [cfg.width * min(2**i, 8) for i in range(cfg.layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, cfg.width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
            stride = 2 if i < cfg.layers else 1
            modules += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(cfg.groups, after)]
            modules.append(nn.LeakyReLU(0.2))
        modules.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.net = nn.Sequential(*modules)
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)  # as in pix2pix, section 6.2
        for parameter in self.parameters():
            parameter.lr_factor = cfg.lr_factor  # type: ignore[attr-defined]  # where the optimizer looks for it

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> scores (B, P)."""
        scores: Tensor = self.net(images).flatten(1)
        return scores


class Opposed(nn.Module):
    """An autoencoder and its discriminator: one module, so that one optimizer, EMA and checkpoint hold both."""

    def __init__(self, autoencoder: Autoencoder, discriminator: PatchDiscriminator):
        super().__init__()
        self.autoencoder, self.discriminator = autoencoder, discriminator

    @property
    def vae(self) -> Any:
        """What is exported."""
        return self.autoencoder.vae

    def forward(self, images: Tensor, noise: Tensor, judge: bool = False, push: bool = False) -> Any:
        """The autoencoder's outputs; with `judge`, (outputs, scores (B, P) of images, of reconstructions, *pushes).

        push: append the mean score (B,) of the reconstructions and its gradient (B, 3, H, W) in them.
        """
        outputs = self.autoencoder(images, noise)
        if not judge:
            return outputs
        fake = outputs[0].detach().float()
        pushes = self._push(fake) if push else ()
        real, false = self.discriminator(torch.cat([images, fake])).chunk(2)
        return outputs, real, false, *pushes

    def _push(self, fake: Tensor) -> tuple[Tensor, Tensor]:
        leaf = fake.clone().requires_grad_()
        score = self.discriminator(leaf).float().mean(1)  # (B,)
        # else the next pass shares this one's bf16 weights, whose gradient then comes when stage 3 has let go of them
        torch.clear_autocast_cache()
        (gradient,) = torch.autograd.grad(score.sum(), leaf)  # of the input alone: no weight gets any
        return score.detach(), gradient


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(B,) the discriminator's loss from scores (B, P): half of each side (Lim & Ye, arXiv 1705.02894, eq. 3)."""
    return 0.5 * (F.relu(1 - real.float()).mean(1) + F.relu(1 + fake.float()).mean(1))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, limit: float) -> Tensor:
    """(B,) in [0, limit]: how many times larger the first gradient (B, 3, H, W) of each sample is than the second.

    The rule of Esser et al. (arXiv 2012.09841, eq. 7) for each sample's own gradients in its reconstruction in place
    of the whole batch's in the last layer's weights: no micro-batch, rank or ZeRO stage shows in it. Gradients of
    means over pixels shrink with the image: norms are multiplied by sqrt(3HW), so that delta means the same at any
    size.
    """
    scale = math.sqrt(reconstruction[0].numel())
    wanted, given = (
        scale * torch.linalg.vector_norm(g.flatten(1), dim=1) for g in (reconstruction, adversarial)
    )
    weight: Tensor = wanted / (given + STABILITY)
    return weight.clamp(max=limit)


class WithGradient(torch.autograd.Function):
    """values (B,), whose gradient in x (B, ...) is said to be `gradient` (B, ...), sample by sample."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, outer.view(-1, *[1] * (gradient.ndim - 1)) * gradient, None

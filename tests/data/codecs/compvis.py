"""An autoencoder of latent diffusion in plain torch, written from the paper's appendix (arXiv 2112.10752, E.1).

It shares nothing with diffusers; its modules have the names that CompVis' checkpoints have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    def __init__(self, width: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class OneHead(nn.Module):
    """Every place attends to every other."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2) for conv in (self.q, self.k, self.v))  # (B, C, HW)
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5, dim=-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


class Resize(nn.Module):
    """Half the size by a convolution of stride 2, padded right and below; or twice the size, then a convolution."""

    def __init__(self, width: int, down: bool):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride == (2, 2):
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def middle(width: int, groups: int, attention: bool) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.block_2 = Residual(width, width, groups), Residual(width, width, groups)
    mid.attn_1 = OneHead(width, groups) if attention else nn.Identity()
    mid.forward = lambda x: mid.block_2(mid.attn_1(mid.block_1(x)))
    return mid


class Level(nn.Module):
    def __init__(self, width: int, out: int, layers: int, groups: int, attention: bool, resize: str | None):
        super().__init__()
        self.block = nn.ModuleList(Residual(width if i == 0 else out, out, groups) for i in range(layers))
        self.attn = nn.ModuleList(OneHead(out, groups) for _ in range(layers if attention else 0))
        if resize:
            setattr(self, resize, Resize(out, down=resize == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Autoencoder(nn.Module):
    """widths: channels of each level, from the image on. attention: the levels that have it."""

    def __init__(
        self,
        widths: Sequence[int] = (8, 16, 16),
        layers: int = 2,
        channels: int = 4,
        groups: int = 4,
        attention: Sequence[int] = (),
        mid_attention: bool = True,
        quant: bool = True,
    ):
        super().__init__()
        last, top = len(widths) - 1, widths[-1]
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.encoder.down = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)], w, layers, groups, i in attention, "downsample" if i < last else None
            )
            for i, w in enumerate(widths)
        )
        self.encoder.mid = middle(top, groups, mid_attention)
        self.encoder.norm_out = nn.GroupNorm(groups, top, eps=1e-6)
        self.encoder.conv_out = nn.Conv2d(top, 2 * channels, 3, padding=1)
        self.decoder.conv_in = nn.Conv2d(channels, top, 3, padding=1)
        self.decoder.mid = middle(top, groups, mid_attention)
        self.decoder.up = nn.ModuleList(
            Level(widths[min(i + 1, last)], w, layers + 1, groups, i in attention, "upsample" if i else None)
            for i, w in enumerate(widths)
        )
        self.decoder.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.decoder.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        if quant:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the posterior."""
        part = self.encoder
        h = part.conv_in(images)
        for level in part.down:
            h = level(h)
        h = part.conv_out(F.silu(part.norm_out(part.mid(h))))
        h = self.quant_conv(h) if hasattr(self, "quant_conv") else h
        mean, log_variance = h.chunk(2, dim=1)
        return mean, (0.5 * log_variance).exp()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        part = self.decoder
        z = self.post_quant_conv(latents) if hasattr(self, "post_quant_conv") else latents
        h = part.mid(part.conv_in(z))
        for level in reversed(part.up):
            h = level(h)
        return part.conv_out(F.silu(part.norm_out(h)))


def random_autoencoder(**settings: object) -> Autoencoder:
    """With weights large enough that every tensor of it counts in the result."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(**settings)  # type: ignore[arg-type]
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()

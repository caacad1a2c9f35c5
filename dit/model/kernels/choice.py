"""The key `model.kernels`: who computes what lies between a block's matrix products.

A block and its parts call the methods of one `Kernels`. What a kernel is not made for (a dtype, a norm of another kind,
layers that are not plain ones) takes the plain path of that half block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dit.config import Registry, config
from dit.model.embed import product_dtype, suited
from dit.model.kernels.activation import Activation, activated_linear
from dit.model.kernels.heads import normed_turned_heads
from dit.model.kernels.residual import normed, residual
from dit.model.kernels.running import DTYPES, check
from dit.model.modulation import modulate
from dit.model.norms import TokenNorm
from dit.model.rope import rotate

MAX_WIDTH = 8192  # of a token: a row has to stay in a program's registers
Heads = tuple[Tensor, Tensor, Tensor]


class Kernels(ABC):
    """A way to compute the parts of a block that move more numbers than they multiply.

    x is the residual stream (B, T, D); gates, shifts and scales are (B, 1 or T, D), in float32 at least.
    """

    @abstractmethod
    def check(self, device: torch.device) -> None:
        """Refuse, by ConfigError, a device that it cannot run on."""

    @abstractmethod
    def normed(
        self, x: Tensor, norm: nn.Module, shift: Tensor | None, scale: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give x, to be used in its place, and y = norm(x)·(1 + scale) + shift, to be multiplied by `weight`."""

    @abstractmethod
    def added_normed(
        self, x: Tensor, gate: Tensor, h: Tensor, norm: nn.Module, shift: Tensor | None, scale: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Give x + gate·h, and of that what `normed` gives. h: (B, T, D)."""

    @abstractmethod
    def added(self, x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
        """Give x + gate·h, in x's dtype."""

    @abstractmethod
    def heads(
        self, qkv: Tensor, heads: int, q_norm: nn.Module, k_norm: nn.Module, rotation: Tensor | None
    ) -> Heads:
        """Give queries and keys, normed and turned, and values, (B, heads, T, d) each, of (B, T, 3·heads·d).

        rotation: (2, T, d/2), the table of a rope.
        """

    @abstractmethod
    def feed_forward(self, x: Tensor, first: nn.Linear, activation: Activation, second: nn.Linear) -> Tensor:
        """Give second(activation(first(x)))."""


KERNELS: Registry[Kernels] = Registry("kernels")


class _Plain(Kernels):
    """In torch, operation by operation; a compiler fuses them."""

    def check(self, device: torch.device) -> None:
        """Do nothing: it runs everywhere."""

    def normed(
        self, x: Tensor, norm: nn.Module, shift: Tensor | None, scale: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """In float32 at least."""
        return x, modulate(norm(x), shift, scale)

    def added_normed(
        self, x: Tensor, gate: Tensor, h: Tensor, norm: nn.Module, shift: Tensor | None, scale: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """In float32 at least."""
        x = self.added(x, gate, h)
        return x, modulate(norm(x), shift, scale)

    def added(self, x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
        """The sum in float32 at least, by promotion."""
        return (x + gate * h).to(x.dtype)

    def heads(
        self, qkv: Tensor, heads: int, q_norm: nn.Module, k_norm: nn.Module, rotation: Tensor | None
    ) -> Heads:
        """In the dtype of qkv."""
        # split before the heads move: the gradient is then one copy and not two
        q, k, v = rearrange(qkv, "b t (n h d) -> b t n h d", n=3, h=heads).unbind(2)  # (B, T, heads, d)
        q, k = (norm(a).to(a.dtype) for norm, a in ((q_norm, q), (k_norm, k)))
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # (B, heads, T, d)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v

    def feed_forward(self, x: Tensor, first: nn.Linear, activation: Activation, second: nn.Linear) -> Tensor:
        """In the dtype of the products."""
        out: Tensor = second(activation.plain(first(suited(x, first.weight))))
        return out


@KERNELS.register("auto")
@config
class Auto(_Plain):
    """What has been measured to be quicker: plain, as the others have not been measured on a GPU."""


@KERNELS.register("plain")
@config
class Plain(_Plain):
    """Torch's own operations: eager they go through memory one by one, compiled they are fused."""


@KERNELS.register("triton")
@config
class Triton(_Plain):
    """Fused kernels on a GPU; a run on anything else is refused before it begins."""

    def check(self, device: torch.device) -> None:
        """Refuse, by ConfigError, a device without Triton."""
        check(device)

    def normed(
        self, x: Tensor, norm: nn.Module, shift: Tensor | None, scale: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y in the dtype of the product."""
        if not (_fits(x, product_dtype(x, weight)) and isinstance(norm, TokenNorm)):
            return super().normed(x, norm, shift, scale, weight)
        factor, shift = _folded(norm, scale, shift)
        rows = _rows(x, factor), None if shift is None else _rows(x, shift)
        out, y = normed(_lines(x, scale), *rows, **_how(norm), dtype=product_dtype(x, weight))
        return out.view_as(x), y.view_as(x)

    def added_normed(
        self, x: Tensor, gate: Tensor, h: Tensor, norm: nn.Module, shift: Tensor | None, scale: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y in the dtype of the product."""
        if not (_fits(x, h.dtype, product_dtype(x, weight)) and isinstance(norm, TokenNorm)):
            return super().added_normed(x, gate, h, norm, shift, scale, weight)
        factor, shift = _folded(norm, scale, shift)
        lines = _lines(x, scale), _lines(h, scale), _rows(x, gate), _rows(x, factor)
        out, y = residual(
            *lines, None if shift is None else _rows(x, shift), **_how(norm),
            stream=x.dtype, dtype=product_dtype(x, weight),
        )  # fmt: skip
        return out.view_as(x), y.view_as(x)

    def added(self, x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
        """In one pass."""
        if not _fits(x, h.dtype):
            return super().added(x, gate, h)
        return residual(_lines(x, gate), _lines(h, gate), _rows(x, gate), stream=x.dtype)[0].view_as(x)

    def heads(
        self, qkv: Tensor, heads: int, q_norm: nn.Module, k_norm: nn.Module, rotation: Tensor | None
    ) -> Heads:
        """In one pass, where there is a norm or a rope."""
        normed = isinstance(q_norm, TokenNorm)
        alone = isinstance(q_norm, nn.Identity) and rotation is None
        if alone or qkv.dtype not in DTYPES or not (normed or isinstance(q_norm, nn.Identity)):
            return super().heads(qkv, heads, q_norm, k_norm, rotation)
        each = rearrange(qkv, "b t (n h d) -> b t n h d", n=3, h=heads)
        gain, bias = (_both(getattr(n, name, None) for n in (q_norm, k_norm)) for name in ("gain", "bias"))
        how = _how(q_norm) if isinstance(q_norm, TokenNorm) else {}
        q, k, v = normed_turned_heads(each, gain, bias, rotation, normed=normed, **how)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def feed_forward(self, x: Tensor, first: nn.Linear, activation: Activation, second: nn.Linear) -> Tensor:
        """Of the two layers' weights, without calling the layers, where they are plain ones."""
        if not (_is_plain(first) and _is_plain(second) and product_dtype(x, first.weight) in DTYPES):
            return super().feed_forward(x, first, activation, second)
        h = F.linear(suited(x, first.weight), first.weight)  # (B, T, M), or (B, T, 2·M) where it is gated
        return activated_linear(h, first.bias, second.weight, second.bias, gated=activation.gated)


class Kerneled(nn.Module):
    """A module that computes by `kernels`; `use` changes them."""

    kernels: Kernels = Auto()


def use(network: nn.Module, kernels: Kernels) -> None:
    """Let all modules of a network compute by these."""
    for module in network.modules():
        if isinstance(module, Kerneled):
            module.kernels = kernels


def _fits(x: Tensor, *others: torch.dtype) -> bool:
    """Whether the kernels take a stream like x, and these dtypes beside it."""
    return x.shape[-1] <= MAX_WIDTH and all(dtype in DTYPES for dtype in (x.dtype, *others))


def _lines(x: Tensor, rows: Tensor) -> Tensor:
    """(B, T, D) as (N, T, D) of which each n has its row: where each token has its own, it is a sample of one token."""
    return x if rows.shape[1] == 1 else x.reshape(-1, 1, x.shape[-1])


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """(B or 1, 1 or T, D) as (N, D), the rows of `_lines`."""
    return rows.expand(len(x), -1, -1).flatten(0, 1)


def _folded(norm: TokenNorm, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The norm's gain and bias in the modulation: weight and shift of the norm without them."""
    weight = 1 + scale
    if norm.bias is not None:
        shift = norm.bias * weight if shift is None else torch.addcmul(shift, norm.bias, weight)
    return weight if norm.gain is None else norm.gain * weight, shift


def _how(norm: TokenNorm) -> dict[str, Any]:
    return {"epsilon": norm.epsilon, "centred": norm.is_centred}


def _both(parameters: Iterable[Tensor | None]) -> Tensor | None:
    """Those of queries and keys as one (2, d); None where they have none."""
    q, k = parameters
    return None if q is None or k is None else torch.stack([q, k])


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is no more than its weights: no other class, nothing hung onto its call."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)

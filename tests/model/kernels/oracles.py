"""What the fused operations must compute, in plain torch and float64, which autograd differentiates; and inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the error's norm, over the norm
EPSILON = 1e-3  # large enough to be seen


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, on the default device, to be differentiated by."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), device="cpu")
    return numbers.to(torch.get_default_device(), dtype).requires_grad_()


def normed(x: Tensor, centred: bool) -> Tensor:
    """Over the last axis."""
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def half_block(
    x: Tensor, h: Tensor | None, gate: Tensor | None, weight: Tensor | None, shift: Tensor | None, centred: bool
) -> list[Tensor]:  # fmt: skip
    """The stream with what is added, and it normed and modulated; whichever is asked for."""
    found = []
    if h is not None and gate is not None:
        x = x + gate[:, None] * h
        found.append(x)
    if weight is not None:
        y = normed(x, centred) * weight[:, None]
        found.append(y if shift is None else y + shift[:, None])
    return found


def activated(h: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    """GELU's tanh form, or SwiGLU, by their formulas."""
    v = h if bias is None else h + bias
    if not gated:
        return 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))
    gate, value = v.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * value


def head(v: Tensor, gain: Tensor | None, bias: Tensor | None, angles: Tensor | None, norm: str) -> Tensor:
    """Queries or keys (B, T, heads, d), normed and turned, by complex numbers."""
    v = v if norm == "none" else normed(v, norm == "layer")
    v = v if gain is None else v * gain
    v = v if bias is None else v + bias
    if angles is None:
        return v
    pairs = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())  # (B, T, heads, d/2)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def compare(
    found: Sequence[Tensor], given: Sequence[Tensor | None], expected: Sequence[Tensor], exact: Sequence[Tensor | None],
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Compare values, and gradients of the same random sum of them by what was given, and by its float64 copies."""
    directions = [drawn(*v.shape, seed=7).detach() for v in found]
    gradients = []
    for values, inputs in ((found, given), (expected, exact)):
        total = torch.stack([(v.double() * d).sum() for v, d in zip(values, directions, strict=True)]).sum()
        gradients.append(torch.autograd.grad(total, [i for i in inputs if i is not None]))
    for name, a, b in [("value", *v) for v in zip(found, expected, strict=True)] + [
        (f"gradient {i}", *v) for i, v in enumerate(zip(*gradients, strict=True))
    ]:
        off = float(((a.double() - b).norm() / b.norm()).detach())
        assert off <= LIMITS[dtype], f"{name}: {off:.1e} from the oracle, of shape {tuple(b.shape)}"


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    """Leaves of their own, in float64."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Plain, in the dtype of x."""
    return F.linear(x, weight, bias)

"""The kernels of `activation.py`, and how they are launched.

A program takes a tile of columns down some rows. The backward pass adds up each column for the bias as it goes; a
second pass adds the programs' sums in their order, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit.model.kernels.running import FUSED

ROWS, COLUMNS, WARPS = 4, 512, 8  # of a tile: 8 numbers a thread, which are 16 bytes of bfloat16
TILES = 16  # that a program of the backward pass takes, one below the other


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _gelu(v):
    """GELU in its tanh form, as v·sigmoid(2u), and its slope; u = √(2/π)·(v + 0.044715·v³)."""
    s = _sigmoid(1.5957691216057308 * v * (1.0 + 0.044715 * v * v))
    return v * s, s + v * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * v * v)


@triton.jit
def _silu(v):
    """SiLU and its slope."""
    s = _sigmoid(v)
    return v * s, s + v * s * (1.0 - s)


@triton.jit
def _biased(h, bias, here, columns, inside, of_width):
    """A tile of the first layer's product, and its bias."""
    v = tl.load(h + here, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + columns, mask=of_width, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit
def _forward(h, bias, out, rows, width, GATED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """A tile of gelu(h + bias), or of silu(first half)·(second half)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    columns = tl.program_id(1) * C + tl.arange(0, C)
    of_width, inside = columns < width, (row < rows) & (columns < width)[None, :]
    wide = 2 * width if GATED else width
    here = row * wide + columns[None, :]
    v = _biased(h, bias, here, columns, inside, of_width)
    if GATED:
        said, _ = _silu(v)
        said *= _biased(h, bias, here + width, columns + width, inside, of_width)
    else:
        said, _ = _gelu(v)
    tl.store(out + row * width + columns[None, :], said.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    given, h, bias, dh, out, sums, rows, width,
    TILES: tl.constexpr, GATED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Tiles below each other: the gradient of h, the activation once more, and the sums of the gradient's columns."""
    columns = tl.program_id(1) * C + tl.arange(0, C)
    of_width = columns < width
    wide = 2 * width if GATED else width
    first, second = tl.zeros((R, C), tl.float32), tl.zeros((R, C), tl.float32)
    for i in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + i) * R + tl.arange(0, R)[:, None]
        inside = (row < rows) & of_width[None, :]
        here, there = row * wide + columns[None, :], row * width + columns[None, :]
        v = _biased(h, bias, here, columns, inside, of_width)
        d = tl.load(given + there, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate, slope = _silu(v)
            value = _biased(h, bias, here + width, columns + width, inside, of_width)
            said, second_d = gate * value, d * gate
            d *= slope * value
            tl.store(dh + here + width, second_d.to(dh.dtype.element_ty), mask=inside)
            second += second_d
        else:
            said, slope = _gelu(v)
            d *= slope
        tl.store(dh + here, d.to(dh.dtype.element_ty), mask=inside)
        tl.store(out + there, said.to(out.dtype.element_ty), mask=inside)
        first += d
    if sums is not None:
        place = sums + tl.program_id(0).to(tl.int64) * wide + columns
        tl.store(place, tl.sum(first, 0), mask=of_width)
        if GATED:
            tl.store(place + width, tl.sum(second, 0), mask=of_width)


def forward(h: Tensor, bias: Tensor | None, out: Tensor, gated: bool) -> None:
    """Fill `out` (R, M) from h (R, M), or (R, 2·M) where it is gated; contiguous."""
    rows, width = out.shape
    if out.numel():
        _forward[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
            h, bias, out, rows, width, GATED=gated, R=ROWS, C=COLUMNS, num_warps=WARPS, **FUSED
        )


def backward(
    given: Tensor, h: Tensor, bias: Tensor | None, dh: Tensor, out: Tensor, gated: bool
) -> Tensor:  # fmt: skip
    """Fill dh and `out`, the activation once more, and give the sums of dh's columns, float32; empty without a bias."""
    rows, width = out.shape
    parts = max(triton.cdiv(rows, ROWS * TILES), 1)
    sums = None if bias is None else torch.zeros(parts, h.shape[1], dtype=torch.float32, device=h.device)
    if out.numel():
        _backward[(parts, triton.cdiv(width, COLUMNS))](
            given,
            h,
            bias,
            dh,
            out,
            sums,
            rows,
            width,
            TILES=TILES,
            GATED=gated,
            R=ROWS,
            C=COLUMNS,
            num_warps=WARPS,
            **FUSED,
        )
    return h.new_empty(0, dtype=torch.float32) if sums is None else torch.sum(sums, 0)

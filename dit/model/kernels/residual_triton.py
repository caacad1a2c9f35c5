"""The kernels of `residual.py`, and how they are launched.

A row (a token's channels) is read once and stays in registers. In the backward pass a program takes some rows of one
sample, one after the other, and adds up what they say of gate, weight and shift; a second pass adds the programs' sums
in their order. There are no atomic additions, so the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit.model.kernels.running import FUSED

PROGRAMS = 2048  # that a backward pass is cut into, or so: some 16 for each of a large GPU's processors
MIN_ROWS, MAX_ROWS = 4, 64  # of a program in the backward pass


@triton.jit
def _statistics(v, inside, width, epsilon, CENTRED: tl.constexpr):
    """A row less its mean, if that is taken off, and 1 / its deviation (or root mean square)."""
    if CENTRED:
        v = tl.where(inside, v - tl.sum(v, 0) / width, 0.0)
    return v, 1.0 / tl.sqrt(tl.sum(v * v, 0) / width + epsilon)


@triton.jit
def _forward(
    x, h, gate, weight, shift, out, y,
    gate_stride, weight_stride, shift_stride, tokens, width, epsilon,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: out = x + gate·h, and y = norm(out)·weight + shift; pointers that are None leave their part out."""
    row = tl.program_id(0).to(tl.int64)
    sample, at = row // tokens, tl.arange(0, BLOCK)
    inside = at < width
    here = row * width + at
    v = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if h is not None:
        g = tl.load(gate + sample * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
        v += g * tl.load(h + here, mask=inside, other=0.0).to(tl.float32)
        kept = v.to(out.dtype.element_ty)  # the norm is of what the next block will read
        tl.store(out + here, kept, mask=inside)
        v = kept.to(tl.float32)
    if y is not None:
        v, inverse = _statistics(v, inside, width, epsilon, CENTRED)
        w = tl.load(weight + sample * weight_stride + at, mask=inside, other=0.0).to(tl.float32)
        said = v * inverse * w
        if shift is not None:
            said += tl.load(shift + sample * shift_stride + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + here, said.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dout, dy, x, h, gate, weight, dx, dh, sums,
    gate_stride, weight_stride, tokens, width, epsilon,
    CENTRED: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows of a sample: dx, dh, and the sums over them for gate, weight and shift. x is what was normed."""
    sample, part, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    of_width = at < width
    of_gate = tl.zeros((BLOCK,), tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_shift = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        token = part * ROWS + i
        inside = at < tl.where(token < tokens, width, 0)  # `&` with a scalar is an int in the interpreter
        here = (sample * tokens + token) * width + at
        d = tl.zeros((BLOCK,), tl.float32)
        if dout is not None:
            d += tl.load(dout + here, mask=inside, other=0.0).to(tl.float32)
        if dy is not None:
            v = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
            v, inverse = _statistics(v, inside, width, epsilon, CENTRED)
            v, given = v * inverse, tl.load(dy + here, mask=inside, other=0.0).to(tl.float32)
            of_weight += given * v
            of_shift += given
            given *= tl.load(weight + sample * weight_stride + at, mask=of_width, other=0.0).to(tl.float32)
            slope = given - v * (tl.sum(given * v, 0) / width)
            if CENTRED:
                slope -= tl.sum(given, 0) / width
            d += tl.where(inside, slope * inverse, 0.0)
            tl.store(dx + here, d.to(dx.dtype.element_ty), mask=inside)
        if h is not None:
            g = tl.load(gate + sample * gate_stride + at, mask=of_width, other=0.0).to(tl.float32)
            of_gate += d * tl.load(h + here, mask=inside, other=0.0).to(tl.float32)
            tl.store(dh + here, (d * g).to(dh.dtype.element_ty), mask=inside)
    place = sums + (sample * tl.num_programs(1) + part) * KINDS * width + at
    if h is not None:
        tl.store(place, of_gate, mask=of_width)
    if dy is not None:
        tl.store(place + (KINDS - 2) * width, of_weight, mask=of_width)
        tl.store(place + (KINDS - 1) * width, of_shift, mask=of_width)


def _warps(block: int) -> int:
    """Warps of a program: 8 numbers a thread, which are 16 bytes of bfloat16."""
    return min(max(block // 256, 1), 16)


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, weight: Tensor | None, shift: Tensor | None,
    out: Tensor | None, y: Tensor | None, epsilon: float, centred: bool,
) -> None:  # fmt: skip
    """Fill `out` and `y`, whichever is asked for: x, h, out, y (N, T, D) contiguous, the others rows (N, D)."""
    samples, tokens, width = x.shape
    block = triton.next_power_of_2(width)
    if x.numel():
        _forward[(samples * tokens,)](
            x, h, gate, weight, shift, out, y, _stride(gate), _stride(weight), _stride(shift), tokens, width,
            epsilon, CENTRED=centred, BLOCK=block, num_warps=_warps(block), **FUSED,
        )  # fmt: skip


def backward(
    dout: Tensor | None, dy: Tensor | None, x: Tensor | None, h: Tensor | None, gate: Tensor | None,
    weight: Tensor | None, dx: Tensor | None, dh: Tensor | None, sums: Tensor, epsilon: float, centred: bool,
) -> Tensor:  # fmt: skip
    """Fill dx, dh, and give the sums (N, kinds, D) float32 of gate, if there is one, and of weight and shift.

    sums: empty, of that shape.
    """
    given: Any = dout if dy is None else dy
    samples, tokens, width = given.shape
    rows = min(max(samples * tokens // PROGRAMS, MIN_ROWS), MAX_ROWS, max(tokens, 1))
    rows = triton.next_power_of_2(rows)  # a kernel is compiled for each
    parts, kinds, block = max(-(-tokens // rows), 1), sums.shape[1], triton.next_power_of_2(width)
    partial = sums if parts == 1 else sums.new_empty(samples, parts, kinds, width)
    if given.numel():
        _backward[(samples, parts)](
            dout, dy, x, h, gate, weight, dx, dh, partial, _stride(gate), _stride(weight), tokens, width,
            epsilon, CENTRED=centred, KINDS=kinds, ROWS=rows, BLOCK=block, num_warps=_warps(block), **FUSED,
        )  # fmt: skip
    return sums if parts == 1 else torch.sum(partial, 1)

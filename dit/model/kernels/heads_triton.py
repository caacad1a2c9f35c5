"""The kernels of `heads.py`, and how they are launched.

A row is one head of one token; a program takes some rows of queries, or keys, or (backward) values. Sums for the norms'
gains are those of programs, added in their order in a second pass: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit.model.kernels.running import FUSED

NUMBERS, WARPS = 2048, 8  # of a program's tile, and its warps
TILES = 8  # that a program of the backward pass takes, one after the other


@triton.jit
def _turned(
    v, rotation, place, inside, tokens,
    BACK: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Rows whose pairs of neighbours are turned by the angles of their place, or turned back."""
    half = WIDTH // 2
    pairs = tl.arange(0, W // 2)
    at, known = place[:, None] * half + pairs[None, :], inside[:, None] & (pairs < half)[None, :]
    cos = tl.load(rotation + at, mask=known, other=1.0).to(tl.float32)
    sin = tl.load(rotation + tokens * half + at, mask=known, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    even, odd = tl.split(tl.reshape(v, (R, W // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (R, W))


@triton.jit
def _normed(v, inside, epsilon, CENTRED: tl.constexpr, WIDTH: tl.constexpr):
    """Rows over their deviation (or root mean square), and what they were multiplied by."""
    if CENTRED:
        v = tl.where(inside, v - (tl.sum(v, 1) / WIDTH)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(v * v, 1) / WIDTH + epsilon)
    return v * inverse[:, None], inverse[:, None]


@triton.jit
def _forward(
    qkv, gain, bias, rotation, q, k, rows, heads, tokens, epsilon,
    NORMED: tl.constexpr, CENTRED: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Rows of queries (second axis of the grid at 0) or keys (1): the norm with gain and bias, then the turn."""
    kind = tl.program_id(1)
    row, at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W)
    token, inside = row // heads, (row < rows)[:, None] & (at < WIDTH)[None, :]
    place = ((token * 3 + kind) * heads + row % heads) * WIDTH
    v = tl.load(qkv + place[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        v, _ = _normed(v, inside, epsilon, CENTRED, WIDTH)
    if gain is not None:
        v *= tl.load(gain + kind * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + kind * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)[None, :]
    if rotation is not None:
        v = _turned(v, rotation, token % tokens, row < rows, tokens, False, WIDTH, R, W)
    there = (row * WIDTH)[:, None] + at[None, :]
    if kind == 0:
        tl.store(q + there, v.to(q.dtype.element_ty), mask=inside)
    else:
        tl.store(k + there, v.to(k.dtype.element_ty), mask=inside)


@triton.jit
def _unnormed(d, v, inside, epsilon, CENTRED: tl.constexpr, WIDTH: tl.constexpr):
    """The gradient before the norm, of rows v, from that behind it."""
    normed, inverse = _normed(v, inside, epsilon, CENTRED, WIDTH)
    slope = d - normed * (tl.sum(d * normed, 1) / WIDTH)[:, None]
    if CENTRED:
        slope -= (tl.sum(d, 1) / WIDTH)[:, None]
    return slope * inverse


@triton.jit
def _backward(
    dq, dk, dv, qkv, gain, rotation, dqkv, sums, rows, heads,
    tokens, epsilon,
    TILES: tl.constexpr, NORMED: tl.constexpr, CENTRED: tl.constexpr,
    WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The gradient of all three from those of queries and keys, turned and normed, and of the values, as they are."""
    part, kind, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, W)
    of_gain, of_bias = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for i in range(TILES):
        row = (part * TILES + i) * R + tl.arange(0, R)
        token, inside = row // heads, (row < rows)[:, None] & (at < WIDTH)[None, :]
        there = (row * WIDTH)[:, None] + at[None, :]
        here = (((token * 3 + kind) * heads + row % heads) * WIDTH)[:, None] + at[None, :]
        if kind == 2:
            d = tl.load(dv + there, mask=inside, other=0.0).to(tl.float32)
        else:
            if kind == 0:
                d = tl.load(dq + there, mask=inside, other=0.0).to(tl.float32)
            else:
                d = tl.load(dk + there, mask=inside, other=0.0).to(tl.float32)
            if rotation is not None:
                d = _turned(d, rotation, token % tokens, row < rows, tokens, True, WIDTH, R, W)
            if NORMED:
                v = tl.load(qkv + here, mask=inside, other=0.0).to(tl.float32)
                if gain is not None:
                    normed, _ = _normed(v, inside, epsilon, CENTRED, WIDTH)
                    of_gain += d * normed
                    of_bias += d
                    d *= tl.load(gain + kind * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)[None, :]
                d = _unnormed(d, v, inside, epsilon, CENTRED, WIDTH)
        tl.store(dqkv + here, d.to(dqkv.dtype.element_ty), mask=inside)
    if sums is not None:  # noqa: SIM102 (known when it is compiled, unlike the next)
        if kind < 2:
            place = sums + ((part * 2 + kind) * 2) * WIDTH + at
            tl.store(place, tl.sum(of_gain, 0), mask=at < WIDTH)
            tl.store(place + WIDTH, tl.sum(of_bias, 0), mask=at < WIDTH)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = triton.next_power_of_2(max(width, 2))
    return max(NUMBERS // columns, 1), columns


def forward(
    qkv: Tensor, gain: Tensor | None, bias: Tensor | None, rotation: Tensor | None, q: Tensor, k: Tensor,
    epsilon: float, normed: bool, centred: bool,
) -> None:  # fmt: skip
    """Fill q and k (B, T, heads, d) from qkv (B, T, 3, heads, d); gain, bias (2, d), rotation (2, T, d/2)."""
    batch, tokens, heads, width = q.shape
    rows, (r, w) = batch * tokens * heads, _tile(width)
    if rows:
        _forward[(triton.cdiv(rows, r), 2)](
            qkv, gain, bias, rotation, q, k, rows, heads, tokens, epsilon,
            NORMED=normed, CENTRED=centred, WIDTH=width, R=r, W=w, num_warps=WARPS, **FUSED,
        )  # fmt: skip


def backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor | None, rotation: Tensor | None, dqkv: Tensor,
    epsilon: float, normed: bool, centred: bool,
) -> Tensor:  # fmt: skip
    """Fill dqkv, and give the gradients of gains and biases (2 kinds, 2, d), float32; empty without a gain."""
    batch, tokens, heads, width = dq.shape
    rows, (r, w) = batch * tokens * heads, _tile(width)
    parts = triton.cdiv(rows, r * TILES)
    sums = None if gain is None else dq.new_empty(parts, 2, 2, width, dtype=torch.float32)
    if rows:
        _backward[(parts, 3)](
            dq, dk, dv, qkv, gain, rotation, dqkv, sums, rows, heads, tokens, epsilon,
            TILES=TILES, NORMED=normed, CENTRED=centred, WIDTH=width, R=r, W=w, num_warps=WARPS, **FUSED,
        )  # fmt: skip
    return dq.new_empty(0, dtype=torch.float32) if sums is None else torch.sum(sums, 0)

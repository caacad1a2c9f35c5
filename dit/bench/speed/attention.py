"""Torch's kernels of attention beside each other: forward and backward, at the head widths that a model may have.

At a fixed width of the tokens, so that fewer heads are wider ones and the work is the same. Queries, keys and values
lie in memory as the model's do. What a device cannot compute is told, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dit.bench.speed.turns import Contender, MedianRange, TurnFigures, ratio, take_turns
from dit.config import ConfigError, config
from dit.model.sdpa import Backend, attend, can

Dtype = Literal["bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS: tuple[Backend, ...] = ("auto", "cudnn", "flash", "efficient", "math")


@config
class AttentionBench:
    """Sizes: by default those of a layer of XL/2 at 256 tokens."""

    kernels: tuple[Backend, ...] = KERNELS  # that are measured; the first is what others are compared with
    head_widths: tuple[int, ...] = (64, 72, 128)  # channels of a head; each divides width
    dtypes: tuple[Dtype, ...] = ("bf16",)  # of queries, keys and values: bf16, fp32
    width: int = 1152  # channels of a token, over all heads
    tokens: int = 256  # that attend to each other
    batch: int = 64  # images a call
    calls: int = 20  # forward and backward passes a turn
    repeats: int = 5  # turns of each kernel

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch, self.calls, self.repeats, *self.head_widths) < 1 or not self.kernels:
            raise ConfigError(
                "tokens, batch, calls, repeats and head_widths are at least 1; a kernel is needed"
            )
        for head_width in self.head_widths:
            if self.width % head_width:
                raise ConfigError(f"heads of {head_width} channels do not divide the width {self.width}")

    @property
    def flops(self) -> float:
        """Of a call: two products forward, four backward, 2 per multiply-add; what a kernel computes again is not."""
        return 12.0 * self.batch * self.tokens**2 * self.width


def turns(cfg: AttentionBench) -> int:
    """Say how often `run` calls `progress` at most."""
    return (1 + cfg.repeats) * len(cfg.kernels) * len(cfg.head_widths) * len(cfg.dtypes)


def run(
    cfg: AttentionBench, device: torch.device, progress: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Measure {"rows": [...]}, as JSON values: a row for each dtype, head width and kernel."""
    rows: list[dict[str, Any]] = []
    for dtype in cfg.dtypes:
        for head_width in cfg.head_widths:
            rows += _rows(cfg, device, dtype, head_width, progress)
    return {"flops": cfg.flops, "rows": rows}


def _rows(
    cfg: AttentionBench, device: torch.device, dtype: Dtype, head_width: int, progress: Callable[[], object]
) -> list[dict[str, Any]]:
    """The rows of one head width; without times where a kernel cannot compute it."""
    q, k, v = _tensors(cfg, head_width, device, DTYPES[dtype])
    able = [
        name for name in cfg.kernels if name == "auto" or can(name, device, q.dtype, head_width, cfg.tokens)
    ]

    def turn(kernel: Backend, number: int) -> int:
        for _ in range(cfg.calls):
            _pass(kernel, q, k, v)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return cfg.calls

    found = take_turns(
        [Contender(name, partial(turn, name)) for name in able], cfg.repeats, progress=progress
    )
    exact = _pass("math", *(x.detach().double().requires_grad_() for x in (q, k, v)))
    rows: list[dict[str, Any]] = []
    for name in cfg.kernels:
        row: dict[str, Any] = {"dtype": dtype, "head_width": head_width, "kernel": name}
        if name in able:
            row |= _figures(cfg, found[name], found[able[0]], device)
            row["error"] = max(map(_error, _pass(name, q, k, v), exact))
        rows.append(row)
    return rows


def _tensors(cfg: AttentionBench, head_width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values (B, heads, T, d), the heads of a token beside each other in memory."""
    generator = torch.Generator().manual_seed(0)
    shape = (cfg.batch, cfg.tokens, cfg.width // head_width, head_width)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3)]
    return [x.requires_grad_() for x in drawn]


def _pass(kernel: Backend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What attention says, and the three gradients of half its sum of squares."""
    out = attend(q, k, v, backend=kernel)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), out.detach())


def _error(found: Tensor, exact: Tensor) -> float:
    """The relative error, over all numbers."""
    return float((found.double() - exact).norm() / exact.norm())


def _figures(
    cfg: AttentionBench, mine: TurnFigures, first: TurnFigures, device: torch.device
) -> dict[str, Any]:
    """Times: of CPU on a CPU, whose other work then does not count. quicker: the first one's time over this one's."""
    if device.type == "cpu":
        ms, quicker = [us / 1e3 for us in mine.cpu], ratio(first.cpu, mine.cpu)
    else:
        ms, quicker = [1e3 / rate for rate in mine.rate], ratio(mine.rate, first.rate)
    middle = MedianRange.of(ms)
    return {"ms": vars(middle), "quicker": vars(quicker), "flops_per_s": cfg.flops / middle.median * 1e3}


def quickest(figures: dict[str, Any]) -> dict[tuple[str, int], str]:
    """The kernel of least median time, of each dtype and head width."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in figures["rows"]:
        key = (row["dtype"], row["head_width"])
        if "ms" in row and (key not in found or row["ms"]["median"] < found[key]["ms"]["median"]):
            found[key] = row
    return {key: row["kernel"] for key, row in found.items()}


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """Write the table in Markdown, then which kernel was the quickest where."""
    yield "| dtype | head width | kernel | ms forward + backward | x the first | GFLOP/s | relative error |"
    yield "|---|---|---|---|---|---|---|"
    for row in figures["rows"]:
        head = f"| {row['dtype']} | {row['head_width']} | {row['kernel']} |"
        if "ms" not in row:
            yield f"{head} cannot | | | |"
            continue
        ms, quicker = MedianRange(**row["ms"]), MedianRange(**row["quicker"])
        yield f"{head} {ms} | {quicker} | {row['flops_per_s'] / 1e9:.4g} | {row['error']:.1e} |"
    best = quickest(figures)
    yield "quickest: " + ", ".join(f"{name} ({dtype}, {width})" for (dtype, width), name in best.items())

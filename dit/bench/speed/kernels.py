"""A block's forward and backward pass by each way of computing what lies between its products (`model.kernels`).

Eager and compiled, one block of a size of model, in a table: time, images/s and what the block keeps for its backward
pass. The block alone: no optimizer, no embeddings. On a GPU the first turn, which does not count, compiles.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dit.bench.speed.turns import Contender, MedianRange, TurnFigures, ratio, take_turns
from dit.config import ConfigError, config, from_dict
from dit.model.dit import DiTConfig
from dit.model.kernels.choice import KERNELS, use

CHANNELS, SIDE, CLASSES = 4, 32, 1000
# A plain DiT's block, and one with all that has a kernel of its own
BLOCKS: dict[str, dict[str, Any]] = {
    "dit": {},
    "modern": {"norm": "rms", "qk_norm": "rms", "rope": "halves", "mlp": "swiglu"},
}
BASE = "plain compiled"  # what the others are compared with: the compiler's own fusion
HEADER = f"{'':28s} {'ms a pass':>24s} {'images/s':>24s} {'x plain compiled':>22s} {'MiB kept':>9s} {'GiB peak':>9s}"


@config
class KernelBench:
    """Sizes. A turn is `steps` passes, forward and backward."""

    size: tuple[str, ...] = ("XL", "S")  # of the models that the block is of
    patch: int = 2  # latent pixels of a patch, on a side
    block: tuple[Literal["dit", "modern"], ...] = ("dit", "modern")  # kinds of block
    kernels: tuple[str, ...] = ("auto", "plain", "triton")  # ways to compute it, each eager and compiled
    batch: int = 64  # images a pass
    precision: Literal["fp32", "bf16"] = "bf16"  # of the products
    compiler: Literal["inductor", "aot_eager"] = "inductor"  # torch.compile's, of the compiled ones
    steps: int = 10  # passes a turn
    repeats: int = 5  # turns of each contender

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if min(self.batch, self.steps, self.repeats) < 1:
            raise ConfigError("batch, steps and repeats are at least 1")
        for name in self.kernels:
            KERNELS[name]
        for size in self.size:
            from_dict(DiTConfig, {"size": size, "patch": self.patch})


@dataclass
class _Pass:
    """A block's forward and backward pass."""

    block: nn.Module
    forward: Callable[..., Any]
    x: Tensor
    inputs: tuple[Tensor, ...]
    turns: dict[str, Tensor]
    autocast: bool

    def __call__(self) -> None:
        """Do it, from fresh gradients."""
        self.block.zero_grad()
        self.x.grad = None
        self.output().backward(self.x.detach())

    def output(self) -> Tensor:
        """Do the forward pass."""
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            out: Tensor = self.forward(self.x, *self.inputs, **self.turns)
        return out

    def kept(self) -> int:
        """Bytes that the forward pass keeps, without parameters; a storage counts once."""
        own = {p.untyped_storage().data_ptr() for p in self.block.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.output()
        del out
        return sum(found.values())


def run(
    cfg: KernelBench, device: torch.device, tell: Callable[[dict[str, Any]], object] = lambda figures: None
) -> dict[str, Any]:
    """Measure all: {"rows": [...]}, a row for each size, block and way that can run here; others say why not.

    tell: gets what is known so far after each size and kind of block.
    """
    rows: list[dict[str, Any]] = []
    for size in cfg.size:
        for kind in cfg.block:
            rows += _compared(cfg, device, size, kind)
            tell({"rows": rows})
    return {"rows": rows}


def table(figures: dict[str, Any]) -> str:
    """What `run` gave as lines of text."""
    return "\n".join([HEADER, *(_line(row) for row in figures["rows"])])


def _line(row: dict[str, Any]) -> str:
    name = f"{row['size']} {row['block']}, {row['name']}"
    if "refused" in row:
        return f"{name:28s} {row['refused']}"
    spread = [MedianRange(**row[key]) if key in row else "-" for key in ("ms", "images_per_s", "of_base")]
    kept = f"{row['kept_bytes'] / 2**20:.1f}"
    peak = f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else "-"
    return f"{name:28s} {spread[0]!s:>24s} {spread[1]!s:>24s} {spread[2]!s:>22s} {kept:>9s} {peak:>9s}"


def _compared(cfg: KernelBench, device: torch.device, size: str, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of one block."""
    passes, rows = {}, {}
    for kernels in cfg.kernels:
        for compiled in (False, True):
            name = f"{kernels} compiled" if compiled else kernels
            rows[name] = {"size": size, "block": kind, "name": name, "batch": cfg.batch}
            try:
                KERNELS[kernels]().check(device)
            except ConfigError as error:
                rows[name]["refused"] = str(error)
                continue
            passes[name] = _built(cfg, device, size, kind, kernels, compiled)
            rows[name] |= _memory(passes[name], device)
    found = take_turns([_turn(cfg, device, name, one) for name, one in passes.items()], cfg.repeats)
    for name, figures in found.items():
        rows[name] |= _figures(cfg, figures, found.get(BASE))
    return iter(rows.values())


def _figures(cfg: KernelBench, found: TurnFigures, base: TurnFigures | None) -> dict[str, Any]:
    """Of one contender, beside what it is compared with."""
    figures: dict[str, Any] = {
        "ms": vars(MedianRange.of([1e3 * cfg.batch / rate for rate in found.rate])),
        "images_per_s": vars(MedianRange.of(found.rate)),
        "cpu_ms": vars(MedianRange.of([cfg.batch * cpu / 1e3 for cpu in found.cpu])),
    }
    return figures if base is None else figures | {"of_base": vars(ratio(found.rate, base.rate))}


def _built(
    cfg: KernelBench, device: torch.device, size: str, kind: str, kernels: str, compiled: bool
) -> _Pass:
    """A block with noise in its weights, and its inputs."""
    torch.manual_seed(0)
    model = from_dict(
        DiTConfig, {"size": size, "patch": cfg.patch, "block": {"name": "adaln_zero", **BLOCKS[kind]}}
    )
    dims = model.dims(SIDE, CHANNELS, CLASSES)
    block = model.block.build(dims).to(device)
    use(block, KERNELS[kernels]())
    x = torch.randn(cfg.batch, dims.tokens, dims.width, device=device, requires_grad=True)
    c = torch.randn(cfg.batch, dims.width, device=device, requires_grad=True)
    rope = model.block.rope
    turns = {} if rope is None else {"rotation": rope.table(dims.grid, dims.head_width).float().to(device)}
    forward = (
        torch.compile(block.forward, backend=cfg.compiler, fullgraph=True) if compiled else block.forward
    )
    return _Pass(block, forward, x, (c,), turns, cfg.precision == "bf16")


def _memory(one: _Pass, device: torch.device) -> dict[str, Any]:
    """What a pass keeps, and on a GPU the most that it takes, after one that compiles and fills caches."""
    one()
    figures: dict[str, Any] = {"kept_bytes": one.kept()}
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        one()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return figures


def _turn(cfg: KernelBench, device: torch.device, name: str, one: _Pass) -> Contender:
    """A turn of a contender's passes."""

    def passes(turn: int) -> int:
        for _ in range(cfg.steps):
            one()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return cfg.steps * cfg.batch

    return Contender(name, passes)

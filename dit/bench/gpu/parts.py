"""The items that compare ways to do one part of a step: kernels, attention, updates, memory, the loop, parity."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from dit.bench import parity
from dit.bench.gpu.item import Found, Place
from dit.bench.gpu.measures import precision
from dit.bench.parity import ParityBench
from dit.bench.speed import attention as attention_bench
from dit.bench.speed import kernels as kernels_bench
from dit.bench.speed import memory as memory_bench
from dit.bench.speed import overhead as overhead_bench
from dit.bench.speed import updates as updates_bench
from dit.bench.speed.attention import AttentionBench
from dit.bench.speed.kernels import KernelBench
from dit.bench.speed.memory import MemoryBench
from dit.bench.speed.overhead import OverheadBench
from dit.bench.speed.turns import MedianRange
from dit.bench.speed.updates import UpdatesBench
from dit.config import from_dict
from dit.ranks import group


def kernels(place: Place) -> Found:
    """A block's passes by each of model.kernels, eager and compiled."""
    how = {
        "size": place.pick(["XL", "S"], ["nano"]),
        "patch": place.pick(2, 8),
        "batch": place.pick(64, 2),
        "precision": precision(place),
        "compiler": place.pick("inductor", "aot_eager"),
        "steps": place.pick(10, 1),
        "repeats": place.pick(5, 1),
    }

    def found(figures: dict[str, Any]) -> Found:
        done = [row for row in figures["rows"] if "ms" in row]
        rows = [
            f"{row['size']} {row['block']} {row['name']} {MedianRange(**row['ms']).median:.4g} ms"
            for row in done
        ]
        return Found("; ".join(rows) or "nothing could run", {"protocol": how, **figures})

    with group.session() as world:
        cfg = from_dict(KernelBench, how)
        return found(kernels_bench.run(cfg, world.device, lambda figures: place.tell(found(figures))))


def attention(place: Place) -> Found:
    """Torch's kernels of attention at head widths of 64, 72 and 128; the quickest of each."""
    toy = {"width": 1152, "tokens": 16, "batch": 1, "calls": 1, "repeats": 1, "dtypes": ["fp32"]}
    how: dict[str, Any] = place.pick({}, toy)
    with group.session() as world:
        figures = attention_bench.run(from_dict(AttentionBench, how), world.device)
    best = attention_bench.quickest(figures)
    text = "; ".join(f"{dtype}, heads of {width}: {name}" for (dtype, width), name in best.items())
    return Found(text, {"protocol": how, **figures})


def updates(place: Place, size: str) -> Found:
    """An update and its average by each way, as bytes moved a second."""
    how = {"size": place.pick(size, "nano"), "steps": 8, "repeats": place.pick(5, 1)}
    rows = updates_bench.run(from_dict(UpdatesBench, how))
    told = [f"{name} {MedianRange(**row['ms']).median:.4g} ms" for name, row in rows.items()]
    return Found("; ".join(told), {"protocol": how, "rows": rows})


def memory(place: Place) -> Found:
    """Peak memory of a step beside its prediction (P7)."""
    how: dict[str, Any] = {
        "size": place.pick(["S"], ["nano"]),
        "patch": place.pick(2, 8),
        "batch": place.pick(64, 2),
        "precision": precision(place),
        "stages": place.pick([0, 1, 2, 3], [0]),
        "recompute": place.pick(["none", "products", "all"], ["none"]),
        "ranks": [1],
    }
    done: list[dict[str, Any]] = []

    def found() -> Found:
        text = [*memory_bench.lines(done)][-1] if done else "nothing yet"
        return Found(text, {"protocol": how, "rows": list(done)})

    def told(row: dict[str, Any]) -> None:
        done.append(row)
        place.tell(found())

    rows = memory_bench.run(from_dict(MemoryBench, how), row_done=told)
    done[:] = rows
    return found()


def overhead(place: Place, size: str) -> Found:
    """The loop's share of a step (P5)."""
    how: dict[str, Any] = {
        "size": place.pick(size, "nano"),
        "patch": place.pick(2, 8),
        "batch": place.pick(256, 2),
        "micro_batch": place.pick({"XL": 64}.get(size, 256), 2),
        "precision": precision(place),
        "compile": place.pick(True, False),
        "steps": place.pick(20, 1),
        "repeats": place.pick(3, 1),
        "log_every": place.pick(10, 1),
    }
    cfg = from_dict(OverheadBench, how)
    with tempfile.TemporaryDirectory() as folder:
        figures = overhead_bench.run(cfg, Path(folder))
    text = [*overhead_bench.lines(figures, cfg.device_bound, not place.is_toy)][-1]
    return Found(text.strip(), {"protocol": how, **figures})


def as_good(place: Place, study: str) -> Found:
    """Held-out losses of cheaper arithmetic beside the usual one, three seeds, on real digits."""
    how: dict[str, Any] = {
        "study": study,
        "size": place.pick("S", "nano"),
        "steps": place.pick(300, 1),
        "batch": place.pick(256, 2),
        "digits": 32,
        "compile": place.pick(True, False),
        "seeds": place.pick([0, 1, 2], [0]),
    }
    extra = {"optim.lr": "5e-4", "optim.warmup": place.pick("30", "0")}
    figures = parity.run(from_dict(ParityBench, how), place.out / f"parity-{study}", lambda line: None, extra)
    told = [f"{name} {row['mean']}" + (f" ({row['verdict']})" if "verdict" in row else "")
            for name, row in figures["variants"].items()]  # fmt: skip
    return Found("; ".join(told), {"protocol": how, **figures})

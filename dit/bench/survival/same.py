"""Whether two runs are the same, from what they left: every difference in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dit.train.checkpoints.checkpoint import Checkpoint, Reader

Row = dict[str, Any]
FIGURES = ("batch_hash", "loss", "grad_norm", "lr", "samples", "updates", "skipped")  # what is not a speed
OF_THE_PLACE = ("config", "files")  # meta data: where the run lies, and checksums of what is compared itself


def step_problems(rows: Sequence[Row], steps: int) -> list[str]:
    """List where the lines of metrics.jsonl are not steps 1..steps, each once and in order."""
    logged = [int(row["step"]) for row in rows]
    counts = Counter(logged)
    found = [f"step {s} is missing" for s in range(1, steps + 1) if not counts[s]]
    found += [f"step {s} is there {n} times" for s, n in sorted(counts.items()) if n > 1]
    found += [f"step {s} is beyond the run's {steps}" for s in sorted(counts) if not 1 <= s <= steps]
    if not found and logged != sorted(logged):
        found.append("the steps are not in order")
    return [f"metrics.jsonl: {problem}" for problem in found]


def figure_problems(
    rows: Sequence[Row], reference: Sequence[Row], names: Sequence[str] = FIGURES
) -> list[str]:
    """List figures that differ from the reference's at a step that both have: the first such step of each."""
    there, found = {row["step"]: row for row in reference}, []
    for name in names:
        pairs = [
            (row["step"], row.get(name), there[row["step"]].get(name)) for row in rows if row["step"] in there
        ]
        wrong = [pair for pair in pairs if pair[1] != pair[2]]
        if wrong:
            step, ours, theirs = wrong[0]
            found.append(
                f"metrics.jsonl: {name} at step {step} is {ours!r}, undisturbed {theirs!r} ({len(wrong)} steps differ)"
            )
    return found


def checkpoint_problems(ours: Checkpoint, reference: Checkpoint) -> tuple[int, list[str]]:
    """Compare weights, averages, optimizer, buffers, meta data: (tensors compared, what is not the same to the bit)."""
    a, b = _tensors(ours), _tensors(reference)
    found = [f"checkpoint: {name} is in one of the two alone" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        if not same_bits(a[name], b[name]):
            found.append(f"checkpoint: {name} differs")
    found += [
        f"checkpoint: {key} is {ours.meta.get(key)!r}, undisturbed {reference.meta.get(key)!r}"
        for key in sorted({*ours.meta, *reference.meta} - {*OF_THE_PLACE})
        if ours.meta.get(key) != reference.meta.get(key)
    ]
    return len(a), found


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Everything that the ranks' files hold, whole."""
    reader, kinds = Reader(checkpoint), set()
    for entry in checkpoint.meta["files"]:
        with safe_open(checkpoint.path / entry["file"], framework="pt") as file:
            kinds |= {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    found = {
        f"{kind}/{name}": reader.whole(kind, name)
        for kind in sorted(kinds - {"buffer"})
        for name in reader.shapes
    }
    return found | {f"buffer/{name}": tensor for name, tensor in reader.buffers().items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether type, shape and every bit are the same: 0 is not -0, and NaN is itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    first, second = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return bool(torch.equal(first, second))


def leftovers(run_dir: Path) -> list[str]:
    """List what a killed write left behind and nobody has cleared away."""
    return [f"left over: {path}" for path in sorted(run_dir.rglob("*.partial"))]

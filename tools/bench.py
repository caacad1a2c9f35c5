"""Speed figures, each a ratio of contenders that take turns in one run: `python tools/bench.py loader` or `zero`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from dit.bench import loader as loader_bench
from dit.bench import zero as zero_bench
from dit.bench.turns import Spread, protocol
from dit.cli import run
from dit.config import from_dict, to_dict

EPOCHS = 80  # the shortest run that is usual on ImageNet: 400,000 steps of 256
ENOUGH = {"repeats": 5, "samples": 100_000}  # for which the bounds are stated


def loader(
    *,
    folder: Annotated[
        str | None, "where the data lie, 2 GB; kept for the next time; a temporary one if not given"
    ] = None,
    samples: Annotated[int, "latents of 8 KiB"] = 100_000,
    plain: Annotated[int, "of them in per-sample shards"] = 20_000,
    batch: Annotated[int, "samples a batch"] = 256,
    repeats: Annotated[int, "turns of each contender"] = 5,
    readers: Annotated[int, "threads that read blocks"] = 2,
    lanes: Annotated[int, "data sequences"] = 64,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """Samples a second of one process: our shards, a memory map's fancy indexing, plain webdataset.

    Also CPU time a sample, the first batch of a fresh start and of a resume, the first epoch (which checks), several
    ranks on one node, memory. Warm page cache: run it with more free memory than the data take.
    """
    sizes = {
        "samples": samples,
        "plain": plain,
        "batch": batch,
        "repeats": repeats,
        "readers": readers,
        "lanes": lanes,
    }
    cfg = from_dict(loader_bench.LoaderBench, sizes)
    torch.set_num_threads(1)
    how = protocol(**to_dict(cfg))
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=loader_bench.turns(cfg), unit="turn") as bar:
        figures = loader_bench.run(Path(folder or temporary), cfg, bar.update)
    enough = repeats >= ENOUGH["repeats"] and samples >= ENOUGH["samples"]
    _print_loader(figures, enough)
    if not enough:
        print(
            f"too few to judge the bounds: {repeats} turns of {samples:,} samples; take at least "
            f"--repeats={ENOUGH['repeats']} --samples={ENOUGH['samples']}"
        )
    print(json.dumps(how))
    if json_file:
        Path(json_file).write_text(json.dumps({"protocol": how, "figures": figures}, indent=1) + "\n")


def _print_bound(name: str, ratio: dict[str, float], bound: float, enough: bool, most: bool = False) -> None:
    """A ratio, its bound and, where enough was measured, whether its median meets it."""
    spread = Spread(**ratio)
    met = spread.median <= bound if most else spread.median >= bound
    verdict = f": {'met' if met else 'missed'}" if enough else ""
    print(f"{name:28s} {spread} (at {'most' if most else 'least'} {bound:g}{verdict})")


def _shares(checksums: dict[str, float]) -> dict[str, float]:
    """Of the loader's time over EPOCHS epochs, what the checks of the first one take."""
    of = {"median": "median", "low": "high", "high": "low"}  # the quicker the first epoch, the less they take
    return {name: (1 / checksums[value] - 1) / EPOCHS for name, value in of.items()}


def _print_loader(figures: dict[str, Any], enough: bool) -> None:
    print(f"{'':28s} {'samples/s':>32s} {'CPU us/sample':>26s}")
    for name, rate in figures["rates"].items():
        print(f"{name:28s} {Spread(**rate)!s:>32s} {Spread(**figures['cpu_us'][name])!s:>26s}")
    _print_bound("ours / memory map", figures["of memory map"], 0.6, enough)
    _print_bound("ours / plain webdataset", figures["of plain webdataset"], 20, enough)
    print(f"{'first epoch / ours':28s} {Spread(**figures['checksums'])} (every block is checked, once a run)")
    _print_bound(f"checks over {EPOCHS} epochs", _shares(figures["checksums"]), 0.03, enough, most=True)
    first = figures["first_batch"]
    print(
        f"first batch, ms              {Spread(**first['fresh'])} fresh, {Spread(**first['resume'])} resumed"
    )
    _print_bound("resumed / fresh", first["ratio"], 2, enough, most=True)
    for size, found in figures["ranks"].items():
        print(
            f"{size} rank(s), all together     {found['rate']:.4g} samples/s, {found['cpu_us']:.2f} us a sample"
        )
    print(
        f"memory                       {figures['memory_bytes'] / 2**20:.0f} MiB of batches at most, as stated"
    )


def zero(
    *,
    width: Annotated[int, "of the DiT"] = 192,
    depth: Annotated[int, "blocks"] = 12,
    heads: Annotated[int, "of the attention"] = 3,
    batch: Annotated[int, "samples a step, over all ranks"] = 32,
    accumulation: Annotated[int, "micro-batches a rank and step"] = 1,
    steps: Annotated[int, "steps a turn"] = 4,
    repeats: Annotated[int, "turns of each contender"] = 5,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """ZeRO stages 0-3 against torch's DistributedDataParallel, on 2 and 4 gloo ranks of this machine's CPU, in fp32.

    Bytes that each rank sends a step, by the ring's formula for the collectives that were seen, beside those of the
    ZeRO paper; seconds a step, and their ratio to DDP's in the same turn.
    """
    sizes = {"width": width, "depth": depth, "heads": heads, "batch": batch, "accumulation": accumulation}
    cfg = from_dict(zero_bench.ZeroBench, {**sizes, "steps": steps, "repeats": repeats})
    how = protocol(**to_dict(cfg))
    with tqdm(total=len(cfg.ranks), unit="size") as bar:
        figures = zero_bench.run(cfg, bar.update)
    for size, rows in figures.items():
        print(
            f"{size} ranks   {'sent, MB':>9s} {'formula':>9s} {'ratio':>6s} {'ms a step':>26s} {'of DDP':>22s}"
        )
        for name, row in rows.items():
            sent, expected = row["sent_bytes"], row["formula_bytes"]
            ms = Spread(*(1e3 * row["step_seconds"][key] for key in ("median", "low", "high")))
            print(
                f"{name:9s} {sent / 1e6:9.2f} {expected / 1e6:9.2f} {sent / expected:6.3f} {ms!s:>26s} "
                f"{Spread(**row['of_ddp'])!s:>22s}"
            )
    print(json.dumps(how))
    if json_file:
        Path(json_file).write_text(json.dumps({"protocol": how, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    run({"loader": loader, "zero": zero})

"""Speed figures, each a ratio of contenders that take turns in one run: `python tools/bench.py loader`."""

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
from dit.bench.turns import Spread, protocol
from dit.cli import run
from dit.config import from_dict, to_dict


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

    Also CPU time a sample, the first batch of a fresh start and of a resume, the cost of checking every block, several
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
    _print_loader(figures)
    print(json.dumps(how))
    if json_file:
        Path(json_file).write_text(json.dumps({"protocol": how, "figures": figures}, indent=1) + "\n")


def _print_loader(figures: dict[str, Any]) -> None:
    print(f"{'':28s} {'samples/s':>32s} {'CPU us/sample':>26s}")
    for name, rate in figures["rates"].items():
        print(f"{name:28s} {Spread(**rate)!s:>32s} {Spread(**figures['cpu_us'][name])!s:>26s}")
    print(f"ours / memory map            {Spread(**figures['of memory map'])} (at least 0.6)")
    print(f"ours / plain webdataset      {Spread(**figures['of plain webdataset'])} (at least 20)")
    print(f"every block checked / ours   {Spread(**figures['checksums'])} (at least 0.97)")
    first = figures["first_batch"]
    print(
        f"first batch, ms              {Spread(**first['fresh'])} fresh, {Spread(**first['resume'])} resumed"
    )
    print(f"resumed / fresh              {Spread(**first['ratio'])} (at most 2)")
    for size, found in figures["ranks"].items():
        print(
            f"{size} rank(s), all together     {found['rate']:.4g} samples/s, {found['cpu_us']:.2f} us a sample"
        )
    print(
        f"memory                       {figures['memory_bytes'] / 2**20:.0f} MiB of batches at most, as stated"
    )


if __name__ == "__main__":
    run({"loader": loader})

"""The figures of `dit/bench/speed/loader.py` as lines of text, beside their bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit.bench.speed.bounds import bound_line
from dit.bench.speed.turns import MedianRange

EPOCHS = 80  # the shortest run that is usual on ImageNet: 400,000 steps of 256
LEAST_RATE = 200_000  # samples/s of a process; an H100 at 100% MFU eats 27,000 of S/2
MOST_CPU = 5  # microseconds a sample


def lines(figures: dict[str, Any], enough: bool) -> Iterator[str]:
    """Write the table; enough: so much was measured that the bounds are judged."""
    yield f"{'':28s} {'samples/s':>32s} {'CPU us/sample':>26s}"
    for name, rate in figures["rates"].items():
        yield f"{name:28s} {MedianRange(**rate)!s:>32s} {MedianRange(**figures['cpu_us'][name])!s:>26s}"
    yield bound_line("samples/s", figures["rates"]["ours"], LEAST_RATE, enough)
    yield bound_line("CPU us a sample", figures["cpu_us"]["ours"], MOST_CPU, enough, most=True)
    yield f"{'ours / memory map':28s} {MedianRange(**figures['of memory map'])} (a yardstick: no bound)"
    yield bound_line("ours / plain webdataset", figures["of plain webdataset"], 20, enough)
    first_epoch = MedianRange(**figures["checksums"])
    yield f"{'first epoch / ours':28s} {first_epoch} (every block is checked, once a run)"
    yield bound_line(f"checks over {EPOCHS} epochs", _shares(figures["checksums"]), 0.03, enough, most=True)
    first = figures["first_batch"]
    fresh, resumed = MedianRange(**first["fresh"]), MedianRange(**first["resume"])
    yield f"first batch, ms              {fresh} fresh, {resumed} resumed"
    yield bound_line("resumed / fresh", first["ratio"], 2, enough, most=True)
    for size, found in figures["ranks"].items():
        each = f"{found['rate']:.4g} samples/s, {found['cpu_us']:.2f} us a sample"
        yield f"{size} rank(s), all together     {each}"
    yield f"memory                       {figures['memory_bytes'] / 2**20:.0f} MiB of batches at most, as stated"


def _shares(checksums: dict[str, float]) -> dict[str, float]:
    """Tell what the checks of the first epoch take of the loader's time over EPOCHS epochs."""
    of = {"median": "median", "low": "high", "high": "low"}  # the quicker the first epoch, the less they take
    return {name: (1 / checksums[value] - 1) / EPOCHS for name, value in of.items()}

"""The figures of `dit/bench/speed/zero.py` as lines of text: a table a number of ranks, a contender each line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit.bench.speed.turns import MedianRange


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """Write the tables."""
    for size, rows in figures.items():
        yield f"{size} ranks   {'sent, MB':>9s} {'formula':>9s} {'ratio':>6s} {'ms a step':>26s} {'of DDP':>22s}"
        for name, row in rows.items():
            sent, expected = row["sent_bytes"], row["formula_bytes"]
            ms = MedianRange(*(1e3 * row["step_seconds"][key] for key in ("median", "low", "high")))
            yield (
                f"{name:9s} {sent / 1e6:9.2f} {expected / 1e6:9.2f} {sent / expected:6.3f} {ms!s:>26s} "
                f"{MedianRange(**row['of_ddp'])!s:>22s}"
            )

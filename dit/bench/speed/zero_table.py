"""The figures of `dit/bench/speed/zero.py` as lines of text: a table a number of ranks, a contender each line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit.bench.speed.turns import MedianRange


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """Write the tables."""
    for size, rows in figures.items():
        spreads = f"{'ms a step':>26s} {'of DDP':>22s} {'of plain':>22s} {'CPU of plain':>22s}"
        yield f"{size} ranks   {'sent, MB':>9s} {'formula':>9s} {'ratio':>6s}  {'':6s} {spreads}"
        for name, row in rows.items():
            sent, expected = row["sent_bytes"], row["formula_bytes"]
            ms = MedianRange(*(1e3 * row["step_seconds"][key] for key in ("median", "low", "high")))
            verdict = "met" if row["is_within"] else "MISSED"
            spread = [MedianRange(**row[key]) for key in ("of_ddp", "of_plain", "cpu_of_plain")]
            yield (
                f"{name:9s} {sent / 1e6:9.2f} {expected / 1e6:9.2f} {sent / expected:6.3f}  {verdict:6s} {ms!s:>26s} "
                f"{spread[0]!s:>22s} {spread[1]!s:>22s} {spread[2]!s:>22s}"
            )

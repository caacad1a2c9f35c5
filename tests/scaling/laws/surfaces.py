"""Loss surfaces with known laws, as CSV files or as points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit.scaling.laws.law import Law
from dit.scaling.laws.solver import Points

CHINCHILLA = Path(__file__).with_name("chinchilla.csv")
HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # arXiv 2203.15556, eq. 10
# alpha = beta and not, E small and large, terms of unlike size
LAWS = {
    "hoffmann": HOFFMANN,
    "alike": Law(1.82, 480.0, 2100.0, 0.35, 0.35),
    "steep": Law(0.05, 3e4, 40.0, 0.6, 0.2),
    "shallow": Law(0.5, 9.0, 2e5, 0.12, 0.55),
}


@dataclass(frozen=True)
class Grid:
    """IsoFLOP budgets with sizes about their optimum. off: log of how far the grid's middle is from it."""

    sizes: int = 7
    budgets: int = 5
    off: float = 0.0
    wide: float = 8.0  # the largest size over the middle one
    first: float = 1e18
    last: float = 1e21

    def flops_params(self, law: Law) -> tuple[np.ndarray, np.ndarray]:
        flops = np.repeat(np.geomspace(self.first, self.last, self.budgets), self.sizes)
        around = np.tile(np.geomspace(1 / self.wide, self.wide, self.sizes), self.budgets)
        return flops, law.optimum(flops)[0] * np.exp(self.off) * around


def points(law: Law, grid: Grid | None = None, noise: float = 0.0, seed: int = 0) -> Points:
    """Runs of a law at 6·N·D FLOPs, log-normal noise on their losses."""
    flops, params = (grid or Grid()).flops_params(law)
    tokens = flops / 6 / params
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal(len(flops)))
    return Points.of(params, tokens, law.loss(params, tokens) * factors)


def table(law: Law, grid: Grid | None = None, noise: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """The same as rows with params, flops and loss."""
    made = points(law, grid, noise, seed)
    params, tokens, loss = (np.exp(column) for column in (made.params, made.tokens, made.loss))
    return [
        {"params": float(n), "flops": float(6 * n * d), "loss": float(value)}
        for n, d, value in zip(params, tokens, loss, strict=True)
    ]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows of the same keys as a CSV file."""
    lines = [",".join(rows[0]), *(",".join(str(cell) for cell in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path

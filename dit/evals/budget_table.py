"""A table of distances by solver and budget, kept as it grows, and its picture."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.errors import Notice, UserError
from dit.evals.protocol import protocol_hash
from dit.files import write_atomically
from dit.outputs import claim, write_record
from dit.sample.finite import NotFiniteError


@dataclass
class BudgetTable:
    """The figures, kept in OUT.json as they come in, so that nothing is drawn twice; OUT.md and OUT.png show them.

    Raises OutputError where figures of another protocol are there; overwrite: they are replaced.
    """

    out: Path
    protocol: dict[str, Any]

    overwrite: bool = False

    def __post_init__(self) -> None:
        files = [self.file, *(self.out.with_name(f"{self.out.name}.{ending}") for ending in ("md", "png"))]
        held = claim(files, {"protocol": self.protocol}, record=self.file, overwrite=self.overwrite)
        self.rows: list[dict[str, Any]] = [] if held is None else held["rows"]
        self.out.parent.mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> Path:
        """Where the figures are kept."""
        return self.out.with_name(f"{self.out.name}.json")

    def has(self, row: dict[str, Any]) -> bool:
        """Whether this cell was measured."""
        return any(all(held.get(key) == value for key, value in row.items()) for held in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a figure."""
        self.rows.append(row)
        values = {"protocol": self.protocol, "hash": protocol_hash(self.protocol), "rows": self.rows}
        write_record(self.file, values)

    def measure(self, row: dict[str, Any], frechet: Callable[[], float]) -> None:
        """Measure a cell and keep its figure, unless that is done; empty, with a Notice, where an image is none."""
        if self.has(row):
            return
        try:
            self.add({**row, "frechet": frechet()})
        except NotFiniteError as error:
            warnings.warn(
                f"{row['run']}, {row['solver']} in {row['nfe']} evaluations: no figure. {error}",
                Notice,
                stacklevel=2,
            )

    def write(self) -> None:
        """The table and the picture. UserError where there is no figure to show."""
        if not self.drawn():
            raise UserError(
                f"{self.file} holds no figure of drawn images: give more evaluations, or other runs"
            )
        write_atomically(self.out.with_name(f"{self.out.name}.md"), self.markdown().encode())
        self.plot(self.out.with_name(f"{self.out.name}.png"))

    def drawn(self) -> list[dict[str, Any]]:
        """Rows of generated images, as opposed to real ones."""
        return [row for row in self.rows if "budget" in row]

    def floor(self) -> float | None:
        """The distance of real images."""
        return next((row["frechet"] for row in self.rows if "budget" not in row), None)

    def markdown(self) -> str:
        """A line for each run and solver, a column for each budget; the best of a column and run is bold."""
        budgets = sorted({row["budget"] for row in self.drawn()})
        lines = [
            "| run | solver | " + " | ".join(f"NFE {b}" for b in budgets) + " |",
            "|---|---|" + "---|" * len(budgets),
        ]
        found = {(r["run"], r["solver"], r["budget"]): r["frechet"] for r in self.drawn()}
        for name, solver in dict.fromkeys((r["run"], r["solver"]) for r in self.drawn()):
            words = []
            for b in budgets:
                best = min(v for (n, _, budget), v in found.items() if (n, budget) == (name, b))
                value = found.get((name, solver, b))
                words.append("" if value is None else f"**{value:.2f}**" if value == best else f"{value:.2f}")
            lines.append(f"| {name} | {solver} | " + " | ".join(words) + " |")
        if self.floor() is not None:
            lines.append(f"\nReal images: {self.floor():.2f}.")
        return "\n".join(
            [*lines, f"\nProtocol {protocol_hash(self.protocol)}: `{json.dumps(self.protocol)}`\n"]
        )

    def plot(self, file: Path) -> None:
        """Distance against evaluations, a panel for each run."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        runs = list(dict.fromkeys(row["run"] for row in self.drawn()))
        figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.8), sharey=True, squeeze=False)
        for axis, name in zip(axes[0], runs, strict=True):
            mine = [row for row in self.drawn() if row["run"] == name]
            for solver in dict.fromkeys(row["solver"] for row in mine):
                points = sorted((r["nfe"], r["frechet"]) for r in mine if r["solver"] == solver)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=solver)
            if self.floor() is not None:
                axis.axhline(self.floor(), color="grey", linestyle="--", linewidth=1, label="real images")
            axis.set(xscale="log", yscale="log", title=name, xlabel="evaluations of the denoiser per image")
            axis.set_xticks(sorted({row["budget"] for row in mine}))
            axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
            for each in (axis.xaxis, axis.yaxis):
                each.set_major_formatter(mpl.ticker.ScalarFormatter())
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("Fréchet distance to the training images")
        axes[0][-1].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(file, dpi=130)
        plt.close(figure)

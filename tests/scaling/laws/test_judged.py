"""Warnings: each is given where its data call for it, and none where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit.errors import UserError
from dit.scaling.laws.fit import Floor
from dit.scaling.laws.fitting import Order, fit_file
from dit.scaling.laws.judged import held_out, seeds_spread
from dit.scaling.laws.law import Law
from dit.scaling.laws.record import FitRecord
from dit.scaling.laws.table import Runs
from tests.scaling.laws.surfaces import HOFFMANN, Grid, table, write

Rows = list[dict[str, Any]]


def fitted(tmp_path: Path, rows: Rows, **how: Any) -> FitRecord:
    return fit_file(Order(write(tmp_path / "runs.csv", rows), **{"bootstrap": 100, **how}))


def with_tokens(rows: Rows) -> Rows:
    return [row | {"tokens": row["flops"] / 6 / row["params"]} for row in rows]


def test_good_data_give_no_warning(tmp_path: Path) -> None:
    assert fitted(tmp_path, with_tokens(table(HOFFMANN, Grid(8, 6), 2e-4))).warnings == []


def proportional() -> Rows:
    """Runs of one number of tokens a parameter."""
    sizes = np.geomspace(1e7, 1e10, 8)
    return [{"params": n, "flops": 6 * n * 20 * n, "loss": float(HOFFMANN.loss(n, 20 * n))} for n in sizes]


def crossed(*sizes: float, law: Law = HOFFMANN) -> Rows:
    """Each size trained on each of four numbers of tokens."""
    return [
        {"params": n, "flops": 6 * n * d, "loss": float(law.loss(n, d))}
        for n in sizes
        for d in (1e9, 1e10, 1e11, 1e12)
    ]


def bent() -> Rows:
    """Losses that bend the other way than a floor would."""
    rows = table(Law(0.0, 50.0, 90.0, 0.2, 0.15))
    sizes = np.log([row["params"] for row in rows])
    less = 0.02 * (sizes - sizes.mean()) ** 2
    return [row | {"loss": row["loss"] - float(cut)} for row, cut in zip(rows, less, strict=True)]


def chance() -> Rows:
    """Losses that have nothing to do with N and D."""
    losses = np.random.default_rng(0).uniform(1, 3, 24)
    return [
        row | {"loss": float(loss)} for row, loss in zip(table(HOFFMANN, Grid(6, 4)), losses, strict=True)
    ]


def spoilt() -> Rows:
    """One run of which the loss is off."""
    rows = table(HOFFMANN, Grid(6, 4), 1e-3)
    return [row | {"loss": row["loss"] * (1.3 if i == 3 else 1.0)} for i, row in enumerate(rows)]


CASES: dict[str, tuple[Callable[[], Rows], str]] = {
    "few sizes": (lambda: crossed(1e8, 1e9, 1e10), "3 sizes of model: fewer than 4"),
    "near budgets": (lambda: table(HOFFMANN, Grid(6, 3, first=1e18, last=5e18)), "budgets span 0.70 decades of FLOPs"),
    "small models": (lambda: table(HOFFMANN, Grid(6, 4, off=-4.0)), "at 4 of 4 budgets the largest model is the best"),
    "large models": (lambda: table(HOFFMANN, Grid(6, 4, off=4.0)), "at 4 of 4 budgets the smallest model is the best"),
    "chance": (chance, "alpha is at its bound, 8: no power"),
    "no floor": (bent, "E is at its bound, 0"),
    "noise": (lambda: table(HOFFMANN, Grid(5, 4), 3e-2), "intervals wider than the estimate: "),
    "proportional": (proportional, "N and D go together (correlation 1.000"),
    "no size": (lambda: crossed(1e7, 3e7, 1e8, law=Law(1.69, 1e-9, 410.7, 0.34, 0.28)), "A/N^alpha is below 0.001"),
    "an outlier": (spoilt, "1 run off the law by more than 6 (robust) standard deviations: line 5"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "said"), CASES.values(), ids=CASES)
def test_what_data_cannot_carry_is_said(rows: Callable[[], Rows], said: str, tmp_path: Path) -> None:
    warnings = fitted(tmp_path, rows()).warnings
    assert any(said in text for text in warnings), warnings


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_under_two_names_is_named(seed: int, tmp_path: Path) -> None:
    rows = [row | {"run": f"r{i}", "seed": 0} for i, row in enumerate(table(HOFFMANN, Grid(8, 6), 2e-4))]
    warnings = fitted(tmp_path, [*rows, rows[5] | {"run": "again", "seed": seed}]).warnings
    said = "1 run with the very loss of another of the same N and D, such as r5 and again: one run under two names"
    assert any(said in text for text in warnings), warnings


def test_seeds_that_spread_more_than_the_residuals(tmp_path: Path) -> None:
    """Seeds of one point apart, all else on the law: impossible for noise, and so a sign of something else."""
    rows = with_tokens(table(HOFFMANN, Grid(8, 8)))
    rows = [row | {"seed": 0} for row in rows] + [rows[5] | {"seed": 1, "loss": rows[5]["loss"] * 1.2}]
    record = fitted(tmp_path, rows)
    assert any("seeds alone spread the loss by 12.89%" in text for text in record.warnings), record.warnings


def test_the_largest_rung_is_predicted_by_the_others(tmp_path: Path) -> None:
    rows = [row | {"seed": seed} for row in table(HOFFMANN, Grid(6, 5)) for seed in (0, 1)]
    rows = [row | {"loss": row["loss"] * (1.001 if row["seed"] else 1 / 1.001)} for row in rows]
    top = max(row["flops"] for row in rows)
    moved = [row | {"loss": row["loss"] * (1.05 if row["flops"] > top / 1.1 else 1.0)} for row in rows]
    found = held_out(Runs.read(write(tmp_path / "runs.csv", moved)), Floor())
    assert len(found["runs"]) == 12
    assert found["fitted_runs"] == 48
    assert found["error"] == pytest.approx(1 / 1.05 - 1, abs=3e-4)
    assert found["worst"] == pytest.approx(0.0486, abs=1e-3)
    assert found["seeds_spread"] == pytest.approx(np.sqrt(2) * np.log(1.001), rel=1e-6)
    few = held_out(Runs.read(write(tmp_path / "few.csv", table(HOFFMANN, Grid(3, 2)))), Floor())
    assert few["error"] is None
    assert "without the largest runs: 3 runs" in few["why"]


def swept() -> Rows:
    """A sweep of learning rates at one point, of two seeds each that differ by 0.2 %; all else on the law."""
    rows = [row | {"lr": 1e-3, "seed": 0} for row in with_tokens(table(HOFFMANN, Grid(6, 4)))]
    first = rows[0]
    return rows + [
        first | {"lr": lr, "seed": seed, "loss": first["loss"] * worse * (1.002 if seed else 1.0)}
        for lr, worse in ((1e-3, 1.0), (2e-3, 1.1), (4e-3, 1.3))
        for seed in (0, 1)
        if (lr, seed) != (1e-3, 0)
    ]


def test_a_sweep_of_learning_rates_is_no_spread_of_seeds(tmp_path: Path) -> None:
    """Nor is one whose column is not known: there a seed comes twice."""
    spread = seeds_spread(Runs.read(write(tmp_path / "runs.csv", swept())))
    assert spread == pytest.approx(np.log(1.002) / np.sqrt(2), rel=1e-6)
    renamed = [{"rate" if key == "lr" else key: cell for key, cell in row.items()} for row in swept()]
    assert seeds_spread(Runs.read(write(tmp_path / "renamed.csv", renamed))) is None


def test_a_sweep_of_learning_rates_among_the_runs_is_said(tmp_path: Path) -> None:
    warnings = fitted(tmp_path, swept()).warnings
    assert any("runs of 1 of 24 pairs of N and D differ in lr" in text for text in warnings), warnings
    written = [row | {"lr": "1e-3" if row["seed"] else "0.001"} for row in swept()]
    kept = [row for row in written if row["loss"] < swept()[0]["loss"] * 1.05]
    assert not any("differ in lr" in text for text in fitted(tmp_path, kept).warnings)


def test_runs_without_a_seed_are_no_repetitions(tmp_path: Path) -> None:
    rows = [row | {"run": f"{i}"} for i, row in enumerate([*table(HOFFMANN), *table(HOFFMANN, noise=1e-3)])]
    assert seeds_spread(Runs.read(write(tmp_path / "runs.csv", rows))) is None


def test_a_loss_that_nothing_lowers_has_no_law(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all runs have the loss 2\.5: there is nothing that N"):
        fitted(tmp_path, [row | {"loss": 2.5} for row in table(HOFFMANN, Grid(4, 3))])


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    assert seeds_spread(Runs.read(write(tmp_path / "runs.csv", table(HOFFMANN)))) is None

"""Approaches 1 and 2 beside the fit: right where theory says they are, and off where it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dit.scaling.laws.approaches import approaches, budgets
from dit.scaling.laws.law import Law
from dit.scaling.laws.table import Runs
from tests.scaling.laws.surfaces import CHINCHILLA, HOFFMANN, LAWS, Grid, table, write


def runs(tmp_path: Path, law: Law, grid: Grid) -> Runs:
    return Runs.read(write(tmp_path / "runs.csv", table(law, grid)))


def test_parabolas_are_right_where_the_surface_is_symmetric(tmp_path: Path) -> None:
    """With alpha = beta and a grid about the optimum a parabola's vertex is the optimum."""
    law = LAWS["alike"]
    found = approaches(runs(tmp_path, law, Grid(7, 5)), law)["isoflop"]
    assert found["n_opt_exponent"] == pytest.approx(0.5, abs=1e-9)
    assert found["bias"] == pytest.approx(0.0, abs=1e-9)
    for flops, params, tokens, _ in found["points"]:
        assert params == pytest.approx(law.optimum(flops)[0], rel=1e-9)
        assert 6 * params * tokens == pytest.approx(flops)
    assert found["n_opt_coefficient"] * 1e20**0.5 == pytest.approx(law.optimum(1e20)[0], rel=1e-6)


def test_parabolas_are_off_where_it_is_not_and_their_bias_says_by_how_much(tmp_path: Path) -> None:
    """arXiv 2603.22339: coefficients are off where alpha and beta differ; exponents where the grid drifts too."""
    law = LAWS["steep"]
    wide, narrow = (runs(tmp_path, law, Grid(9, 5, wide=width)) for width in (16.0, 1.5))
    off = [
        abs(np.log(approaches(own, law)["isoflop"]["points"][0][1] / law.optimum(1e18)[0]))
        for own in (wide, narrow)
    ]
    assert off[0] > 0.1 > 0.01 > off[1]
    drifting = wide.chosen(~((wide.flops < 2e19) & (wide.params > np.exp(1.5) * law.optimum(1e18)[0])))
    found = approaches(drifting, law)["isoflop"]
    assert found["bias"] == pytest.approx(found["n_opt_exponent"] - law.n_opt_exponent, abs=1e-9)
    assert abs(found["bias"]) > 1e-3
    assert "2603.22339" in found["note"]


def test_the_envelope_has_the_lowest_losses(tmp_path: Path) -> None:
    found = approaches(runs(tmp_path, HOFFMANN, Grid(33, 7)), HOFFMANN)["envelope"]
    assert found["n_opt_exponent"] == pytest.approx(HOFFMANN.n_opt_exponent, abs=0.02)
    assert found["d_opt_exponent"] == pytest.approx(HOFFMANN.d_opt_exponent, abs=0.02)
    losses = [point[3] for point in found["points"]]
    assert losses == sorted(losses, reverse=True)


def test_budgets_are_told_apart_by_their_flops() -> None:
    flops = np.repeat([1e18, 1.1e18, 3e18, 1e19], [3, 2, 4, 2])
    params = np.array([1.0, 2, 4, 8, 16, 1, 2, 4, 8, 1, 2])
    assert [own.tolist() for own in budgets(flops, params)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(budgets(flops, params, 2)) == 3
    assert budgets(flops, np.ones(11)) == []


def test_where_there_are_too_few_points_it_says_why(tmp_path: Path) -> None:
    own = runs(tmp_path, HOFFMANN, Grid(3, 4))
    found = approaches(own, HOFFMANN)
    assert found["isoflop"]["n_opt_exponent"] is None
    assert "within 25% of FLOPs: 0; at least 3 with an optimum inside" in found["isoflop"]["why"]
    off = approaches(runs(tmp_path, HOFFMANN, Grid(7, 4, off=-4.0)), HOFFMANN)
    assert (
        "budgets with at least 4 sizes within 25% of FLOPs: 4, 4 of them without an optimum"
        in off["isoflop"]["why"]
    )


def test_the_published_runs_have_budgets_though_their_flops_scatter() -> None:
    found = approaches(Runs.read(CHINCHILLA), HOFFMANN)
    for name in ("envelope", "isoflop"):
        assert 0.4 < found[name]["n_opt_exponent"] < 0.6  # 0.50 and 0.49 in arXiv 2203.15556, table 2
        assert len(found[name]["points"]) >= 9

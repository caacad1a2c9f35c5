"""fit.json: its keys, that it is read again as it was, and what is no fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dit.errors import UserError
from dit.scaling.laws.fitting import Order, fit_file
from dit.scaling.laws.intervals import NAMES
from dit.scaling.laws.record import FitRecord
from dit.scaling.laws.telling import claim_fit, write_fit
from tests.scaling.laws.surfaces import CHINCHILLA, HOFFMANN, Grid, table, write

KEYS = {
    "E", "A", "B", "alpha", "beta", "n_opt_exponent", "d_opt_exponent", "ci", "warnings", "protocol", "huber", "delta",
    "flops_per_param_token", "runs", "approaches", "without_E", "profile", "bootstrap", "held_out", "floor", "columns",
}  # fmt: skip


@pytest.fixture(scope="module")
def record() -> FitRecord:
    return fit_file(Order(CHINCHILLA, bootstrap=100))


def test_it_is_read_as_it_was_written(record: FitRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "fit.json")
    text = (tmp_path / "fit.json").read_text()
    held = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert held.keys() >= KEYS
    for again in (FitRecord.load(tmp_path), FitRecord.load(str(tmp_path / "fit.json"))):
        assert again.as_json() == record.as_json()
        np.testing.assert_array_equal(again.draws, record.draws)
    assert record.draws.shape == (100, 5)
    assert held["ci"]["alpha"][0] < held["alpha"] < held["ci"]["alpha"][1]
    assert held["ci"].keys() == held["profile"].keys() == set(NAMES)
    assert held["floor"] == {"kind": "fit", "value": None}


def test_residuals_are_of_the_losses_over_the_law(record: FitRecord) -> None:
    predicted = record.law.loss(record.column("params"), record.column("tokens"))
    np.testing.assert_allclose(record.column("predicted"), predicted)
    np.testing.assert_allclose(record.column("residual"), np.log(record.column("loss") / predicted))
    size = np.abs(record.column("residual"))
    summed = np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()
    assert record.huber == pytest.approx(summed)
    assert record.without_E is not None
    assert record.without_E["huber"] > record.huber


def test_the_same_table_gives_the_same_record(tmp_path: Path) -> None:
    file = write(tmp_path / "runs.csv", table(HOFFMANN, Grid(5, 4), 1e-3))
    first, again, other = (fit_file(Order(file, bootstrap=100, seed=seed)) for seed in (0, 0, 1))
    assert first.as_json() == again.as_json()
    assert first.law == other.law
    assert (first.draws != other.draws).any()


def test_the_floor_is_fitted_given_or_the_column_s(tmp_path: Path) -> None:
    rows = [row | {"floor": 1.69} for row in table(HOFFMANN, Grid(5, 4), 1e-3)]
    file = write(tmp_path / "runs.csv", rows)
    exact = fit_file(Order(file, floor="exact", bootstrap=100))
    value = fit_file(Order(file, floor="1.69", bootstrap=100))
    assert exact.floor == {"kind": "exact", "value": 1.69}
    assert value.floor == {"kind": "value", "value": 1.69}
    assert exact.law == value.law
    assert pytest.approx(1.69) == exact.law.E
    assert exact.ci["E"] == pytest.approx((1.69, 1.69))
    assert exact.without_E is None
    for floor, said in (
        ("exct", "--floor=exct: expected fit, exact or a number"),
        ("9", "not below the lowest loss"),
    ):
        with pytest.raises(UserError, match=said):
            fit_file(Order(file, floor=floor, bootstrap=100))
    with pytest.raises(UserError, match="needs a column `floor`"):
        fit_file(Order(CHINCHILLA, floor="exact"))
    with pytest.raises(UserError, match="expected at least 100 resamples"):
        Order(file, bootstrap=5)


@pytest.mark.parametrize(
    "spoil",
    [
        {"alpha": 0},
        {"E": -1},
        {"runs": []},
        {"runs": "none"},
        {"runs": [{"params": 1.0}]},
        {"bootstrap": {"params": [], "seed": 0}},
        {"bootstrap": {"params": [[1, 2, 3]] * 10, "seed": 0}},
        {"bootstrap": {"params": [[None] * 5] * 10, "seed": 0}},
        {"flops_per_param_token": 0},
        {"flops_per_param_token": "6"},
        {"tokens_per_sample": "a"},
        {"approaches": None},
        {"held_out": "x"},
        {"ci": {}},
        {"warnings": None},
    ],
    ids=str,
)
def test_what_is_damaged_is_named_where_it_is_read(
    spoil: dict[str, object], record: FitRecord, tmp_path: Path
) -> None:
    """Not where a number is missed, in the midst of a report."""
    (tmp_path / "fit.json").write_text(json.dumps({**record.as_json(), **spoil}))
    with pytest.raises(UserError, match=r"fit\.json is damaged .*: fit the runs again"):
        FitRecord.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params,flops,loss", r"is not JSON .*: expected fit\.json"),
        ("[]", "is not a fit"),
        ('{"E": 1}', "is not a fit"),
        ('{"kind": "scaling fit", "E": 1}', "is of version None of a fit, and this reads version 1"),
        ('{"kind": "scaling fit", "version": 1, "E": 1}', "is damaged"),
        ('{"kind": "scaling fit", "version": 1, "E": "a", "ci": 3, "profile": {}}', "is damaged"),
    ],
)
def test_what_is_no_fit_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(UserError, match=said):
        FitRecord.load(tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        FitRecord.load(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["fit.json", "residuals.png"])
def test_what_a_stop_leaves_is_replaced_by_the_same_command(
    record: FitRecord, tmp_path: Path, name: str
) -> None:
    """As of a full disk: here something is in the way of one of the two."""
    way = tmp_path / f".{name}.partial"
    way.mkdir()
    with pytest.raises(IsADirectoryError):
        write_fit(record, tmp_path)
    way.rmdir()
    claim_fit(tmp_path)
    write_fit(record, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"fit.json", "residuals.png"}

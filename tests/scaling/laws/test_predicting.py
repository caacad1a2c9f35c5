"""Predictions of a budget: what the law says, with intervals that widen with distance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dit.errors import UserError
from dit.scaling.laws.fitting import Order, fit_file
from dit.scaling.laws.predicting import Device, predict
from dit.scaling.laws.record import FitRecord
from tests.scaling.laws.surfaces import HOFFMANN, Grid, table, write


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> FitRecord:
    file = tmp_path_factory.mktemp("runs") / "runs.csv"
    return fit_file(Order(write(file, table(HOFFMANN, Grid(7, 5), 2e-3)), bootstrap=200))


def test_it_is_the_law_s_optimum(record: FitRecord) -> None:
    found = predict(record, 1e22, tokens_per_sample=256)
    assert (found.params, found.tokens, found.loss) == record.law.optimum(1e22, 6.0)
    assert found.samples == found.tokens / 256
    assert found.beyond == pytest.approx(10)
    assert found.warnings == [f"of the fit: {one}" for one in record.warnings]
    assert found.loss_interval[0] < HOFFMANN.optimum(1e22)[2] < found.loss_interval[1]
    assert found.params_interval[0] < HOFFMANN.optimum(1e22)[0] < found.params_interval[1]


def test_intervals_widen_beyond_the_runs(record: FitRecord) -> None:
    near, far = (predict(record, flops) for flops in (1e20, 1e25))
    widths = [(high - low) / found.params for found in (near, far) for low, high in [found.params_interval]]
    assert widths[1] > 2 * widths[0]
    assert "1e+04 times the FLOPs of the largest run" in far.warnings[0]


def test_what_the_fit_warns_of_is_said_of_its_predictions(record: FitRecord) -> None:
    warned = dataclasses.replace(record, warnings=["E is at its bound"])
    assert predict(warned, 1e20).warnings == ["of the fit: E is at its bound"]
    assert predict(warned, 1e20).as_json()["warnings"] == ["of the fit: E is at its bound"]


def test_hours_are_flops_over_what_the_device_reaches(record: FitRecord) -> None:
    found = predict(record, 1e21, device=Device("H100", 989.5e12, 0.4, 8)).as_json()["figures"]
    assert found["gpu_hours"] == pytest.approx(1e21 / (989.5e12 * 0.4) / 3600)
    assert found["hours"] == found["gpu_hours"] / 8
    assert found["steps"] is None  # nobody says the batch


def test_what_cannot_be_predicted_is_refused(record: FitRecord, tmp_path: Path) -> None:
    for flops in (0.0, -1e20, float("nan"), float("inf")):
        with pytest.raises(UserError, match="expected a number of training FLOPs above 0"):
            predict(record, flops)
    with pytest.raises(UserError, match="expected a number above 0"):
        predict(record, 1e21, tokens_per_sample=0)
    with pytest.raises(UserError, match="expected a share of the peak"):
        Device("H100", 1e15, mfu=40)
    with pytest.raises(UserError, match="expected 1 or more"):
        Device("H100", 1e15, count=0)

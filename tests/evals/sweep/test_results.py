"""What a sweep found: means over seeds, and differences that take the noise that is shared out of the error."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit.errors import Notice
from dit.evals.metrics.resampling import Resampling
from dit.evals.sweep.axes import ALWAYS, Setting
from dit.evals.sweep.cells import Cell, CellFolder, Measured
from dit.evals.sweep.picture import draw
from dit.evals.sweep.results import Results, Value
from dit.evals.sweep.table import as_csv, markdown
from dit.sample.grid import UniformGrid
from dit.sample.solve import Heun

BOOTSTRAP = 200


def cell(run: str, scale: float, seed: int, steps: int = 8, noise: str = "same") -> Cell:
    setting = Setting("ema", scale, ALWAYS, Heun(), steps)
    spec = setting.spec(steps, UniformGrid(), seed)
    protocol = {"run": run, "scale": scale, "seed": seed, "steps": steps}
    return Cell(run, setting, seed, spec, protocol, f"{noise}-{seed}")


def measured(value: float, shared: np.ndarray, own: np.ndarray, name: str = "frechet") -> Measured:
    drawn = np.concatenate([[value], value + shared + own])
    space = {"figures": {name: value}, "intervals": {name: [value - 1, value + 1]}, "hash": "h"}
    held = {"resamples": {name: {"values": drawn.tolist(), "is_shifted": True}}}
    return Measured(
        {"spaces": {"pixels": {**space, **held}}, "nfe": 16, "bootstrap": {"resamples": 1, "seed": 0}}
    )


@pytest.fixture
def results() -> Results:
    """Two runs, two scales, two seeds: errors of a standard deviation of 1 that are shared, and own ones of 0.01."""
    rng = np.random.default_rng(0)
    found = []
    for seed, offset in ((0, 0.0), (1, 3.0)):
        shared = rng.normal(0, 1, BOOTSTRAP)
        for run, better in (("a", 0.0), ("b", 0.5)):
            for scale in (1.0, 2.0):
                own = rng.normal(0, 0.01, BOOTSTRAP)
                found.append((cell(run, scale, seed), measured(10 + offset - better + scale, shared, own)))
    return Results.of(found, {"num_samples": 5}, {})


def test_seeds_are_put_together(results: Results) -> None:
    value = results.groups[0].value("pixels", "frechet")
    assert value.mean == pytest.approx(12.5)
    assert value.error == pytest.approx(3 / math.sqrt(2) / math.sqrt(2))  # of 11 and 14
    assert value.interval[1] - value.interval[0] > 1


def test_a_difference_is_sure_where_the_figures_are_not(results: Results) -> None:
    ((group, first), (_, second)) = results.against_first("pixels", "frechet")
    assert group.run == "b"
    for value in (first, second):
        assert value.mean == pytest.approx(-0.5)
        assert value.error == pytest.approx(0)
        assert -0.55 < value.interval[0] < -0.5 < value.interval[1] < -0.45
    best = results.best("pixels", "frechet")
    assert (best.run, best.setting.scale) == ("b", 1.0)
    assert len(results.against_best("pixels", "frechet")) == 3


def test_other_noise_makes_no_pair() -> None:
    zeros = np.zeros(BOOTSTRAP)
    pair = [
        (cell("a", 1.0, 0, noise="x"), measured(1, zeros, zeros)),
        (cell("b", 1.0, 0, noise="y"), measured(2, zeros, zeros)),
    ]
    assert Results.of(pair, {}, {}).against_first("pixels", "frechet") == []


def test_of_precision_the_greatest_is_best() -> None:
    zeros = np.zeros(BOOTSTRAP)
    found = [(cell("a", s, 0), measured(v, zeros, zeros, "precision")) for s, v in ((1.0, 0.2), (2.0, 0.9))]
    assert Results.of(found, {}, {}).best("pixels", "precision").setting.scale == 2.0


def test_table_csv_and_picture(results: Results, tmp_path: Path) -> None:
    text = markdown(results)
    assert "| a | 1 | **12.5 ± 1.5" in text
    assert "| b | 1 | **12 ± 1.5" in text
    assert "less that of a at the same setting, from the same noise" in text
    rows = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert len(rows) == 8
    assert {(r["run"], r["cfg_scale"], r["seed"], r["frechet"]) for r in rows} >= {("b", "2", "1", "14.5")}
    draw(results, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 2 * picture.height * 0.9  # a panel for each run


def test_cells_that_are_empty_or_not_finite_are_told() -> None:
    zeros = np.zeros(BOOTSTRAP)
    empty = Cell("a", Setting("ema", 1.0, ALWAYS, Heun(), 1, is_budget=True), 0, None)
    bad = Cell("a", Setting("ema", 9.0, ALWAYS, Heun(), 4, is_budget=True), 0, cell("a", 9.0, 0).spec)
    good = Cell("a", Setting("ema", 1.0, ALWAYS, Heun(), 4, is_budget=True), 0, cell("a", 1.0, 0).spec)
    found = [
        (empty, None),
        (good, measured(1, zeros, zeros)),
        (bad, Measured({"not_finite": "image 3", "spaces": {}})),
    ]
    text = markdown(Results.of(found, {}, {}))
    assert "| 1 | - | **1 [1, 1]** |" in text
    assert "| 9 |  | not finite |" in text
    assert "one step takes more evaluations: heun at NFE 1" in text
    assert "nfe=4, seed=0: image 3" in text


def test_a_cell_is_kept_and_found_by_its_protocol(tmp_path: Path) -> None:
    folder, one = CellFolder(tmp_path), cell("a", 1.0, 0)
    assert folder.read(one, Resampling()) is None
    folder.write(one, {"spaces": {}, "bootstrap": None})
    assert folder.read(one, Resampling()) is not None
    assert folder.read(one, Resampling(200)) is None  # it has no resamples
    assert folder.read(cell("a", 2.0, 0), Resampling()) is None
    file = folder.file(one)
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 5'))
    with pytest.warns(Notice, match="another protocol than its name says"):
        assert folder.read(one, Resampling()) is None
    file.write_text("{")
    with pytest.warns(Notice, match="is not JSON"):
        assert folder.read(one, Resampling()) is None


def test_one_seed_has_no_error_and_words_are_short() -> None:
    assert Value.of([2.0], [], True).text() == "2"
    assert Value(1.23456, 0.0123, (1.0, 2.0)).text() == "1.235 ± 0.012 [1, 2]"

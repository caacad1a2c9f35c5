"""A scaling report: what it predicts is the law's, what it draws is the runs', and bad input is named."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tools.scaling
from dit.errors import UserError
from dit.outputs import OutputError
from dit.reports.scaling import page
from dit.reports.scaling.axes import round_numbers
from dit.reports.scaling.figures import figures
from dit.reports.scaling.material import ReportError, read_material, smaller, vertex
from dit.reports.scaling.page import as_text, write_report
from dit.reports.scaling.tables import tables
from dit.scaling.laws.fitting import Order, fit_file
from dit.scaling.laws.law import Law
from dit.scaling.laws.record import FitRecord
from tests.commands import call

TRUE = Law(E=0.4, A=20.0, B=80.0, alpha=0.35, beta=0.37)
K = 6.3


def rows(rates: bool = True) -> list[dict[str, Any]]:
    """Five sizes at four budgets, two seeds, and three sizes at five learning rates each."""
    random, found = np.random.default_rng(0), []
    for i, flops in enumerate(np.geomspace(1e15, 1e18, 4)):
        best, _, _ = TRUE.optimum(flops, K)
        for j, factor in enumerate((0.2, 0.5, 1.0, 2.0, 5.0)):
            for seed in (0, 1):
                found.append(row(f"b{i}s{j}r{seed}", best * factor, flops, random.normal(0, 0.002), seed))
    for j, params in enumerate((1e6, 3e6, 9e6) if rates else ()):
        for step in range(-2, 3):
            rate, best = 1e-3 * 2.0**step, 1e-3 * (params / 3e6) ** -0.3
            off = 0.01 * np.log(rate / best) ** 2
            found.append(row(f"lr{j}{step}", params, K * params * 2e9, off, 0, rate))
    return found


def row(name: str, params: float, flops: float, noise: float, seed: int, lr: float = 1e-3) -> dict[str, Any]:
    tokens = flops / K / params
    loss = float(TRUE.loss(params, tokens) * np.exp(noise))
    return {
        "run": name, "params": params, "samples": tokens / 16, "tokens": tokens, "flops": flops, "loss": loss,
        "metric": "held_out_loss", "seed": seed, "complete": "true", "protocol": "abc", "lr": lr,
    }  # fmt: skip


def write(path: Path, given: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, given[0])
        writer.writeheader()
        writer.writerows(given)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """(fit.json, runs.csv)."""
    folder = tmp_path_factory.mktemp("fit")
    table = write(folder / "runs.csv", rows())
    fit_file(Order(table, bootstrap=100)).save(folder / "fit.json")
    return folder / "fit.json", table


@pytest.fixture
def one_figure(monkeypatch):
    """Drawn are pictures at equal FLOPs alone, which takes a tenth of the time."""
    monkeypatch.setattr(page, "figures", lambda material: figures(material)[:1])


def test_the_command_writes_page_pictures_and_text(made, tmp_path, capsys) -> None:
    fit, table = made
    words = (str(fit), f"--runs={table}", f"--out={tmp_path}", "--flops=2e19")
    assert call(tools.scaling.report, *words) == 0
    told = capsys.readouterr().out
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 10
    assert not re.search(
        r'(src|href)="https?:|@import|url\(http', html
    )  # links inside of SVG headers are names
    for name in (
        "isoflop",
        "frontier",
        "n_opt",
        "d_opt",
        "residuals",
        "rates",
        "rate_drift",
        "published",
        "sampling",
    ):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert min(picture.shape[:2]) > 600
        assert picture.std() > 10
    law = FitRecord.load(fit).law
    params, tokens, loss = law.optimum(2e19, FitRecord.load(fit).flops_per_param_token)
    for words in (html, told):
        assert f"{params:.4g}" in words
        assert f"{tokens:.4g}" in words
        assert f"{loss:.5g}" in words
        assert "Liang et al." in words
        assert "0.0009 · C^0.5681" in words
    held = json.loads((tmp_path / "report.json").read_text())
    assert held["predictions"][-1]["loss"][0] == pytest.approx(loss)


def test_bands_hold_the_law_and_the_truth(made) -> None:
    band = read_material(FitRecord.load(made[0]), "runs.csv").band([1e16, 1e18, 1e19])
    true = TRUE.optimum(band.flops, K)
    for values, known in zip((band.params, band.tokens, band.loss), true, strict=True):
        assert values.shape == (3, 3)
        assert bool((values[1] <= values[0]).all() and (values[0] <= values[2]).all())
        np.testing.assert_allclose(values[0], known, rtol=0.2)


def test_rates_and_their_drift_are_found(made) -> None:
    material = read_material(FitRecord.load(made[0]), "runs.csv", made[1])
    assert [one.params for one in material.rates] == [1e6, 3e6, 9e6]
    best = [one.best for one in material.rates]
    np.testing.assert_allclose(best, [1e-3 * 3**0.3, 1e-3, 1e-3 * 3**-0.3], rtol=1e-3)


def test_a_rate_at_the_edge_is_no_optimum() -> None:
    rates = np.array([1e-4, 1e-3, 1e-2])
    assert vertex(rates, np.array([3.0, 2.0, 1.0])) is None
    assert vertex(rates, np.array([1.5, 1.0, 1.5])) == pytest.approx(1e-3)


def test_what_a_table_lacks_is_not_drawn(made, tmp_path, one_figure) -> None:
    material = read_material(FitRecord.load(made[0]), "runs.csv")
    names = {figure.name for figure in figures(material)}
    assert not names & {"rates", "rate_drift", "sampling"}
    plain = [{name: one[name] for name in ("params", "flops", "loss")} for one in rows(rates=False)]
    table = write(tmp_path / "runs.csv", plain)
    record = fit_file(Order(table, bootstrap=100))
    write_report(read_material(record, str(table), table), tmp_path / "report")
    assert (tmp_path / "report" / "isoflop.png").exists()


def test_a_table_is_read_as_the_fit_reads_it(made, tmp_path) -> None:
    """Lines above the header that have nothing in them; a number in Python's way is a word."""
    text = made[1].read_text()
    header, first, *rest = text.splitlines()
    given = f"{header},more\n{first},1_000\n" + "".join(f"{line},{i}\n" for i, line in enumerate(rest))
    (tmp_path / "runs.csv").write_text(" ,,\n# a comment\n" + given)
    material = read_material(FitRecord.load(made[0]), "runs.csv", tmp_path / "runs.csv")
    plain = read_material(FitRecord.load(made[0]), "runs.csv", made[1])
    assert {*material.more} == {*plain.more, "more"}
    assert np.isnan(material.more["more"][0])
    assert [one.best for one in material.rates] == [one.best for one in plain.rates]


def test_sampling_costs_are_a_third_of_training(made) -> None:
    material = read_material(FitRecord.load(made[0]), "runs.csv", made[1])
    assert material.forward_flops is not None
    np.testing.assert_allclose(
        material.forward_flops, 2 * K / 6 * 16 * material.fit.column("params"), rtol=1e-6
    )


def test_evaluations_give_costs_of_whole_images(made, tmp_path) -> None:
    given = [{**one, "evaluations": 10 * (i % 3 + 1)} for i, one in enumerate(rows())]
    table = write(tmp_path / "runs.csv", given)
    material = read_material(FitRecord.load(made[0]), "runs.csv", table)
    note = next(figure.note for figure in figures(material) if figure.name == "sampling")
    assert "evaluations of the network times" in note


def test_a_smaller_model_takes_longer_to_the_same_loss(made) -> None:
    fit = FitRecord.load(made[0])
    whole, half, tiny = smaller(fit, 1e18, (1.0, 0.5, 1e-3))
    assert whole["tokens"] == pytest.approx(1)
    params, tokens, loss = fit.law.optimum(1e18, fit.flops_per_param_token)
    assert fit.law.loss(params / 2, half["tokens"] * tokens) == pytest.approx(loss)
    assert half["training"] == pytest.approx(half["tokens"] / 2)
    assert half["training"] > 1
    assert tiny["tokens"] is None


def test_labels_of_axes_are_few_and_round() -> None:
    for low, high in ((1.5e5, 7e6), (1e15, 2e19), (3e18, 4e30), (2e-4, 5e-3), (20, 200)):
        found = round_numbers(low, high)
        assert 2 <= len(found) <= 7
        assert all(low <= value <= high for value in found)


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: "", "is not JSON"),
        (lambda held: "not json", "is not JSON"),
        (lambda held: "[1]", "is not a fit"),
        (lambda held: json.dumps({}), "is not a fit"),
        (lambda held: json.dumps({**held, "version": 99}), "is of version 99"),
        (lambda held: json.dumps({key: held[key] for key in held if key != "version"}), "is of version None"),
        (lambda held: json.dumps({key: held[key] for key in held if key != "beta"}), "is damaged"),
        (lambda held: json.dumps({key: held[key] for key in held if key != "huber"}), "is damaged"),
        (lambda held: json.dumps({**held, "bootstrap": {"params": [[1, 2]], "seed": 0}}), "is damaged"),
    ],
)
def test_what_is_no_fit_is_named(made, tmp_path, capsys, change, message) -> None:
    file = tmp_path / "fit.json"
    file.write_text(change(json.loads(made[0].read_text())))
    assert call(tools.scaling.report, str(file), f"--out={tmp_path / 'out'}") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_of_another_fit_are_refused(made, tmp_path) -> None:
    fit = FitRecord.load(made[0])
    other = write(tmp_path / "other.csv", [{**one, "run": f"x{i}"} for i, one in enumerate(rows())])
    with pytest.raises(ReportError, match=r"of other runs than the fit: 55 of its 55"):
        read_material(fit, "runs.csv", other)
    changed = write(tmp_path / "changed.csv", [{**one, "loss": one["loss"] * 1.01} for one in rows()])
    with pytest.raises(ReportError, match="has changed since the fit: b0s0r0 has loss"):
        read_material(fit, "runs.csv", changed)
    with pytest.raises(UserError, match="no such file"):
        read_material(fit, "runs.csv", tmp_path / "none.csv")


@pytest.mark.parametrize("flops", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_of_nothing_is_refused(made, flops) -> None:
    with pytest.raises(ReportError, match="above 0"):
        read_material(FitRecord.load(made[0]), "runs.csv", budget=flops)


def test_another_report_is_not_replaced(made, tmp_path, one_figure) -> None:
    material = read_material(FitRecord.load(made[0]), "runs.csv")
    (tmp_path / "isoflop.png").touch()
    with pytest.raises(OutputError, match="nothing says how it was made"):
        write_report(material, tmp_path)
    write_report(material, tmp_path / "mine")
    write_report(material, tmp_path / "mine")  # of the same fit: made anew
    table = write(tmp_path / "runs.csv", rows(rates=False))
    other = read_material(fit_file(Order(table, bootstrap=100)), "runs.csv")
    with pytest.raises(OutputError, match="another result"):
        write_report(other, tmp_path / "mine")
    write_report(other, tmp_path / "mine", overwrite=True)


def test_a_far_budget_is_told_to_be_far(made) -> None:
    material = read_material(FitRecord.load(made[0]), "runs.csv", budget=1e24)
    assert "it is a guess" in tables(material)[0].note
    assert "1e+24" in as_text(material)


@pytest.mark.parametrize("name", ["isoflop.png", "report.html"])
def test_a_report_that_was_stopped_is_made_by_the_same_command(made, tmp_path, one_figure, name) -> None:
    material, way = read_material(FitRecord.load(made[0]), "runs.csv"), tmp_path / f".{name}.partial"
    way.mkdir()
    with pytest.raises(IsADirectoryError):
        write_report(material, tmp_path)
    way.rmdir()
    write_report(material, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "report.json", "isoflop.png"}

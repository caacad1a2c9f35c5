"""Sweeps of a real run: the figures of drawing and evaluating, cells that are not drawn again, faults named early."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

import tools.sample
from dit.evals.record import read
from dit.experiments.sweep_cells import named_runs
from tests.commands import call
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import at_step, random_run
from tools.evaluate import images, reference, sweep

PIXELS = ("--features=pixels", "--features.components=4")
FEW = ("--num_samples=12", "--batch_size=8", "--reference=digits:test", "--num_reference=100", *PIXELS)
AXES = ("--cfg_scale=1,2", "--nfe=1,2", "--solver=euler,heun", "--bootstrap=20")


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(digits, tmp_path_factory.mktemp("run"))


def go(run: Path, out: Path, *words: str) -> int:
    return call(sweep, f"net={run}", f"--out={out}", *FEW, *words)


@pytest.fixture(scope="module")
def swept(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "new" / "sweep"
    assert go(run, out, *AXES, "--held_out=digits:train") == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))


def cells(out: Path) -> dict[str, tuple[float, ...]]:
    """When each cell was written."""
    return {file.name: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}


def test_a_cell_is_what_drawing_and_evaluating_give(run: Path, swept: Path, tmp_path: Path) -> None:
    """The same figure to the last bits, in the same protocol, so that the run's evaluations stand together."""
    drawn, place = tmp_path / "drawn", tmp_path / "f.json"
    how = ("--cfg_scale=2", "--num_steps=2", "--solver=euler", "--num_samples=12", "--batch_size=8")
    assert call(tools.sample.main, run, f"--out={drawn}", *how) == 0
    size = "--image_size=16"
    npz = tmp_path / "reference.npz"
    assert call(reference, "digits:test", npz, *PIXELS, size, "--num_images=100", "--keep_features") == 0
    told = (f"--reference={npz}", *PIXELS, "--metrics=frechet", f"--json_file={place}", "--batch_size=8")
    assert call(images, drawn, *told) == 0
    (space,) = json.loads(place.read_text())["spaces"]
    (row,) = [r for r in rows(swept) if (r["cfg_scale"], r["budget"], r["solver"]) == ("2", "2", "euler")]
    assert float(row["frechet"]) == pytest.approx(space["figures"]["frechet"], rel=1e-9)
    assert row["protocol"] == space["hash"]
    assert float(row["frechet_low"]) < float(row["frechet"]) < float(row["frechet_high"])
    found = [r for r in read(run) if r["hash"] == space["hash"]]
    assert len(found) == 2
    assert found[0]["figures"] == pytest.approx(found[1]["figures"])
    assert found[0]["samples"]["content"] == found[1]["samples"]["content"]  # bit for bit


def test_what_is_written_and_what_stays_empty(swept: Path) -> None:
    found = {(r["cfg_scale"], r["solver"], r["budget"]): r for r in rows(swept)}
    assert len(found) == 8
    assert found["1", "heun", "1"]["frechet"] == ""
    assert found["1", "heun", "2"]["nfe"] == "2"
    assert found["2", "heun", "2"]["network_evaluations"] == "4"
    text = (swept / "sweep.md").read_text()
    assert "heun at NFE 1" in text
    assert "Real images: " in text
    assert "over 5 random splits), 12 against 100" in text
    assert (swept / "sweep.png").stat().st_size > 5000
    assert len(json.loads((swept / "sweep.json").read_text())["cells"]) == len(cells(swept)) == 6


def test_finished_cells_are_not_drawn_again_and_new_ones_are(run: Path, swept: Path, capsys) -> None:
    """Killed, one cell is lacking; the same command with one more seed draws that, and the new ones."""
    before, recorded = cells(swept), len(read(run))
    first = min(before)
    os.remove(swept / "cells" / first)
    assert go(run, swept, *AXES, "--seeds=0,1") == 0
    assert "5 of 16 cells are there already" in capsys.readouterr().out
    after = cells(swept)
    assert len(after) == 12
    assert {name: after[name] for name in before if name != first} == {
        name: when for name, when in before.items() if name != first
    }
    assert len(read(run)) == recorded + 7
    assert "± is the standard error over 2 seeds" in (swept / "sweep.md").read_text()
    small = [
        word.replace("--batch_size=8", "--batch_size=4") for word in (*FEW, *AXES)
    ]  # changes but rounding
    assert call(sweep, f"again={run}", f"--out={swept}", *small) == 0
    assert cells(swept) == after


def go_on_ranks(run: Path, out: Path) -> int:
    return go(run, out, *AXES)


def test_ranks_change_nothing(run: Path, swept: Path, ranks: Server, tmp_path: Path) -> None:
    out = tmp_path / "ranks"
    assert ranks.run(2, go_on_ranks, run, out) == [0, 0]
    for file in (out / "cells").iterdir():
        one, two = (json.loads((folder / "cells" / file.name).read_text()) for folder in (out, swept))
        assert one == two


def test_two_runs_are_compared_where_the_noise_is_the_same(run: Path, tmp_path: Path) -> None:
    both = f"a={at_step(run, 1)},b={at_step(run, 2)}"
    out = tmp_path / "both"
    assert (
        call(sweep, both, f"--out={out}", *FEW, "--num_steps=1", "--weights=ema,model", "--bootstrap=20") == 0
    )
    held = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(r["run"], r["weights"]) for r in held] == [(r, w) for r in "ab" for w in ("ema", "model")]
    for mine, base in ((held[2], held[0]), (held[3], held[1])):
        difference = mine["minus_first_run"]
        assert difference["mean"] == pytest.approx(mine["value"]["mean"] - base["value"]["mean"])
        assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--weights=ema,ema_0.9",), "ema_0.9"),
        (("--solver=euler,dopri5", "--nfe=2"), "dopri5 chooses its own steps"),
        (("--solver=euler,ddpm", "--nfe=2", "--num_steps=3"), "nfe and num_steps are both given"),
        (("--cfg_scale=1,2", "--interval=0.2:0.7", "--solver=dopri5"), "chooses its steps by an error"),
        (("--held_out=digits:test", "--num_samples=2000"), "500 images, and a cell has 2000"),
        (("--metrics=frechte",), "did you mean frechet"),
    ],
)
def test_what_is_amiss_with_any_cell_is_said_before_the_first(
    run: Path, tmp_path: Path, capsys, words: tuple[str, ...], match: str
) -> None:
    kept = [word for word in FEW if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    assert call(sweep, f"net={run}", f"--out={tmp_path / 'out'}", *kept, *words) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out" / "cells").exists()


def test_figures_that_a_reference_cannot_give_are_refused_before_anything_is_drawn(
    run: Path, tmp_path: Path, capsys
) -> None:
    """By a statistics file without features there is a Fréchet distance, and no figure of single images."""
    npz, out = tmp_path / "reference.npz", tmp_path / "out"
    assert call(reference, "digits:test", npz, *PIXELS, "--image_size=16", "--num_images=100") == 0
    told = (f"--reference={npz}", *PIXELS, "--metrics=frechet,mind")
    capsys.readouterr()
    assert call(sweep, run, f"--out={out}", "--num_samples=12", "--num_steps=1", *told) == 1
    assert not (out / "cells").exists()
    assert call(images, "digits:train", *told) == 1  # which would fail at its 8 pixels, once gone through
    said = capsys.readouterr().err
    assert said.count("mind needs the reference's features") == 2
    assert "samples:" not in said


def test_a_cell_that_is_not_finite_is_kept_as_such(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "far"
    words = ("--cfg_scale=1,1e38", "--num_steps=2")
    assert go(run, out, *words) == 0
    said = (out / "sweep.md").read_text()
    assert "not finite" in said
    assert "image 0 (class 0)" in said
    before = cells(out)
    assert len(before) == 2
    assert go(run, out, *words) == 0
    assert cells(out) == before


def test_what_lies_there_is_not_replaced(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "sweep.md").write_text("mine")
    assert go(run, tmp_path, "--num_steps=1") == 1
    assert "nothing says how it was made" in capsys.readouterr().err
    assert go(run, run, "--num_steps=1") == 1
    assert "is a run directory, and a folder of a sweep is to be written" in capsys.readouterr().err


def test_names_of_runs() -> None:
    assert named_runs("flow=runs/a,runs/b") == {"flow": "runs/a", "runs/b": "runs/b"}
    with pytest.raises(ValueError, match="two runs have one name"):
        named_runs("a=x,a=y")

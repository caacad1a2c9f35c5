"""tools/bench.py: the table and the figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from dit.bench.speed.steppers import StepBench
from dit.bench.speed.turns import MedianRange
from dit.config import ConfigError, from_dict
from dit.outputs import OutputError
from tests.commands import execute
from tools import bench


@pytest.mark.slow
def test_loader(tmp_path):
    """The table says what the file holds, of the sizes that were asked for, and judges nothing from one turn."""
    done = execute(
        "bench.py", "loader", f"--folder={tmp_path / 'data'}", "--samples=1000", "--plain=200", "--repeats=1",
        "--batch=64", f"--json_file={tmp_path / 'found.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "found.json").read_text())
    found, lines = written["figures"], done.stdout.splitlines()
    for name, rate in found["rates"].items():
        (line,) = [row for row in lines if row.startswith(f"{name}  ")]
        assert str(MedianRange(**rate)) in line
        assert line.endswith(str(MedianRange(**found["cpu_us"][name])))
    for name in ("of plain webdataset", "of memory map"):
        (line,) = [row for row in lines if row.startswith(f"ours / {name.removeprefix('of ')}")]
        assert str(MedianRange(**found[name])) in line
    (line,) = [row for row in lines if row.startswith("resumed / fresh")]
    assert str(MedianRange(**found["first_batch"]["ratio"])) in line
    for ranks in ("1", "2", "4"):
        assert any(
            row.startswith(f"{ranks} rank(s)") and f"{found['ranks'][ranks]['rate']:.4g}" in row
            for row in lines
        )
    sizes = {"samples": 1000, "plain": 200, "batch": 64, "repeats": 1}
    assert sizes.items() <= written["protocol"].items()
    assert "too few to judge the bounds: 1 turns of 1,000 samples" in done.stdout
    assert ": met" not in done.stdout
    assert ": missed" not in done.stdout
    assert list((tmp_path / "data" / "plain").iterdir())  # kept, as a folder was given


def test_sizes_are_checked_first():
    done = execute("bench.py", "loader", "--samples=10", "--plain=20")
    assert done.returncode == 1
    assert "at most samples" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("kills", "--ranks=3"), "ranks must divide the global batch of 32"),
        (("elastic", "--ranks=1,2"), "as many ranks as stages"),
    ],
)
def test_settings_of_survival_are_checked_first(words, complaint, tmp_path):
    done = execute("bench.py", *words, f"--folder={tmp_path / 'none'}")
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("command", "sizes", "words"),
    [
        ("checkpoint", ("--parameters=1100000",), ("16 MiB", "plain write", "stall / save")),
        ("draws", ("--size=nano", "--batch=2"), ("draws", "step", "draws / step")),
    ],
)
def test_figures_of_few_turns_are_not_judged(tmp_path, command, sizes, words):
    json_file = tmp_path / "new" / "found.json"
    done = execute("bench.py", command, *sizes, "--repeats=2", f"--json_file={json_file}")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)
    assert ": met" not in done.stdout
    assert ": missed" not in done.stdout
    assert json.loads(json_file.read_text())["protocol"]["repeats"] == 2


@pytest.mark.slow
def test_zero(tmp_path):
    done = execute(
        "bench.py", "zero", "--width=64", "--depth=8", "--heads=2", "--batch=8", "--repeats=1", "--steps=1",
        f"--json_file={tmp_path / 'found.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of DDP" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["protocol"]["ranks"] == [2, 4]
    for rows in found["figures"].values():
        assert list(rows) == ["DDP", "stage 0", "stage 1", "stage 2", "stage 3"]
        for row in rows.values():  # P3, docs/guarantees.md
            assert row["sent_bytes"] == pytest.approx(row["formula_bytes"], rel=0.1)
            assert row["of_ddp"]["median"] > 0


def test_a_batch_that_cannot_be_shared_is_refused_first():
    done = execute("bench.py", "zero", "--batch=6")
    assert done.returncode == 1
    assert "a batch of 6 cannot be shared by 4 ranks" in done.stderr


def test_figures_that_could_not_be_written_are_not_taken(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder, and a file is to be written"):
        bench.step(json_file=str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is there and is no folder"):
        bench.loader(json_file=str(tmp_path / "file" / "found.json"))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"size": ("S", "Q")}, "unknown size 'Q'"),
        ({"micro_batch": 0}, "micro_batch is 0, expected 1 or more"),
        ({"micro_batch": -2}, "micro_batch is -2, expected 1 or more"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_a_step_that_is_none_is_refused_as_a_key_is(how: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        from_dict(StepBench, how)
    assert "pydantic" not in str(refused.value)

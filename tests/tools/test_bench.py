"""tools/bench.py: the table and the figures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.bench.speed.steppers import StepBench
from dit.bench.speed.turns import MedianRange
from dit.config import ConfigError, from_dict
from dit.model.cost import cost
from dit.model.dit import DiTConfig
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


XL = "configs/imagenet256/xl2_rectified_flow.yaml"


def test_plan(tmp_path):
    """The keys that are promised, at the top; keys of the configuration and flags of the data are taken."""
    done = execute(
        "bench.py", "plan", XL, "--device=h100", "--gpus=64", "--batch=1024", "--samples=1000000", "--price=2",
        "--model.size=B", "--input_size=64", f"--json_file={tmp_path / 'plan.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] is True
    assert (found["global_batch"], found["samples"], found["gpus"]) == (1024, 1_000_000, 64)
    model = cost(from_dict(DiTConfig, {"size": "B"}), 64, 4, 1000)
    assert found["training_flops"] == model.training_flops
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"])
    assert "ESTIMATE" in done.stdout
    assert "not measured" in found["assumptions"]["efficiency"]
    assert all(words in done.stdout for words in found["assumptions"].values())
    again = execute(
        "bench.py", "plan", XL, "--device=h100", "--gpus=512", f"--json_file={tmp_path / 'plan.json'}"
    )
    assert again.returncode == 0, again.stderr  # a file of its own kind is replaced
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] is False
    assert "256 samples is smaller than 512 devices" in found["reason"]


def test_plan_refuses_what_it_does_not_know():
    for words, complaint in (
        (("--device=h10", "--gpus=1"), "did you mean h100"),
        (("--device=h100", "--gpus=0"), "--gpus must be at least 1"),
        (("--device=h100", "--gpus=1", "--modle.size=B"), "did you mean model"),
        (("--device=h100", "--gpus=1", "--measured=nowhere.json"), "nowhere.json"),
    ):
        done = execute("bench.py", "plan", XL, *words)
        assert done.returncode in (1, 2), done.stdout
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_plan_is_compared_with_what_is_measured(tmp_path):
    words = ("--device=cpu", "--gpus=2", "--validate", f"--json_file={tmp_path / 'plan.json'}")
    done = execute("bench.py", "plan", "configs/digits.yaml", *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "plan.json").read_text())["validation"]
    here = [row for row in rows if row["name"].startswith("here")]
    assert len(here) == 12  # four stages on 1, 2 and 4 ranks
    assert all(row["error"] == pytest.approx(row["estimated_ms"] / row["measured_ms"] - 1) for row in rows)
    assert all(row["name"] in done.stdout for row in rows)


def test_trace(tmp_path):
    words = ("--size=nano", "--patch=8", "--batch=2", "--stage=null", "--steps=1", "--warmup=1")
    files = (f"--out={tmp_path}", f"--json_file={tmp_path / 'found.json'}")
    done = execute("bench.py", "trace", *words, *files)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["protocol"]["size"] == "nano"
    assert sum(found["figures"]["parts_ms"].values()) == pytest.approx(found["figures"]["step_ms"])
    trace = (tmp_path / "trace.json.gz").read_bytes()
    refused = execute("bench.py", "trace", *words, *files)
    assert refused.returncode == 1
    assert "trace.json.gz is there already" in refused.stderr
    assert (tmp_path / "trace.json.gz").read_bytes() == trace


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
        assert list(rows) == ["DDP", "plain", "stage 0", "stage 1", "stage 2", "stage 3"]
        for row in rows.values():  # P3, docs/guarantees.md
            assert row["sent_bytes"] == pytest.approx(row["formula_bytes"], rel=0.1)
            assert row["is_within"]
            assert row["of_ddp"]["median"] > 0
        assert (
            rows["plain"]["sent_bytes"] == rows["plain"]["formula_bytes"] == rows["stage 0"]["formula_bytes"]
        )
        assert (
            rows["plain"]["of_plain"] == rows["plain"]["cpu_of_plain"] == {"median": 1, "low": 1, "high": 1}
        )


def test_sample(tmp_path: Path) -> None:
    json_file = tmp_path / "found.json"
    sizes = ("--size=nano", "--patch=8", "--batch=2", "--num_steps=2", "--repeats=1")
    done = execute("bench.py", "sample", *sizes, f"--json_file={json_file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(json_file.read_text())
    assert found["protocol"]["interval"] == [0.25, 0.6]
    of_plain = MedianRange(**found["figures"]["of_plain"])
    assert f"ours / plain loop            {of_plain} (at least 1)" in done.stdout


def test_solvers(tmp_path: Path) -> None:
    done = execute("bench.py", "solvers", "--evaluations=20,200", "--points=2")
    assert done.returncode == 0, done.stderr
    assert "better at 20 evaluations than Euler at 200: heun, midpoint, rk4" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is needed")
def test_without_a_gpu_nothing_is_measured_on_the_cpu_at_full_size(tmp_path: Path) -> None:
    done = execute("bench.py", "gpu", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "there is no CUDA device here; --toy runs every item" in done.stderr
    assert not (tmp_path / "out").exists()


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

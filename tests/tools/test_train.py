"""tools/train.py: as a process that is killed and started again, and everything it refuses before it starts."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import tools.train
from dit.config import to_dict
from dit.data.shards.manifest import Manifest
from dit.experiments.diffusion import Experiment
from tests.commands import Forked, call, execute
from tests.datasets import Digits
from tests.train.runs import at_step, column, differing, experiment, go, state, values


@pytest.fixture
def config(digits: Digits, tmp_path: Path) -> Path:
    """A config as a user would write it."""
    path = tmp_path / "digits.yaml"
    given = values(digits, tmp_path / "run", train={"steps": 60}, checkpoint={"every": 4})
    path.write_text(yaml.safe_dump(given))
    return path


def logged(run: Path) -> int:
    """How many steps a run has logged."""
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def killed_after(words: tuple[object, ...], folder: Path, steps: int) -> int:
    """Run a command in `folder` until its run 2024 has logged so many steps, and SIGKILL it; its status."""
    process = Forked(*words, cwd=folder)
    end = time.monotonic() + 100
    while logged(folder / "2024") < steps:
        assert process.poll() is None, process.printed()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    return process.wait()


def test_killed_and_started_again_by_the_same_command(digits: Digits, config: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; then bit for bit the run that nothing interrupted. `2024` is a folder's name."""
    words = ("train.py", config, "--run_dir=2024", "--train.steps=30", "--engine=local")
    for _ in range(5):  # where it ended before the kill, because the machine was busy with other things
        if killed_after(words, tmp_path, 9) == -signal.SIGKILL and logged(tmp_path / "2024") < 30:
            break
        shutil.rmtree(tmp_path / "2024")
    assert 9 <= logged(tmp_path / "2024") < 30
    done = execute(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming 2024 at step " in done.stdout
    whole = values(digits, tmp_path / "whole", engine="local", train={"steps": 30}, checkpoint={"every": 4})
    go(whole)
    for name in ("step", "batch_hash", "loss", "grad_norm"):
        assert column(tmp_path / "2024", name) == column(tmp_path / "whole", name)
    final = [state(at_step(tmp_path / folder, 30)) for folder in ("2024", "whole")]
    assert differing(*final) == []


def test_deepspeed_is_the_default_and_is_quiet(config: Path, tmp_path: Path) -> None:
    done = execute("train.py", config, "--train.steps=3", "--train.log_every=1", afresh=True)
    assert done.returncode == 0, done.stderr
    assert column(tmp_path / "run", "step") == [1, 2, 3]
    noise = [line for line in done.stdout.splitlines() if line.strip()]
    assert not any("WARNING" in line or "INFO" in line for line in noise + done.stderr.splitlines()), (
        done.stderr
    )
    again = execute("train.py", config, "--train.steps=3", "--train.log_every=1")
    assert again.returncode == 0
    assert "has done its 3 steps; raise train.steps to go on" in again.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--trainsteps=3"], 1, "unknown key"),
        (["--train.step=3"], 1, "did you mean train.steps?"),
        (["--train.steps=many"], 1, "train.steps"),
        (["--zero.stage=7"], 1, "zero.stage"),
        (["--dryrun"], 2, "needs a value"),
        (["other.yaml"], 2, "unexpected argument 'other.yaml'"),
        (["--seed=1", "--seed=2"], 2, "--seed is given twice"),
        (["--data.path=nowhere"], 1, "nowhere: no manifest.json"),
        (["--train.global_batch=1000"], 1, "1000 is larger than the data set of 160 samples"),
        (["--train.micro_batch=5"], 1, "does not divide"),
        (["--init.from=nowhere"], 1, "nowhere is missing"),
        (["--train.freeze=[block.0.*]"], 1, "did you mean blocks.0.*?"),
        (["--zero.stage=3", "--zero.hpz=2"], 1, "zero.hpz = 2 does not divide 1 ranks"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    assert call(tools.train.main, config, *words, config=Experiment) == code
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_a_start_says_what_it_is(config: Path, digits: Digits, tmp_path: Path) -> None:
    """In aligned lines; and as stderr is no terminal, in lines alone."""
    words = ("--train.steps=4", "--engine=local", f"--data.val={digits.moments_val}", "--val.every=2")
    done = execute(
        "train.py", config, *words, "--sample.every=4", "--sample.count=10", "--sample.num_steps=2"
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rows = {line.split()[0]: line[12:] for line in lines[:14]}
    assert rows["run"] == f"{tmp_path / 'run'} (new)"
    assert rows["device"].startswith("1 x CPU, ")
    assert rows["model"].startswith("dit nano (width 64, depth 2, 2 heads), patch 2, 16 tokens")
    assert rows["objective"].startswith("path linear, prediction velocity, times logit_normal")
    assert (
        f"{digits.moments}: 160 samples of (2, 2, 4, 8, 8), 0.8 epochs, 10 classes, codec vae" in rows["data"]
    )
    assert "32 = 1 ranks x 8 x 4 accumulated" in rows["batch"]
    assert rows["steps"] == "4; checkpoint every 4, held-out loss every 2, pictures every 4"
    assert rows["rate"].startswith("0.002, cosine, 4 updates of warm-up (")
    assert rows["ema"].startswith("decay 0.9, warmed up; 0.5% of the first weights left after 4 updates")
    assert str(digits.vae) in rows["codec"]
    assert f"tensorboard --logdir {tmp_path / 'run'}" in rows["watch"]
    told = [line for line in lines if line.startswith("step ")]
    assert [line.split(" of ema ")[0].rsplit(" ", 1)[0] for line in told] == [
        "step 2: held-out loss",
        "step 4: held-out loss",
        "step 4:",
    ]
    assert "(decay 0.9, warmed up; 0.5% of the first weights left)" in told[-1]
    assert [line.split(",")[0] for line in done.stderr.splitlines() if line.startswith("train: ")] == [
        "train: 1/4 step (25%)",
        "train: 4/4 step (100%)",
    ]
    with Image.open(tmp_path / "run" / "samples" / "step-00000004.png") as picture:
        assert picture.text["Title"] == "step 4, ema (decay 0.9, warmed up; 0.5% of the first weights left)"
    rows = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert [row["weights"] for row in rows] == ["ema", "ema"]
    assert [row["start_share"] for row in rows] == pytest.approx(
        [2 / 11 * 3 / 12, 2 / 11 * 3 / 12 * 4 / 13 * 5 / 14]
    )
    assert column(tmp_path / "run", "ema_start_share")[1::2] == [row["start_share"] for row in rows]


def test_a_missing_config_is_named(tmp_path: Path, capsys) -> None:
    assert call(tools.train.main, tmp_path / "digts.yaml") == 1
    assert "digts.yaml: no such config file" in capsys.readouterr().err
    assert call(tools.train.main) == 2
    assert "missing CONFIG" in capsys.readouterr().err


def test_help_behind_a_positional_starts_nothing(config: Path, tmp_path: Path) -> None:
    done = execute("train.py", config, "--help")
    assert done.returncode == 0
    assert "Train in run_dir, or resume what is there." in done.stdout
    for key in (
        "train.global_batch",
        "train.micro_batch",
        "checkpoint.every",
        "zero.stage",
        "run_dir",
        "seed",
    ):
        assert f"  {key} " in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_changed_identity_is_refused_and_an_operational_change_taken(
    config: Path, tmp_path: Path, capsys
) -> None:
    first = ("--engine=local", "--train.steps=2")
    assert call(tools.train.main, config, *first) == 0
    capsys.readouterr()
    assert call(tools.train.main, config, *first, "--optim.lr=5e-3", "--seed=3") == 1
    said = capsys.readouterr().err
    assert "optim.lr: 0.002 there, 0.005 now" in said
    assert "seed: 0 there, 3 now" in said
    assert call(tools.train.main, config, "--engine=local", "--train.steps=3", "--train.micro_batch=16") == 0
    assert column(tmp_path / "run", "step") == [1, 2, 3]


def test_dry_run_tells_the_cost_and_trains_nothing(
    digits: Digits, config: Path, tmp_path: Path, capsys
) -> None:
    assert call(tools.train.main, config, "--dry_run", "--train.steps=1e3") == 0
    said = capsys.readouterr().out
    cfg = experiment(values(digits, tmp_path))
    module = cfg.model.build(8, 4, 10)
    assert f"{sum(p.numel() for p in module.parameters()):,} trained" in said
    rows = {line.split()[0]: line for line in said.splitlines()}
    assert {"parameters", "forward", "training", "data", "batch", "memory", "peak", "hours"} <= set(rows)
    assert "200.0 epochs" in rows["data"]  # 1000 steps of 32 over 160
    assert "32 = 1 ranks x 8 x 4 accumulated" in rows["batch"]
    flops = cfg.cost(Manifest.load(digits.moments)).training_flops
    assert f"{flops * 32_000:.3g} in all" in rows["training"]
    assert not (tmp_path / "run").exists()
    assert to_dict(cfg)["train"]["steps"] != 1000


def test_dry_run_tells_which_stage_would_be_taken_and_what_is_frozen(
    digits: Digits, config: Path, tmp_path: Path, capsys
) -> None:
    words = ("--zero.stage=auto", "--train.freeze=*.bias,blocks.0.mlp.*")
    assert call(tools.train.main, config, "--dry_run", *words) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "zero.stage: 0, the quickest that fits: stage 0 needs 0.0 GiB of" in rows["sharding"]
    module = experiment(values(digits, tmp_path)).model.build(8, 4, 10)
    named = dict(module.named_parameters())
    frozen = sum(p.numel() for n, p in named.items() if n.endswith(".bias") or n.startswith("blocks.0.mlp."))
    assert f"{sum(p.numel() for p in named.values()) - frozen:,} trained" in rows["parameters"]
    assert f"{frozen:,} frozen" in rows["parameters"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--objective={path: linear, prediction: velocity, coupling: {name: ot, group: 24}}"],
            "no multiple of",
        ),
        (["--val.every=1", "--data.val=nowhere"], "nowhere"),
        (["--sample.every=5", "--codec=null"], "nothing says where it is"),
        (["--sample.every=5", "--codec={name: vae, path: /nowhere}"], "/nowhere/config.json is missing"),
    ],
)
def test_a_dry_run_refuses_what_training_would(
    digits: Digits, tmp_path: Path, capsys, words: list[str], says: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(values(digits, tmp_path / "run")))
    assert call(tools.train.main, path, "--dry_run", *words) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

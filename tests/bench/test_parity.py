"""Comparisons of runs at the same seeds: what is said of losses that are known, and real runs, which go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from dit.bench import parity
from dit.bench.parity import STUDIES, ParityBench, Study, compared, lines
from dit.config import ConfigError
from dit.configfile import load, write_yaml
from dit.data.shards.manifest import Manifest
from dit.experiments.diffusion import Experiment
from tests.datasets import Digits
from tests.train.runs import experiment, values

SEEDS = [1.00, 1.02, 0.98]  # the reference's losses


def told(*more: float) -> dict:
    losses = {"reference": SEEDS[: len(more)], "other": [a + b for a, b in zip(SEEDS, more, strict=False)]}
    return compared(losses)["variants"]["other"]


def test_differences_are_of_the_same_seed_with_students_interval() -> None:
    """The seeds' own spread, 0.02, does not count: the differences are 1, 2 and 3 thousandths."""
    row = told(0.001, 0.002, 0.003)
    assert compared({"reference": SEEDS})["variants"]["reference"]["spread"] == pytest.approx(0.02)
    assert row["mean"] == pytest.approx(1.002)
    assert row["difference"] == pytest.approx(0.002)
    assert row["half"] == pytest.approx(0.001 / 3**0.5 * stats.t.ppf(0.95, 2))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((-0.001, 0.002, 0.003), "parity: at most 1%, whatever chance does"),
        ((0.001, 0.002, 0.003), "parity: clearly worse, by at most 1%, whatever chance does"),
        ((-0.05, -0.051, -0.049), "parity: at most 1%"),
        ((0.05, 0.051, 0.049), "worse"),
        ((0.0, 0.03, -0.03), "not decided: it may be more than 1% worse; take more seeds"),
        ((0.001,), "not decided: one seed does not tell it from chance"),
        ((0.001, float("inf"), 0.003), "worse: a run failed"),
    ],
)
def test_verdicts(more: tuple[float, ...], says: str) -> None:
    assert told(*more)["verdict"].startswith(says)


def test_figures_are_json_though_a_run_failed() -> None:
    row = told(0.001, float("inf"), 0.003)
    assert json.loads(json.dumps(row, allow_nan=False))["losses"] == [1.001, None, 0.983]
    assert (
        "1.00100, failed, 0.98300"
        in list(lines(compared({"a": SEEDS, "b": [1.001, float("inf"), 0.983]})))[-1]
    )


def test_the_table_has_all_of_it() -> None:
    found = compared({"reference": SEEDS, "other": [1.001, 1.022, 0.983]})
    first, _, reference, other = lines(found)
    assert first.count("|") == reference.count("|") == other.count("|") == 7
    assert "| reference | 1.00000, 1.02000, 0.98000 | 1.00000 | 0.02000 |  |  |" in reference
    assert "+0.00200 ± 0.00169" in other
    assert "+0.00000 |" in list(lines(compared({"a": [1.0], "b": [1.0]})))[-1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("study", STUDIES)
def test_every_variant_of_every_study_is_a_configuration_of_its_own(study: str, device: str) -> None:
    made = [
        load(Experiment, "configs/digits.yaml", STUDIES[study].keys(variant, device))
        for variant in STUDIES[study].variants
    ]
    assert len(set(map(repr, made))) == len(made) > 1
    assert {cfg.train.precision for cfg in made} == {"bf16"}


def test_digits_are_made_where_there_are_no_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDIES, "residual", Study({"alone": {"train.precision": "bf16"}}))
    cfg = ParityBench(digits=8, steps=2, batch=8, seeds=(0,))
    found = parity.run(cfg, tmp_path, lambda text: None)
    assert 0.5 < found["variants"]["alone"]["losses"][0] < 3
    manifest = Manifest.load(tmp_path / "digits-8" / "train")
    assert (manifest.samples, manifest.channels, manifest.input_size) == (1297, 3, (8, 8))


def test_what_cannot_be_compared_is_refused() -> None:
    for given, says in (({"study": "residul"}, "did you mean residual"), ({"seeds": (1, 1)}, "each once")):
        with pytest.raises(ConfigError, match=says):
            ParityBench(**given)  # type: ignore[arg-type]


def test_runs_are_real_and_are_not_trained_twice(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one key that does nothing and one that does; the second time, and with a seed more, what is there is taken."""
    study = Study({"as it is": {}, "same": {"train.log_every": "2"}, "other": {"optim.lr": "0.02"}})
    monkeypatch.setitem(STUDIES, "residual", study)
    write_yaml(tmp_path / "base.yaml", experiment(values(digits, tmp_path / "unused")))
    given = {
        "config": str(tmp_path / "base.yaml"),
        "val": str(digits.moments_val),
        "steps": 4,
        "batch": 8,
    }
    told: list[str] = []
    extra = {"train.micro_batch": "null", "optim.warmup": "0"}
    found = parity.run(ParityBench(**given, seeds=(0,)), tmp_path, told.append, extra)
    row = found["variants"]
    assert row["same"]["losses"] == row["as it is"]["losses"]
    assert row["other"]["losses"] != row["as it is"]["losses"]
    assert found["images_per_s"]["other"] > 0
    logged = json.loads((tmp_path / "residual" / "other-seed0" / "held_out.jsonl").read_text())
    assert [logged["loss"]] == row["other"]["losses"]
    trained: list[str] = []
    train = parity.train
    monkeypatch.setattr(
        parity, "train", lambda cfg, *rest, **more: (trained.append(cfg.run_dir), train(cfg, *rest, **more))
    )
    more = parity.run(ParityBench(**given, seeds=(0, 1)), tmp_path, told.append, extra)["variants"]
    assert [Path(place).name for place in trained] == ["as_it_is-seed1", "same-seed1", "other-seed1"]
    assert more["other"]["losses"][:1] == row["other"]["losses"]
    assert more["other"]["losses"][1] != row["other"]["losses"][0]
    assert len(told) == 3 + 6

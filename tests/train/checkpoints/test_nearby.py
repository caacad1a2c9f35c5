"""Runs that lie below a folder are listed with what they are."""

from __future__ import annotations

import json
from pathlib import Path

from dit.train.checkpoints.nearby import SHOWN, runs_below, suggestion


def plant(folder: Path, step: int, **config: object) -> Path:
    """What of a checkpoint is looked at."""
    place = folder / "checkpoints" / f"step-{step:08d}"
    place.mkdir(parents=True)
    (place / "meta.json").write_text(json.dumps({"step": step, "config": config}))
    return folder


def test_each_is_named_with_its_kind_and_newest_step(tmp_path: Path) -> None:
    plant(plant(tmp_path / "quick" / "dit", 5, model={}), 12, model={})
    plant(tmp_path / "quick" / "vae", 9, autoencoder={})
    plant(tmp_path / "guide", 3, classifier={})
    plant(tmp_path / "a" / "b" / "c" / "d", 3, model={})  # too deep
    (tmp_path / "quick" / "latents").mkdir()
    assert [str(run).removeprefix(f"{tmp_path}/") for run in runs_below(tmp_path)] == [
        "guide (a classifier, for --guidance, step 3)",
        "quick/dit (a model to draw from, step 12)",
        "quick/vae (an autoencoder, for --codec.path=RUN/vae, step 9)",
    ]
    assert f"There are runs in {tmp_path}; give one of them:\n" in suggestion(tmp_path)


def test_a_broken_checkpoint_hides_no_run(tmp_path: Path) -> None:
    plant(plant(tmp_path / "run", 5, model={}), 12, model={})
    (tmp_path / "run" / "checkpoints" / "step-00000012" / "meta.json").write_text("{")
    (run,) = runs_below(tmp_path)
    assert run.step == 5


def test_where_there_is_none_nothing_is_said(tmp_path: Path) -> None:
    assert suggestion(tmp_path) == suggestion(tmp_path / "nowhere") == ""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert suggestion(tmp_path) == ""


def test_very_many_are_not_all_shown(tmp_path: Path) -> None:
    for i in range(SHOWN + 3):
        plant(tmp_path / f"run-{i:02d}", 1)
    assert suggestion(tmp_path).endswith("\n  and 3 more")
    assert len(suggestion(tmp_path).splitlines()) == SHOWN + 3

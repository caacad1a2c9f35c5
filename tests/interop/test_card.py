"""Model cards: what they say, which figures are of the weights, and that they can be read by machines."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from dit.errors import Notice
from dit.evals import record
from dit.experiments.trained import Trained
from dit.interop import card
from dit.interop.card import Use
from tests.datasets import Digits
from tests.interop.random_models import DDPM, random_run
from tests.train.runs import go, values

USE = Use("dit", f'import dit\nmodel = dit.load("{card.NAME}")', ("A note.",))
PROTOCOL = {"features": "pixels", "count": 64}


@pytest.fixture(scope="module")
def trained(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = random_run(tmp_path_factory.mktemp("card") / "run", digits, DDPM)
    return Trained.load(str(run), "ema", torch.device("cpu"))


def evaluated(trained: Trained, **values: Any) -> dict[str, Any]:
    row = {
        "step": trained.step,
        "digest": trained.digest,
        "weights": "ema",
        "figures": {"frechet": 12.25, "count": 3},
        "intervals": {"frechet": [12.0, 12.5]},
        "protocol": PROTOCOL,
        "hash": "0123456789ab",
    }
    return {**row, **values}


def write_rows(trained: Trained, *rows: dict[str, Any]) -> Path:
    path = trained.run_dir / record.FILE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_says_what_the_model_is_and_how_it_was_measured(trained: Trained) -> None:
    path = write_rows(
        trained,
        evaluated(trained),
        evaluated(trained, step=7, figures={"of_another_step": 1.0}),
        evaluated(trained, weights="model", figures={"of_other_weights": 1.0}),
        evaluated(trained, digest="of another run", figures={"of_another_run": 1.0}),
    )
    said = card.text(trained, "digits", USE)
    path.unlink()
    assert "| frechet | 12.25 | 12 to 12.5 | `0123456789ab` |" in said
    assert '"features": "pixels"' in said
    assert "of_a" not in said
    assert "of_other" not in said
    count = sum(p.numel() for p in trained.model.parameters())
    assert f"{count:,} parameters" in said
    assert "path ddpm, prediction eps" in said
    assert "10: 0, 1, 2" in said
    assert trained.digest in said
    assert "A note." in said
    held = ModelCard(said).data.to_dict()
    assert (held["library_name"], held["tags"]) == ("dit", ["diffusion", "dit", "class-conditional"])
    (result,) = held["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 12.25
    assert "0123456789ab" in result["metrics"][0]["name"]


def test_without_figures_it_says_so(trained: Trained) -> None:
    said = card.text(trained, "digits", USE)
    assert "None were measured" in said
    assert "model-index" not in yaml.safe_load(said.split("---")[1])


@pytest.mark.parametrize("line", ["{", "[]", '{"figures": 3, "hash": "x"}', '{"figures": {}}'])
def test_a_line_that_is_no_evaluation_is_left_out_and_said(line: str, trained: Trained) -> None:
    path = write_rows(trained, evaluated(trained))
    path.write_text(path.read_text() + line + "\n")
    with pytest.warns(Notice, match=r"evaluations\.jsonl: line 2 is not a row"):
        assert len(card.evaluations(trained)) == 1
    path.unlink()


def test_figures_name_their_features_and_what_was_measured_again_stands_once(trained: Trained) -> None:
    again = {"figures": {"frechet": 12.5, "kid": 0.5}, "intervals": {}, "hash": "aa", "features": "pixels"}
    first = {
        **again,
        "figures": {"frechet": 12.25, "count": 3},
        "intervals": {"frechet": [12, 13], "count": [2, 4]},
    }
    path = write_rows(
        trained,
        evaluated(trained, features="inception"),
        evaluated(trained, **first),
        evaluated(trained, **again),
        evaluated(trained, **again, samples={"content": "of another seed"}),
    )
    rows = card.evaluations(trained)
    said = card.text(trained, "digits", USE)
    path.unlink()
    assert len(rows) == 3
    assert rows[1]["figures"] == {"frechet": 12.5, "kid": 0.5, "count": 3}
    assert rows[1]["intervals"] == {"count": [2, 4]}
    assert "| frechet (inception) | 12.25 |" in said
    assert "| frechet (pixels) | 12.5 |" in said


def test_a_card_beside_a_file_stays_where_it_was_written_in(trained: Trained, tmp_path: Path) -> None:
    run, out = str(trained.run_dir), tmp_path / "digits.safetensors"
    assert card.with_card(run, "ema", out, USE) == (out, tmp_path / "digits.md")
    said = (tmp_path / "digits.md").read_text()
    assert 'dit.load("digits.safetensors")' in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card.with_card(run, "ema", out, USE)
    (tmp_path / "digits.md").write_text(said + "mine\n")
    with pytest.warns(Notice, match=r"digits\.md is there and says something else, and stays"):
        card.with_card(run, "ema", out, USE)
    assert (tmp_path / "digits.md").read_text().endswith("mine\n")
    card.with_card(run, "ema", out, USE, overwrite=True)
    assert (tmp_path / "digits.md").read_text() == said


def test_a_trained_run_s_card_has_its_data_and_its_average(digits: Digits, tmp_path: Path) -> None:
    go(values(digits, tmp_path / "run", engine="local", train={"steps": 1}))
    said = card.text(Trained.load(str(tmp_path / "run"), "ema", torch.device("cpu")), "digits", USE)
    assert "| data set | moments (`" in said
    assert "step 1, after 1 updates" in said
    assert str(tmp_path) not in said

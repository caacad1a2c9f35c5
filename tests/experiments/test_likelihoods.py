"""The likelihood of a data set under a trained model: measured once, where it lies, and what it is refused for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit.config import from_dict
from dit.data import DataError
from dit.evals.bits import LikelihoodSpec
from dit.experiments.likelihoods import likelihood_of
from dit.experiments.trained import Trained
from dit.outputs import OutputError
from dit.ranks.group import World
from tests.datasets import Digits

SPEC = from_dict(LikelihoodSpec, {"count": 3, "method": {"name": "ode", "num_steps": 1}})


def test_it_is_measured_once_and_lies_where_it_is_found_again(
    digits: Digits, run: Path, tmp_path: Path
) -> None:
    trained = Trained.load(str(run), "ema", torch.device("cpu"))
    how = (SPEC, 2, "fp32", World(), str(tmp_path / "new" / "out.json"))
    first = likelihood_of(trained, str(digits.moments_val), *how)
    again = likelihood_of(trained, str(digits.moments_val), *how)
    assert (first.is_new, again.is_new) == (True, False)
    held = json.loads(first.file.read_text())
    assert held == {**held, **json.loads(json.dumps(first.figures))} == again.figures
    assert str(again) == f"{first}, measured already"
    assert f"{held['bits_per_dim']:.4f} +- {held['standard_error']:.4f} bits/dim" in str(first)
    other = replace(SPEC, seed=1)
    with pytest.raises(OutputError, match=r"protocol\.seed: 0 there, 1 now"):
        likelihood_of(trained, str(digits.moments_val), other, *how[1:])
    assert likelihood_of(trained, str(digits.moments_val), other, *how[1:], overwrite=True).is_new
    with pytest.raises(DataError, match="come from different codecs"):
        likelihood_of(trained, str(digits.pixels_val), *how)

"""Every project's weights into a run and out again: what is inferred, and bit for bit what came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.config import from_dict, to_dict
from dit.experiments.trained import Trained
from dit.flow.objective import Objective
from dit.interop.convert import from_run, to_run
from dit.interop.facebook_dit import FacebookDiT
from dit.interop.format import Format
from dit.interop.latents import Choices
from dit.interop.sit import SiT
from dit.interop.weights import WeightsError
from tests.interop.goldens import GOLDENS
from tests.interop.reference import weights

EXACT = {"rtol": 0.0, "atol": 1e-5}
HEADS = {"facebook-dit": 4, "sit": 4}  # which their weights do not tell
KNOWN: dict[str, tuple[Format[Any], dict[str, Tensor]]] = {
    "facebook-dit": (FacebookDiT(), weights()),
    "sit": (SiT(learn_sigma=False), weights(learn_sigma=False)),
    **{name: (golden.format, golden.state()) for name, golden in GOLDENS.items()},
}


@pytest.mark.parametrize("name", GOLDENS)
def test_the_arguments_are_seen_in_the_weights(name: str) -> None:
    golden = GOLDENS[name]
    found = to_dict(golden.format.infer(golden.state()))
    assert {key: found[key] for key in golden.arguments} == golden.arguments


@pytest.mark.parametrize("name", KNOWN)
def test_what_came_in_goes_out_bit_for_bit(name: str, tmp_path: Path) -> None:
    format, state = KNOWN[name]
    torch.save({"ema": {f"module.{k}": t for k, t in state.items()}}, tmp_path / "in.pt")
    to_run(
        tmp_path / "in.pt",
        tmp_path / "run",
        format,
        Choices(num_heads=HEADS.get(name)),
    )
    from_run(str(tmp_path / "run"), tmp_path / "out.pt", format, "ema")
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert back.keys() == state.keys()
    assert [k for k in state if not torch.equal(back[k], state[k])] == []


@pytest.mark.parametrize("name", GOLDENS)
def test_a_run_of_them_gives_the_references_numbers(name: str, tmp_path: Path) -> None:
    golden = GOLDENS[name]
    torch.save(golden.state(), tmp_path / "in.pt")
    to_run(tmp_path / "in.pt", tmp_path / "run", golden.format, Choices())
    x, t, y, out = (
        torch.from_numpy(golden.numbers[f"{golden.place}{key}"]) for key in ("x", "t", "y", "out")
    )
    label = torch.where(y == golden.arguments["num_classes"], -1, y)
    with torch.no_grad():
        found = Trained.load(str(tmp_path / "run"), "ema", torch.device("cpu")).model(x, t, {"label": label})
    torch.testing.assert_close(found, out, **EXACT)


@pytest.mark.parametrize("name", KNOWN)
def test_another_objective_is_not_given_out(name: str) -> None:
    format, state = KNOWN[name]
    arguments = format.infer(state, num_heads=HEADS.get(name))
    model = arguments.build()
    with pytest.raises(WeightsError, match=r"these weights predict|SiT has no prediction"):
        format.theirs(model, from_dict(Objective, {"path": "cosine", "prediction": "velocity"}))

"""MCG-NJU/DDT's weights: its numbers, and inputs of any size."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.errors import Notice
from dit.flow.objective import Objective
from dit.flow.predict import ReverseVelocity
from dit.interop import ddt
from dit.interop.ddt import DDT, PATH, DDTArguments
from dit.interop.weights import Pretrained, WeightsError
from dit.model.dit import MODELS, DiTConfig
from tests.gaussian import golden
from tests.interop.reference import weights

EXACT = {"rtol": 0.0, "atol": 1e-5}  # numbers up to 7, in float32


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    return golden("ddt")


@pytest.fixture(scope="module")
def state(numbers: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name[2:]: torch.from_numpy(w) for name, w in numbers.items() if name.startswith("w/")}


@pytest.fixture(scope="module")
def model(numbers: dict[str, np.ndarray], state: dict[str, Tensor]) -> Pretrained:
    return ddt.from_state_dict(state, **json.loads(str(numbers["config"])))


def test_the_network_gives_the_references_numbers(model: Pretrained, numbers: dict[str, np.ndarray]) -> None:
    x, t, y, out = (torch.from_numpy(numbers[name]) for name in ("x", "t", "y", "out"))
    with torch.no_grad():
        torch.testing.assert_close(model.model(x, t, y), out, **EXACT)
        wide = model.model(torch.cat([x, x], dim=3), t, y)
        assert wide.shape == (5, 4, 8, 16)
        torch.testing.assert_close(model.model(x, t, y), out, **EXACT)  # and back


def test_entries_that_do_not_fit_are_named(numbers: dict[str, np.ndarray], state: dict[str, Tensor]) -> None:
    arguments = json.loads(str(numbers["config"]))
    with pytest.raises(WeightsError, match=r"missing: blocks\.4\.attn\.qkv\.weight"):
        ddt.from_state_dict(state, **{**arguments, "num_blocks": 5})
    with pytest.raises(WeightsError, match=r"unexpected: extra"):
        ddt.from_state_dict({**state, "extra": torch.zeros(1)}, **arguments)
    with pytest.raises(ConfigError, match="num_group"):
        ddt.from_state_dict(state, **{**arguments, "num_group": 3})


def test_the_encoders_share_is_xls_or_must_be_said(state: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"how many of the 4 blocks .* give --num_encoder_blocks"):
        DDT().infer(state)
    with pytest.raises(WeightsError, match="leaves none for the decoder"):
        DDT(num_encoder_blocks=4).infer(state).model()
    with pytest.warns(Notice, match="22 of 28 blocks are taken to be the encoder's"):
        found = DDT().infer({**state, "blocks.27.norm1.weight": torch.ones(48)})
    assert (found.num_blocks, found.num_encoder_blocks) == (28, 22)


def test_patches_are_said_since_weights_tell_their_numbers_alone(state: dict[str, Tensor]) -> None:
    assert DDT(num_encoder_blocks=3, patch_size=4).infer(state).in_channels == 1
    with pytest.raises(WeightsError, match=r"16 numbers, no multiple .* give --patch_size"):
        DDT(num_encoder_blocks=3, patch_size=3).infer(state)


def test_what_is_no_ddt_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"no weights of a DDT: s_embedder\.proj\.weight"):
        DDT().infer(weights())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "dit"}, "DDT's networks are of model 'ddt', this one is of 'dit'"),
        ({"time_period": 100.0}, "time_period 10.0 there, 100.0 here"),
        ({"decoder_width": 64}, "differs in the shapes of output"),
        ({"decoder_heads": 4}, r"differs in the shapes of output\.blocks\.0\.attention\.q_norm"),
        ({"mlp_ratio": 3.0}, "differs in the shapes of blocks"),
        ({"learn_sigma": True}, "differs in the shapes of output"),
    ],
)
def test_what_ddt_lacks_is_not_given_out(fields: dict[str, Any], says: str) -> None:
    arguments = DDTArguments(hidden_size=32, num_groups=2, num_blocks=3, num_encoder_blocks=2, num_classes=3)
    values = {**to_dict(arguments.model()), **fields}
    if values["name"] == "dit":
        values = {key: value for key, value in values.items() if not key.startswith("decoder")}
    cfg = MODELS.parse(values)
    assert isinstance(cfg, DiTConfig)
    with pytest.raises(WeightsError, match=says):
        DDT().theirs(cfg.build(8, 4, 3), Objective(path=PATH, prediction=ReverseVelocity()))

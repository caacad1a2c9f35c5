"""MCG-NJU/DDT's weights: its numbers, and inputs of any size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import ConfigError
from dit.interop import ddt
from dit.interop.weights import Pretrained, WeightsError
from tests.gaussian import golden

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

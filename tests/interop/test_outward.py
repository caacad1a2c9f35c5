"""What of ours another project has, and so may be given out."""

from __future__ import annotations

import pytest

from dit.config import from_dict
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import ReverseVelocity
from dit.interop.outward import check_flow, to_theirs
from dit.interop.weights import WeightsError
from dit.model.dit import DiTConfig


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"block": {"name": "adaln_zero", "qk_norm": True}}, r"it differs in block\.qk_norm"),
        ({"cond": []}, "it differs in cond"),
    ],
)
def test_a_network_that_the_reference_lacks_is_not_given_out(fields: dict, says: str) -> None:
    model = from_dict(DiTConfig, {"size": "nano", **fields}).build(8, 4, 10)
    with pytest.raises(WeightsError, match=says):
        to_theirs(model)


@pytest.mark.parametrize(
    "fields", [{"time_frequencies": "ddpm"}, {"block": {"name": "adaln_zero", "mlp_epsilon": 1e-5}}]
)
def test_a_network_that_computes_something_else_with_the_same_weights_is_not_given_out(fields: dict) -> None:
    model = from_dict(DiTConfig, {"size": "nano", **fields}).build(8, 4, 10)
    with pytest.raises(WeightsError, match=r"it differs in (time_frequencies|block\.mlp_epsilon)"):
        to_theirs(model)


@pytest.mark.parametrize("fields", [{"kernels": "plain"}, {"kernels": "triton"}, {"checkpoint_blocks": True}])
def test_a_network_that_computes_the_same_in_another_way_is_given_out(fields: dict) -> None:
    model = from_dict(DiTConfig, {"size": "nano", **fields}).build(8, 4, 10)
    assert to_theirs(model).keys() == to_theirs(DiTConfig(size="nano").build(8, 4, 10)).keys()


def test_only_squares_are_given_out() -> None:
    with pytest.raises(WeightsError, match="square inputs only"):
        to_theirs(DiTConfig(size="nano").build((8, 16), 4, 10))


def test_a_flow_of_another_time_or_direction_is_not_given_out() -> None:
    path = Linear(model_time_data=1.0, model_time_noise=0.0)
    check_flow("X", Objective(path=path, prediction=ReverseVelocity()), path)
    for other in (Objective(path=Linear(), prediction=ReverseVelocity()), Objective(path=path)):
        with pytest.raises(WeightsError, match="X samples ReverseVelocity"):
            check_flow("X", other, path)


def test_a_network_that_only_rounds_otherwise_is_given_out() -> None:
    keys = {"residual": "bfloat16", "attention": "math", "checkpoint_blocks": True}
    given, plain = (from_dict(DiTConfig, {"size": "nano", **more}).build(8, 4, 10) for more in (keys, {}))
    assert to_theirs(given).keys() == to_theirs(plain).keys()

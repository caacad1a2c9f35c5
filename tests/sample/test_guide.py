"""Guidance: neutral strength is the identity, one call for both branches, all channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit.config import to_dict
from dit.flow.path import Path, broadcast
from dit.flow.predict import Cond, Endpoints, Prediction
from dit.sample.denoise import Denoiser
from dit.sample.guide import GUIDANCES, ClassifierFree, cfg, null
from tests.gaussian import PAIR_IDS, PAIRS, normal


class Toy:
    """A denoiser whose answer depends on label and drop, remembering its calls."""

    def __init__(self) -> None:
        self.calls: list[Cond] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        assert len(t) == len(x)
        self.calls.append(cond)
        drop = cond.get("drop", torch.zeros(len(x), dtype=torch.bool))
        label = broadcast(torch.where(drop, torch.tensor(-1), cond["label"]).to(x.dtype), x)
        scale = broadcast(t, x)
        return Endpoints(x * label + scale, x - label * scale, x + label)


LABELS = torch.tensor([0, 3, 5])


def inputs() -> tuple[Tensor, Tensor]:
    return normal(3, 4, 2, 2), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("name", GUIDANCES.names())
def test_the_default_is_neutral_and_returns_the_very_function(name: str) -> None:
    toy = Toy()
    assert GUIDANCES[name]()(toy) is toy


def test_cfg_at_scale_one_is_the_identity() -> None:
    toy = Toy()
    assert cfg(1.0)(toy) is toy
    assert cfg(1)(toy) is toy
    assert cfg(1.0000001)(toy) is not toy


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0, 7.5])
def test_cfg_extrapolates_from_null_to_conditional_on_all_channels(scale: float) -> None:
    x, t = inputs()
    cond = {"label": LABELS}
    guided = cfg(scale)(Toy())(x, t, cond)
    with_label, without = Toy()(x, t, cond), Toy()(x, t, null(cond, x))
    torch.testing.assert_close(guided.data, without.data + scale * (with_label.data - without.data))
    torch.testing.assert_close(guided.eps, without.eps + scale * (with_label.eps - without.eps))
    assert torch.equal(guided.log_variance, with_label.log_variance)


def test_cfg_calls_once_with_both_branches() -> None:
    x, t = inputs()
    toy = Toy()
    extra = torch.arange(6.0).reshape(3, 2)
    cfg(2.0)(toy)(x, t, {"label": LABELS, "text": extra})
    (both,) = toy.calls
    assert both["label"].tolist() == [0, 3, 5, 0, 3, 5]
    assert both["drop"].tolist() == [False] * 3 + [True] * 3
    assert torch.equal(both["text"], torch.cat([extra, extra]))


def test_cfg_keeps_conditions_that_were_dropped_already() -> None:
    x, t = inputs()
    drop = torch.tensor([False, True, False])
    toy = Toy()
    guided = cfg(3.0)(toy)(x, t, {"label": LABELS, "drop": drop})
    assert toy.calls[0]["drop"].tolist() == [False, True, False, True, True, True]
    alone = Toy()(x, t, {"label": LABELS, "drop": torch.ones(3, dtype=torch.bool)})
    torch.testing.assert_close(guided.data[1], alone.data[1])  # both branches are null there


@pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
def test_guiding_endpoints_is_guiding_the_prediction(path: Path, prediction: Prediction) -> None:
    """The solve is linear in the prediction, so it is the same guidance for every prediction of every path."""
    x, t = inputs()
    scale, preds = 2.5, normal(6, 4, 2, 2, seed=9)
    model = Denoiser(lambda x, t, cond: preds, path, prediction)
    guided = cfg(scale)(model)(x, t, {"label": LABELS})
    coeffs = path.coeffs(t)
    want = prediction.endpoints(coeffs, x, preds[3:] + scale * (preds[:3] - preds[3:]))
    torch.testing.assert_close(guided.data, want.data)
    torch.testing.assert_close(guided.eps, want.eps)
    torch.testing.assert_close(coeffs.mix(guided.data, guided.eps), x)  # still endpoints of x


def test_null_changes_drop_alone() -> None:
    cond = {"label": LABELS, "drop": torch.zeros(3, dtype=torch.bool)}
    dropped = null(cond, torch.zeros(3, 1))
    assert dropped["label"] is LABELS
    assert bool(dropped["drop"].all())
    assert not bool(cond["drop"].any())


def test_guidance_without_a_condition_is_refused() -> None:
    x, t = inputs()
    with pytest.raises(ValueError, match="needs a condition"):
        cfg(2.0)(Toy())(x, t, {})


def test_conditions_of_another_batch_are_refused() -> None:
    x, t = inputs()
    with pytest.raises(ValueError, match=r"cond\['label'\] has 1 entries for a batch of 3"):
        cfg(2.0)(Toy())(x, t, {"label": LABELS[:1]})


def test_guidance_is_its_own_configuration() -> None:
    assert GUIDANCES.parse(to_dict(cfg(2.5))) == ClassifierFree(scale=2.5)

"""An encoder that speaks for several evaluations: what is shared, when it is asked anew, and what that saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit.config import ConfigError, from_dict
from dit.flow.path import Linear
from dit.flow.predict import Velocity
from dit.model.ddt import DDT
from dit.model.dit import DiTConfig
from dit.model.sharing import EncoderSharing, encoder_share, share_encoder
from dit.sample.generate import Sampler, SamplerSpec
from tests.model.test_block import perturbed
from tests.model.test_ddt import KINDS, built, config, inputs

CPU = torch.device("cpu")
GUIDED = {"name": "cfg", "scale": 2.0}


def sampler(model: object, sharing: EncoderSharing | None = None, **spec: object) -> Sampler:
    made = from_dict(SamplerSpec, {"solver": "euler", "num_steps": 6, **spec})
    return Sampler(model, Linear(), Velocity(), lambda x: x, (3, 4, 6), made, CPU, classes=5, sharing=sharing)  # type: ignore[arg-type]


def drawn(
    every: int, model: DDT | None = None, first: int = 0, **spec: object
) -> tuple[Tensor, EncoderSharing]:
    sharing = share_encoder(model or perturbed(built("modern")), every)
    index = torch.arange(first, first + 2)
    return sampler(sharing, sharing, **spec).latents(index, torch.tensor([1, 4])), sharing


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_parts_are_the_whole_to_the_bit(kind: str) -> None:
    model = perturbed(built(kind))
    x, t, cond = inputs()
    assert torch.equal(model.decode(x, t, model.encode(x, t, cond)), model(x, t, cond))


@pytest.mark.parametrize("guidance", [[], [GUIDED], [{**GUIDED, "interval": [0.3, 0.7]}]], ids=str)
def test_sharing_among_one_is_none_to_the_bit(guidance: list) -> None:
    found, sharing = drawn(1, guidance=guidance)
    plain = sampler(perturbed(built("modern")), guidance=guidance)
    assert torch.equal(found, plain.latents(torch.arange(2), torch.tensor([1, 4])))
    assert sharing.encoded == sharing.asked


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_two_evaluations_share_and_the_encoder_is_asked_half_as_often(solver: str) -> None:
    """And the pictures are near those of none shared, but not the same."""
    alone, _ = drawn(1, guidance=[GUIDED], solver=solver)
    found, sharing = drawn(2, guidance=[GUIDED], solver=solver)
    evaluations = 6 if solver == "euler" else 12
    assert (sharing.asked, sharing.encoded) == (4 * evaluations, 2 * evaluations)
    assert 0 < float((found - alone).norm() / alone.norm()) < 0.2


def test_the_decoder_sees_each_evaluation_and_its_time_and_the_encoder_the_first_alone() -> None:
    model = perturbed(built("alike"))
    sharing = share_encoder(model, 2)
    x, t, cond = inputs()
    sharing.begin()
    sharing.next()
    assert torch.equal(sharing(x, t, cond), model(x, t, cond))
    sharing.next()
    assert torch.equal(sharing(2 * x, t / 2, cond), model.decode(2 * x, t / 2, model.encode(x, t, cond)))
    sharing.next()
    assert torch.equal(sharing(3 * x, t / 3, cond), model(3 * x, t / 3, cond))


def test_branches_of_guidance_and_other_batches_share_nothing() -> None:
    model = perturbed(built("alike"))
    sharing = share_encoder(model, 10)
    x, t, cond = inputs()
    null = {**cond, "drop": torch.ones(2, dtype=torch.bool)}
    sharing.begin()
    for _ in range(2):  # each branch in a call of its own, with what it said before
        sharing.next()
        assert torch.equal(sharing(x, t, cond), model(x, t, cond))
        assert torch.equal(sharing(x, t, null), model(x, t, null))
    assert (sharing.asked, sharing.encoded) == (8, 4)
    sharing.next()
    assert torch.equal(
        sharing(x[:1], t[:1], {"label": cond["label"][:1]}), model(x[:1], t[:1], {"label": cond["label"][:1]})
    )
    sharing.begin()
    assert torch.equal(sharing(2 * x, t, cond), model(2 * x, t, cond))  # in no evaluation: kept for nobody
    sharing.next()
    assert torch.equal(sharing(3 * x, t, cond), model(3 * x, t, cond))


def test_an_image_is_the_same_whatever_was_drawn_before() -> None:
    model = perturbed(built("modern"))
    sharing = share_encoder(model, 3)
    one = sampler(sharing, sharing, guidance=[{**GUIDED, "interval": [0.3, 0.7]}])
    label = torch.tensor([1, 4])
    one.latents(torch.arange(2), label)
    again = one.latents(torch.arange(2, 4), label)
    assert torch.equal(again, drawn(3, model, 2, guidance=[{**GUIDED, "interval": [0.3, 0.7]}])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoders_share_is_what_a_counter_finds(kind: str) -> None:
    with torch.device("meta"):
        model = config(kind).build((4, 6), 3, 5)
        x, t, label = torch.empty(1, 3, 4, 6), torch.empty(1), torch.zeros(1).long()
        said = torch.empty(1, 6, 32)
    counts = []
    for call in (lambda: model(x, t, {"label": label}), lambda: model.decode(x, t, said)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert encoder_share(config(kind), (4, 6), 3, 5) == pytest.approx(1 - counts[1] / counts[0], rel=1e-12)


def test_a_model_without_an_encoder_is_refused() -> None:
    model = DiTConfig(width=32, depth=1, heads=2).build((4, 4), 3, 0)
    with pytest.raises(ConfigError, match=r"share_encoder is 2, and this model has no encoder .*ddt has one"):
        share_encoder(model, 2)

"""Auxiliary terms: how a config names them, how they add up, and the closed forms of those of the prediction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict, to_dict
from dit.configfile import load
from dit.flow.auxiliary import AUXILIARIES, Auxiliary, Context, Direction, LayerSync
from dit.flow.discrete import DiscreteVP
from dit.flow.objective import Objective
from dit.flow.path import VP, Linear, NoisePath
from dit.flow.predict import Cond, Eps, Model, Prediction, Velocity, usable
from dit.flow.variance import LearnedRange
from tests.first_loss import first_loss
from tests.flow.test_objective import NoSync, draws, says, silent
from tests.gaussian import PAIR_IDS, PAIRS, normal

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
every_term = pytest.mark.parametrize("name", AUXILIARIES.names())
DDPM = {"path": DiscreteVP(), "prediction": Eps()}  # where every term is defined
BOTH = (Direction(weight=0.3), LearnedRange(weight=0.5))


def context(
    path: NoisePath, prediction: Prediction, t: Tensor, output: Tensor, learns_variance: bool = False
) -> Context:
    """One call of a network that said `output`, at t (B,), of fixed data and eps."""
    shape = (len(t), output.shape[1] // (1 + learns_variance), *output.shape[2:])
    data, eps = (normal(*shape, seed=seed).to(t.dtype) for seed in (0, 1))
    coeffs = path.coeffs(t)
    x = coeffs.mix(data, eps)
    ends = prediction.endpoints(coeffs, x, output)
    tokens = dict(zip((7, 8, 16), normal(3, len(t), 3, 6, seed=7).float(), strict=True))
    cond = {"label": torch.arange(len(t)) % 3 - 1, "drop": torch.arange(len(t)) % 4 == 3}
    return Context(
        path,
        prediction,
        t,
        coeffs,
        data,
        eps,
        x,
        output,
        ends,
        tokens,
        cond,
        draws(len(t)),
        t.clone(),
        lambda *_: output / 2,
    )


def inside(path: NoisePath, prediction: Prediction, count: int = 5) -> Tensor:
    """Times of the usable interval, away from where a velocity is infinite."""
    lo, hi = usable(path, prediction)
    return path.snap(lo + (hi - lo) * torch.linspace(0.05, 0.95, count, dtype=torch.float64))


# --- how they are named ------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Any, Any]] = {
    "null": (None, None),
    "an empty list": ([], None),
    "a word": ("direction", Direction()),
    "a mapping": ({"name": "direction", "weight": "2"}, Direction(weight=2.0)),
    "a list of one": (["direction"], Direction()),
    "a list": (
        ["learned_range", {"name": "direction", "weight": 2}],
        (LearnedRange(), Direction(weight=2.0)),
    ),
    "terms": (Direction(), Direction()),
    "a tuple of terms": ((Direction(), LearnedRange()), (Direction(), LearnedRange())),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_taken_and_comes_back(form: str) -> None:
    given, terms = FORMS[form]
    objective = from_dict(Objective, {"auxiliary": given})
    assert objective.auxiliary == terms
    assert objective.terms == (terms if isinstance(terms, tuple) else () if terms is None else (terms,))
    assert from_dict(Objective, to_dict(objective)) == objective
    assert hash(objective) == hash(from_dict(Objective, to_dict(objective)))


def test_none_and_one_are_written_as_before_there_were_lists() -> None:
    assert to_dict(Objective())["auxiliary"] is None
    for given in (LearnedRange(), (LearnedRange(),)):
        assert to_dict(Objective(auxiliary=given))["auxiliary"] == {"name": "learned_range", "weight": 1.0}


@pytest.mark.parametrize(
    ("typed", "terms"),
    [
        ({"auxiliary": "direction,learned_range"}, (Direction(), LearnedRange())),
        (
            {"auxiliary": "[{name: direction, weight: 3}, learned_range]"},
            (Direction(weight=3), LearnedRange()),
        ),
        ({"auxiliary.weight": "3"}, (Direction(weight=3.0),)),
        ({"auxiliary": "null"}, ()),
    ],
)
def test_a_command_line_names_them(typed: dict[str, str], terms: tuple[Auxiliary, ...]) -> None:
    assert load(Objective, {"auxiliary": "direction"}, typed).terms == terms


def test_what_is_wrong_is_said_with_its_place() -> None:
    for given, said in (
        ("directon", r"^auxiliary: unknown auxiliary term 'directon'; did you mean direction\?"),
        ({"name": "direction", "wieght": 1}, r"^auxiliary\.wieght: unknown key; did you mean weight\?"),
        (["direction", "x"], r"^auxiliary\.1: unknown auxiliary term 'x'"),
        ([{"name": "direction", "weight": -1}], r"^auxiliary\.0\.weight: expected more than 0, got -1"),
        ([None], r"^auxiliary\.0: expected the name"),
        (3, r"^auxiliary: expected the name"),
    ):
        with pytest.raises(ConfigError, match=said):
            from_dict(Objective, {"auxiliary": given})
    with pytest.raises(ConfigError) as every:
        from_dict(Objective, {"auxiliary": ["x", {"name": "direction", "weight": 0}]})
    assert [p.key for p in every.value.problems] == [("auxiliary", "0"), ("auxiliary", "1", "weight")]


def test_the_same_term_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="names direction 2 times"):
        Objective(auxiliary=(Direction(), Direction(weight=2.0))).check()


class Tapping:
    """A network that says `output`, whose tokens behind block n are turned the further the larger n is."""

    def __init__(self, output: Tensor, tokens: Tensor):
        self.output, self.tokens, self.asked = output, tokens, [()]
        self.scale = torch.tensor(1.0, requires_grad=True)

    def __call__(self, x: Tensor, model_time: Tensor, cond: Cond, taps: tuple[int, ...] = ()) -> Any:
        self.asked.append(taps)
        behind = tuple(self.tokens[0].roll(n % 5, 2) + self.scale * self.tokens[0] for n in taps)
        drop = cond.get("drop")  # an answer to no condition is another one
        output = (
            self.output if drop is None else torch.where(drop.reshape(-1, 1, 1, 1), 0.5, 1.0) * self.output
        )
        return (output, behind) if taps else output


# --- how they add up ---------------------------------------------------------------------------------------


def answers(count: int = 16, channels: int = 4) -> Tensor:
    """What a network with a learned variance says of so many latents."""
    return normal(count, 2 * channels, 2, 2, seed=9, dtype=torch.float32)


def test_terms_add_up_and_each_is_logged_by_its_name() -> None:
    data = normal(16, 4, 2, 2, dtype=torch.float32)
    model = says(answers())
    alone = [Objective(**DDPM, auxiliary=term).loss(model, data, {}, draws(16)) for term in BOTH]
    together = Objective(**DDPM, auxiliary=BOTH).loss(model, data, {}, draws(16))
    plain = Objective(**DDPM).loss(model, data, {}, draws(16))
    assert torch.equal(together.per_sample, plain.per_sample)
    assert plain.auxiliary is None
    torch.testing.assert_close(together.auxiliary, alone[0].auxiliary + alone[1].auxiliary)
    torch.testing.assert_close(together.mean, (plain.per_sample + together.auxiliary).mean())
    assert list(together.metrics) == ["direction", "variational_bound"]
    for term, loss in zip(BOTH, alone, strict=True):
        assert list(loss.metrics) == [term.metric]
        assert torch.equal(together.metrics[term.metric], loss.auxiliary.mean())
        assert not together.metrics[term.metric].requires_grad


def test_missing_samples_count_for_no_term() -> None:
    data = normal(16, 4, 2, 2, dtype=torch.float32)
    loss = Objective(**DDPM, auxiliary=BOTH).loss(says(answers()), data, {}, draws(16))
    valid = torch.arange(16) < 12
    kept = (loss.per_sample + loss.auxiliary)[:12].sum() / 16
    torch.testing.assert_close(loss.where(valid).mean, kept)


def test_one_that_needs_variance_channels_is_enough() -> None:
    assert Objective(auxiliary=BOTH).uses_variance
    assert not Objective(auxiliary=(Direction(),)).uses_variance
    with pytest.raises(ConfigError, match="discrete steps"):
        Objective(auxiliary=BOTH).check()
    Objective(**DDPM, auxiliary=BOTH).check()


def test_the_first_losses_know_no_term() -> None:
    assert first_loss(Objective(auxiliary=Direction()), 8) == first_loss(Objective(), 8)


@every_term
def test_every_term_waits_for_no_device_and_has_a_gradient(name: str) -> None:
    objective = Objective(**DDPM, auxiliary=AUXILIARIES[name]())
    count = max(8, objective.group)
    data, output = normal(count, 4, 2, 2, dtype=torch.float32), answers(count).requires_grad_()
    cond: Cond = {"label": torch.arange(count), "drop": torch.arange(count) % 4 == 3}
    model = Tapping(output, normal(1, count, 3, 6, seed=7).float())
    objective.loss(model, data, cond, draws(count))  # tables are computed once, at first
    with NoSync():
        loss = objective.loss(model, data, cond, draws(count))
    assert loss.auxiliary is not None
    assert loss.auxiliary.shape == (count,)
    grads = torch.autograd.grad(loss.auxiliary.sum(), [output, model.scale], allow_unused=True)
    found = [grad for grad in grads if grad is not None]
    assert all(bool(torch.isfinite(grad).all()) for grad in found)
    assert any(bool((grad != 0).any()) for grad in found)


@every_term
def test_every_term_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    term = AUXILIARIES[name]()
    t = torch.tensor([0.001, 0.3, 0.9]).repeat(term.slots)
    at = context(DiscreteVP(), Eps(), t, answers(len(t)), learns_variance=True)
    compiled = torch.compile(term.term, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(at), term.term(at))


# --- the direction of the velocity -------------------------------------------------------------------------


@every_pair
def test_it_is_one_less_the_cosine_of_the_velocities(path: NoisePath, prediction: Prediction) -> None:
    """Of a wrong answer that x cannot tell, whose velocity differs from the true one by det·wrong."""
    t = inside(path, prediction)
    c = path.coeffs(t)
    wrong = normal(len(t), 3, 2, 4, seed=5)
    at = context(path, prediction, t, torch.zeros_like(wrong))

    def wide(value: Tensor) -> Tensor:
        return value[:, None, None, None]

    data, eps = at.data - wide(c.sigma) * wrong, at.eps + wide(c.alpha) * wrong
    said = context(path, prediction, t, prediction.target(c, data, eps))
    true = wide(c.d_alpha) * at.data + wide(c.d_sigma) * at.eps
    predicted = wide(c.d_alpha) * data + wide(c.d_sigma) * eps
    cosine = torch.nn.functional.cosine_similarity(true, predicted, dim=1, eps=1e-12)
    smoothed = cosine * predicted.norm(dim=1) / (predicted.square().sum(1) + 1e-6).sqrt()
    torch.testing.assert_close(
        Direction(weight=0.5).term(said), 0.5 * (1 - smoothed.mean((1, 2))), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(("scale", "value"), [(1.0, 0.0), (7.0, 0.0), (-0.5, 2.0)])
def test_only_the_direction_counts(scale: float, value: float) -> None:
    t = torch.full((2,), 0.3, dtype=torch.float64)
    true = context(Linear(), Velocity(), t, torch.zeros(2, 8, 3, 3))
    at = context(Linear(), Velocity(), t, scale * (true.eps - true.data))
    assert Direction().term(at).tolist() == pytest.approx([value] * 2, abs=1e-5)


def test_positions_count_alike_however_fast_they_move() -> None:
    """Two positions, one right and one the other way round, a thousand times as fast: (0 + 2) / 2."""
    t = torch.tensor([0.5], dtype=torch.float64)
    true = context(Linear(), Velocity(), t, torch.zeros(1, 4, 2))
    turned = (true.eps - true.data) * torch.tensor([1.0, -1000.0])
    assert float(Direction().term(context(Linear(), Velocity(), t, turned))) == pytest.approx(1.0, abs=1e-5)


def test_latents_without_positions_have_one() -> None:
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    flat, one = (context(Linear(), Velocity(), t, normal(2, 5, *at, seed=4)) for at in ((), (1, 1)))
    assert torch.equal(Direction().term(flat), Direction().term(one))


def test_a_network_that_says_0_has_the_whole_term_and_a_finite_gradient() -> None:
    """The gradient is that of a linear function: −v / |v| over the smoothing's root, in the mean over positions."""
    t = torch.tensor([0.1, 0.9])
    zero = torch.zeros(2, 4, 3, 3, requires_grad=True)
    at = context(Linear(), Velocity(), t, zero)
    term = Direction(weight=2.0).term(at)
    assert term.tolist() == [2.0, 2.0]
    term.sum().backward()
    true = at.eps - at.data
    torch.testing.assert_close(zero.grad, -2.0 * true / true.norm(dim=1, keepdim=True) / 1e-3 / 9)


@every_pair
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_it_is_finite_wherever_it_is_trained(path: NoisePath, prediction: Prediction, scale: float) -> None:
    """At the ends of the usable times, where velocities may be infinite, in float32; and so is its gradient."""
    lo, hi = usable(path, prediction)
    t = torch.tensor([lo, lo + 1e-7, 1e-3, 0.5, hi]).clamp(lo, hi)
    output = (scale * normal(5, 4, 2, 2, seed=3)).float().requires_grad_()
    term = Direction().term(context(path, prediction, t, output))
    term.sum().backward()
    assert term.dtype == torch.float32
    assert float(term.detach().min()) >= -1e-5
    assert float(term.detach().max()) <= 2 + 1e-5
    assert output.grad is not None
    assert bool(torch.isfinite(output.grad).all())


def test_where_a_velocity_is_infinite_its_direction_is_that_of_the_noise() -> None:
    """VP at t = 0, where sigma grows like sqrt(t) and alpha does not move beside it."""
    t = torch.zeros(2)
    assert bool(torch.isinf(VP().coeffs(t).d_sigma).all())
    output = normal(2, 4, 2, 2, seed=3).float()
    at = context(VP(), Eps(), t, output)
    cosine = torch.nn.functional.cosine_similarity(at.eps, output, dim=1)
    torch.testing.assert_close(Direction().term(at), 1 - cosine.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_an_answer_in_low_precision_is_measured_in_float32() -> None:
    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        return x.bfloat16()

    answer: Model = model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Objective(auxiliary=Direction()).loss(answer, normal(8, 3, dtype=torch.bfloat16), {}, draws(8))
    assert loss.auxiliary is not None
    assert loss.auxiliary.dtype == loss.mean.dtype == torch.float32


def test_the_first_term_of_a_silent_network_is_its_weight() -> None:
    loss = Objective(auxiliary=Direction(weight=0.7)).loss(silent, normal(8, 3, 2, 2), {}, draws(8))
    assert loss.auxiliary is not None
    assert loss.auxiliary.tolist() == pytest.approx([0.7] * 8)
    assert math.isclose(float(loss.mean), float(loss.per_sample.mean()) + 0.7, rel_tol=1e-9)


# --- a layer that follows a later one ----------------------------------------------------------------------


def synced(early: Tensor, late: Tensor, term: LayerSync) -> Tensor:
    """The term of these tokens (B, T, D)."""
    t = torch.full((len(early),), 0.5)
    at = context(Linear(), Velocity(), t, torch.zeros(len(early), 1, 2, 2))
    return term.term(replace(at, taps={term.early: early, term.late: late}))


def test_layersync_is_one_less_the_cosine_of_each_token_and_teaches_the_early_one_alone() -> None:
    early, late = (normal(2, 5, 8, seed=i).float().requires_grad_() for i in (1, 2))
    term = synced(early, late, LayerSync(weight=0.5, early=1, late=3))
    cosine = torch.nn.functional.cosine_similarity(early, late, dim=2)
    torch.testing.assert_close(term, 0.5 * (1 - cosine.mean(1)))
    term.sum().backward()
    assert late.grad is None
    assert early.grad is not None
    assert float(early.grad.abs().min()) > 0


def test_layersync_is_0_of_tokens_alike_and_finite_of_none_in_float32() -> None:
    tokens = normal(2, 5, 8).bfloat16()
    alike = synced(tokens, 3 * tokens, LayerSync())
    assert alike.dtype == torch.float32
    torch.testing.assert_close(alike, torch.zeros(2), rtol=0, atol=1e-4)
    nothing = torch.zeros(2, 5, 8, requires_grad=True)
    term = synced(nothing, torch.zeros(2, 5, 8), LayerSync())
    assert term.tolist() == pytest.approx([0.2, 0.2])
    term.sum().backward()
    assert nothing.grad is not None
    assert bool(torch.isfinite(nothing.grad).all())


def test_a_network_is_asked_for_taps_once_and_only_where_a_term_looks_at_them() -> None:
    model = Tapping(normal(8, 3, 2, 2), normal(1, 8, 3, 6))
    data = normal(8, 3, 2, 2)
    Objective(auxiliary=(LayerSync(early=2, late=5), Direction())).loss(model, data, {}, draws(8))
    Objective(auxiliary=Direction()).loss(model, data, {}, draws(8))
    Objective(auxiliary=LayerSync()).per_sample(model, data, data, torch.full((8,), 0.5).double(), {})
    assert model.asked == [(), (2, 5), (), ()]


def test_blocks_that_a_network_does_not_have_are_refused() -> None:
    objective = Objective(auxiliary=LayerSync(early=2, late=5))
    objective.check_depth(5)
    Objective(auxiliary=Direction()).check_depth(1)
    with pytest.raises(ConfigError, match="layersync looks behind block 5, and the network has 4"):
        objective.check_depth(4)
    with pytest.raises(ConfigError, match="an early block follows a later one"):
        LayerSync(early=5, late=5)

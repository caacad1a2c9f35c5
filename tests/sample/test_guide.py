"""Guidance: neutral strength is the identity, one call for both branches, what each option changes and leaves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.flow.path import Linear, NoisePath, broadcast
from dit.flow.predict import Cond, Endpoints, Eps, Prediction
from dit.sample.denoise import DenoiseFn, Denoiser
from dit.sample.guide import GUIDANCES, Autoguidance, ClassifierFree, Context, Guidance, LogitsFn, cfg, null
from dit.sample.solve import Euler, Heun
from tests.gaussian import ALL_PATHS, PAIR_IDS, PAIRS, Gaussian, normal
from tests.ulps import assert_within


class Toy:
    """A denoiser whose answer depends on label and drop, remembering its calls."""

    def __init__(self) -> None:
        self.calls: list[Cond] = []

    @property
    def samples(self) -> list[int]:
        """How many were in each call."""
        return [len(cond["label"]) for cond in self.calls]

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


NEUTRAL: list[dict[str, object]] = [
    {"name": "cfg", "scale": 1, "interval": [0.2, 0.7], "rescale": 0.5},
    {"name": "cfg_zero", "scale": 1, "zero_init": 0},
    {"name": "autoguidance", "checkpoint": "nowhere", "scale": 1},
    {"name": "classifier", "checkpoint": "nowhere", "scale": 0},
    {"name": "threshold", "quantile": None, "floor": 1},
]


@pytest.mark.parametrize("value", NEUTRAL, ids=lambda v: v["name"])
def test_neutral_strength_returns_the_very_function(value: dict) -> None:
    toy = Toy()
    assert GUIDANCES.parse(value)(toy) is toy
    assert GUIDANCES.parse(value)(toy, Context(Linear())) is toy
    assert {v["name"] for v in NEUTRAL} == set(GUIDANCES)


@pytest.mark.parametrize("name", GUIDANCES.names())
def test_no_guidance_does_nothing_for_want_of_a_strength(name: str) -> None:
    with pytest.raises(ConfigError, match="is required and was not given"):
        GUIDANCES.parse(name)


STRONG: list[Guidance] = [
    GUIDANCES.parse(value)
    for value in (
        {"name": "cfg", "scale": 3.0},
        {"name": "cfg", "scale": 3.0, "interval": [0.1, 0.6]},
        {"name": "cfg", "scale": 3.0, "channels": 2},
        {"name": "cfg", "scale": 3.0, "rescale": 0.7},
        {"name": "cfg", "scale": 0.5, "interval": [0.3, 1.0], "channels": 3, "rescale": 1.0},
        {"name": "cfg_zero", "scale": 3.0},
        {"name": "cfg_zero", "scale": 3.0, "interval": [0.1, 0.6], "rescale": 0.7},
        {"name": "autoguidance", "checkpoint": "weak", "scale": 2.0},
        {"name": "classifier", "checkpoint": "classes", "scale": 1.5},
        {"name": "threshold", "quantile": 0.8, "floor": 0.5},
    )
]


class Weak:
    """An opener of one weak model of a path and of one classifier of six classes."""

    def __init__(self, path: NoisePath):
        self.path, self.opened = path, list[str]()

    def denoiser(self, checkpoint: str) -> DenoiseFn:
        self.opened.append(checkpoint)
        return Gaussian(mean=-1.0, std=1.0).denoise(self.path)

    def classifier(self, checkpoint: str) -> LogitsFn:
        self.opened.append(checkpoint)
        weight = normal(16, 6, seed=7)
        return lambda x, t: torch.tanh(x.flatten(1) @ weight) * 3


def exact(path: NoisePath) -> DenoiseFn:
    """Gaussian data whose mean and spread the label gives; 0 is the null's."""

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        shift = torch.where(cond["drop"], 0, cond["label"]) if "drop" in cond else cond["label"]
        ends = [
            Gaussian(float(s), 0.4 + 0.1 * float(s)).endpoints(path, x[i : i + 1], t[i : i + 1])
            for i, s in enumerate(shift)
        ]
        return Endpoints(torch.cat([e.data for e in ends]), torch.cat([e.eps for e in ends]), x.clone())

    return denoise


def test_every_guidance_is_here() -> None:
    assert {GUIDANCES.name_of(g) for g in STRONG} == set(GUIDANCES)


@pytest.mark.parametrize("path", ALL_PATHS, ids=str)
@pytest.mark.parametrize("guidance", STRONG, ids=str)
def test_what_is_guided_are_still_endpoints_of_x_and_differ(guidance: Guidance, path: NoisePath) -> None:
    """x = alpha·data + sigma·eps, so that every solver may follow; and the learned variance is left alone."""
    x, t = inputs()
    cond, opener = {"label": LABELS}, Weak(path)
    ends = guidance(exact(path), Context(path, opener))(x, t, cond)
    torch.testing.assert_close(path.coeffs(t).mix(ends.data, ends.eps), x)
    plain = exact(path)(x, t, cond)
    assert torch.equal(ends.log_variance, plain.log_variance)
    for found, before in zip((ends.data, ends.eps), (plain.data, plain.eps), strict=True):
        assert not torch.allclose(found, before, rtol=1e-3)
    assert opener.opened == [c for c in [getattr(guidance, "checkpoint", None)] if c]


@pytest.mark.parametrize("guidance", STRONG, ids=str)
def test_each_sample_is_guided_by_itself(guidance: Guidance) -> None:
    """Alone, in any order, beside others at other times: the same, so an image is its own."""
    x, t = inputs()
    path = Linear()
    guided = guidance(exact(path), Context(path, Weak(path)))
    whole = guided(x, t, {"label": LABELS})
    for rows in ([2], [1, 0], [0, 0, 2]):
        part = guided(x[rows], t[rows], {"label": LABELS[rows]})
        torch.testing.assert_close(part.data, whole.data[rows])
        torch.testing.assert_close(part.eps, whole.eps[rows])


@pytest.mark.parametrize("guidance", STRONG, ids=str)
def test_guidance_is_its_own_configuration(guidance: Guidance) -> None:
    assert GUIDANCES.parse(to_dict(guidance)) == guidance
    assert hash(GUIDANCES.parse(to_dict(guidance))) == hash(guidance)


@pytest.mark.parametrize(
    ("guidance", "says"),
    [
        (STRONG[3], "rescale=0.7.* give a Context"),
        (STRONG[5], "Context"),
        (STRONG[7], "Opener"),
        (STRONG[8], "Opener"),
        (STRONG[9], "Context"),
    ],
    ids=str,
)
def test_a_context_that_is_missing_is_named(guidance: Guidance, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        guidance(Toy())
    if says == "Opener":
        with pytest.raises(ValueError, match="another checkpoint: give a Context with an Opener"):
            guidance(Toy(), Context(Linear()))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"name": "cfg", "scale": 2, "interval": [0.5, 0.5]}, "0 <= lo < hi <= 1, got [0.5, 0.5]"),
        ({"name": "cfg", "scale": 2, "interval": [-0.1, 0.5]}, "0 <= lo < hi <= 1"),
        ({"name": "cfg", "scale": 2, "interval": [0.5, 1.5]}, "0 <= lo < hi <= 1"),
        ({"name": "cfg", "interval": [0.5]}, "interval"),
        ({"name": "cfg", "channels": 0}, "channels"),
        ({"name": "cfg", "rescale": 1.1}, "rescale"),
        ({"name": "cfg", "scael": 2}, "did you mean scale?"),
        ({"name": "autoguidance", "scale": 2}, "checkpoint: is required"),
        ({"name": "classifier", "scale": 2}, "checkpoint: is required"),
        ({"name": "threshold", "quantile": 0.0}, "quantile"),
        ({"name": "threshold", "quantile": 1.1}, "quantile"),
        ({"name": "threshold", "floor": 0}, "floor"),
        ({"name": "clasifier"}, "did you mean classifier?"),
    ],
)
def test_impossible_guidance_is_refused(value: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        GUIDANCES.parse(value)
    assert says in str(error.value)


# --- classifier-free ---------------------------------------------------------------------------------------


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
def test_guiding_endpoints_is_guiding_the_prediction(path: NoisePath, prediction: Prediction) -> None:
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


def test_no_channels_beyond_the_latents() -> None:
    x, t = inputs()
    with pytest.raises(ValueError, match="channels = 5, but there are 4"):
        ClassifierFree(scale=2.0, channels=5)(Toy())(x, t, {"label": LABELS})


# --- cfg in an interval ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "inside"), [((0.0, 0.1), 0), ((0.3, 0.6), 1), ((0.4, 1.0), 2), ((0.1, 0.9), 3)]
)
def test_outside_its_interval_only_the_conditional_branch_is_evaluated(
    interval: tuple[float, float], inside: int
) -> None:
    """t = 0.2, 0.5, 0.9: in a mixed batch the null branch is evaluated for the samples inside alone."""
    x, t = inputs()
    toy, cond = Toy(), {"label": LABELS}
    found = ClassifierFree(scale=3.0, interval=interval)(toy)(x, t, cond)
    assert toy.samples == [3 + inside]
    plain, guided = Toy()(x, t, cond), cfg(3.0)(Toy())(x, t, cond)
    rows = (t >= interval[0]) & (t <= interval[1])
    assert int(rows.sum()) == inside
    for name in ("data", "eps", "log_variance"):
        assert torch.equal(getattr(found, name)[~rows], getattr(plain, name)[~rows])
        assert_within(getattr(found, name)[rows], getattr(guided, name)[rows], 4)  # of a smaller batch


def test_a_batch_outside_the_interval_is_asked_as_it_came() -> None:
    x, t = inputs()
    toy, cond = Toy(), {"label": LABELS}
    ClassifierFree(scale=3.0, interval=(0.0, 0.1))(toy)(x, t, cond)
    assert toy.calls == [cond]
    assert toy.calls[0] is cond


def test_both_ends_belong_to_the_interval_in_float32_too() -> None:
    x, t = torch.ones(2, 1, 1, 1), torch.tensor([0.3, 0.7])
    toy = Toy()
    ClassifierFree(scale=3.0, interval=(0.3, 0.7))(toy)(x, t, {"label": LABELS[:2]})
    assert toy.samples == [4]


def test_conditions_are_taken_with_their_samples() -> None:
    x, t = inputs()
    toy, drop = Toy(), torch.tensor([False, True, False])
    cond = {"label": LABELS, "drop": drop, "text": torch.arange(6.0).reshape(3, 2)}
    ClassifierFree(scale=3.0, interval=(0.4, 1.0))(toy)(x, t, cond)
    (call,) = toy.calls
    assert call["label"].tolist() == [0, 3, 5, 3, 5]
    assert call["drop"].tolist() == [False, True, False, True, True]
    assert call["text"][:, 0].tolist() == [0, 2, 4, 2, 4]


def test_a_solver_pays_for_the_interval_alone() -> None:
    """Euler's five steps on the linear path visit t = 1, 0.8, 0.6, 0.4, 0.2; two of them lie inside."""
    toy = Toy()
    guided = ClassifierFree(scale=3.0, interval=(0.3, 0.7))(toy)
    times = torch.linspace(1, 0, 6, dtype=torch.float64)
    Euler()(guided, normal(3, 4, 2, 2), times, Linear(), cond={"label": LABELS})
    assert toy.samples == [3, 3, 6, 6, 3]


# --- cfg on some channels ----------------------------------------------------------------------------------


def test_on_three_channels_it_is_dits_forward_with_cfg() -> None:
    """models.py of facebookresearch/DiT: eps of the first three guided, the rest of the output as it is.

    The whole of the reference's own numbers are reproduced in tests/interop.
    """
    x, t = normal(3, 4, 2, 2), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    output, scale = normal(6, 8, 2, 2, seed=3), 4.0
    path = ALL_PATHS[[type(p).__name__ for p in ALL_PATHS].index("DiscreteVP")]
    model = Denoiser(lambda *_: output, path, Eps())
    found = ClassifierFree(scale=scale, channels=3)(model)(x, t, {"label": LABELS})
    guided, rest = output[:, :3], output[:3, 3:]
    conditional, unconditional = guided.chunk(2)
    half = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(torch.cat([half, rest], 1), torch.cat([found.eps, found.log_variance], 1))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_other_channels_are_the_conditionals(channels: int) -> None:
    x, t = inputs()
    cond = {"label": LABELS}
    found = ClassifierFree(scale=3.0, channels=channels)(Toy())(x, t, cond)
    plain, all_of_them = Toy()(x, t, cond), cfg(3.0)(Toy())(x, t, cond)
    for name in ("data", "eps"):
        assert torch.equal(getattr(found, name)[:, channels:], getattr(plain, name)[:, channels:])
        assert_within(getattr(found, name)[:, :channels], getattr(all_of_them, name)[:, :channels], 4)


# --- rescaled cfg ------------------------------------------------------------------------------------------


def spread(data: Tensor) -> Tensor:
    return data.flatten(1).std(1)


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), scale=st.floats(1.5, 8))
def test_rescaling_moves_the_spread_towards_the_conditionals(share: float, scale: float) -> None:
    """std = (1 − share)·that of the guided + share·that of the conditional; nothing else of the data changes."""
    x, t = inputs()
    path, cond = Linear(), {"label": LABELS}
    found = ClassifierFree(scale=scale, rescale=share)(exact(path), Context(path))(x, t, cond)
    guided, plain = cfg(scale)(exact(path))(x, t, cond), exact(path)(x, t, cond)
    torch.testing.assert_close(
        spread(found.data), share * spread(plain.data) + (1 - share) * spread(guided.data)
    )
    torch.testing.assert_close(
        found.data / broadcast(spread(found.data), x), guided.data / broadcast(spread(guided.data), x)
    )


def test_data_without_any_spread_are_left_alone() -> None:
    x, t = torch.ones(1, 1, 1, 2), torch.tensor([0.5])
    found = ClassifierFree(scale=3.0, rescale=1.0)(Toy(), Context(Linear()))(x, t, {"label": LABELS[1:2]})
    assert torch.isfinite(found.data).all()


# --- autoguidance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 3.5])
def test_autoguidance_leads_away_from_the_weak_model(scale: float) -> None:
    x, t = inputs()
    path, cond = Linear(), {"label": LABELS}
    found = Autoguidance(checkpoint="weak", scale=scale)(exact(path), Context(path, Weak(path)))(x, t, cond)
    strong, weak = exact(path)(x, t, cond), Weak(path).denoiser("weak")(x, t, cond)
    torch.testing.assert_close(found.data, weak.data + scale * (strong.data - weak.data))
    torch.testing.assert_close(found.eps, weak.eps + scale * (strong.eps - weak.eps))


def test_both_models_see_the_same_condition_once() -> None:
    x, t = inputs()
    toys, cond = [Toy(), Toy()], {"label": LABELS}

    class Opener(Weak):
        def denoiser(self, checkpoint: str) -> DenoiseFn:
            return toys[1]

    Autoguidance(checkpoint="weak", scale=2.0)(toys[0], Context(Linear(), Opener(Linear())))(x, t, cond)
    assert [toy.calls for toy in toys] == [[cond], [cond]]


def test_autoguidance_undoes_what_the_weak_model_blurs() -> None:
    """Both models exact for data of their own spread: guidance at scale 2 samples data narrower than both."""
    path, x = Linear(), normal(2000, 1)
    times = torch.linspace(1, 0, 21, dtype=torch.float64)

    class Opener(Weak):
        def denoiser(self, checkpoint: str) -> DenoiseFn:
            return Gaussian(mean=1.0, std=0.8).denoise(path)

    stds = []
    for scale in (0.0, 1.0, 2.0):
        guided = Autoguidance(checkpoint="weak", scale=scale)(
            Gaussian(mean=1.0, std=0.4).denoise(path), Context(path, Opener(path))
        )
        stds.append(float(Heun()(guided, x, times, path).std()))
    assert stds[0] == pytest.approx(0.8, rel=0.05)
    assert all(before > 1.3 * after for before, after in pairwise(stds))

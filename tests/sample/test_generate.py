"""From noise to images: the right distribution, image i for itself (I7), labels, and pictures of pictures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict
from dit.flow.objective import Objective
from dit.flow.path import PATHS, VE, Cosine, Linear, NoisePath
from dit.flow.predict import PREDICTIONS, Cond, Endpoints, Eps, Model, Prediction, Score, V, Velocity
from dit.model.dit import DiTConfig
from dit.rng import Draws, Purpose
from dit.sample.denoise import DenoiseFn
from dit.sample.finite import NotFiniteError
from dit.sample.generate import (
    Sampler,
    SamplerSpec,
    image_grid,
    labels_for,
    to_uint8,
)
from dit.sample.guide import GUIDANCES, LogitsFn
from tests.gaussian import Gaussian

SHAPE = (3, 4, 4)


def sampler(
    model: Model, path: NoisePath | None = None, prediction: Prediction | None = None, **spec: object
) -> Sampler:
    made = from_dict(SamplerSpec, spec)
    return Sampler(
        model, path or Linear(), prediction or Velocity(), lambda x: x, SHAPE, made, torch.device("cpu")
    )


@pytest.mark.parametrize("label", [3, 1000])
def test_labels_that_the_model_does_not_know_are_refused(label: int) -> None:
    drawn = replace(sampler(lambda x, t, cond: x, num_steps=1), classes=3)
    known = torch.tensor([2, -1, 0])
    assert drawn.latents(torch.arange(3), known).shape == (3, *SHAPE)
    with pytest.raises(ValueError, match=rf"label {label}: this model has classes 0 to 2"):
        drawn.latents(torch.arange(2), torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("index", "label", "says"),
    [
        (4, torch.zeros(4, dtype=torch.int64), r"index: expected a tensor \(B,\) of whole numbers, got 4"),
        (torch.arange(4), [0, 1, 2, 0], r"label: expected a tensor \(B,\) of whole numbers, got \[0, 1"),
        (torch.arange(4), None, "label: expected a tensor .* got None"),
        (torch.arange(4), torch.tensor(1), "label: expected a tensor"),
        (torch.arange(4), torch.tensor([0, 1]), "there are 2 labels for 4 images; -1 is no class"),
        (torch.arange(1), torch.tensor([1.0]), "label: expected whole numbers, as int64, got torch.float32"),
    ],
)
def test_indices_and_labels_that_are_none_are_named(index: Any, label: Any, says: str) -> None:
    drawn = replace(sampler(lambda x, t, cond: x, num_steps=1), classes=3)
    with pytest.raises(ValueError, match=says):
        drawn.latents(index, label)


def trainable() -> list[tuple[NoisePath, Prediction]]:
    """The pairs that the objective lets train, so that they are sampled."""
    found = []
    for path in (cls() for _, cls in PATHS.items()):
        for prediction in (cls() for _, cls in PREDICTIONS.items()):
            try:
                Objective(path=path, prediction=prediction).check()
            except ConfigError:
                continue
            found.append((path, prediction))
    return found


PAIRS = trainable()


def test_there_are_pairs_of_every_path() -> None:
    assert {type(path) for path, _ in PAIRS} == {cls for _, cls in PATHS.items()}


@pytest.mark.parametrize(
    ("path", "prediction"), PAIRS, ids=[f"{PATHS.name_of(a)}-{PREDICTIONS.name_of(b)}" for a, b in PAIRS]
)
def test_the_best_networks_samples_have_the_datas_distribution(
    path: NoisePath, prediction: Prediction
) -> None:
    data, n = Gaussian(), 256
    drawn = sampler(data.network(path, prediction), path, prediction, num_steps=40)
    found = drawn.latents(torch.arange(n), torch.zeros(n).long()).double()
    count = found.numel()
    assert abs(float(found.mean()) - data.mean) < 5 * data.std / math.sqrt(count) + 0.01
    assert abs(float(found.std()) / data.std - 1) < 5 / math.sqrt(2 * count) + 0.02


@pytest.mark.parametrize(
    ("path", "prediction"), [(Linear(), Eps()), (Cosine(), Score()), (VE(sigma_max=5e3), V())]
)
def test_sampling_starts_from_the_prior_of_its_first_time(path: NoisePath, prediction: Prediction) -> None:
    """Which is not 1 where the prediction says nothing at pure noise."""
    seen: list[Tensor] = []

    def watching(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    drawn = sampler(watching, path, prediction, num_steps=2, solver="euler")
    index, first = torch.arange(2), drawn.times()[:1]
    drawn.latents(index, torch.zeros(2).long())
    sigma = path.alpha_sigma(first)[1].float()
    torch.testing.assert_close(seen[0], path.input_scale(first).float() * sigma * drawn.noise(index))


# --- image i is its own ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A nano DiT with random weights everywhere, so that labels, time and places matter."""
    torch.manual_seed(0)
    model = DiTConfig(size="nano").build(4, 3, 5)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def images(model: Model, index: list[int], batch: int, **spec: object) -> np.ndarray:
    """Images `index`, of classes i mod 5, so many at a time."""
    drawn = sampler(model, **{"num_steps": 3, "cfg_scale": 2.0, **spec})
    where = torch.tensor(index)
    parts = [drawn.images(part, part % 5) for part in where.split(batch)]
    return np.concatenate(parts).astype(int)


def test_an_image_depends_on_its_index_and_not_on_its_batch(network: torch.nn.Module) -> None:
    whole = images(network, list(range(12)), batch=12)
    assert whole.std() > 20
    assert len({w.tobytes() for w in whole}) == 12
    assert np.abs(images(network, list(range(12)), batch=5) - whole).max() <= 1
    chosen = [11, 3, 7]
    assert np.abs(images(network, chosen, batch=1) - whole[chosen]).max() <= 1
    assert (images(network, list(range(12)), batch=12) == whole).all()


def test_the_noise_is_bitwise_the_same_in_any_batch() -> None:
    seen: list[Tensor] = []

    def record(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    drawn = sampler(record, num_steps=1, solver="euler", seed=3)
    for index in (torch.arange(8), torch.tensor([6, 2])):
        drawn.latents(index, torch.zeros(len(index)).long())
    assert torch.equal(seen[1], seen[0][[6, 2]])
    expected = Draws(3, 0, torch.arange(8), 1).normal(Purpose.PRIOR, SHAPE)
    assert torch.equal(seen[0], expected)  # the linear path ends at sigma = 1


def test_seed_label_weights_and_scale_matter(network: torch.nn.Module) -> None:
    base = images(network, [0, 1], batch=2)
    assert (images(network, [0, 1], batch=2, seed=1) != base).any()
    assert (images(network, [0, 1], batch=2, cfg_scale=1.0) != base).any()
    drawn = sampler(network, num_steps=3)
    a, b = (drawn.images(torch.tensor([0]), torch.tensor([label])) for label in (0, 1))
    assert (a != b).any()


# --- what the network is asked -----------------------------------------------------------------------------


class Counting:
    """A network that says 0 and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Cond] = []

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.calls.append(cond)
        return torch.zeros_like(x)


@pytest.mark.parametrize("path", [cls() for _, cls in PATHS.items()], ids=PATHS.names())
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_nfe_is_what_is_evaluated(path: NoisePath, solver: str) -> None:
    model = Counting()
    prediction = PREDICTIONS["v"]()
    drawn = sampler(model, path, prediction, solver=solver, num_steps=7)
    drawn.latents(torch.arange(2), torch.zeros(2).long())
    assert len(model.calls) == drawn.nfe


def test_without_guidance_there_is_one_branch_and_with_it_two_in_one_call() -> None:
    plain, guided = Counting(), Counting()
    label = torch.tensor([3, -1])
    sampler(plain, num_steps=2, cfg_scale=1.0).latents(torch.arange(2), label)
    sampler(guided, num_steps=2, cfg_scale=1.5).latents(torch.arange(2), label)
    assert len(plain.calls) == len(guided.calls)
    assert all(torch.equal(c["label"], label) and "drop" not in c for c in plain.calls)
    for cond in guided.calls:
        assert cond["label"].tolist() == [3, -1, 3, -1]
        assert cond["drop"].tolist() == [False, False, True, True]


class Others:
    """Opens a weak model that says 0, and a classifier of ten classes that says nothing."""

    def denoiser(self, checkpoint: str) -> DenoiseFn:
        return lambda x, t, cond: Endpoints(torch.zeros_like(x), x / t[0])

    def classifier(self, checkpoint: str) -> LogitsFn:
        return lambda x, t: 0 * x.flatten(1)[:, :10]


WEAK = {"name": "autoguidance", "checkpoint": "w", "scale": 2.0}
CLASSES = {"name": "classifier", "checkpoint": "c", "scale": 2.0}


@pytest.mark.parametrize(
    ("spec", "evaluations"),
    [
        ({}, 4),
        ({"cfg_scale": 2.0}, 8),
        ({"guidance": [{"name": "cfg", "scale": 2.0}]}, 8),
        ({"guidance": [{"name": "cfg", "scale": 2.0, "interval": [0.4, 0.6]}]}, 5),  # t = 1, 3/4, 1/2, 1/4
        ({"guidance": [WEAK]}, 8),
        ({"guidance": [CLASSES]}, 8),
        ({"guidance": [{"name": "threshold", "quantile": 0.9, "floor": 1}]}, 4),
        ({"cfg_scale": 2.0, "guidance": [WEAK, CLASSES]}, 16),
        ({"solver": "heun", "cfg_scale": 2.0}, 16),
    ],
    ids=str,
)
def test_every_branch_is_counted_and_calls_are_not_branches(spec: dict, evaluations: int) -> None:
    drawn = replace(sampler(Counting(), **{"solver": "euler", "num_steps": 4, **spec}), open=Others())
    for index in (torch.arange(3), torch.arange(3, 5)):
        drawn.latents(index, index)
    assert drawn.tally.images == 5
    assert drawn.tally.per_image() == {"nfe": drawn.nfe, "network_evaluations": evaluations}


def test_an_adaptive_solvers_evaluations_are_measured() -> None:
    data = Gaussian()
    drawn = sampler(data.network(Linear(), Velocity()), solver="dopri5", num_steps=1)
    assert drawn.nfe is None
    drawn.latents(torch.arange(4), torch.zeros(4).long())
    counted = drawn.tally.per_image()
    assert counted["nfe"] == counted["network_evaluations"] > 7


def test_guidance_applies_in_turn_after_cfg_scale() -> None:
    """Clipping after guidance bounds the data, guidance after clipping does not."""
    clip = {"name": "threshold", "quantile": 0.5, "floor": 0.1}

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return x - 1.0 - cond["drop"].to(x.dtype).reshape(-1, 1, 1, 1) if "drop" in cond else x - 1.0

    guide = {"name": "cfg", "scale": 5.0}
    x, t, cond = torch.randn(2, *SHAPE), torch.full((2,), 0.5), {"label": torch.zeros(2).long()}
    reach = [
        float(sampler(network, **spec).denoise(x, t, cond).data.abs().max())
        for spec in (
            {"cfg_scale": 5.0, "guidance": [clip]},
            {"guidance": [guide, clip]},
            {"guidance": [clip, guide]},
        )
    ]
    assert reach[0] == reach[1] == pytest.approx(0.1)
    assert reach[2] > 0.2


def test_cfg_scale_is_short_for_guidance_that_begins_with_cfg() -> None:
    """Either alone, or both of them saying the same, guide once and alike."""

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return x - 1.0 - cond["drop"].to(x.dtype).reshape(-1, 1, 1, 1) if "drop" in cond else x - 1.0

    guide = {"name": "cfg", "scale": 3.0}
    specs = ({"cfg_scale": 3}, {"guidance": guide}, {"cfg_scale": 3, "guidance": [guide]})
    found = [sampler(network, num_steps=2, **spec) for spec in specs]
    drawn = [s.latents(torch.arange(2), torch.zeros(2).long()) for s in found]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert [len(s.spec.in_turn) for s in found] == [1, 1, 1]
    assert [s.spec.needs_label for s in found] == [True] * 3
    plain = sampler(network, num_steps=2).latents(torch.arange(2), torch.zeros(2).long())
    assert not torch.equal(drawn[0], plain)


def test_neutral_guidance_changes_no_bit(network: torch.nn.Module) -> None:
    spec = {"cfg_scale": 1.0}
    base = sampler(network, num_steps=2, **spec).latents(torch.arange(3), torch.arange(3))
    neutral = [
        {"name": "cfg", "scale": 1},
        {"name": "cfg_zero", "scale": 1, "zero_init": 0},
        {"name": "autoguidance", "checkpoint": "nowhere", "scale": 1},
        {"name": "classifier", "checkpoint": "nowhere", "scale": 0},
        {"name": "threshold", "quantile": None, "floor": 1},
    ]
    assert {str(one["name"]) for one in neutral} == set(GUIDANCES)
    for given in (neutral[1:], [neutral[0], *neutral[2:]]):  # of the cfgs one alone is taken
        found = sampler(network, num_steps=2, guidance=given, **spec)
        assert torch.equal(found.latents(torch.arange(3), torch.arange(3)), base)


def test_guidance_that_needs_a_checkpoint_needs_an_opener() -> None:
    with pytest.raises(ValueError, match="give a Context with an Opener"):
        _ = sampler(Counting(), guidance=[WEAK]).denoise


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"solver": "hune"}, "did you mean heun?"),
        ({"solver": {"name": "heun", "churn": 1}}, "churn"),
        ({"grid": "karass"}, "grid"),
        ({"steps": 3}, "did you mean num_steps?"),
        (
            {"cfg_scale": 2, "guidance": [{"name": "cfg", "scale": 3}]},
            "guidance has cfg with scale 3: set cfg_scale to 1, or take cfg out of guidance",
        ),
        ({"guidance": [{"name": "cfg", "scale": 2}, {"name": "cfg", "scale": 3}]}, "guide twice"),
        (
            {"solver": "dopri5", "guidance": [{"name": "cfg", "scale": 2, "interval": [0.2, 0.7]}]},
            "solver of fixed steps",
        ),
        ({"guidance": ["treshold"]}, "did you mean threshold?"),
        ({"guidance": [{"name": "threshold", "quantil": 0.9}]}, "guidance.0.quantil"),
        ({"guidance": "threshold"}, "guidance"),
    ],
)
def test_impossible_specs_are_refused(bad: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(SamplerSpec, bad)
    assert says in str(error.value)


# --- labels and pictures -----------------------------------------------------------------------------------


def test_one_guidance_needs_no_brackets() -> None:
    one = {"name": "cfg", "scale": 2}
    assert from_dict(SamplerSpec, {"guidance": one}) == from_dict(SamplerSpec, {"guidance": [one]})


def test_labels_go_round() -> None:
    assert labels_for(torch.arange(7), [4, 0, 2]).tolist() == [4, 0, 2, 4, 0, 2, 4]
    assert labels_for(torch.tensor([5]), [4, 0, 2]).tolist() == [2]
    assert labels_for(torch.arange(2), range(1)).dtype == torch.int64


def test_to_uint8_rounds_to_the_nearest_and_clips() -> None:
    levels = torch.arange(256) / 127.5 - 1
    image = levels.reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert to_uint8(image)[0, :, :, 0].flatten().tolist() == list(range(256))
    beyond = torch.tensor([-1.2, -1.0, 1.0, 3.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(beyond)[0, :, :, 2].flatten().tolist() == [0, 0, 255, 255]
    apart = torch.zeros(1, 3, 2, 5)
    apart[0, 0], apart[0, 1], apart[0, 2] = -1.0, 0.0, 1.0
    assert to_uint8(apart).shape == (1, 2, 5, 3)
    assert to_uint8(apart)[0, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_to_uint8_makes_no_picture_of_what_is_not_finite(value: float) -> None:
    images = torch.zeros(3, 3, 2, 2)
    images[1, 2, 0, 1] = value
    with pytest.raises(NotFiniteError, match="image 1 of 3 has pixels that are not finite"):
        to_uint8(images)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_named(value: float) -> None:
    """The fourth image, of class 2: from the network's answer to its label alone."""

    def odd(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return torch.where(cond["label"].view(-1, 1, 1, 1) == 2, value, torch.zeros_like(x))

    drawn = replace(sampler(odd, num_steps=2), model_advice="compute in float32")
    index, label = torch.arange(10, 16), torch.tensor([0, 1, 0, 2, 1, 2])
    with pytest.raises(
        NotFiniteError, match=r"image 13 \(class 2\): 100% of its latents .*; compute in float32$"
    ):
        drawn.images(index, label)
    assert drawn.images(index[:3], label[:3]).shape == (3, 4, 4, 3)


def test_less_guidance_is_advised_where_there_is_any() -> None:
    def flat(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return torch.where(cond["label"] == 0, 1.0, 0.5).view(-1, 1, 1, 1) * torch.full_like(x, math.nan)

    with pytest.raises(NotFiniteError, match=r"image 0 \(no class\).*try another solver"):
        sampler(flat, num_steps=1).latents(torch.arange(1), torch.tensor([-1]))
    threshold = {"name": "threshold", "quantile": 0.5, "floor": 1}
    for spec, says in (
        ({"guidance": [threshold]}, r"; lower the strength of guidance threshold$"),
        ({"cfg_scale": 1e30}, r"; lower cfg_scale \(it is 1e\+30\)$"),
        (
            {"cfg_scale": 3, "guidance": [threshold]},
            r"cfg_scale \(it is 3\) and the strength of guidance thres",
        ),
    ):
        with pytest.raises(NotFiniteError, match=says):
            sampler(flat, num_steps=1, **spec).latents(torch.arange(1), torch.tensor([0]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_finite_are_named_with_what_the_codec_advises(value: float) -> None:
    def decode(latents: Tensor) -> Tensor:
        decoded = torch.zeros_like(latents)
        decoded[2, 0, 1, 1] = value
        return decoded

    drawn = replace(
        sampler(lambda x, t, cond: 0 * x, num_steps=1), decode=decode, codec_advice="take float32"
    )
    with pytest.raises(
        NotFiniteError, match=r"image 7 \(class 4\): 2% of its pixels, decoded from latents.*; take float32"
    ):
        drawn.images(torch.arange(5, 9), torch.arange(2, 6))


def test_a_grid_holds_each_image_in_its_place() -> None:
    tiles = np.stack([np.full((2, 3, 3), i, np.uint8) for i in range(5)])
    grid = image_grid(tiles, columns=3, gap=1)
    assert grid.shape == (2 * 3 + 1, 3 * 4 + 1, 3)
    for i in range(5):
        y, x = 1 + (i // 3) * 3, 1 + (i % 3) * 4
        assert (grid[y : y + 2, x : x + 3] == i).all()
    assert (grid[4:6, 9:12] == 255).all()  # the sixth place is empty
    assert (grid[0] == 255).all()


def test_a_grid_shifted_by_dimension_is_of_the_latents_shape() -> None:
    one, other = (
        replace(sampler(Counting(), num_steps=4, grid={"name": "uniform", "shift": shift}), shape=(4, 64, 64))
        for shift in ("dimension", 2.0)
    )
    assert torch.equal(one.times(), other.times())
    assert torch.equal(
        one.latents(torch.arange(1), torch.arange(1)), other.latents(torch.arange(1), torch.arange(1))
    )

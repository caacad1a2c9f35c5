"""Rows between two seeds and two classes: their ends are the images themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import ConfigError
from dit.flow.path import Linear
from dit.flow.predict import Cond, Velocity
from dit.sample.between import COLUMNS, Between, interpolated, parse_between, slerp
from dit.sample.classes import chosen_classes
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.solve import Euler

NAMES = ["cat", "dog", "hen"]
INDEX, LABEL = torch.arange(4), torch.tensor([0, 1, 2, 0])


def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Of a class k the data are all (k − 1) / 2: the velocity is (x − data) / t. time: 1000 t."""
    data = (cond["label"].float() - 1) / 2
    if "drop" in cond:
        data = torch.where(cond["drop"], 0.0, data)
    return (x - data.view(-1, 1, 1, 1)) / (time / 1000).clamp(min=1e-3).view(-1, 1, 1, 1)


def sampler(**spec) -> Sampler:
    return Sampler(
        network,
        Linear(),
        Velocity(),
        lambda x: x / 4,
        (3, 4, 4),
        SamplerSpec(solver=Euler(), num_steps=2, **spec),
        torch.device("cpu"),
    )


def told(text: str) -> Between:
    return parse_between(text, lambda ends: chosen_classes(ends, NAMES))


def rows(drawn: Sampler, text: str) -> np.ndarray:
    """(rows, columns, H, W, 3)."""
    done: list[int] = []
    images = interpolated(drawn, told(text), INDEX, LABEL, done.append)
    assert done == [len(INDEX)] * COLUMNS
    return images.reshape(len(INDEX), COLUMNS, *images.shape[1:]).astype(int)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_between_classes_the_data_are_the_mean(scale: float) -> None:
    """Of this network they are known: from class 0 to class 2, −1/2 to 1/2, times the guidance's scale."""
    found = rows(sampler(cfg_scale=scale), "classes:cat,hen")
    data = scale * np.linspace(-0.5, 0.5, COLUMNS)
    expected = (data / 4 + 1) * 127.5
    assert np.abs(found - expected[None, :, None, None, None]).max() <= 1


def test_the_ends_are_the_images_themselves() -> None:
    drawn = sampler()
    found = rows(drawn, "classes:0,2")
    for column, label in ((0, 0), (-1, 2)):
        assert (found[:, column] == drawn.images(INDEX, torch.full_like(LABEL, label))).all()
    stays = Sampler(
        lambda x, time, cond: torch.zeros_like(x), Linear(), Velocity(), lambda x: x / 4, (3, 4, 4),
        SamplerSpec(num_steps=2), torch.device("cpu"),
    )  # fmt: skip
    found = rows(stays, "seeds:5,7")  # this network leaves the noise as it is
    for column, seed in ((0, 5), (-1, 7)):
        noise = sampler(seed=seed).noise(INDEX)
        expected = ((noise / 4).clamp(-1, 1) + 1) * 127.5
        assert np.abs(found[:, column] - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.51
    assert all((found[:, i] != found[:, i + 1]).any() for i in range(COLUMNS - 1))


def test_slerp_turns_at_an_even_pace_and_keeps_the_length() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for weight in (0.25, 0.5, 0.8):
        angle = weight * math.pi / 2
        expected = 2 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(slerp(a, b, weight), expected)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    noise = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    middle = slerp(noise[0], noise[1], 0.5)
    assert float((middle.square().mean(1).sqrt() - 1).abs().max()) < 0.3
    assert float(middle.square().mean()) > 1.5 * float(((noise[0] + noise[1]) / 2).square().mean())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("noise:0,1", "expected seeds:0,1 or classes:3,7"),
        ("seeds:0", "two seeds"),
        ("seeds:0,1,2", "two seeds"),
        ("seeds:a,b", "two seeds"),
        ("seeds:4,4", "two different seeds"),
        ("classes:1", "two different classes"),
        ("classes:0,9", "out of range"),
        ("classes:cat,hne", "did you mean 'hen'"),
    ],
)
def test_what_is_no_pair_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        told(text)

"""The discriminator: what a score sees, its loss and the adaptive weight by closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dit.config import ConfigError, from_dict
from dit.stage1.discriminator import DiscriminatorConfig, WithGradient, adaptive_weight, hinge


def some(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("layers", "size", "patches"), [(1, 8, 4), (2, 32, 36), (3, 32, 4), (3, 256, 900)])
def test_scores_are_of_patches(layers: int, size: int, patches: int) -> None:
    cfg = DiscriminatorConfig(width=8, layers=layers)
    assert cfg.build(size, size)(torch.zeros(2, 3, size, size)).shape == (2, patches)


def test_three_layers_look_at_70_pixels() -> None:
    """Isola et al., section 6.1.2: the receptive field of C64-C128-C256-C512. Norms see all, so they are left out."""
    net = DiscriminatorConfig(width=8, layers=3).build(256, 256).net
    images = some(1, 256).requires_grad_()
    scores = nn.Sequential(*[m for m in net if not isinstance(m, nn.GroupNorm)])(images)
    (gradient,) = torch.autograd.grad(scores[0, 0, 15, 15], images)
    rows = gradient[0].abs().sum((0, 2)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70


def test_a_sample_is_scored_by_itself() -> None:
    """In training mode too: a norm over the batch would make the loss depend on how it is cut."""
    discriminator = DiscriminatorConfig(width=8, layers=2).build(16, 16).train()
    images = some(5, 16)
    each = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), each)
    assert not list(discriminator.buffers())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"groups": 3}, "must divide discriminator.width"),
        ({"layers": 0}, "layers"),
        ({"limit": 0}, "limit"),
        ({"weight": -1}, "weight"),
        ({"start": -1}, "start"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_dict(DiscriminatorConfig, settings)


def test_images_must_have_a_patch() -> None:
    assert DiscriminatorConfig(layers=3).build(24, 32)(torch.zeros(1, 3, 24, 32)).shape == (1, 2)
    with pytest.raises(
        ConfigError, match="images of 23x64 are too small for a discriminator that halves them 3 times"
    ):
        DiscriminatorConfig(layers=3).build(23, 64)


@pytest.mark.parametrize(
    ("real", "fake", "loss"), [(2.0, -2.0, 0.0), (0.0, 0.0, 1.0), (-1.0, -3.0, 1.0), (1.5, 2.0, 1.5)]
)
def test_hinge_is_half_of_each_side(real: float, fake: float, loss: float) -> None:
    found = hinge(torch.full((3, 4), real), torch.full((3, 4), fake))
    assert found.tolist() == [loss] * 3


def test_hinge_means_over_patches() -> None:
    real, fake = torch.tensor([[3.0, -1.0]]), torch.tensor([[-3.0, 0.0]])
    assert hinge(real, fake).tolist() == [0.5 * ((0 + 2) / 2 + (0 + 1) / 2)]


def test_the_adaptive_weight_is_the_ratio_of_norms() -> None:
    a, b = some(4, 8), 5 * some(4, 8).flip(0)
    ratio = a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    torch.testing.assert_close(adaptive_weight(a, b, 1e4), ratio, rtol=1e-5, atol=0)
    assert adaptive_weight(a, torch.zeros_like(b), 7.0).tolist() == [7.0] * 4  # the limit
    assert adaptive_weight(torch.zeros_like(a), b, 7.0).tolist() == [0.0] * 4
    one = adaptive_weight(torch.ones(1, 3, 8, 8) * 1e-4 / 192, torch.zeros(1, 3, 8, 8), 1e4)
    assert one.item() == pytest.approx(
        1.0
    )  # delta: an adversarial gradient of rms 0 counts as 1e-4 of a mean's


def test_the_adaptive_weight_does_not_know_the_size_of_the_image() -> None:
    """The gradient of a mean over four times as many pixels is a quarter at each."""
    a, b = some(2, 8), 1e-4 * some(2, 8).flip(0)
    larger = [g.repeat(1, 1, 2, 2) / 4 for g in (a, b)]
    torch.testing.assert_close(adaptive_weight(*larger, 1e9), adaptive_weight(a, b, 1e9))


def test_with_gradient_says_what_the_gradient_is() -> None:
    x, gradient = some(3, 4).requires_grad_(), some(3, 4).flip(0)
    values = WithGradient.apply(torch.tensor([1.0, 2.0, 3.0]), x, gradient)
    assert values.tolist() == [1.0, 2.0, 3.0]
    (found,) = torch.autograd.grad((values * torch.tensor([1.0, 10.0, 0.0])).sum(), x)
    torch.testing.assert_close(found, gradient * torch.tensor([1.0, 10.0, 0.0]).view(-1, 1, 1, 1))


def test_first_weights_are_those_of_pix2pix() -> None:
    torch.manual_seed(0)
    convolutions = [m for m in DiscriminatorConfig().build(64, 64).net if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 512, 1]
    for convolution in convolutions:
        assert float(convolution.weight.detach().std()) == pytest.approx(0.02, rel=4 / math.sqrt(3072))

"""The ends of the network: their numbers by hand, and full precision whatever the autocast."""

import math

import pytest
import torch
import torch.nn.functional as F

from dit.config import ConfigError
from dit.model.dims import Dims, grid_of
from dit.model.embed import PatchEmbed, TimeEmbed, WideLinear, patchify, position_table, sinusoid, unpatchify

DIMS = Dims(
    width=16,
    depth=1,
    heads=2,
    mlp_width=64,
    patch=2,
    grid=(2, 3),
    channels=3,
    out_channels=3,
    num_classes=5,
)


@pytest.mark.parametrize(("spacing", "parts"), [("adm", 4), ("ddpm", 3)])
def test_sinusoid_is_cosines_then_sines_of_the_paper_frequencies(spacing, parts):
    t = torch.tensor([0.0, 1.5, 999.0], dtype=torch.float64)
    got = sinusoid(t, 8, 10_000.0, spacing)
    for row, time in enumerate(t.tolist()):
        for i in range(4):
            angle = time * 10_000.0 ** (-i / parts)
            assert got[row, i].item() == pytest.approx(math.cos(angle), abs=1e-9)
            assert got[row, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinusoid_keeps_the_precision_it_is_given(dtype):
    assert sinusoid(torch.rand(3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_a_time_of_less_than_float32_is_refused(dtype):
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\."):
        sinusoid(torch.ones(3).to(dtype))


@pytest.mark.parametrize("t", [1e-3, 0.3, 0.999])
def test_time_embed_tells_near_times_apart_under_bfloat16(t):
    """1e-4 is far below bfloat16's spacing of 2e-3 near 0.3: it must survive autocast and bfloat16 weights."""
    torch.manual_seed(0)
    embed = TimeEmbed(32)
    times = torch.tensor([t, t + 1e-4])
    exact = embed(times)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = embed(times)
    assert torch.equal(under_autocast, exact)
    low = embed.bfloat16()(times)
    assert low.dtype == torch.float32
    change, expected = (low[1] - low[0]).norm(), (exact[1] - exact[0]).norm()
    assert expected > 0
    assert change.item() == pytest.approx(expected.item(), rel=0.05)


def test_time_embed_is_float64_in_a_float64_model():
    assert TimeEmbed(8).double()(torch.rand(2, dtype=torch.float64)).dtype == torch.float64


def test_wide_linear_ignores_autocast_and_narrow_weights():
    torch.manual_seed(0)
    layer, x = WideLinear(8, 4), torch.randn(3, 8)
    exact = F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact)
        assert not torch.equal(F.linear(x, layer.weight, layer.bias), exact)
    narrow = layer.bfloat16()
    assert torch.equal(narrow(x), F.linear(x, narrow.weight.float(), narrow.bias.float()))


def test_patch_embed_is_the_strided_convolution():
    torch.manual_seed(0)
    embed, x = PatchEmbed(DIMS), torch.randn(2, 3, 4, 6)
    weight = embed.proj.weight.view(16, 3, 2, 2)
    expected = F.conv2d(x, weight, embed.proj.bias, stride=2).flatten(2).transpose(1, 2)  # (B, T, D)
    torch.testing.assert_close(embed(x), expected)


def test_patch_embed_with_more_channels_starts_as_without():
    torch.manual_seed(0)
    embed, x = PatchEmbed(DIMS, extra_channels=2), torch.randn(2, 3, 4, 6)
    for layer in embed.zero_layers():
        torch.nn.init.zeros_(layer.weight)
    assert torch.equal(embed(x, torch.randn(2, 2, 4, 6)), embed.proj(patchify(x, 2)))
    with pytest.raises(ValueError, match="built for 2 further input channels, conditioners gave none"):
        embed(x)
    with pytest.raises(ValueError, match="built for no further input channels, conditioners gave 2"):
        PatchEmbed(DIMS)(x, torch.randn(2, 2, 4, 6))


def test_patch_embed_refuses_another_size():
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 6\), got \(2, 3, 6, 4\)"):
        PatchEmbed(DIMS)(torch.zeros(2, 3, 6, 4))


def test_unpatchify_puts_every_number_where_the_reference_does():
    patch, grid, channels = 2, (2, 3), 5
    tokens = torch.randn(2, 6, patch * patch * channels)
    image = unpatchify(tokens, patch, grid)
    assert image.shape == (2, channels, 4, 6)
    for row in range(4):
        for column in range(6):
            token = (row // patch) * grid[1] + column // patch
            first = ((row % patch) * patch + column % patch) * channels
            assert torch.equal(image[:, :, row, column], tokens[:, token, first : first + channels])


def test_position_table_has_the_column_first():
    table = position_table(16, (2, 3))
    assert table.shape == (6, 16)
    assert table.dtype == torch.float64
    for row in range(2):
        for column in range(3):
            got = table[row * 3 + column].tolist()
            for i in range(4):
                omega = 10_000.0 ** (-i / 4)
                expected = [math.sin(column * omega), math.cos(column * omega)]
                expected += [math.sin(row * omega), math.cos(row * omega)]
                assert [got[i], got[4 + i], got[8 + i], got[12 + i]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("size", "patch", "grid"), [(32, 2, (16, 16)), ((32, 16), 8, (4, 2)), (8, 8, (1, 1))]
)
def test_grid(size, patch, grid):
    assert grid_of(size, patch) == grid


@pytest.mark.parametrize(("size", "patch"), [(32, 3), ((32, 12), 8), (2, 4), (32, 0), (0, 2)])
def test_a_patch_that_does_not_fit_is_refused(size, patch):
    with pytest.raises(ConfigError, match=f"patch {patch} does not divide"):
        grid_of(size, patch)

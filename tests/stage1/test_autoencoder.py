"""Autoencoders of both kinds: shapes, penalties by closed forms, and what quantising does to gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import VQModel

from dit.config import ConfigError, from_dict, to_dict
from dit.data.codecs.autoencoders import VaeCodec
from dit.stage1.autoencoder import (
    AUTOENCODERS,
    AutoencoderConfig,
    Kl,
    Quantizer,
    Vq,
    code_perplexity,
    count_codes,
)

SHAPE = {"groups": 4, "latent_channels": 3}


@pytest.mark.parametrize("name", AUTOENCODERS.names())
@pytest.mark.parametrize(("widths", "factor"), [((8,), 1), ((8, 8), 2), ((8, 16, 16), 4)])
def test_each_width_after_the_first_halves_the_image(name: str, widths: tuple[int, ...], factor: int) -> None:
    cfg = AUTOENCODERS.parse({"name": name, "widths": widths, **SHAPE})
    assert cfg.factor == factor
    latent = (2, 3, 8 // factor, 8 // factor)
    output, *more = cfg.build()(torch.zeros(2, 3, 8, 8), torch.zeros(latent))
    assert output.shape == (2, 3, 8, 8)
    assert more[0].shape == more[1].shape == latent
    penalty, terms = cfg.penalty((output, *more))
    assert penalty.shape == (2,)
    assert all(term.shape == (2,) for term in terms.values())
    assert cfg.codes((output, *more)).shape == (2, latent[2] * latent[3] if cfg.codebook else 0)


@pytest.mark.parametrize("name", AUTOENCODERS.names())
@pytest.mark.parametrize(
    "bad",
    [{"widths": []}, {"widths": [16, 20], "groups": 8}, {"layers": 0}, {"groups": 0}, {"latent_channels": 0}],
)
def test_impossible_shapes_are_refused(name: str, bad: dict) -> None:
    with pytest.raises(ConfigError):
        AUTOENCODERS.parse({"name": name, **bad})


def test_settings_without_a_name_are_those_of_a_kl_autoencoder() -> None:
    assert AUTOENCODERS.parse({"widths": [8], "groups": 4}) == Kl(widths=(8,), groups=4)
    assert to_dict(AUTOENCODERS.parse("vq"))["name"] == "vq"
    with pytest.raises(ConfigError, match="codebook"):
        from_dict(Vq, {"codebook": 1})


# --- KL ----------------------------------------------------------------------------------------------------


def test_the_noise_is_scaled_by_the_posteriors_std_and_decoded() -> None:
    torch.manual_seed(0)
    module = Kl(widths=(8, 16), groups=4, latent_channels=3).build().eval()
    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        output, mean, log_variance = module(images, noise)
        expected = module.vae.decode(mean + (0.5 * log_variance).exp() * noise).sample
        torch.testing.assert_close(output, expected)
        without, _, _ = module(images, torch.zeros_like(noise))
    codec = VaeCodec(module.vae)  # the codec that will use it sees the same posterior and the same picture
    moments = codec.encode(images)
    torch.testing.assert_close(moments[:, 0], mean)
    torch.testing.assert_close(moments[:, 1], (0.5 * log_variance).exp())
    torch.testing.assert_close(codec.decode(mean), without.clamp(-1, 1))


@pytest.mark.parametrize(
    ("mean", "log_variance", "kl"),
    [
        (0.0, 0.0, 0.0),
        (2.0, 0.0, 2.0),
        (0.0, math.log(4.0), 0.5 * (4 - 1 - math.log(4.0))),
        (1.0, -2.0, 0.5 * (1 + math.exp(-2) - 1 + 2)),
    ],
)
def test_the_kl_divergence_is_the_closed_form(mean: float, log_variance: float, kl: float) -> None:
    ones = torch.ones(2, 3, 4, 4)
    penalty, terms = Kl().penalty((torch.zeros(2, 3, 8, 8), mean * ones, log_variance * ones))
    torch.testing.assert_close(penalty, torch.full((2,), kl), rtol=1e-6, atol=1e-7)
    assert torch.equal(terms["kl"], penalty)


# --- VQ ----------------------------------------------------------------------------------------------------


def quantizer(entries: list[list[float]]) -> Quantizer:
    made = Quantizer(len(entries), len(entries[0]), beta=0.25)
    made.embedding.weight.data = torch.tensor(entries)
    return made


def test_the_nearest_entry_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(16, 3, generator=generator)
    z = torch.randn(2, 3, 4, 5, generator=generator)
    straight, entry, codes = quantizer(entries.tolist())(z)
    assert codes.shape == (2, 4, 5)
    for b, y, x in [(0, 0, 0), (1, 3, 4), (0, 2, 3), (1, 0, 2)]:
        away = [float((z[b, :, y, x] - e).norm()) for e in entries]
        assert int(codes[b, y, x]) == away.index(min(away))
        torch.testing.assert_close(entry[b, :, y, x], entries[codes[b, y, x]])
    torch.testing.assert_close(straight, entry)


def test_gradients_go_straight_through_and_leave_the_codebook_alone() -> None:
    quantize = quantizer([[0.0, 0.0], [3.0, 3.0]])
    z = torch.tensor([1.0, 2.5]).view(1, 2, 1, 1).requires_grad_()
    straight, _, codes = quantize(z)
    assert codes.item() == 1
    (straight * torch.tensor([5.0, -7.0]).view(1, 2, 1, 1)).sum().backward()
    assert z.grad.flatten().tolist() == [5.0, -7.0]
    assert quantize.embedding.weight.grad is None


def test_the_penalty_pulls_entries_to_what_is_encoded_and_beta_times_the_other_way() -> None:
    cfg = Vq(codebook=2, latent_channels=2, beta=0.25)
    quantize = quantizer([[0.0, 0.0], [3.0, 3.0]])
    z = torch.tensor([1.0, 2.5]).view(1, 2, 1, 1).requires_grad_()
    _, entry, codes = quantize(z)
    penalty, terms = cfg.penalty((torch.zeros(1, 3, 1, 1), z, entry, codes))
    square = (2.0**2 + 0.5**2) / 2  # entry - z = (2, 0.5)
    assert penalty.item() == pytest.approx(1.25 * square)
    assert terms["commitment"].item() == pytest.approx(square)
    penalty.sum().backward()
    assert z.grad.flatten().tolist() == pytest.approx(
        [-0.25 * 2.0, -0.25 * 0.5]
    )  # -beta * 2 * difference / 2
    assert quantize.embedding.weight.grad.tolist() == [[0.0, 0.0], [2.0, 0.5]]


def test_what_is_exported_decodes_as_what_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = Vq(widths=(8, 8), codebook=16, **SHAPE)
    module = cfg.build().eval()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    module.vae.save_pretrained(tmp_path, safe_serialization=True)
    theirs = VQModel.from_pretrained(str(tmp_path), use_safetensors=True).eval()
    with torch.no_grad():
        output, encoded, _, _ = module(images, torch.ones(2, 3, 4, 4))
        torch.testing.assert_close(theirs.encode(images).latents, encoded)
        torch.testing.assert_close(theirs(images).sample, output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("counts", "perplexity"), [([8, 0, 0, 0], 1), ([2, 2, 2, 2], 4), ([3, 3, 0, 0], 2)])
def test_perplexity_of_even_use_is_the_number_of_entries_in_use(counts: list[int], perplexity: float) -> None:
    codes = torch.repeat_interleave(torch.arange(4), torch.tensor(counts)).repeat(3, 1)
    found = count_codes(codes, 4)
    assert found.tolist() == [counts] * 3
    torch.testing.assert_close(code_perplexity(found), torch.full((3,), float(perplexity)).double())


def test_a_base_class_is_no_choice() -> None:
    with pytest.raises(NotImplementedError):
        AutoencoderConfig().build()

"""What is known of the latents that weights from elsewhere go with: given, or as usual, and then said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.config import ConfigError, from_dict, to_dict
from dit.data.codecs.norm import LatentNorm
from dit.errors import Notice
from dit.interop.latents import Choices, contract_of
from dit.interop.lightningdit import LightningArguments, LightningDiT
from tests.datasets import Digits

ARGUMENTS = LightningArguments(input_size=8, in_channels=4, num_classes=3)


def contract(**choices: Any) -> dict[str, Any]:
    return contract_of(ARGUMENTS, from_dict(Choices, choices), LightningDiT.factor, LightningDiT.scale)


@pytest.fixture
def stats(tmp_path: Path) -> str:
    held = {"mean": torch.tensor([1.0, 2.0, 3.0, 4.0]), "std": torch.tensor([2.0, 1.0, 0.5, 4.0])}
    torch.save({name: t.view(1, 4, 1, 1) for name, t in held.items()}, tmp_path / "latents_stats.pt")
    return str(tmp_path / "latents_stats.pt")


def test_statistics_and_a_factor_after_them(stats: str) -> None:
    """The network sees (latents - mean) / std, times the factor."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        plain, scaled = (
            contract(latents_stats=stats, factor=16, **more) for more in ({}, {"scaling_factor": 0.5})
        )
    assert plain["norm"] == to_dict(LatentNorm(mean=(1.0, 2.0, 3.0, 4.0), std=(2.0, 1.0, 0.5, 4.0)))
    assert scaled["norm"] == to_dict(LatentNorm(mean=(1.0, 2.0, 3.0, 4.0), std=(4.0, 2.0, 1.0, 8.0)))
    assert (plain["image_size"], plain["shape"]) == (128, [4, 8, 8])


def test_what_is_not_known_is_said() -> None:
    with pytest.warns(Notice) as told:
        found = contract()
    said = " ".join(str(w.message) for w in told)
    assert "--latents_stats=FILE" in said
    assert "16 x 16 pixels" in said
    assert found["norm"] == to_dict(LatentNorm(mean=(0.0,) * 4, std=(1.0,) * 4))
    assert found["image_size"] == 128


def test_a_codec_says_its_size_and_its_own_normalisation(digits: Digits, stats: str) -> None:
    codec = {"name": "vae", "path": str(digits.vae)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        own, given = contract(codec=codec), contract(codec=codec, latents_stats=stats)
    assert own["image_size"] == given["image_size"] == 16
    assert own["norm"]["std"] == [1 / own["codec"]["config"]["scaling_factor"]] * 4
    assert given["norm"]["mean"] == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ConfigError, match="factor is 16, but the codec's is 2"):
        contract(codec=codec, factor=16)

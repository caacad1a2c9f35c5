"""What travels with a checkpoint of its latents, and which others may be used with it."""

from __future__ import annotations

import copy
import json

import pytest

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.norm import latent_norm
from dit.data.shards.manifest import Manifest
from dit.experiments.latents import check_same_latents, check_same_path, latent_contract
from dit.flow.path import PATHS, Linear
from tests.datasets import Digits


def test_the_contract_is_json_and_says_what_sampling_needs(digits: Digits) -> None:
    manifest = Manifest.load(digits.moments)
    found = latent_contract(manifest, latent_norm(manifest, "dataset"))
    assert json.loads(json.dumps(found)) == found
    assert (found["shape"], found["image_size"]) == ([4, 8, 8], 16)
    assert found["norm"] == {"mean": list(manifest.mean), "std": list(manifest.std)}
    assert found["codec"] == manifest.codec


def test_other_latents_are_refused_by_what_differs(digits: Digits) -> None:
    manifest = Manifest.load(digits.moments)
    ours = latent_contract(manifest, latent_norm(manifest, "dataset"))
    check_same_latents(ours, copy.deepcopy(ours), "a", "b")
    check_same_latents(ours, {**ours, "image_size": 32}, "a", "b")  # follows from shape and codec
    for key, other in [
        ("shape", [4, 8, 16]),
        ("classes", ["0", "1"]),
        ("norm", {"mean": [0.0] * 4, "std": [1.0] * 4}),
    ]:
        with pytest.raises(DataError, match=rf"a and b differ in the {key} of their latents .* same data"):
            check_same_latents(ours, {**ours, key: other}, "a", "b")
    with pytest.raises(DataError, match="a and b come from different codecs"):
        check_same_latents(ours, {**ours, "codec": {"name": "pixels"}}, "a", "b")


@pytest.mark.parametrize("name", PATHS.names())
def test_the_same_noise_is_asked_for_and_not_the_same_words(name: str) -> None:
    path = PATHS[name]()
    check_same_path(path, PATHS[name](), "a", "b")
    for other in PATHS:
        if other != name:
            with pytest.raises(
                ConfigError, match=r"a was trained on path .* and b on .* not as noisy on both"
            ):
                check_same_path(path, PATHS[other](), "a", "b")


def test_another_name_of_the_time_is_the_same_noise() -> None:
    check_same_path(Linear(), Linear(model_time_data=1.0, model_time_noise=0.0), "a", "b")

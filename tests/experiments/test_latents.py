"""What travels with a checkpoint of its latents, and which others may be used with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.autoencoders import Vae, unknown_vae
from dit.data.codecs.codec import CODECS, Pixels
from dit.data.codecs.ldm import Ldm
from dit.data.codecs.norm import latent_norm
from dit.data.shards.manifest import Manifest
from dit.experiments.latents import (
    check_same_latents,
    check_same_path,
    codec_doubts,
    latent_contract,
    open_codec,
)
from dit.flow.path import PATHS, Linear
from dit.stage1.autoencoder import Kl
from tests.datasets import Digits

CPU = torch.device("cpu")


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
    many = {**ours, "classes": [f"class {i}" for i in range(1000)]}
    fewer = {**ours, "classes": [*many["classes"][:700], "another", *many["classes"][701:900]]}
    with pytest.raises(DataError) as error:
        check_same_latents(many, fewer, "a", "b")
    assert "(1000 against 900, first number 700: 'class 700' against 'another')" in str(error.value)
    shorter = {**ours, "classes": many["classes"][:900]}
    with pytest.raises(DataError, match="first number 900: 'class 900' against nothing"):
        check_same_latents(many, shorter, "a", "b")
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


# --- a codec that is configured, beside that of the data ----------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CODECS if n != "pixels"])
def test_pixels_and_a_codec_contradict_each_other(name: str, digits: Digits) -> None:
    choice = {"vae": Vae(path="gone"), "ldm": Ldm(path="gone")}[name]
    pixels, latents = (Manifest.load(d).codec for d in (digits.pixels, digits.moments))
    for reads in (True, False):
        (told,) = codec_doubts(choice, pixels, "there", reads)
        assert told.startswith(f"codec is '{name}', and the data in there are of codec 'pixels': ")
        assert "or set codec: null" in told
        assert codec_doubts(choice, latents, "there", reads) == ()  # it may be somewhere else
    (told,) = codec_doubts(Pixels(), latents, "there", reads=False)
    assert told.startswith("codec is 'pixels', and the data in there are of codec 'vae': ")
    assert "or set codec: {name: vae, path: FOLDER}" in told


def test_what_is_the_datas_own_or_not_said_contradicts_nothing(digits: Digits, tmp_path: Path) -> None:
    pixels, latents = (Manifest.load(d).codec for d in (digits.pixels, digits.moments))
    for identity in (pixels, latents):
        assert codec_doubts(None, identity, "there", reads=True) == ()
    assert codec_doubts(Pixels(), pixels, "there", reads=True) == ()
    assert codec_doubts(Vae(path=str(digits.vae)), latents, "there", reads=True) == ()
    Kl(widths=(8, 8), groups=4).build().vae.save_pretrained(tmp_path / "other")
    other = Vae(path=str(tmp_path / "other"))
    (told,) = codec_doubts(other, latents, "there", reads=True)
    assert told.startswith("there and the codec that is configured come from different codecs")
    assert codec_doubts(other, latents, "there", reads=False) == ()
    (tmp_path / "empty").mkdir()
    assert codec_doubts(Vae(path=str(tmp_path / "empty")), latents, "there", reads=True) == ()


def test_the_codec_of_the_data_is_found_or_asked_for(digits: Digits, tmp_path: Path) -> None:
    identity = Manifest.load(digits.moments).codec
    assert open_codec(None, {"name": "pixels"}, "there", CPU).channels == 3
    assert open_codec(Vae(path=str(digits.vae)), identity, "there", CPU).factor == 2
    with pytest.raises(ConfigError, match=r"codec is 'vae' and nothing says where it is: set codec"):
        open_codec(None, identity, "there", CPU)
    torch.manual_seed(1)
    Kl(widths=(8, 8), groups=4).build().vae.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"there and the codec given come from different codecs \(sha256"):
        open_codec(Vae(path=str(tmp_path / "other")), identity, "there", CPU)


def test_pixels_need_no_codec_whatever_is_set_and_a_missing_one_names_what_it_is_for() -> None:
    nowhere = Vae(path="./nowhere")
    assert open_codec(nowhere, {"name": "pixels"}, "it", CPU).identity() == {"name": "pixels"}
    with pytest.raises(
        DataError, match=r"nowhere/config.json is missing.*it needs the codec 'vae'.*--codec.path"
    ):
        open_codec(nowhere, {"name": "vae"}, "it", CPU)


def test_any_vae_of_the_channels_is_taken_where_it_is_not_known_which(digits: Digits, capsys) -> None:
    given = Vae(path=str(digits.vae))
    assert open_codec(given, unknown_vae(4, 0.18215), "weights", CPU).factor == 2
    assert "note: weights does not say which vae it goes with" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"weights needs a codec 'vae' of 16 channels; .* 'vae' and has 4"):
        open_codec(given, unknown_vae(16, 0.18215), "weights", CPU)
    with pytest.raises(DataError, match=r"weights needs a codec 'vae' of 3 channels; .* 'pixels' and has 3"):
        open_codec(Pixels(), unknown_vae(3, 0.18215), "weights", CPU)

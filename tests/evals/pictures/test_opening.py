"""What is typed becomes a set of images: the same content whatever it lies in, at one size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import from_dict, to_dict
from dit.data import DataError
from dit.data.sources.source import BadImage
from dit.evals.pictures.choice import chosen, described, sampler_hash
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import PicturesError, content, digests
from dit.evals.protocol import protocol_hash
from dit.sample.formats import FORMATS, LATENTS, format_of
from dit.sample.generate import SamplerSpec
from dit.sample.labels import Labels

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, image in enumerate(IMAGES):
        place = tmp_path / "images" / f"{'ab'[i // 3]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    return tmp_path / "images"


def test_a_folder_and_an_npz_of_the_same_images_have_the_same_content(folder, tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES, np.arange(6) // 3)
    a, b = open_pictures(folder), open_pictures(tmp_path / "a.npz")
    assert np.array_equal(a.labels, b.labels)
    assert content(digests(a.block(range(6)))) == content(digests(b.block(range(6))))
    assert a.classes == ("a", "b")


def test_a_folder_of_drawn_images_brings_its_record(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES, np.arange(6))
    (tmp_path / "spec.json").write_text(json.dumps({"checkpoint": "/x", "step": 3}))
    for place in (tmp_path, tmp_path / "samples.npz"):
        pictures = open_pictures(place)
        assert pictures.spec == {"checkpoint": "/x", "step": 3}
        assert np.array_equal(pictures.labels, np.arange(6))


SPEC = {
    "checkpoint": "/a", "step": 3, "num_samples": 6, "classes": [4, 7], "label_order": "random", "nfe": 98.5,
    "sampler": {"solver": {"name": "heun"}, "seed": 5}, "preview": False, "precision": "fp32",
}  # fmt: skip


def drawn(out: Path, *forms: str) -> Path:
    """A folder as tools/sample.py leaves it, its grid and another picture among what lies there."""
    out.mkdir()
    labels = Labels([4, 7], "random", 5)(torch.arange(6)).numpy()
    for name in forms:
        values = IMAGES if name != LATENTS else np.zeros((6, 4, 2, 2), np.float32)
        with format_of(name).writing(out, 6) as add:
            add(values, labels)
    for name in ("grid.png", "interpolation.png"):
        Image.fromarray(np.zeros((22, 22, 3), np.uint8)).save(out / name)
    (out / "spec.json").write_text(json.dumps({**SPEC, "formats": forms}))
    return out


def test_drawn_images_are_the_same_set_in_every_form(tmp_path):
    told = []
    for i, form in enumerate(FORMATS):
        pictures = open_pictures(drawn(tmp_path / str(i), form, LATENTS))
        assert len(pictures) == 6
        said = content(digests(pictures.block(range(6)))), described(pictures, np.arange(6))
        told.append((*said, pictures.labels.tolist(), pictures.classes))
    assert len(told) > 2
    assert all(one == told[0] for one in told)
    assert told[0][1]["labels"] == "random over 2 classes"


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_a_folder_in_a_drawing_is_opened_with_the_drawings_record(tmp_path, monkeypatch, form):
    out = drawn(tmp_path / "a", "npz", form)
    whole, part = open_pictures(out), open_pictures(out / FORMATS[form].names[0])
    assert part.spec == whole.spec
    assert part.labels.tolist() == whole.labels.tolist()
    assert part.named.endswith(FORMATS[form].names[0])
    assert described(part, np.arange(6)) == described(whole, np.arange(6))
    assert not hasattr(part, "rows")  # it is the folder that was named, and not the npz beside it
    monkeypatch.chdir(out / FORMATS[form].names[0])
    assert open_pictures(".").spec == whole.spec
    (out / "other").mkdir()
    Image.fromarray(IMAGES[0]).save(out / "other" / "a.png")
    assert open_pictures(out / "other").spec is None


def test_the_first_of_a_drawing_are_those_of_a_smaller_one(tmp_path):
    record = {**SPEC, "formats": ["npz"]}
    for name, count in (("all", 6), ("few", 4)):
        (tmp_path / name).mkdir()
        np.savez(
            tmp_path / name / "samples.npz", IMAGES[:count], Labels([4, 7], "random", 5)(torch.arange(count))
        )
        (tmp_path / name / "spec.json").write_text(json.dumps({**record, "num_samples": count}))
    larger, smaller = (open_pictures(tmp_path / name) for name in ("all", "few"))
    index = chosen(larger, 4, "num_samples")
    assert index.tolist() == [0, 1, 2, 3]
    assert described(larger, index) == described(smaller, chosen(smaller, None, "num_samples"))
    assert described(larger, index)["chosen"] == "all"
    (tmp_path / "all" / "spec.json").unlink()
    plain = open_pictures(tmp_path / "all" / "samples.npz")
    index = chosen(plain, 4, "num_samples")
    assert index.tolist() != [0, 1, 2, 3]
    assert described(plain, index)["chosen"] == "4 of 6 at random, seed 0"


def test_a_drawn_folder_without_images_or_with_another_number_of_them_says_so(tmp_path):
    with pytest.raises(PicturesError, match="latents alone"):
        open_pictures(drawn(tmp_path / "a", LATENTS))
    (drawn(tmp_path / "b", "png") / "images" / "00000005.png").unlink()
    with pytest.raises(PicturesError, match="5 images in images, and 6 were drawn"):
        open_pictures(tmp_path / "b")


@pytest.mark.parametrize(
    ("changed", "is_same"),
    [
        (
            {"formats": ["png"], "nfe": 97.0, "network_evaluations": 99, "batch_size": 9, "num_samples": 7},
            True,
        ),
        (
            {"checkpoint": "/b", "digest": "x", "step": 4, "weights": "model", "device": "cuda", "code": "y"},
            True,
        ),
        ({"sampler": {"solver": {"name": "heun"}, "seed": 6}}, True),
        ({"codec": {"codec.path": "/vae"}}, True),
        ({"codec": {"codec_dtype": "bfloat16"}}, False),
        ({"sampler": {"solver": {"name": "euler"}, "seed": 5}}, False),
        ({"precision": "bf16"}, False),
        ({"compile": False}, True),
        ({"compile": True}, False),
        ({"share_encoder": 1}, True),
        ({"share_encoder": 2}, False),
        ({"label_order": "balanced"}, False),
        ({"classes": [4]}, False),
    ],
)
def test_a_samplers_hash_is_of_what_decides_about_the_kind_of_images_alone(changed, is_same):
    assert (sampler_hash({**SPEC, **changed}) == sampler_hash(SPEC)) == is_same


def test_where_a_guiding_checkpoint_lies_is_not_in_a_samplers_hash_and_older_records_mean_balanced():
    guided = [{"sampler": {"guidance": [{"name": "autoguidance", "checkpoint": at, "scale": s}]}}
              for at, s in (("/a", 2), ("/b", 2), ("/a", 3))]  # fmt: skip
    a, b, stronger = (sampler_hash(spec) for spec in guided)
    assert a == b != stronger
    assert sampler_hash({"sampler": {}}) == sampler_hash({"sampler": {}, "label_order": "balanced"})


PLAIN = {"name": "cfg", "scale": 1.5, "interval": [0.0, 1.0], "channels": None, "rescale": 0.0}


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"cfg_scale": 1.5}, {"guidance": [PLAIN]}, True),
        ({"cfg_scale": 1.5}, {"guidance": [{"name": "cfg", "scale": 1.5}]}, True),
        ({"cfg_scale": 1.5}, {"cfg_scale": 1.5, "guidance": [PLAIN]}, True),
        ({}, {"guidance": [{**PLAIN, "scale": 1.0, "interval": [0.2, 0.7]}]}, True),
        ({}, {"cfg_scale": 1}, True),
        ({"cfg_scale": 1.5}, {"guidance": [{**PLAIN, "interval": [0.2, 0.7]}]}, False),
        ({"cfg_scale": 1.5}, {"guidance": [{**PLAIN, "channels": 3}]}, False),
        ({"cfg_scale": 1.5}, {"guidance": [{**PLAIN, "scale": 2.0}]}, False),
        ({}, {"solver": "heun"}, True),
        ({}, {"num_steps": 51}, False),
    ],
)
def test_settings_that_draw_the_same_images_have_one_hash_however_they_are_typed(one, other, is_same):
    a, b = ({"sampler": to_dict(from_dict(SamplerSpec, typed))} for typed in (one, other))
    assert (sampler_hash(a) == sampler_hash(b)) == is_same


def test_the_hash_of_plain_settings_is_that_of_older_versions():
    """Rows on file have it: the record's own values, without the seed."""
    for spec in (SamplerSpec(), SamplerSpec(cfg_scale=2.0, num_steps=8, seed=4)):
        own = {key: value for key, value in to_dict(spec).items() if key != "seed"}
        kept = {"sampler": own, "classes": [1], "label_order": "balanced", "precision": "fp32", "codec": {}}
        assert sampler_hash({"sampler": to_dict(spec), "classes": [1]}) == protocol_hash(kept)


def test_mixed_sizes_are_refused_and_cropped_when_asked(folder):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(folder / "b" / "5.png")
    pictures = open_pictures(folder)
    with pytest.raises(BadImage, match=r"b/5\.png: .*8x9, and the first one is 8x8.*--image_size"):
        pictures.block(range(6))
    cropped = open_pictures(folder, image_size=4)
    assert cropped.block(range(6)).shape == (6, 4, 4, 3)
    assert "crop" in cropped.converted


def test_digits_are_opened_at_their_own_size():
    pictures = open_pictures("digits:test")
    assert (len(pictures), pictures.size) == (500, (8, 8))
    assert pictures.block([3]).shape == (1, 8, 8, 3)


def test_what_is_not_there_or_damaged_is_named(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_pictures(tmp_path / "nothing")
    with pytest.raises(PicturesError, match="no such file"):
        open_pictures(tmp_path / "nothing.npz")
    (folder / "a" / "0.png").write_bytes((folder / "a" / "0.png").read_bytes()[:60])
    with pytest.raises(BadImage, match=r"a/0\.png"):
        open_pictures(folder)
    np.savez(tmp_path / "a.npz", IMAGES)
    with pytest.raises(PicturesError, match="--image_size"):
        open_pictures(tmp_path / "a.npz", image_size=4)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_an_npz_of_the_size_that_is_asked_for_is_taken_as_it_is(tmp_path, form):
    np.savez(tmp_path / "samples.npz", IMAGES)
    if form == "folder":
        (tmp_path / "spec.json").write_text("{}")
    place = tmp_path / "samples.npz" if form == "file" else tmp_path
    asked, as_is = open_pictures(place, image_size=IMAGES.shape[1]), open_pictures(place)
    assert (asked.size, asked.about, asked.converted) == (as_is.size, as_is.about, as_is.converted)
    with pytest.raises(PicturesError, match="8x8 and not 4"):
        open_pictures(place, image_size=4)

"""What is typed becomes a set of images: the same content whatever it lies in, at one size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.data import DataError
from dit.data.sources.source import BadImage
from dit.evals.pictures.choice import described, sampler_hash
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import PicturesError, content, digests
from dit.sample.formats import FORMATS, LATENTS, format_of
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

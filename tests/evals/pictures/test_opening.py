"""What is typed becomes a set of images: the same content whatever it lies in, at one size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit.data import DataError
from dit.data.sources.source import BadImage
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import PicturesError, content, digests
from dit.sample.formats import FORMATS

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


def drawn(folder: Path, form: str) -> Path:
    """What tools/sample.py leaves in one form: the images, a grid of them and the record."""
    folder.mkdir()
    labels = np.array([3, 0, 11, 2, 10, 3])
    with FORMATS[form]().writing(folder, 6) as add:
        add(IMAGES, labels)
    Image.fromarray(IMAGES[0]).save(folder / "grid.png")
    (folder / "spec.json").write_text(json.dumps({"step": 3, "num_samples": 6}))
    return folder


@pytest.mark.parametrize("form", list(FORMATS))
def test_drawn_images_are_the_same_in_any_form(tmp_path, form):
    out = drawn(tmp_path / "out", form)
    for place in {out, out / FORMATS[form].names[0]}:
        found = open_pictures(place)
        assert np.array_equal(found.block(range(len(found))), IMAGES)
        assert found.labels.tolist() == [3, 0, 11, 2, 10, 3]
        assert found.spec["step"] == 3


def test_drawn_files_that_are_missing_are_told(tmp_path):
    out = drawn(tmp_path / "out", "png")
    (out / "images" / "00000002.png").unlink()
    with pytest.raises(PicturesError, match="5 images, and 6 were drawn"):
        open_pictures(out)


@pytest.mark.parametrize("damage", ["file,label\n", "a,b\n0,1\n", "file,label\n" + "x,one\n" * 6])
def test_a_damaged_table_of_labels_is_told(tmp_path, damage):
    out = drawn(tmp_path / "out", "png")
    (out / "labels.csv").write_text(damage)
    with pytest.raises(PicturesError, match=r"labels.csv .*damaged"):
        open_pictures(out)


def test_the_grid_alone_is_no_image(tmp_path):
    out = drawn(tmp_path / "out", "npz")
    (out / "samples.npz").unlink()
    with pytest.raises(PicturesError, match="no images in it"):
        open_pictures(out)

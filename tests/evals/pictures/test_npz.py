"""Images in an npz: ADM's layout, read row by row; and all that is no such thing is named, and never unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from dit.evals.pictures.npz import open_npz
from dit.evals.pictures.pictures import PicturesError, content, digests

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)
LABELS = np.arange(10) % 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_rows_are_those_that_numpy_reads(tmp_path, save):
    save(tmp_path / "a.npz", IMAGES, LABELS)
    pictures = open_npz(tmp_path / "a.npz")
    assert (len(pictures), pictures.size) == (10, (4, 5))
    for index in ([0, 1, 2], [3, 7, 8], [9], [2, 4]):  # the last goes back
        assert np.array_equal(pictures.block(index), IMAGES[index])
    assert np.array_equal(pictures.need_labels("anything"), LABELS)


def test_the_layout_of_adm_is_read_as_its_own_evaluator_reads_it(tmp_path):
    """arr_0 by numpy.savez behind other members, mu and sigma beside it: by name, as numpy.load has them."""
    with zipfile.ZipFile(tmp_path / "adm.npz", "w") as file:
        for name, array in {"mu": np.ones(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": 2 * np.eye(2),
                            "arr_0": IMAGES}.items():  # fmt: skip
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    with np.load(tmp_path / "adm.npz") as held:
        expected = held["arr_0"]
    pictures = open_npz(tmp_path / "adm.npz")
    assert np.array_equal(pictures.block(range(10)), expected)
    assert pictures.labels is None
    assert np.array_equal(pictures.moments["features"].mean, np.ones(3))
    assert np.array_equal(pictures.moments["spatial"].cov, 2 * np.eye(2))


def test_statistics_alone_are_taken(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.ones(3), sigma=np.eye(3))
    pictures = open_npz(tmp_path / "s.npz")
    assert len(pictures) == 0
    assert set(pictures.moments) == {"features"}


def test_grey_images_are_converted_and_that_is_stated(tmp_path):
    for grey in (IMAGES[..., :1], IMAGES[..., 0]):
        np.savez(tmp_path / "g.npz", grey)
        pictures = open_npz(tmp_path / "g.npz")
        assert pictures.converted == "grey repeated in three channels"
        assert np.array_equal(pictures.block([1, 2]), np.repeat(IMAGES[1:3, ..., :1], 3, axis=3))


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


FLOATS = IMAGES / 255
REFUSED = {
    "objects": (np.array([Trap(), Trap()], object), "never unpickled"),
    "floats in [0, 1]": (FLOATS, r"\[0, 1\].*images \* 255"),
    "floats in [-1, 1]": (FLOATS * 2 - 1, r"images \+ 1"),
    "truth": (FLOATS > 0.5, r"\[0, 1\].*images \* 255\.0"),
    "all of 16 bits": ((FLOATS * 65535).astype(np.uint16), r"images / 257"),
    "no range in use": (FLOATS * 65535, "so say it yourself$"),
    "signed bytes": ((FLOATS * 254 - 127).astype(np.int8), "so say it yourself$"),
    "NaN": (np.where(np.arange(10)[:, None, None, None] == 3, np.nan, FLOATS), "image 3 is not finite"),
    "16 bits": (IMAGES.astype(np.uint16), "uint16"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2).copy(), r"transpose\(0, 2, 3, 1\)"),
    "four channels": (np.concatenate([IMAGES, IMAGES[..., :1]], 3), "4 channels.*transparency"),
    "two channels": (IMAGES[..., :2], "2 channels"),
    "features": (FLOATS.reshape(10, -1), "evaluate.py features"),
    "no images": (IMAGES[:0], "empty"),
    "no pixels": (IMAGES[:, :0], "empty"),
    "Fortran order": (np.asfortranarray(IMAGES), "ascontiguousarray"),
    "one dimension": (LABELS, "expected images"),
}  # fmt: skip


@pytest.mark.parametrize(("array", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_are_no_uint8_images_is_refused_with_the_way_to_mend_it(tmp_path, array, said):
    np.savez(tmp_path / "bad.npz", array)
    with pytest.raises(PicturesError, match=said):
        open_npz(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    "labels", [LABELS[:9], LABELS.astype(np.float32), np.eye(10)], ids=["few", "float", "one-hot"]
)
def test_labels_that_are_none_are_refused(tmp_path, labels):
    np.savez(tmp_path / "bad.npz", IMAGES, labels)
    with pytest.raises(PicturesError, match="arr_1"):
        open_npz(tmp_path / "bad.npz")


def test_missing_labels_are_named_when_they_are_needed(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES)
    with pytest.raises(PicturesError, match=r"no labels, which class accuracy needs"):
        open_npz(tmp_path / "a.npz").need_labels("class accuracy")
    np.savez(tmp_path / "b.npz", IMAGES, np.where(LABELS == 2, -1, LABELS))
    with pytest.raises(PicturesError, match="3 of 10 images have no label"):
        open_npz(tmp_path / "b.npz").need_labels("class accuracy")


def damaged(file: Path, way: str) -> None:
    data = file.read_bytes()
    if way == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif way == "other":
        file.write_bytes(b"not an archive at all")
    elif way == "empty":
        file.write_bytes(b"")
    else:  # the header of the array
        file.write_bytes(data.replace(b"\x93NUMPY", b"\x93NUMPX", 1))


@pytest.mark.parametrize("way", ["cut", "other", "empty", "header"])
def test_a_damaged_file_is_named(tmp_path, way):
    file = tmp_path / "a.npz"
    np.savez(file, IMAGES)
    damaged(file, way)
    with pytest.raises(PicturesError, match=r"a\.npz"):
        open_npz(file)


def test_damaged_compressed_rows_are_named(tmp_path):
    file = tmp_path / "a.npz"
    np.savez_compressed(file, np.tile(IMAGES, (100, 1, 1, 1)))
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 3, len(data) // 3 + 60):
        data[place] ^= 0xFF
    file.write_bytes(data)
    pictures = open_npz(file)
    with pytest.raises(PicturesError, match=r"damaged|cut off"):
        pictures.block(range(1000))


def test_an_array_shorter_than_its_header_says_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file, file.open("arr_0.npy", "w") as member:
        np.lib.format.write_array(member, IMAGES[:5])
    data = (tmp_path / "a.npz").read_bytes().replace(b"(5, 4, 5, 3)", b"(6, 4, 5, 3)")
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(PicturesError, match=r"takes|cannot be read"):
        open_npz(tmp_path / "a.npz")


def test_content_is_of_pixels_and_their_order_alone():
    whole = content(digests(IMAGES))
    assert whole == content(digests(IMAGES[:4]) + digests(IMAGES[4:]))
    changed = IMAGES.copy()
    changed[7, 0, 0, 0] ^= 1
    assert len({whole, content(digests(changed)), content(digests(IMAGES[::-1])), content(digests(IMAGES[:9])),
                content(digests(IMAGES.reshape(10, 5, 4, 3)))}) == 5  # fmt: skip

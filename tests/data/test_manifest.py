"""manifest.json: whole or not there, checked when read, and the same wherever the folder lies."""

import json
import shutil

import pytest

from dit.data import DataError
from dit.data.manifest import FILE, Manifest
from tests.data.helpers import write_dataset


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "set", [4, 4, 3], views=2)


def edit(manifest, **changes):
    file = f"{manifest.root}/{FILE}"
    with open(file) as f:
        values = {**json.load(f), **changes}
    with open(file, "w") as f:
        json.dump(values, f)
    return manifest.root


def test_what_is_saved_is_what_is_loaded(manifest, tmp_path):
    assert Manifest.load(manifest.root) == Manifest.load(f"{manifest.root}/{FILE}") == manifest
    assert manifest.channels == 2
    assert manifest.input_size == (3, 3)
    assert manifest.read_names() == [f"image-{i}" for i in range(11)]
    assert "root" not in json.loads((tmp_path / "set" / FILE).read_text())
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [FILE, "names.txt", "shard-000000.tar"]


def test_the_digest_is_of_the_data_not_of_the_place(manifest, tmp_path):
    shutil.copytree(manifest.root, tmp_path / "copy")
    assert Manifest.load(tmp_path / "copy").digest == manifest.digest
    assert Manifest.load(edit(manifest, seed=1)).digest != manifest.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 12}, "blocks hold 11 samples, not 12"),
        ({"class_counts": [3, 2, 2, 2, 1]}, "class counts do not add up"),
        ({"classes": ["a"]}, "1 classes but 5 class counts"),
        ({"shape": [1, 2, 2, 3, 3]}, "does not fit moments of 2 views"),
        ({"mean": [0.0]}, "1 means and 2 stds for 2 channels"),
        ({"block": 2}, "4 samples out of range"),
        ({"shards": []}, "out of range"),
        ({"shards": [{"name": "shard-000000.tar", "bytes": 100, "sha256": ""}]}, "lies outside"),
        ({"format": "dit-blocks/9"}, "format 'dit-blocks/9', expected 'dit-blocks/1'"),
        ({"sampels": 1}, "sampels: unknown key; did you mean samples"),
        ({"samples": "many"}, "samples: "),
        ({"dtype": "float64"}, "dtype: "),
    ],
)
def test_a_manifest_that_cannot_be_right(manifest, changes, words):
    with pytest.raises(DataError, match=words):
        Manifest.load(edit(manifest, **changes))


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match="encode that did not finish"):
        Manifest.load(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        Manifest.load(tmp_path / "nothing")
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Manifest.load(tmp_path)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(DataError, match="format 'list'"):
        Manifest.load(tmp_path)


def test_other_names_are_refused(manifest):
    with open(f"{manifest.root}/names.txt", "a") as names:
        names.write("one more\n")
    with pytest.raises(DataError, match="not the names file"):
        manifest.read_names()

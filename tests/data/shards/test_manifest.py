"""manifest.json: whole or not there, checked when read, and the same wherever the folder lies."""

import dataclasses
import json
import pickle
import re
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.data import DataError
from dit.data.shards.manifest import FILE, Manifest
from tests.data.foreign.foreign_shards import write_foreign
from tests.data.helpers import edit_manifest, write_dataset


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "set", [4, 4, 3], views=2)


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
    assert Manifest.load(edit_manifest(manifest.root, seed=1)).digest != manifest.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0, "blocks": [], "class_counts": [0] * 5}, "holds no samples"),
        ({"samples": 12}, "blocks hold 11 samples, not 12"),
        ({"class_counts": [3, 2, 2, 2, 1]}, "class counts do not add up"),
        ({"classes": ["a"]}, "1 classes but 5 class counts"),
        ({"shape": [1, 2, 2, 3, 3]}, "does not fit moments of 2 views"),
        ({"mean": [0.0]}, "1 means and 2 stds for 2 channels"),
        ({"block": 2}, "4 samples out of range"),
        ({"shards": []}, "out of range"),
        ({"shards": [{"name": "shard-000000.tar", "bytes": 100, "sha256": ""}]}, "lies outside"),
        ({"shape": [2, 2, 2, 3, 400]}, "bytes have no room for 4 samples of 19200 bytes"),
        ({"shape": [2, 2, 2, 3, 0]}, r"blocks of 4 samples of shape \(2, 2, 2, 3, 0\)"),
        ({"block": 10**9}, "blocks of 1000000000 samples of shape .* expected at most"),
        (
            {"foreign": {"array": "npy", "shape": [2, 3, 3], "dtype": "float16"}},
            "format dit-blocks/2 with foreign",
        ),
        ({"format": "dit-samples/1"}, "format dit-samples/1 with foreign: None"),
        ({"format": "dit-blocks/9"}, "format 'dit-blocks/9', expected 'dit-blocks/2' or 'dit-samples/1'"),
        ({"sampels": 1}, "sampels: unknown key; did you mean samples"),
        ({"samples": "many"}, "samples: "),
        ({"dtype": "float64"}, "dtype: "),
    ],
)
def test_a_manifest_that_cannot_be_right(manifest, changes, words):
    with pytest.raises(DataError, match=words):
        Manifest.load(edit_manifest(manifest.root, **changes))


def test_blocks_stand_one_behind_the_other(manifest):
    plain = json.loads((Path(manifest.root) / FILE).read_text())["blocks"]
    for blocks in (plain[1:], plain[::-1], [plain[0], plain[0], plain[2]]):
        count = sum(b["samples"] for b in blocks)
        changes = {"samples": count, "class_counts": [0] * 5, "unlabelled": count}
        with pytest.raises(DataError, match="does not begin where the one before it ends"):
            Manifest.load(edit_manifest(manifest.root, blocks=blocks, **changes))


def test_a_manifest_that_was_edited(manifest):
    with pytest.raises(DataError, match=r"manifest.json: altered: its checksum is"):
        Manifest.load(edit_manifest(manifest.root, keep_checksum=True, std=[1.0, 1.0]))


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_or_means_the_same(altered_copy, place, bit):
    """Spaces may change their kind; nothing that the manifest says may."""
    manifest, whole, file = altered_copy
    data = bytearray(whole)
    data[place % len(data)] ^= 1 << bit
    file.write_bytes(data)
    try:
        assert Manifest.load(manifest.root) == manifest
    except DataError as error:
        assert str(file) in str(error)  # noqa: PT017 (both ends are right)


@pytest.fixture(scope="module")
def altered_copy(tmp_path_factory):
    manifest = write_dataset(tmp_path_factory.mktemp("altered") / "set", [4, 4, 3], views=2)
    file = Path(manifest.root) / FILE
    return manifest, file.read_bytes(), file


def test_a_record_has_a_name(manifest):
    assert [manifest.record(i) for i in range(3)] == ["000000-0000", "000000-0001", "000000-0002"]


def test_records_of_many_shards_have_names(tmp_path):
    """The name of a record counts from its shard's first block; whatever was asked before, the manifest is the same."""
    made = write_dataset(tmp_path / "set", [2] * 7, blocks_per_shard=3)
    before = (made.text(), repr(made), made.digest)
    per_shard = [sum(b.shard == s for b in made.blocks) for s in range(len(made.shards))]
    assert len(per_shard) > 2
    expected = [f"{s:06d}-{i:04d}" for s, count in enumerate(per_shard) for i in range(count)]
    assert [made.record(i) for i in range(7)] == expected
    assert [made.first_id(i) for i in range(7)] == [0, 2, 4, 6, 8, 10, 12]
    assert (made.text(), repr(made), made.digest) == before
    assert made == Manifest.load(made.root) == pickle.loads(pickle.dumps(made))
    assert pickle.loads(pickle.dumps(made)).record(6) == expected[6]
    fewer = dataclasses.replace(made, blocks=made.blocks[1:])
    assert fewer.first_id(6) == 12
    assert fewer.record(0) == "000000-0000"


def test_names_of_many_records_take_no_time_each(manifest):
    """Once it was 40 minutes for 400,000 blocks."""
    many = dataclasses.replace(manifest, blocks=manifest.blocks[:1] * 100_000)
    start = time.process_time()
    for i in range(0, 100_000, 10):
        many.record(i)
        many.first_id(i)
    assert time.process_time() - start < 2


NAMES_OUTSIDE = ["/etc/hostname", "../x.tar", "sub/../../x.tar", "..", "https://h/x.tar", "file:///x.tar"]


@pytest.mark.parametrize("name", NAMES_OUTSIDE)
def test_names_of_files_that_lie_elsewhere(manifest, tmp_path, name):
    """Of our own shards, and of any names file; the shards of an index may lie anywhere."""
    words = re.escape(f"{name!r} is no name of a file of this data set")
    for data_set in (manifest, write_foreign(tmp_path / "foreign", [3])):
        values = json.loads((Path(data_set.root) / FILE).read_text())
        kept = (Path(data_set.root) / FILE).read_bytes()
        with pytest.raises(DataError, match=words):
            Manifest.load(edit_manifest(data_set.root, names={**values["names"], "file": name}))
        (Path(data_set.root) / FILE).write_bytes(kept)
        root = edit_manifest(
            data_set.root, shards=[{**values["shards"][0], "name": name}, *values["shards"][1:]]
        )
        if data_set is manifest:
            with pytest.raises(DataError, match=words):
                Manifest.load(root)
        else:
            assert Manifest.load(root).shards[0].name == name


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=r"no manifest.json \(not a data set\); make data sets with"):
        Manifest.load(tmp_path)
    (tmp_path / "set.partial").mkdir()
    with pytest.raises(DataError, match=r"set: its encode is unfinished \(.*set.partial\): start the same"):
        Manifest.load(tmp_path / "set")
    (tmp_path / "set.partial").rename(tmp_path / "set")
    (tmp_path / "set" / "shard-000000.tar").touch()
    with pytest.raises(DataError, match=r"is a file of a data set; give the folder: .*/set$"):
        Manifest.load(tmp_path / "set" / "shard-000000.tar")
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

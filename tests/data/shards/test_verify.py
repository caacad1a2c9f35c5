"""verify: all that is wrong, each with its file and place, from one read; and nothing where nothing is."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from dit.data import DataError
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import FILE, Manifest
from dit.data.shards.records import END
from dit.data.shards.verify import check_manifest, verify
from dit.data.shards.write import ShardWriter
from tests.data.foreign.foreign_shards import write_foreign
from tests.data.helpers import edit_manifest, flip_byte, write_dataset
from tests.data.storage.http_server import serving

SIZES = [4, 4, 4, 4, 2]


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "set", SIZES, views=2)


def table(manifest, **options):
    return [(f.file, f.part, f.what) for f in verify(manifest, **options)]


def rewritten(manifest: Manifest, change) -> Manifest:
    """The data set with `change(block, arrays)` made to its blocks, and everything that is said of bytes corrected."""
    reader = BlockReader(manifest)
    blocks = [reader.read(i) for i in range(len(manifest.blocks))]
    limit = max(shard.bytes for shard in manifest.shards)
    with ShardWriter(Path(manifest.root), limit) as writer:
        for i, arrays in enumerate(blocks):
            change(i, arrays)
            writer.add(arrays)
        writer.finish()
    forged = dataclasses.replace(manifest, shards=tuple(writer.shards), blocks=tuple(writer.blocks))
    forged.save(manifest.root)
    return Manifest.load(manifest.root)


def corrected(manifest: Manifest, **changes) -> Manifest:
    """The manifest with the hashes and sizes that its shards have now."""
    shards, blocks = [], []
    for i, shard in enumerate(manifest.shards):
        data = Path(manifest.path(i)).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        shards.append(dataclasses.replace(shard, bytes=len(data), sha256=digest))
    for b in manifest.blocks:
        data = Path(manifest.path(b.shard)).read_bytes()[b.offset : b.offset + b.bytes]
        blocks.append(dataclasses.replace(b, xxh3=xxhash.xxh3_64_hexdigest(data)))
    made = dataclasses.replace(manifest, shards=tuple(shards), blocks=tuple(blocks), **changes)
    made.save(manifest.root)
    return Manifest.load(manifest.root)


def swap(manifest: Manifest, one: int, two: int) -> None:
    """Two records of one size, in the bytes of one shard."""
    a, b = manifest.blocks[one], manifest.blocks[two]
    path = Path(manifest.path(a.shard))
    data = bytearray(path.read_bytes())
    first, second = data[a.offset : a.offset + a.bytes], data[b.offset : b.offset + b.bytes]
    data[a.offset : a.offset + a.bytes], data[b.offset : b.offset + b.bytes] = second, first
    path.write_bytes(data)


# --- whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{"views": 2}, {"posterior": False}, {"posterior": False, "eps": True}])
@pytest.mark.parametrize("threads", [1, 4])
def test_nothing_is_wrong_with_a_whole_one(tmp_path, kind, threads):
    made = write_dataset(tmp_path, [25] * 9, **kind)
    assert table(made, threads=threads) == []
    assert check_manifest(tmp_path) == (made, [])


def test_every_byte_is_read_once(manifest):
    seen = []
    assert table(manifest, progress=seen.append) == []
    assert sum(seen) == sum(s.bytes for s in manifest.shards)


def test_over_http_every_byte_is_asked_for_once(manifest):
    with serving(Path(manifest.root)) as server:
        remote = Manifest.load(server.url)
        server.served.clear()
        assert table(remote) == []
        flip_byte(manifest.path(0), manifest.blocks[1].offset + 999)
        asked = Counter(
            (path, part) for path, part in server.served if path.endswith(".tar") and part != "bytes=0-0"
        )
        covered = sum(
            int(r.split("-")[1]) - int(r.split("=")[1].split("-")[0]) + 1 for _, r in asked.elements()
        )
        assert covered == sum(s.bytes for s in manifest.shards)
        assert set(asked.values()) == {1}
        files = [file for file, _, _ in table(remote)]
    assert files == ["shard-000000.tar", "shard-000000.tar"]


# --- bytes ---------------------------------------------------------------------------------------------------


def test_all_faults_are_told_not_the_first_alone(manifest):
    one, three = manifest.blocks[1], manifest.blocks[3]
    flip_byte(manifest.path(0), one.offset + 999)
    flip_byte(manifest.path(0), manifest.shards[0].bytes - 1)  # after the last block
    os.truncate(manifest.path(1), three.offset + 700)
    (Path(manifest.root) / "names.txt").write_text("")
    found = table(manifest)
    assert [(file, part) for file, part, _ in found] == [
        ("names.txt", ""),
        ("shard-000000.tar", ""),
        ("shard-000001.tar", ""),
        ("shard-000001.tar", ""),
        ("shard-000000.tar", f"record 000000-0001, bytes {one.offset} to {one.offset + one.bytes}"),
        ("shard-000001.tar", f"record 000001-0000, bytes {three.offset} to {three.offset + three.bytes}"),
        (
            "shard-000001.tar",
            f"record 000001-0001, bytes {three.bytes} to {three.bytes + manifest.blocks[4].bytes}",
        ),
    ]
    words = ["not the names file", "sha256", "700 bytes, the manifest says", "sha256", "altered: its xxh3"]
    assert all(word in what for word, (_, _, what) in zip(words, found, strict=False))


def test_a_missing_shard(manifest):
    Path(manifest.path(1)).unlink()
    assert table(manifest) == [("shard-000001.tar", "", "missing")]  # and not each of its records again


# --- what hashes that were made anew do not hide -----------------------------------------------------------------


def test_records_in_another_order(manifest):
    swap(manifest, 0, 2)
    found = table(corrected(manifest))
    assert [what for _, _, what in found] == [
        "is called '000000-0002', expected '000000-0000'",
        "is called '000000-0000', expected '000000-0002'",
    ]


def test_a_record_that_stands_twice(manifest):
    def change(i, arrays):
        if i == 0:
            kept.update({name: a.copy() for name, a in arrays.items()})
        if i == 3:
            arrays.update(kept)

    kept = {}
    found = table(rewritten(manifest, change))
    twice = [(file, part) for file, part, what in found if "occurs before" in what]
    assert twice == [("shard-000001.tar", "record 000001-0000")] * 4
    assert "class_counts" in {part for _, part, _ in found}


def test_an_id_without_a_name(manifest):
    def change(i, arrays):
        if i == 3:
            arrays["id"] = arrays["id"] + np.array([0, 100, 0, 0], np.uint64)

    ((file, part, what),) = table(rewritten(manifest, change))
    assert (file, part) == ("shard-000001.tar", "record 000001-0000")
    assert "has no name" in what


@pytest.mark.parametrize("label", [5, -2, 2**62])
def test_a_label_without_a_class(manifest, label):
    def change(i, arrays):
        if i == 3:
            arrays["label"] = np.where(np.arange(4) == 2, label, arrays["label"])

    ((file, part, what),) = table(rewritten(manifest, change))
    assert file == "shard-000001.tar"
    assert part.startswith("record 000001-0000, bytes 0 to")
    assert what == f"sample 2 has the label {label}, of 5 classes"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(manifest, value):
    def change(i, arrays):
        if i == 1:
            arrays["moments"][3, 1, 0, 0, 0, 0] = value

    ((_, part, what),) = table(rewritten(manifest, change))
    assert part.startswith("record 000000-0001")
    assert what == "moments of 1 sample(s) are not finite, first of sample 3"


def test_standard_deviations_below_0(manifest):
    def change(i, arrays):
        if i == 1:
            arrays["moments"][3, 1, 1] *= -1

    ((_, _, what),) = table(rewritten(manifest, change))
    assert what == "a standard deviation below 0"  # their squares, and so the statistics, are the same


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.astype(np.float32), "is float32 of"),
        (lambda a: a.view(np.int16), "is int16 of"),
        (lambda a: a.reshape(*a.shape[:-2], 9, 1), "2, 9, 1), not float16 of"),
    ],
)
def test_arrays_of_another_type_or_shape(manifest, change, words):
    found = table(rewritten(manifest, lambda i, arrays: arrays.update(moments=change(arrays["moments"]))))
    assert len(found) == 5
    assert all(words in what for _, _, what in found)


def test_what_lies_after_the_last_record(manifest):
    path = Path(manifest.path(0))
    path.write_bytes(path.read_bytes()[: -len(END)] + b"hidden".ljust(512, b"\0") + END)
    ((file, part, what),) = table(corrected(manifest))
    assert (file, what) == ("shard-000000.tar", "neither records nor zeros")
    assert part.startswith(f"bytes {manifest.blocks[2].offset + manifest.blocks[2].bytes} to")


def test_a_block_that_was_left_out(manifest):
    """The samples and counts with it: its bytes are there still, and the statistics are of all."""
    labels = BlockReader(manifest).read(4)["label"]
    counts = np.array(manifest.class_counts) - np.bincount(labels, minlength=5)
    blocks = manifest.blocks[:4]
    root = edit_manifest(
        manifest.root,
        samples=16,
        class_counts=counts.tolist(),
        blocks=[dataclasses.asdict(b) for b in blocks],
    )
    found = table(Manifest.load(root))
    assert ("shard-000001.tar", "neither records nor zeros") in {(file, what) for file, _, what in found}
    assert {"names", "mean"} <= {part for _, part, _ in found}


@pytest.mark.parametrize(
    ("changes", "part", "words"),
    [
        ({"mean": [8.0, 8.625]}, "mean", "the latents have"),
        ({"std": [5.0, float("nan")]}, "std", "the latents have"),
        ({"class_counts": [3, 4, 4, 4, 3]}, "class_counts", "4 samples of class 'a', it says 3"),
        (
            {"class_counts": [3, 4, 4, 3, 3], "unlabelled": 1},
            "unlabelled",
            "0 samples without a label, it says 1",
        ),
        ({"bad": ["image-3"]}, "names", "18 samples and 1 bad images, but 18 names"),
    ],
)
def test_a_manifest_that_the_data_contradict(manifest, changes, part, words):
    found = table(Manifest.load(edit_manifest(manifest.root, **changes)))
    assert any(p == part and words in what and file == FILE for file, p, what in found)


# --- the manifest itself -----------------------------------------------------------------------------------------


def test_an_altered_manifest_and_what_is_wrong_besides(manifest):
    flip_byte(manifest.path(0), manifest.blocks[1].offset + 999)
    loaded, faults = check_manifest(edit_manifest(manifest.root, keep_checksum=True, seed=3))
    assert [f.file for f in faults] == [FILE]
    assert "altered: its checksum is" in faults[0].what
    assert [f.part.split(",")[0] for f in verify(loaded)] == ["", "record 000000-0001"]


def test_a_manifest_that_contradicts_itself(manifest):
    """Every contradiction, and of the data what can be checked without it: the files as a whole."""
    flip_byte(manifest.path(1), 999)
    root = edit_manifest(manifest.root, samples=17, mean=[0.0])
    loaded, faults = check_manifest(root)
    assert [f.what.split(",")[0] for f in faults] == [
        "blocks hold 18 samples",
        "class counts do not add up to the samples",
        "1 means and 2 stds for 2 channels",
    ]
    assert [(f.file, f.part) for f in verify(loaded)] == [(FILE, "names"), ("shard-000001.tar", "")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "format 'list'"),
        ("{}", "format None"),
        ('{"format": "dit-blocks/2", "samples": []}', "altered"),
    ],
    ids=["cut", "empty", "deep", "list", "empty object", "other keys"],
)
def test_a_manifest_that_is_none(tmp_path, text, words):
    (tmp_path / FILE).write_text(text)
    loaded, faults = check_manifest(tmp_path)
    assert loaded is None
    assert [f.file for f in faults] == [FILE]
    assert words in faults[0].what


def test_a_manifest_that_says_the_same_in_other_words(manifest):
    file = Path(manifest.root) / FILE
    file.write_text(json.dumps(json.loads(file.read_text())))
    loaded, faults = check_manifest(manifest.root)
    assert loaded == manifest
    assert ["not byte for byte" in f.what for f in faults] == [True]


def test_a_manifest_of_nothing(manifest):
    root = edit_manifest(manifest.root, samples=0, blocks=[], class_counts=[0] * 5)
    loaded, faults = check_manifest(root)
    assert [(f.file, f.what) for f in faults] == [(FILE, "holds no samples")]
    assert [part for _, part, _ in table(loaded)] == ["names"]


def test_a_manifest_that_leads_elsewhere_is_not_followed(manifest, tmp_path):
    shards = [dataclasses.asdict(s) for s in manifest.shards]
    shards[0]["name"] = str(tmp_path / "set" / shards[0]["name"])
    loaded, faults = check_manifest(edit_manifest(manifest.root, shards=shards))
    assert loaded is None
    assert "is no name of a file of this data set" in faults[0].what


def test_names_that_no_file_can_have(manifest):
    for name in ("\0", "\ud800", ""):
        shards = [dataclasses.asdict(s) for s in manifest.shards]
        shards[0]["name"] = name
        loaded, faults = check_manifest(edit_manifest(manifest.root, shards=shards))
        assert loaded is None
        assert "is no name of a file" in faults[0].what


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: no {FILE}"):
        check_manifest(tmp_path)


# --- foreign ---------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    return write_foreign(tmp_path / "foreign", [6, 5])


def test_foreign_names_in_another_order(foreign):
    file = Path(foreign.root) / "names.txt"
    lines = file.read_text().splitlines()
    lines[4], lines[5] = lines[5], lines[4]
    data = "".join(f"{n}\n" for n in lines).encode()
    file.write_bytes(data)
    names = {**dataclasses.asdict(foreign.names), "sha256": hashlib.sha256(data).hexdigest()}
    ((shard, part, what),) = table(Manifest.load(edit_manifest(foreign.root, names=names)))
    assert shard == "latents-000.tar"
    assert part.startswith("record of samples 4 to 5, bytes")
    assert what == "is called 'sample0004', expected 'sample0005'"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": 2.0}, "the latents have"),
        ({"label": "json"}, "'sample0000' has no .json"),
        ({"array": "pt"}, "'sample0000' has no .pt"),
        ({"dtype": "float32"}, "expected float32"),
        ({"shape": [2, 9, 1]}, "does not fit stored arrays of (2, 9, 1)"),
        ({"flipped": "flip.npy"}, "does not fit stored arrays of"),
    ],
)
def test_a_foreign_layout_that_is_another(foreign, changes, words):
    layout = {**dataclasses.asdict(foreign.foreign), **changes}
    loaded, faults = check_manifest(edit_manifest(foreign.root, foreign=layout))
    found = [*(f.what for f in faults), *(what for _, _, what in table(loaded))]
    assert any(words in what for what in found)


def test_a_foreign_sample_after_the_last_block(foreign):
    """A shard to which something was added, and a manifest that knows of the bytes but of no block."""
    path = Path(foreign.path(1))
    end = foreign.blocks[-1].offset + foreign.blocks[-1].bytes
    data = path.read_bytes()
    path.write_bytes(data[:end] + data[: foreign.blocks[-1].bytes] + data[end:])
    ((file, part, what),) = table(corrected(foreign))
    assert (file, what) == ("latents-001.tar", "neither records nor zeros")
    assert part.startswith(f"bytes {end} to")

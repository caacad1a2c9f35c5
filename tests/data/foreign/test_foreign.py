"""Shards made elsewhere: indexed, and read as they are, to the number; what cannot be right is refused."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError, from_dict
from dit.data import DataError
from dit.data.foreign.existing import already
from dit.data.foreign.index import UnknownCodec, codec_of, index
from dit.data.foreign.probe import IndexOptions, codec_shape
from dit.data.foreign.reader import ARRAYS, LABELS, places, split_path
from dit.data.foreign.shard_list import find_shards, total_bytes
from dit.data.foreign.tape import MAX_STRETCH
from dit.data.loading.stream import Stream
from dit.data.shards.manifest import FILE, Manifest
from dit.data.shards.readers import open_reader
from dit.data.shards.verify import verify
from dit.data.sources.tarwalk import walk
from dit.errors import Notice
from tests.data.foreign.foreign_shards import (
    CLASSES,
    CODEC,
    SIZE,
    array_of,
    as_json,
    npy,
    pt,
    write_foreign,
    write_shards,
    write_tar,
)
from tests.data.storage.http_server import serving

SIZES = [7, 9, 5]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_foreign(tmp_path_factory.mktemp("foreign") / "set", SIZES)


def everything(manifest: Manifest) -> dict[str, np.ndarray]:
    """All samples, block after block."""
    reader = open_reader(manifest)
    blocks = [reader.read(i) for i in range(len(manifest.blocks))]
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


def test_samples_are_those_that_were_written(manifest):
    found = everything(manifest)
    assert [b.samples for b in manifest.blocks] == [4, 3, 4, 4, 1, 4, 1]
    assert np.array_equal(found["latents"][:, 0], [array_of(i) for i in range(21)])
    assert found["label"].tolist() == [i % CLASSES for i in range(21)]
    assert found["id"].tolist() == list(range(21))
    assert manifest.read_names() == [f"sample{i:04d}" for i in range(21)]
    assert manifest.classes == ("0", "1", "2", "3", "4")
    assert manifest.codec == CODEC.identity()
    assert verify(manifest) == []


def test_the_webdataset_library_reads_the_same(manifest):
    shards = [manifest.path(i) for i in range(3)]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    found = everything(manifest)
    assert [t["__key__"] for t in theirs] == manifest.read_names()
    assert np.array_equal([t["npy"] for t in theirs], found["latents"][:, 0])
    assert [t["cls"] for t in theirs] == found["label"].tolist()


def test_statistics_are_those_of_the_samples(manifest):
    latents = everything(manifest)["latents"].astype(np.float64)
    assert np.allclose(manifest.mean, latents.mean((0, 1, 3, 4)), rtol=0, atol=1e-12)
    assert np.allclose(manifest.std, latents.std((0, 1, 3, 4)), rtol=1e-12)


def test_a_stream_of_them(manifest):
    with_stream = Stream(manifest, 0, 7, lanes=7)
    try:
        batches = [with_stream.batch(step) for step in range(3)]
    finally:
        with_stream.close()
    ids = torch.cat([b.id for b in batches])
    assert sorted(ids.tolist()) == list(range(21))
    for batch in batches:
        expected = np.array([array_of(int(i)) for i in batch.id])[:, None]
        assert np.array_equal(batch.moments.numpy(), expected)
        assert batch.label.tolist() == [int(i) % CLASSES for i in batch.id]


# --- how arrays are stored -----------------------------------------------------------------------------------

STD = np.abs(np.arange(2 * SIZE * SIZE).reshape(2, SIZE, SIZE) / 8 + 0.25)  # (C, H, W)


def stored(i, extra=0.0):
    return array_of(i, dtype=np.float32) + np.float32(extra)


def logvar(i, over=np.float32):
    return np.concatenate([stored(i), 2 * np.log(STD)]).astype(over)


def std(i):
    return np.stack([stored(i), STD]).astype(np.float16)


# members of sample i, options, what sample i is then: (views, [2,] C, H, W)
LAYOUTS = {
    "float32": (lambda i: {"npy": stored(i)}, {}, lambda i: stored(i)[None].astype(np.float16)),
    "float32 kept": (lambda i: {"npy": stored(i)}, {"dtype": "float32"}, lambda i: stored(i)[None]),
    "a leading axis": (lambda i: {"npy": array_of(i)[None]}, {}, lambda i: array_of(i)[None]),
    "pt": (lambda i: {"pt": pt(array_of(i))}, {}, lambda i: array_of(i)[None]),
    "pth": (lambda i: {"pth": pt(stored(i))}, {"dtype": "float32"}, lambda i: stored(i)[None]),
    "bfloat16": (
        lambda i: {"pt": pt(stored(i), torch.bfloat16)},
        {"dtype": "float32"},
        lambda i: torch.from_numpy(stored(i)).bfloat16().float().numpy()[None],
    ),
    "scaled": (
        lambda i: {"npy": stored(i)},
        {"scale": 0.18215, "dtype": "float32"},
        lambda i: stored(i)[None] / np.float32(0.18215),
    ),
    "flipped": (
        lambda i: {"npy": array_of(i), "flip.npy": array_of(i)[..., ::-1].copy()},
        {"flipped": "flip.npy"},
        lambda i: np.stack([array_of(i), array_of(i)[..., ::-1]]),
    ),
    "another extension": (
        lambda i: {"npy": array_of(i), "other.npy": array_of(i + 100)},
        {"extension": "other.npy"},
        lambda i: array_of(i + 100)[None],
    ),
    "moments": (lambda i: {"npy": std(i)}, {"array": "moments"}, lambda i: std(i)[None]),
    "moments in channels": (
        lambda i: {"npy": std(i).reshape(4, SIZE, SIZE)},
        {"array": "moments"},
        lambda i: std(i)[None],
    ),
    "log variances": (
        lambda i: {"npy": logvar(i)},
        {"array": "moments", "spread": "logvar", "dtype": "float32"},
        lambda i: np.stack([stored(i), STD])[None],
    ),
    "log variances, mean scaled": (
        lambda i: {"npy": logvar(i)},
        {"array": "moments", "spread": "logvar", "scale": 0.5, "dtype": "float32"},
        lambda i: np.stack([2 * stored(i), STD])[None],
    ),
    "moments scaled": (
        lambda i: {"npy": std(i)},
        {"array": "moments", "scale": 0.5},
        lambda i: 2 * std(i)[None],
    ),
}


@pytest.mark.parametrize(("members", "options", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_arrays_in_every_layout(tmp_path, members, options, expected):
    made = write_foreign(tmp_path / "set", [5, 2], lambda i: {**members(i), "cls": 0}, **options)
    found = everything(made)[made.array]
    whole = np.array([expected(i) for i in range(7)])
    assert found.dtype == made.dtype
    assert found.shape == whole.shape
    assert np.allclose(found.astype(np.float64), whole, rtol=1e-6, atol=0)
    assert verify(made) == []


def test_log_variances_are_clamped_as_latent_diffusion_does(tmp_path):
    extreme = np.concatenate([stored(0), np.full((2, SIZE, SIZE), -1000.0)]).astype(np.float32)
    made = write_foreign(
        tmp_path, [2], lambda i: {"npy": extreme}, array="moments", spread="logvar", dtype="float32"
    )
    assert np.allclose(everything(made)["moments"][:, 0, 1], np.exp(-15.0), rtol=1e-6)


def test_all_readers_of_arrays_and_labels_are_tested():
    used = {e.rpartition(".")[2] for members, _, _ in LAYOUTS.values() for e in members(0)}
    assert used == set(ARRAYS)
    assert set(LABELS) == {"cls", "json"}


@pytest.mark.parametrize(
    ("label", "options", "expected"),
    [
        (lambda i: {"json": as_json(label=i % 3, caption="x")}, {}, lambda i: i % 3),
        (lambda i: {"json": as_json(caption="x")}, {}, lambda i: -1),
        (lambda i: {}, {}, lambda i: -1),
        (lambda i: {"cls": 7}, {"label": "none"}, lambda i: -1),
        (lambda i: {"cls": i % 2, "json": as_json(label=4)}, {}, lambda i: i % 2),
        (lambda i: {"cls": i % 2, "json": as_json(label=4)}, {"label": "json"}, lambda i: 4),
        (lambda i: {"cls": i % 2 - 1}, {}, lambda i: i % 2 - 1),
        (lambda i: {"cls": 2}, {"classes": ("a", "b", "c", "d")}, lambda i: 2),
    ],
    ids=["json", "json without", "none", "none wanted", "both", "json chosen", "some unknown", "names"],
)
def test_labels(tmp_path, label, options, expected):
    made = write_foreign(tmp_path, [4, 3], lambda i: {"npy": array_of(i), **label(i)}, **options)
    assert everything(made)["label"].tolist() == [expected(i) for i in range(7)]
    assert made.unlabelled == sum(expected(i) < 0 for i in range(7))
    assert made.classes == options.get(
        "classes", tuple(map(str, range(max(expected(i) for i in range(7)) + 1)))
    )
    assert verify(made) == []


def test_what_lies_beside_the_arrays_is_left_alone(tmp_path):
    """Pictures in each sample, a file before the first, and one after the last."""
    sample = lambda i: [(f"d/{i}.jpg", b"x" * 700), (f"d/{i}.npy", npy(array_of(i))), (f"d/{i}.cls", b"1")]  # noqa: E731
    inside = [member for i in range(6) for member in sample(i)]
    write_tar(tmp_path / "a.tar", [("README", b"hello"), *inside, ("LICENSE.txt", b"free")])
    made = index(find_shards(str(tmp_path / "a.tar")), tmp_path, CODEC, IndexOptions(block=4))
    assert np.array_equal(everything(made)["latents"][:, 0], [array_of(i) for i in range(6)])
    assert made.read_names() == [f"d/{i}" for i in range(6)]
    assert made.blocks[0].offset == 0
    assert verify(made) == []


def test_blocks_of_big_samples_hold_fewer(tmp_path):
    big = b"x" * (MAX_STRETCH // 3)
    write_tar(
        tmp_path / "a.tar", [m for i in range(7) for m in ((f"{i}.npy", npy(array_of(i))), (f"{i}.mp4", big))]
    )
    made = index(find_shards(str(tmp_path)), tmp_path, CODEC, IndexOptions())
    assert [b.samples for b in made.blocks] == [3, 3, 1]
    (tmp_path / "a.tar").unlink()


# --- tars ----------------------------------------------------------------------------------------------------

NAME = st.text(st.sampled_from("ab/é-"), min_size=1, max_size=140).filter(
    lambda s: "//" not in s and s.strip("/") == s
)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(NAME, st.binary(max_size=1500)), max_size=5, unique_by=lambda m: m[0]),
    kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mtime=st.sampled_from([0, 1.7e9, 1.75e9 + 1 / 3]),
)
def test_members_are_found_as_tarfile_finds_them(members, kind, mtime):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # ustar has no room for the name
                return
    data = out.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name.encode(), m.offset_data, m.size) for m in tar.getmembers()]
        end = tar.offset
    assert list(places(data[: end - end % 512])) == expected or not members


def test_the_size_of_a_pax_header_counts():
    """As of files of more than 8 GiB, whose own header has no room for it."""
    info = tarfile.TarInfo("0.npy")
    info.pax_headers = {"size": "700"}
    data = info.tobuf(tarfile.PAX_FORMAT) + bytes(1024) + tarfile.TarInfo("1.npy").tobuf()
    found = [(m.path.encode(), m.offset, m.size) for m in walk(io.BytesIO(data + bytes(1024)), "here")]
    assert list(places(data)) == found == [(b"0.npy", 1536, 700), (b"1.npy", 3072, 0)]


def test_a_header_that_the_reader_of_blocks_does_not_know(tmp_path):
    """A size in base 256, as GNU tar writes huge ones."""
    shard = write_tar(tmp_path / "a.tar", good(0))
    data = bytearray(shard.read_bytes())
    data[124:136] = b"\x80" + int(data[124:135], 8).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    shard.write_bytes(data)
    with tarfile.open(shard) as tar:
        assert tar.getnames() == ["0.npy", "0.cls"]
    with pytest.raises(DataError, match=r"a.tar: from byte 0 on: headers that the reader of blocks"):
        index([str(shard)], tmp_path, CODEC, IndexOptions())


@pytest.mark.parametrize(
    ("path", "key", "extension"),
    [
        ("a/b.c.npy", "a/b", "c.npy"),
        ("a.b/c.NPY", "a.b/c", "npy"),
        ("README", "README", ""),
        (".hidden", "", "hidden"),
    ],
)
def test_keys_end_at_the_first_dot(path, key, extension):
    assert split_path(path.encode()) == (key.encode(), extension)


# --- what is refused -----------------------------------------------------------------------------------------


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def trapped(folder):
    buffer = io.BytesIO()
    torch.save({"x": Trap(folder / "mark")}, buffer)
    return buffer.getvalue()


def good(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i}.npy", npy(array_of(i))), (f"{i}.cls", b"0")]


def changed(**members: bytes | None):
    """Two good samples, and a third with other members."""
    third = {**{n.split(".")[1]: d for n, d in good(2)}, **members}
    return [*good(0), *good(1), *((f"2.{e.replace('_', '.')}", d) for e, d in third.items() if d is not None)]


def labelled(data: bytes, first: bytes | None = None) -> list[tuple[str, bytes]]:
    """Two samples with labels in JSON."""
    both = (as_json(label=0) if first is None else first, data)
    return [m for i, d in enumerate(both) for m in ((f"{i}.npy", npy(array_of(i))), (f"{i}.json", d))]


def wrong_type(descr: bytes) -> bytes:
    return npy(array_of(0)).replace(b"<f2", descr)


REFUSED = {
    "no label": (changed(cls=None), "sample '2' has no .cls"),
    "no array": (changed(npy=None), "sample '2' has no .npy"),
    "a label that is a word": (
        changed(cls=b"cat"),
        "a.tar: the sample '2' has the label 'cat', a name, where most are numbers\nmend these, or .*label_type=name",
    ),
    "a label below -1": (changed(cls=b"-2"), "2.cls: no label"),
    "a huge label": (changed(cls=b"9" * 30), "2.cls: no label"),
    "the number of an image": (
        changed(cls=b"1000000"),
        "2.cls: no label: '1000000', expected a class number below",
    ),
    "a label with an underscore": (changed(cls=b"1_0"), "'2' has the label '1_0', a name, where"),
    "a first label that is huge": ([("0.npy", npy(array_of(0))), ("0.cls", b"5000000")], "0.cls: no label"),
    "a label of 2 MiB": (changed(cls=b" " * (2 << 20)), "'2.cls' of 2097152 bytes is no label"),
    "an image's number in JSON": (labelled(as_json(label=10**12)), "1.json: no label: .* below 1000000"),
    "the first number in JSON": (labelled(as_json(label=0), as_json(label=10**12)), "0.json: no label"),
    "a truth value in JSON": (labelled(as_json(label=True)), "the label True, a truth value, where"),
    "deep JSON": (labelled(b"[" * 200_000), "1.json: no label: not JSON: maximum recursion"),
    "deep JSON first": (labelled(as_json(label=0), b"[" * 200_000), "sample '0': .json: not JSON: max"),
    "broken JSON first": (labelled(as_json(label=0), b'{"label'), "'0': .json: not JSON: .*--label=none"),
    "JSON of 2 MiB first": (labelled(as_json(label=0), bytes(2 << 20)), "json: 2097152 bytes, expected at"),
    "JSON labels from somewhere on": (
        labelled(as_json(label=0), b"{}"),
        "from byte [0-9]+ on: '1.json', but the first sample has no label",
    ),
    "an unknown type": (changed(npy=wrong_type(b"<f3")), "2.npy: cannot use an npy header of .*'<f3'"),
    "an unknown type first": ([("0.npy", wrong_type(b"zzz"))], "sample '0': .npy: cannot use an npy header"),
    "another shape": (
        changed(npy=npy(array_of(0)[:, :2])),
        r"float16 \(2, 2, 3\), expected float16 \(2, 3, 3\)",
    ),
    "another type": (
        changed(npy=npy(array_of(0, dtype=np.float32))),
        r"float32 \(2, 3, 3\), expected float16",
    ),
    "another type of that size": (
        changed(npy=npy(array_of(0).view(np.int16))),
        "2.npy: int16, expected one of",
    ),
    "not finite": (
        changed(npy=npy(array_of(0) * np.float16("nan"))),
        "sample '2' has .* not finite as they are stored, which no --dtype mends",
    ),
    "too large for float16": (
        [("a.npy", npy(np.full((2, 3, 3), 1e5, np.float32)))],
        "sample 'a' has .* not finite in float16, though they are as stored: --dtype=float32 takes them",
    ),
    "objects": (changed(npy=npy(np.array([{}], object), allow_pickle=True)), "npy"),
    "a pickle": (changed(npy=pickle.dumps([1])), "magic"),
    "an empty array file": (changed(npy=b""), "magic"),
    "a cut array": (changed(npy=npy(array_of(0))[:-1]), "does not fit"),
    "two of one extension": (changed(NPY=npy(array_of(3))), "a second member 'npy'"),
    "the same name twice": ([*good(0), *good(1), *good(0)], "of a name that another has"),
    "a key that comes back": (
        [*good(0), *good(1), ("0.NPY", npy(array_of(0))), ("0.CLS", b"0")],
        "'0' in .* and",
    ),
    "labels from somewhere on": ([("0.npy", npy(array_of(0))), *good(1)], "the first sample has no label"),
    "no arrays": ([("a.jpg", b"x"), ("a.cls", b"0")], "no member ends in one of npy"),
    "two arrays": (
        [("a.npy", npy(array_of(0))), ("a.b.npy", b"")],
        "npy, b.npy: choose one with --extension",
    ),
    "integers": ([("a.npy", npy(np.zeros((2, 3, 3), np.int8)))], "int8, expected one of float16"),
    "two axes": ([("a.npy", npy(np.zeros((3, 3), np.float16)))], r"expected \(C, H, W\)"),
    "other channels": ([("a.npy", npy(np.zeros((4, 3, 3), np.float16)))], "has 4 channels, the codec has 2"),
    "channels last": (
        [("a.npy", npy(np.zeros((4, 4, 2), np.float16)))],
        r"\(4, 4, 2\) has 4 channels, the codec has 2: is it \(H, W, C\)\? .* as in \(2, 4, 4\): write the arrays",
    ),
    "moments": (
        [("a.npy", npy(np.zeros((1, 4, 2, 2), np.float16)))],
        r"has 4 channels, the codec has 2: are these mean and std\? --array=moments",
    ),
    "nothing": ([], "no member ends in"),
    "an absolute path": ([*good(0), ("/etc/1.npy", b"")], "absolute path"),
    "a climbing path": ([*good(0), ("../1.npy", b"")], "leads out of the tar"),
}


@pytest.mark.parametrize(("members", "words"), REFUSED.values(), ids=REFUSED)
def test_shards_that_are_refused(tmp_path, members, words):
    shard = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=words) as error:
        index([str(shard)], tmp_path, CODEC, IndexOptions())
    assert str(shard) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def test_pickles_are_not_run(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.pt", trapped(tmp_path))])
    with pytest.raises(DataError, match=r"a.tar: the sample 'a': .pt: torch.load\(weights_only=True\)"):
        index([str(shard)], tmp_path, CODEC, IndexOptions())
    assert not (tmp_path / "mark").exists()
    torch.load(io.BytesIO(trapped(tmp_path)), weights_only=False)
    assert (tmp_path / "mark").exists()  # the trap works


def test_tensors_that_are_something_else(tmp_path):
    for data, words in (
        (pt(array_of(0))[:-9], "torch.load"),
        (zipped(), "torch.load"),
        (dictionary(), "holds a dict"),
    ):
        shard = write_tar(tmp_path / "a.tar", [("a.pt", data)])
        with pytest.raises(DataError, match=words):
            index([str(shard)], tmp_path, CODEC, IndexOptions())


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x", "y")
    return buffer.getvalue()


def dictionary():
    buffer = io.BytesIO()
    torch.save({"latents": torch.zeros(2, 3, 3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_tars_with_other_things_than_files(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in good(0):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("1.npy")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"member '1.npy': is a"):
        index([str(tmp_path / "a.tar")], tmp_path, CODEC, IndexOptions())


def test_a_tar_that_says_it_is_huge(tmp_path):
    shard = write_tar(tmp_path / "a.tar", good(0) + good(1))
    info = tarfile.TarInfo("2.npy")
    info.size = 1 << 60
    data = shard.read_bytes()
    shard.write_bytes(
        data[: data.index(b"1.cls")] + info.tobuf(tarfile.GNU_FORMAT) + data[data.index(b"1.cls") :]
    )
    with pytest.raises(DataError, match=f"a.tar.*its {1 << 60} bytes go past the end"):
        index([str(shard)], tmp_path, CODEC, IndexOptions())


def sparse_tar(path: Path, members: list[tuple[str, int]]) -> Path:
    """A tar of members of so many zeros, which take no room on disk."""
    with open(path, "wb") as file:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.truncate(file.tell() + size)
            file.seek(size, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    return path


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([(f"{i}.jpg", 1 << 20) for i in range(100)], "no member ends in one of npy"),
        ([("0.mp4", 3 << 30)], "no member ends in one of npy"),
        ([("0.npy", 3 << 30)], f"the sample '0': .npy: {3 << 30} bytes, expected at most"),
        ([("0.npy", 0), ("0.json", 3 << 30)], f"the sample '0': .json: {3 << 30} bytes, expected at most"),
    ],
    ids=["many", "a film", "an array", "a label"],
)
def test_shards_that_hold_much_are_not_held_whole(tmp_path, members, words):
    shard = sparse_tar(tmp_path / "a.tar", members)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=f"a.tar: .*{words}"):
            index([str(shard)], tmp_path, CODEC, IndexOptions())
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_huge_members_of_later_samples_are_not_read(tmp_path):
    write_tar(tmp_path / "a.tar", good(0))
    for members, words in (
        ([("1.npy", 3 << 30)], "too many at once"),
        ([("1.npy", 0), ("1.cls", 3 << 30)], f"'1.cls' of {3 << 30} bytes is no label"),
    ):
        sparse_tar(tmp_path / "b.tar", members)
        read = []
        with pytest.raises(DataError, match=f"b.tar: .*{words}"):
            index(find_shards(str(tmp_path)), tmp_path, CODEC, IndexOptions(), read.append)
        assert sum(read) < 16 << 20


def test_a_big_file_that_is_no_label_is_left_alone(tmp_path):
    """Where the label is another file, or there are none."""
    sample = lambda i: [*good(i), (f"{i}.json", b"[" * (2 << 20))]  # noqa: E731
    write_tar(tmp_path / "a.tar", sample(0) + sample(1))
    for label, unlabelled in (("auto", 0), ("none", 2)):
        made = index([str(tmp_path / "a.tar")], tmp_path / f"to-{label}", CODEC, IndexOptions(label=label))
        assert (made.samples, made.unlabelled) == (2, unlabelled)


def test_a_shard_that_is_gone(tmp_path):
    with pytest.raises(DataError, match=r"gone.tar: cannot be read: No such file"):
        index([str(tmp_path / "gone.tar")], tmp_path, CODEC, IndexOptions())


def test_a_tar_that_was_cut_off_or_packed(tmp_path):
    shard = write_shards(tmp_path, [5])[0]
    whole = shard.read_bytes()
    for cut in (700, 5000, len(whole) - 10240):
        shard.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"latents-000.tar"):
            index([str(shard)], tmp_path, CODEC, IndexOptions())
    with tarfile.open(shard, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.npy"))
    with pytest.raises(DataError, match="unpack it if it is compressed"):
        index([str(shard)], tmp_path, CODEC, IndexOptions())


def test_one_key_in_two_shards(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", good(0) + good(ord(name)))
    with pytest.raises(
        DataError, match=r"(?s)1 key\(s\) that stand for two samples.*'0' in .*a.tar and .*b.tar"
    ):
        index(find_shards(str(tmp_path)), tmp_path, CODEC, IndexOptions())


def test_a_second_shard_of_something_else(tmp_path):
    write_tar(tmp_path / "a.tar", good(0))
    write_tar(tmp_path / "b.tar", [("1.npy", npy(array_of(1, dtype=np.float32))), ("1.cls", b"0")])
    with pytest.raises(
        DataError, match=r"b.tar: from byte 0 on: 1.npy: float32 \(2, 3, 3\), expected float16"
    ):
        index(find_shards(str(tmp_path)), tmp_path, CODEC, IndexOptions())
    write_tar(tmp_path / "b.tar", [("1.jpg", b"")])
    with pytest.raises(DataError, match=r"b.tar: .*no samples"):
        index(find_shards(str(tmp_path)), tmp_path, CODEC, IndexOptions())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"block": 0}, "block is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"extension": "safetensors"}, "extension is 'safetensors', expected one that ends in npy, pt, pth"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(IndexOptions, options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"classes": ("a",)},
            "latents-000.tar: the sample 'sample0001' has the label 1, with 1 classes",
        ),
        ({"extension": "x.npy"}, "choose one with --extension"),
        ({"flipped": "flip.npy"}, "sample 'sample0000' has no .flip.npy"),
        ({"array": "moments"}, r"has 1 channels, the codec has 2"),
        ({"label": "json"}, "sample 'sample0000' has no .json"),
    ],
)
def test_options_that_do_not_fit_the_shards(tmp_path, options, words):
    with pytest.raises(DataError, match=words):
        write_foreign(tmp_path, [5], **options)


@pytest.mark.parametrize("shape", [(6, 6, 4), (2, 6, 6, 2), (6, 5, 4)])
def test_moments_with_their_channels_last(tmp_path, shape):
    shard = write_tar(tmp_path / "a.tar", [("a.npy", npy(np.zeros(shape, np.float16)))])
    with pytest.raises(DataError, match=r"is it \(H, W, C\)\? Channels come first") as error:
        index([str(shard)], tmp_path, CODEC, IndexOptions(array="moments"))
    assert "--array=" not in str(error.value)


@pytest.mark.parametrize("stored", [(2, 3, 3), (1, 2, 3, 3)])
def test_shapes(stored):
    assert codec_shape("latents", stored) == (2, 3, 3)


@pytest.mark.parametrize("stored", [(4, 3, 3), (1, 4, 3, 3), (2, 2, 3, 3), (1, 2, 2, 3, 3)])
def test_shapes_of_moments(stored):
    assert codec_shape("moments", stored) == (2, 2, 3, 3)


@pytest.mark.parametrize(
    ("array", "stored"),
    [
        ("latents", (2, 2, 3, 3)),
        ("latents", (3, 3)),
        ("moments", (3, 3, 3)),
        ("moments", (3, 2, 3, 3)),
        ("moments", ()),
    ],
)
def test_shapes_that_are_neither(array, stored):
    with pytest.raises(ValueError, match="expected"):
        codec_shape(array, stored)


# --- where shards lie ----------------------------------------------------------------------------------------


def test_shards_are_found(tmp_path):
    paths = [str(p.resolve()) for p in write_shards(tmp_path / "a", [1, 1, 1])]
    (tmp_path / "list.txt").write_text(
        f"# three\na/latents-000.tar\n\n{tmp_path}/a/latents-{{001..002}}.tar\n"
    )
    for spec in ("a", "a/*.tar", "a/latents-{000..002}.tar", "list.txt"):
        assert find_shards(str(tmp_path / spec)) == paths
    assert find_shards("s3://b/x-{08..10}.tar") == [f"s3://b/x-{i}.tar" for i in ("08", "09", "10")]
    assert total_bytes(paths) == sum(Path(p).stat().st_size for p in paths)


@pytest.mark.parametrize(
    ("spec", "words"),
    [("nothing", "no tar there"), ("a/latents-{000..009}.tar", "missing"), ("twice.txt", "more than once")],
)
def test_shards_that_are_not_there(tmp_path, spec, words):
    write_shards(tmp_path / "a", [1])
    (tmp_path / "twice.txt").write_text("a\na/latents-000.tar\n")
    with pytest.raises(DataError, match=words):
        find_shards(str(tmp_path / spec))


def test_names_of_shards(tmp_path):
    """Relative ones move with their manifest, others are whole paths."""
    beside = write_foreign(tmp_path / "a", [5])
    assert [s.name for s in beside.shards] == ["latents-000.tar"]
    elsewhere = index(find_shards(str(tmp_path / "a")), tmp_path / "index", CODEC, IndexOptions())
    assert [s.name for s in elsewhere.shards] == [str((tmp_path / "a" / "latents-000.tar").resolve())]
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == [FILE, "names.txt"]
    before = everything(elsewhere)["latents"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copytree(tmp_path / "index", tmp_path / "index2")
    for moved in ("b", "index2"):
        again = Manifest.load(tmp_path / moved)
        assert np.array_equal(everything(again)["latents"], before)
        assert verify(again) == []


def test_an_index_is_not_written_over(tmp_path):
    write_foreign(tmp_path, [5])
    with pytest.raises(DataError, match="exists already"):
        index(find_shards(str(tmp_path)), tmp_path, CODEC, IndexOptions())


def test_shards_at_urls(tmp_path):
    """Indexed, verified and streamed over HTTP, from a list of URLs in a text file; and the index itself from there."""
    write_shards(tmp_path / "web", [6, 5])
    with serving(tmp_path / "web") as server:
        (tmp_path / "urls.txt").write_text(f"{server.url}/latents-{{000..001}}.tar\n")
        shards = find_shards(str(tmp_path / "urls.txt"))
        made = index(shards, tmp_path / "web", CODEC, IndexOptions(block=4))
        assert [s.name for s in made.shards] == shards
        assert np.array_equal(everything(made)["latents"][:, 0], [array_of(i) for i in range(11)])
        assert verify(made) == []
        remote = Manifest.load(server.url)
        assert remote.digest == made.digest
        assert verify(remote) == []
        (tmp_path / "web" / "latents-001.tar").unlink()
        with pytest.raises(DataError, match=f"{server.url}/latents-001.tar"):
            total_bytes(shards)
        with pytest.raises(DataError, match=f"{server.url}/latents-001.tar"):
            index(shards, tmp_path / "again", CODEC, IndexOptions())


# --- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (2, 9, 1)}, r"sample0000.npy: float16 \(2, 3, 3\), expected float16 \(2, 9, 1\)"),
        ({"dtype": "float32"}, "expected float32"),
        ({"label": "json"}, "'sample0000' has no .json"),
        ({"array": "other.npy"}, "'sample0000' has no .other.npy"),
    ],
)
def test_an_index_that_says_something_else(manifest, changes, words):
    other = dataclasses.replace(manifest, foreign=dataclasses.replace(manifest.foreign, **changes))
    with pytest.raises(DataError, match=words) as error:
        open_reader(other).read(0)
    assert f"{manifest.path(0)}: record of samples 0 to 3 (bytes 0 to" in str(error.value)


def test_labels_are_checked_again_when_they_are_read(manifest):
    with pytest.raises(DataError, match=r"latents-000.tar: .*sample 3 has the label 3, of 3 classes"):
        open_reader(dataclasses.replace(manifest, classes=tuple("abc"))).read(0)


def test_another_number_of_samples(manifest):
    blocks = (dataclasses.replace(manifest.blocks[0], samples=3), *manifest.blocks[1:])
    with pytest.raises(DataError, match="4 samples, the manifest says 3"):
        open_reader(dataclasses.replace(manifest, blocks=blocks)).read(0)


def test_an_altered_byte_is_found_before_it_is_decoded(tmp_path):
    made = write_foreign(tmp_path, [5], lambda i: {"pt": pt(array_of(i)), "cls": 0})
    data = bytearray(Path(made.path(0)).read_bytes())
    data[made.blocks[1].offset + 3000] ^= 1
    Path(made.path(0)).write_bytes(data)
    reader = open_reader(made)
    reader.read(0)
    with pytest.raises(DataError, match=r"record of samples 4 to 4 .*altered: its xxh3"):
        reader.read(1)


# --- the codec -----------------------------------------------------------------------------------------------


def test_codecs():
    assert codec_of("unknown", {"codec.channels": "4"}, 0.18215) == UnknownCodec(
        channels=4, scaling_factor=0.18215
    )
    assert (
        codec_of("unknown", {"codec_channels": "4", "codec.scaling_factor": "2"}, 3.0).scaling_factor == 2.0
    )
    assert codec_of("pixels", {}).identity() == {"name": "pixels"}
    with pytest.raises(ConfigError, match="channels: is required"):
        codec_of("unknown", {})
    with pytest.raises(ConfigError, match="chanels: unknown key; did you mean channels"):
        codec_of("unknown", {"codec.chanels": "4"})


def test_pixels_as_samples(tmp_path):
    write_shards(tmp_path, [3], lambda i: {"npy": array_of(i, 3), "cls": 0})
    made = index(find_shards(str(tmp_path)), tmp_path, codec_of("pixels", {}), IndexOptions())
    assert (made.posterior, made.image_size) == ("none", SIZE)


# --- labels of every kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "options", "labels", "classes"),
    [
        (lambda i: {"json": as_json(label=str(i % 3))}, {}, [0, 1, 2, 0, 1], ("0", "1", "2")),
        (lambda i: {"json": as_json(label="cba"[i % 3])}, {}, [2, 1, 0, 2, 1], ("a", "b", "c")),
        (lambda i: {"cls": b"dog\n" if i else b"cat"}, {}, [0, 1, 1, 1, 1], ("cat", "dog")),
        (lambda i: {"cls": b"2.0"}, {}, [2] * 5, ("0", "1", "2")),
        (lambda i: {"json": as_json(label=i % 2 == 0)}, {}, [1, 0, 1, 0, 1], ("0", "1")),
        (lambda i: {"json": as_json(category=i % 2)}, {}, [0, 1, 0, 1, 0], ("0", "1")),
        (lambda i: {"json": as_json(label=None)}, {}, [-1] * 5, ()),
        (
            lambda i: {"json": as_json(meta={"k": i % 2})},
            {"label_key": "meta.k"},
            [0, 1, 0, 1, 0],
            ("0", "1"),
        ),
        (
            lambda i: {"cls": b"%d" % (10 - i)},
            {"label_type": "name"},
            [4, 3, 2, 1, 0],
            ("6", "7", "8", "9", "10"),
        ),
        (
            lambda i: {"cls": b"ab"[i % 2 :][:1]},
            {"classes": ("b", "x", "a")},
            [2, 0, 2, 0, 2],
            ("b", "x", "a"),
        ),
    ],
)
def test_labels_as_people_write_them(tmp_path, member, options, labels, classes):
    made = write_foreign(tmp_path, [3, 2], lambda i: {"npy": array_of(i), **member(i)}, **options)
    assert (everything(made)["label"].tolist(), made.classes) == (labels, classes)
    assert verify(made) == []


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([1, None], {}, "the sample 'sample0001' has null as its label, where others have one"),
        ([None, 1], {}, "the sample 'sample0000' has null as its label"),
        ([1, "cat"], {}, "the sample 'sample0001' has the label 'cat', a name, where most are numbers"),
        ([[1], 1], {}, r"sample0000.json: no label: \[1\], expected a whole number or a name"),
        (["a", "b"], {"classes": ("a",)}, r"'sample0001' has the label 'b', which is none of the 1 classes"),
        (
            [1, 0],
            {"label_key": "kind"},
            "no label under kind; its keys are label: choose one with --label_key",
        ),
        (
            [1, 0],
            {"label_type": "number", "label_key": "label", "classes": ("a",)},
            "has the label 1, with 1 classes",
        ),
    ],
)
def test_json_labels_that_cannot_be_used(tmp_path, values, options, words):
    values = [0, 0, *values] if values[0] == 1 and options == {} else values
    words = words.replace("sample0001", f"sample{len(values) - 1:04d}")
    with pytest.raises(DataError, match=words):
        write_foreign(
            tmp_path,
            [len(values)],
            lambda i: {"npy": array_of(i), "json": as_json(label=values[i])},
            **options,
        )


def test_json_without_a_usual_key_is_spoken_of(tmp_path):
    with pytest.warns(Notice, match="KEY.json has the keys kind, url; --label_key=KEY"):
        made = write_foreign(tmp_path, [2], lambda i: {"npy": array_of(i), "json": as_json(kind=1, url="")})
    assert (made.foreign.label, made.unlabelled) == (None, 2)


def test_keys_with_dots(tmp_path):
    members = [
        (f"22.{i}.{e}", d) for i in range(5) for e, d in (("npy", npy(array_of(i))), ("cls", b"%d" % (i % 2)))
    ]
    write_tar(tmp_path / "a.tar", members)
    made = index(find_shards(str(tmp_path / "a.tar")), tmp_path, CODEC, IndexOptions(block=2))
    assert made.read_names() == [f"22.{i}" for i in range(5)]
    assert everything(made)["label"].tolist() == [0, 1, 0, 1, 0]
    assert np.array_equal(everything(made)["latents"][:, 0], [array_of(i) for i in range(5)])
    assert verify(made) == []


def test_an_index_without_what_is_new_has_the_manifest_of_before(manifest):
    said = json.loads((Path(manifest.root) / "manifest.json").read_text())
    assert "split" not in said
    assert set(said["foreign"]) == {"array", "flipped", "label", "shape", "dtype", "spread", "scale"}


@pytest.mark.parametrize("first", [{}, {"label_type": "name"}])
def test_an_index_of_other_labels_is_not_taken_for_the_same(tmp_path, first):
    write_foreign(tmp_path, [4], **first)
    shards = find_shards(str(tmp_path))
    options = {"image_size": 24, "block": 4}
    assert already(shards, tmp_path, CODEC, IndexOptions(**options, **first)) is not None
    other = {} if first else {"label_type": "name"}
    with pytest.raises(DataError, match="of other shards or options"):
        already(shards, tmp_path, CODEC, IndexOptions(**options, **other))

"""The block format: plain tars for everybody else, checked arrays for us."""

import dataclasses
import io
import os
import pickle
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset
import xxhash

from dit.data import DataError
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.records import HEAD, TAR_BLOCK, npy_header, pack, parse_members, parse_npy
from tests.data.helpers import write_dataset


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", [5, 5, 5, 5, 2], views=2)


def test_tar_lists_the_records(manifest):
    listing = subprocess.run(["tar", "tf", manifest.path(0)], capture_output=True, text=True, check=True)
    assert listing.stderr == ""
    assert listing.stdout.split() == [
        f"000000-000{i}.{part}.npy" for i in range(3) for part in ("moments", "label", "id")
    ]


def test_the_webdataset_library_reads_the_same_arrays(manifest):
    shards = [manifest.path(i) for i in range(len(manifest.shards))]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    reader = BlockReader(manifest)
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [record["__key__"] for record in theirs] == [f"{s:06d}-{i:04d}" for s, i in places]
    for index, record in enumerate(theirs):
        for name, array in reader.read(index).items():
            assert record[f"{name}.npy"].dtype == array.dtype
            assert np.array_equal(record[f"{name}.npy"], array)


def test_numpy_reads_a_member(manifest):
    with tarfile.open(manifest.path(0)) as tar:
        member = tar.extractfile("000000-0001.moments.npy")
        theirs = np.load(io.BytesIO(member.read()), allow_pickle=False)
    assert np.array_equal(theirs, BlockReader(manifest).read(1)["moments"])


def test_a_record_carries_nothing_of_the_machine_or_the_moment(manifest):
    with tarfile.open(manifest.path(0)) as tar:
        kept = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar.getmembers()}
    assert kept == {(0, 0, 0, "", "", 0o644)}


def test_packing_and_parsing():
    arrays = {"moments": np.arange(24, dtype=np.float16).reshape(2, 3, 4), "label": np.array([1, -1])}
    data = b"".join(pack("k", arrays))
    assert len(data) % TAR_BLOCK == 0
    found = {name: parse_npy(content) for name, content in parse_members(memoryview(data))}
    assert list(found) == ["k.moments.npy", "k.label.npy"]
    assert np.array_equal(found["k.moments.npy"], arrays["moments"])
    assert found["k.label.npy"].tolist() == [1, -1]
    assert data[HEAD : HEAD + 48] == arrays["moments"].tobytes()


def test_the_array_begins_at_a_fixed_place_for_any_block():
    for n in (1, 256, 10**6):
        assert len(npy_header((n, 2, 2, 128, 1024, 1024), np.dtype(np.float16))) == HEAD - TAR_BLOCK


def saved(array: np.ndarray) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return memoryview(buffer.getvalue())


class Trap:
    """Unpickling it raises."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (saved(np.array([Trap()], object)), "object"),
        (saved(np.asfortranarray(np.ones((2, 3)))), "Fortran"),
        (saved(np.ones(3))[:-1], "does not fit"),
        (memoryview(pickle.dumps(Trap())), "magic"),
        (memoryview(b""), "magic"),
        (saved(np.zeros(2, [("a", "f4"), ("b", "i8")])), "cannot use an npy header"),
    ],
    ids=["objects", "fortran", "short", "pickle", "empty", "fields"],
)
def test_no_array(data, words):
    with pytest.raises(ValueError, match=words):
        parse_npy(data)


@pytest.mark.parametrize("dtype", ["<f2", "<i8", "<u8", "|u1", ">f4", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 2, 1, 1, 2)])
def test_headers_are_read_as_numpy_reads_them(dtype, shape):
    array = np.ones(shape, dtype)
    found = parse_npy(saved(array))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_threads_share_a_reader(manifest):
    reader = BlockReader(manifest, verify="always")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: reader.read(i % 5)["id"].sum(), range(400)))
    assert found[:5] * 80 == found
    assert reader.reads == 400


def rewritten(manifest: Manifest, tmp_path, arrays: dict[str, np.ndarray]) -> Manifest:
    """A data set whose only block holds other arrays, with a checksum that is right."""
    data = b"".join(bytes(p) for p in pack("00000000", arrays))
    (tmp_path / manifest.shards[0].name).write_bytes(data)
    block = dataclasses.replace(
        manifest.blocks[0], offset=0, bytes=len(data), xxh3=xxhash.xxh3_64_hexdigest(data)
    )
    return dataclasses.replace(manifest, blocks=(block,), root=str(tmp_path))


LABEL, ID = np.zeros(5, np.int64), np.zeros(5, np.uint64)
BIG = np.zeros((5, 2, 2, 2, 3, 3), np.float16)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"moments": BIG.view(np.int16), "label": LABEL, "id": ID}, "is int16 of"),
        ({"moments": BIG.reshape(5, 2, 2, 18), "label": LABEL, "id": ID}, r"float16 of \(5, 2, 2, 18\)"),
        ({"latents": BIG, "label": LABEL, "id": ID}, "holds 00000000.latents.npy"),
        ({"moments": BIG, "id": ID, "label": LABEL}, "expected moments, label and id"),
        ({"moments": BIG, "label": LABEL.astype(np.float64), "id": ID}, r"is float64 of \(5,\), not int64"),
        ({"moments": BIG, "label": LABEL, "id": ID[:4]}, r"is uint64 of \(4,\)"),
        ({"moments": BIG[:4], "label": LABEL, "id": ID}, r"float16 of \(4, 2"),
        ({"moments": BIG, "label": LABEL}, "expected moments, label and id"),
    ],
)
def test_a_record_that_is_not_what_the_manifest_says(manifest, tmp_path, arrays, words):
    with pytest.raises(DataError, match=words):
        BlockReader(rewritten(manifest, tmp_path, arrays)).read(0)


def test_a_record_as_the_manifest_says(manifest, tmp_path):
    made = rewritten(manifest, tmp_path, {"moments": BIG + 1, "label": LABEL, "id": ID})
    assert np.array_equal(BlockReader(made).read(0)["moments"], BIG + 1)


def test_a_block_in_memory_that_is_used_again(manifest):
    """The arrays lie in it, whatever lies behind the block, and say so by changing with the next one."""
    reader = BlockReader(manifest)
    buffer = memoryview(bytearray(max(b.bytes for b in manifest.blocks) + 1000))
    for index in (0, 4, 1):
        found, expected = reader.read(index, buffer), BlockReader(manifest).read(index)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert all(np.shares_memory(array, np.frombuffer(buffer, np.uint8)) for array in found.values())


def test_a_block_that_is_known_is_read_as_it_is_then(manifest, tmp_path):
    """What has the same inode, size and time is not hashed again, but a record that makes no sense is found."""
    made = rewritten(manifest, tmp_path, {"moments": BIG, "label": LABEL, "id": ID})
    reader, path = BlockReader(made), tmp_path / made.shards[0].name
    reader.read(0)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(HEAD - 60)
        file.write(b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="not what the manifest describes: cannot use an npy header"):
        reader.read(0)

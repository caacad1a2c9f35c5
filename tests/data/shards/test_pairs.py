"""Pairs of noise and generated latents: what is written is what is read, whatever the batches and ranks."""

import dataclasses
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import xxhash

from dit.data import DataError
from dit.data.codecs.norm import LatentNorm, latent_norm
from dit.data.loading.stream import Stream
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.pairs import Origin, Pairs
from dit.data.shards.records import pack
from dit.data.shards.verify import verify
from dit.data.shards.write import PLAN
from dit.outputs import OutputError
from dit.ranks import group
from dit.rng import Draws, Purpose
from dit.unfinished import unfinished
from tests.data.helpers import CHANNELS, SIZE, flip_byte, noise_of, write_dataset

NORM = LatentNorm(mean=(1.0, -2.0), std=(0.5, 3.0))
ORIGIN = Origin(NORM, {"name": "made up"}, tuple("abc"), 24, seed=7)
COUNT = 90
SHAPE = (CHANNELS, SIZE, SIZE)


def noise(index: torch.Tensor) -> torch.Tensor:
    return Draws(7, 0, index, 1).normal(Purpose.PRIOR, SHAPE)


def latents(index: torch.Tensor) -> torch.Tensor:
    """What a model might make of it: normalised, and too fine for float16."""
    return 0.9 * noise(index) + 1e-4 * index.view(-1, 1, 1, 1)


def write(
    out: Path, batch: int = 16, change=lambda index, data, eps: (data, eps), block=25, shard_mb=0.01
) -> Path:
    """This rank's share of the pairs that are missing, whole batches in turn, and the data set of all of them."""
    world, spec = group.World.from_env(), {"solver": "heun", "num_samples": COUNT}
    with unfinished(out, spec, spec, (COUNT, batch)) as blocks:
        pairs = Pairs(blocks, ORIGIN)
        for number in blocks.missing()[world.rank :: world.size]:
            index = torch.tensor(blocks.samples(number))
            label = torch.where(index % 4 == 3, -1, index % 4)
            data, eps = change(index, latents(index), noise(index))
            blocks.add(number, pairs.arrays(data, eps, index, label))
        group.barrier()
        group.on_main(lambda: pairs.write(out, spec, block=block, shard_mb=shard_mb))
    return out


def read(folder: Path) -> dict[str, np.ndarray]:
    manifest = Manifest.load(folder)
    reader = BlockReader(manifest, "always")
    blocks = [reader.read(i) for i in range(len(manifest.blocks))]
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def faults(folder: Path) -> list[str]:
    return [f"{f.part}: {f.what}" for f in verify(Manifest.load(folder)) if f is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs") / "set")


# --- writing -----------------------------------------------------------------------------------------------


def test_what_is_written_is_what_went_in(folder):
    manifest, found, index = Manifest.load(folder), read(folder), torch.arange(COUNT)
    assert (manifest.samples, manifest.array, manifest.dtype, manifest.eps) == (
        COUNT,
        "latents",
        "float32",
        True,
    )
    assert (manifest.shape, manifest.block, manifest.views) == ((1, *SHAPE), 25, ("original",))
    assert len(manifest.shards) > 1
    assert {name: a.dtype.name for name, a in found.items()} == {
        "latents": "float32",
        "eps": "float32",
        "label": "int64",
        "id": "uint64",
    }
    assert np.array_equal(found["eps"][:, 0], noise(index).numpy())
    assert np.array_equal(found["latents"][:, 0], NORM.invert(latents(index)).numpy())
    assert found["id"].tolist() == list(range(COUNT))
    assert found["label"].tolist() == [0, 1, 2, -1] * 22 + [0, 1]
    assert manifest.read_names()[5] == "seed-7-sample-5"
    assert (manifest.class_counts, manifest.unlabelled) == ((23, 23, 22), 22)
    assert json.loads((folder / "spec.json").read_text()) == {"solver": "heun", "num_samples": COUNT}


def test_what_the_next_model_sees_is_what_this_one_made(folder):
    """The manifest's statistics are the norm of the model that made the pairs, not those of its samples."""
    manifest = Manifest.load(folder)
    assert latent_norm(manifest) == NORM
    assert (manifest.codec, manifest.classes, manifest.image_size) == (ORIGIN.codec, ORIGIN.classes, 24)
    stored = torch.from_numpy(read(folder)["latents"])
    seen = NORM.draw(stored, Draws(0, 0, torch.arange(COUNT), COUNT))
    torch.testing.assert_close(seen, latents(torch.arange(COUNT)), rtol=0, atol=1e-5)


def test_a_written_set_is_whole(folder):
    assert faults(folder) == []


@pytest.mark.parametrize("batch", [1, 7, 25, 200])
def test_the_bytes_do_not_depend_on_the_batches(folder, tmp_path, batch):
    assert files(write(tmp_path / "set", batch)) == files(folder)


@pytest.mark.parametrize("size", [2, 4])
def test_the_bytes_do_not_depend_on_the_ranks(folder, tmp_path, ranks, size):
    ranks.run(size, write, tmp_path / "set", 30)  # three batches: the fourth rank has none
    assert files(tmp_path / "set") == files(folder)


def test_big_samples_make_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("dit.data.shards.write.MAX_BLOCK_BYTES", 10 * 2 * 4 * CHANNELS * SIZE * SIZE + 1)
    assert Manifest.load(write(tmp_path / "set")).block == 10


def broken(index, data, eps):
    data[index == 40, 1, 2, 0] = float("nan")
    return data, eps


def test_what_fails_keeps_the_blocks_before_it_and_goes_on(folder, tmp_path):
    with pytest.raises(DataError, match="sample 40 is not finite"):
        write(tmp_path / "set", change=broken)
    assert not (tmp_path / "set").exists()
    kept = sorted(p.name for p in (tmp_path / "set.partial").iterdir())
    assert kept == ["block-00000000.npz", "block-00000001.npz", "spec.json"]

    def once(index, data, eps):
        assert int(index[0]) >= 32
        return data, eps

    assert files(write(tmp_path / "set", change=once)) == files(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_what_fails_at_once_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="sample 40 is not finite"):
        write(tmp_path / "set", 50, change=broken)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_on_one_rank_is_not_there(tmp_path, ranks):
    with pytest.raises(AssertionError, match="sample 40 is not finite"):
        ranks.run(2, write, tmp_path / "set", 30, broken)  # the second rank's
    assert not (tmp_path / "set").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="holds something else"):
        write(tmp_path / "set")
    assert (tmp_path / "set" / "thesis.tex").exists()


def test_a_folder_of_an_encode_is_not_cleared(tmp_path):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / PLAN).touch()
    with pytest.raises(OutputError, match="holds something else"):
        write(tmp_path / "set")
    assert (tmp_path / "set.partial" / PLAN).exists()


# --- reading -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """float16 latents of 31 samples with their noise."""
    root = tmp_path_factory.mktemp("stored") / "set"
    return write_dataset(root, [7, 7, 7, 3, 7], posterior=False, eps=True)


def test_everybody_else_can_read_the_records(stored):
    listing = subprocess.run(["tar", "tf", stored.path(0)], capture_output=True, text=True, check=True)
    assert listing.stdout.split()[:4] == [
        f"000000-0000.{part}.npy" for part in ("latents", "eps", "label", "id")
    ]
    first = next(iter(webdataset.WebDataset(str(stored.path(0)), shardshuffle=False).decode()))
    ours = BlockReader(stored).read(0)
    assert list(ours) == ["latents", "eps", "label", "id"]
    for name, array in ours.items():
        assert first[f"{name}.npy"].dtype == array.dtype
        assert np.array_equal(first[f"{name}.npy"], array)
    with tarfile.open(stored.path(0)) as tar:
        eps = np.load(io.BytesIO(tar.extractfile("000000-0001.eps.npy").read()), allow_pickle=False)
    assert np.array_equal(eps, noise_of(BlockReader(stored).read(1)["id"]))


def test_a_batch_brings_each_sample_its_noise(stored):
    streams = [Stream(stored, 3, 8, rank, size, lanes=4) for size, rank in ((1, 0), (2, 0), (2, 1))]
    for step in (0, 2, 11):  # the last in another epoch
        whole, *parts = (s.batch(step) for s in streams)
        assert whole.moments.shape == (8, 1, *SHAPE)
        assert (whole.eps.shape, whole.eps.dtype) == ((8, *SHAPE), torch.float32)
        assert torch.equal(whole.eps, torch.from_numpy(noise_of(whole.id.numpy())[:, 0]))
        assert torch.equal(torch.cat([p.eps for p in parts]), whole.eps)
    for stream in streams:
        stream.close()


def test_float32_stays_float32(folder):
    stream = Stream(Manifest.load(folder), 0, 10)
    batch = stream.batch(0)
    stream.close()
    assert batch.moments.dtype == torch.float32
    assert torch.equal(batch.moments[:, 0], NORM.invert(latents(batch.id)))
    assert torch.equal(batch.eps, noise(batch.id))


def test_data_without_noise_bring_none(tmp_path):
    stream = Stream(write_dataset(tmp_path / "set", [4, 4]), 0, 4)
    assert stream.batch(0).eps is None
    stream.close()


def test_an_altered_noise_is_named(tmp_path):
    made = write_dataset(tmp_path / "set", [5, 5], posterior=False, eps=True)
    data = Path(made.path(0)).read_bytes()
    flip_byte(made.path(0), data.index(noise_of(BlockReader(made).read(1)["id"])[3].tobytes()))
    with pytest.raises(DataError, match=r"record 000000-0001 .*altered"):
        BlockReader(made).read(1)
    assert any("000000-0001" in fault for fault in faults(tmp_path / "set"))


LABEL, ID = np.zeros(5, np.int64), np.zeros(5, np.uint64)
BIG, EPS = np.zeros((5, 1, *SHAPE), np.float16), np.zeros((5, 1, *SHAPE), np.float32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"latents": BIG, "label": LABEL, "id": ID}, "expected latents, eps, label and id"),
        ({"latents": BIG, "eps": EPS.view(np.int32), "label": LABEL, "id": ID}, r"eps.npy' is int32 of"),
        ({"latents": BIG, "eps": EPS[:, 0], "label": LABEL, "id": ID}, r"float32 of \(5, 2, 3, 3\)"),
        ({"latents": BIG, "noise": EPS, "label": LABEL, "id": ID}, "expected latents, eps, label and id"),
        ({"latents": BIG.view(np.int16), "eps": EPS, "label": LABEL, "id": ID}, r"latents.npy' is int16 of"),
    ],
)
def test_a_record_that_is_not_what_the_manifest_says(tmp_path, arrays, words):
    made = write_dataset(tmp_path / "set", [5], posterior=False, eps=True)
    data = b"".join(bytes(p) for p in pack("00000000", arrays))
    Path(made.path(0)).write_bytes(data)
    block = dataclasses.replace(made.blocks[0], bytes=len(data), xxh3=xxhash.xxh3_64_hexdigest(data))
    with pytest.raises(DataError, match=words):
        BlockReader(dataclasses.replace(made, blocks=(block,))).read(0)


# --- the manifest, and checking ------------------------------------------------------------------------------


def test_noise_goes_with_one_view_of_latents(tmp_path):
    for number, kind in enumerate(({"posterior": True}, {"posterior": False, "views": 2})):
        with pytest.raises(DataError, match="noise is stored with one view of latents"):
            write_dataset(tmp_path / str(number), [4], eps=True, **kind)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index, data, eps: (data, 1.2 * eps), "is not standard normal"),
        (lambda index, data, eps: (data, eps + 0.3), "is not standard normal"),
        (lambda index, data, eps: (data, eps * float("nan")), "sample(s) are not finite"),
    ],
    ids=["scaled", "shifted", "not a number"],
)
def test_noise_that_is_none_is_found(tmp_path, change, says):
    found = faults(write(tmp_path / "set", change=change))
    assert found
    assert all(says in fault for fault in found)


def test_latents_that_are_not_finite_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "isfinite", torch.ones_like)  # a writer that does not look
    assert faults(write(tmp_path / "set", change=broken)) == [
        "record 000001-0000, bytes 0 to 7168: latents of 1 sample(s) are not finite, first of sample 15"
    ]

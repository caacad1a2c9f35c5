"""Encoding: the same bytes every time, right statistics, nothing half-done that looks done."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import ConfigError, from_dict
from dit.data import DataError
from dit.data import write as write_module
from dit.data.blocks import BlockReader
from dit.data.codec import PixelCodec, VaeCodec
from dit.data.encode import EncodeOptions, encode
from dit.data.images import open_source
from dit.data.manifest import Manifest
from dit.data.verify import verify
from dit.data.write import ChannelStats
from tests.data.helpers import tiny_vae

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 images of 3 classes; the class is the red channel's mean."""
    root = tmp_path_factory.mktemp("images") / "set"
    rng = np.random.default_rng(0)
    for i in range(30):
        path = root / "abc"[i // 10] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
        pixels[..., 0] = 100 * (i // 10)
        Image.fromarray(pixels).save(path)
    return root


def options(**fields):
    return EncodeOptions(**{"image_size": 8, "block": 7, "batch_size": 4, "workers": 2, **fields})


def run(folder, out, codec=None, **fields):
    return encode(open_source(folder), codec or PixelCodec(), out, options(**fields))


def read_all(manifest):
    reader = BlockReader(manifest)
    records = [reader.read(i) for i in range(len(manifest.blocks))]
    return {name: np.concatenate([r[name] for r in records]) for name in records[0]}


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("posterior", ["moments", "sample"])
def test_the_same_bytes_every_time(folder, tmp_path, posterior):
    for out, workers in (("a", 1), ("b", 3)):
        run(folder, tmp_path / out, VaeCodec(tiny_vae()), posterior=posterior, workers=workers, shard_mb=0.01)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    run(folder, tmp_path / "c", VaeCodec(tiny_vae()), posterior=posterior, seed=1, shard_mb=0.01)
    assert files(tmp_path / "a")["shard-000000.tar"] != files(tmp_path / "c")["shard-000000.tar"]


def test_what_is_written_is_what_went_in(folder, tmp_path):
    source, codec = open_source(folder), VaeCodec(tiny_vae())
    run(folder, tmp_path / "out", codec, shard_mb=0.01)
    manifest = Manifest.load(tmp_path / "out")
    data = read_all(manifest)
    assert sorted(data["id"].tolist()) == list(range(30))
    assert manifest.read_names() == list(source.names)
    assert np.array_equal(data["label"], source.labels[data["id"].astype(int)])
    images = torch.from_numpy(np.stack([source.load(int(i), 8) for i in data["id"]])).permute(0, 3, 1, 2)
    x = images.float() / 127.5 - 1
    expected = torch.stack([codec.encode(x), codec.encode(x.flip(-1))], 1)  # (30, 2, 2, 3, 4, 4)
    np.testing.assert_allclose(data["moments"].astype(np.float32), expected, rtol=1e-3, atol=1e-4)
    assert manifest.shape == (2, 2, 3, 4, 4)
    assert manifest.views == ("original", "flipped")
    assert (manifest.image_size, manifest.input_size, manifest.posterior) == (8, (4, 4), "moments")
    assert (manifest.classes, manifest.class_counts, manifest.unlabelled) == (tuple("abc"), (10, 10, 10), 0)
    assert manifest.codec == codec.identity()
    assert [b.samples for b in manifest.blocks] == [7, 7, 7, 7, 2]
    assert len(manifest.shards) > 1
    assert all(s.bytes <= 10_000 for s in manifest.shards)
    assert [f for f in verify(manifest) if f is not None] == []


def test_statistics_are_those_of_a_float64_reference(folder, tmp_path):
    manifest = run(folder, tmp_path / "out", VaeCodec(tiny_vae())).manifest
    moments = read_all(Manifest.load(tmp_path / "out"))["moments"].astype(np.float64)
    mean, std = moments[:, :, 0], moments[:, :, 1]
    axes = (0, 1, 3, 4)
    np.testing.assert_allclose(manifest.mean, mean.mean(axes), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(manifest.std, np.sqrt(mean.var(axes) + (std**2).mean(axes)), rtol=1e-12)


def test_the_statistics_are_those_of_draws(folder, tmp_path):
    """Var[mean] + E[std^2] is the variance of what training sees."""
    moments = run(folder, tmp_path / "moments", VaeCodec(tiny_vae())).manifest
    sample = run(folder, tmp_path / "sample", VaeCodec(tiny_vae()), posterior="sample").manifest
    assert (sample.array, sample.posterior, sample.shape) == ("latents", "sample", (2, 3, 4, 4))
    np.testing.assert_allclose(sample.std, moments.std, rtol=0.1)  # 960 draws a channel: 2.3% standard error


def test_merging_is_stable():
    """Latents far from zero: a sum of squares in float32, or a naive one in float64, loses them."""
    rng = np.random.default_rng(0)
    data = 3e4 + 1e-3 * rng.standard_normal((64, 1, 2, 4, 4))
    stats = ChannelStats()
    for part in np.split(data, [1, 5, 40]):
        stats.add(part)
    np.testing.assert_allclose(stats.mean, data.mean((0, 1, 3, 4)), rtol=1e-14)
    np.testing.assert_allclose(stats.std, data.std((0, 1, 3, 4)), rtol=1e-7)


def test_pixels(folder, tmp_path):
    run(folder, tmp_path / "out", flip=False)
    manifest = Manifest.load(tmp_path / "out")
    data = read_all(manifest)
    assert (manifest.array, manifest.posterior, manifest.views) == ("latents", "none", ("original",))
    source = open_source(folder)
    for i, latents in zip(data["id"], data["latents"], strict=True):
        pixels = np.rint((latents[0].astype(np.float32) + 1) * 127.5).astype(np.uint8)
        assert np.array_equal(pixels.transpose(1, 2, 0), source.load(int(i), 8))  # float16 keeps all 8 bits


def test_classes_are_mixed(folder, tmp_path):
    labels = read_all(run(folder, tmp_path / "out", flip=False).manifest.load(tmp_path / "out"))["label"]
    assert (np.diff(labels) != 0).sum() > 10  # 2 in the order of the folders, 20 expected


def test_blocks_of_big_samples_hold_fewer(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "MAX_BLOCK_BYTES", 4 * 2 * 3 * 8 * 8 * 2 + 1)
    manifest = run(folder, tmp_path / "out").manifest
    assert manifest.block == 4
    assert {b.samples for b in manifest.blocks} == {4, 2}


# --- faults ------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folder, tmp_path):
    """The images with two that cannot be read."""
    root = tmp_path / "damaged"
    for path in sorted(folder.rglob("*.png")):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        (root / path.parent.name / path.name).write_bytes(data[:60] if path.stem in ("03", "17") else data)
    return root


@pytest.mark.parametrize("max_bad", [0, 1])
def test_damaged_images_stop_it(damaged, tmp_path, max_bad):
    with pytest.raises(
        DataError, match=rf"{max_bad + 1} image\(s\) cannot be read, {max_bad} allowed"
    ) as error:
        run(damaged, tmp_path / "out", max_bad=max_bad)
    assert "a/03.png" in str(error.value) or "b/17.png" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


def test_damaged_images_may_be_left_out(damaged, tmp_path):
    report = run(damaged, tmp_path / "out", max_bad=2)
    assert "2 unreadable left out: " in str(report)
    manifest = Manifest.load(tmp_path / "out")
    assert set(manifest.bad) == {"a/03.png", "b/17.png"}
    assert manifest.class_counts == (9, 9, 10)
    ids = read_all(manifest)["id"].tolist()
    assert sorted(ids) == [i for i in range(30) if i not in (3, 17)]  # the others keep their ids
    assert [f for f in verify(manifest) if f is not None] == []


def test_only_damaged_images(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 images can be read, first a.png"):
        run(tmp_path / "set", tmp_path / "out", max_bad=5)


def test_latents_that_are_not_finite_are_named(folder, tmp_path):
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(torch.inf)
    with pytest.raises(
        DataError, match=r"[abc]/\d\d.png: the codec gives latents that are not finite in float16"
    ):
        run(folder, tmp_path / "out", VaeCodec(vae))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(folder, tmp_path):
    def interrupt(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(open_source(folder), PixelCodec(), tmp_path / "out", options(), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_encode_is_never_taken_for_a_finished_one(folder, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from dit.data.codec import PixelCodec\n"
        "from dit.data.encode import EncodeOptions, encode\n"
        "from dit.data.images import open_source\n"
        "kill = lambda images: os.kill(os.getpid(), signal.SIGKILL)\n"
        "encode(open_source(sys.argv[1]), PixelCodec(), sys.argv[2], EncodeOptions(image_size=8, batch_size=9), kill)\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "out")]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    for name in ("out", "out.partial"):
        with pytest.raises(DataError, match=r"no manifest.json"):
            Manifest.load(tmp_path / name)
    run(folder, tmp_path / "out")  # the next one clears what was left
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert Manifest.load(tmp_path / "out").samples == 30


def test_a_folder_in_use_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    run(folder, tmp_path / "out")  # an empty one is taken
    before = files(tmp_path / "out")
    with pytest.raises(DataError, match="out exists already"):
        run(folder, tmp_path / "out")
    assert files(tmp_path / "out") == before
    (tmp_path / "other.partial").mkdir()
    descriptor = os.open(tmp_path / "other.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="is being written by another process"):
        run(folder, tmp_path / "other")
    os.close(descriptor)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"block": 0}, "block is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"shard_mb": 0}, "shard_mb must be above 0"),
        ({"max_bad": -1}, "max_bad and workers at least 0"),
        ({"posterior": "mean"}, "posterior: "),
    ],
)
def test_impossible_options(fields, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(EncodeOptions, {"image_size": 8, **fields})


def test_an_image_size_that_the_codec_cannot_halve(folder, tmp_path):
    with pytest.raises(ConfigError, match="image_size 9 is not a multiple of the codec's factor 2"):
        run(folder, tmp_path / "out", VaeCodec(tiny_vae()), image_size=9)

"""Encoding in one process: the same bytes every time, right statistics, nothing half-done that looks done.

Several ranks, and ranks that are killed: test_ranks.py.
"""

import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from dit.config import ConfigError, from_dict
from dit.data import DataError
from dit.data.codecs.autoencoders import VaeCodec
from dit.data.codecs.codec import PixelCodec
from dit.data.encoding.encode import EncodeOptions, encode
from dit.data.encoding.job import planned
from dit.data.shards import write as write_module
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.verify import verify
from dit.data.shards.write import PLAN
from dit.data.sources.crops import RandomResized
from dit.data.sources.decode import Decode
from dit.data.sources.images import open_source
from dit.errors import Notice
from tests.data.helpers import tiny_vae


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


def partial(tmp_path):
    """What is in out.partial."""
    return sorted(p.name for p in (tmp_path / "out.partial").iterdir())


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


def test_the_bytes_of_pixels_do_not_depend_on_the_batches(folder, tmp_path):
    for out, size in (("a", 1), ("b", 7), ("c", 100)):
        run(folder, tmp_path / out, batch_size=size)
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_float32(folder, tmp_path):
    source, codec = open_source(folder), VaeCodec(tiny_vae())
    run(folder, tmp_path / "out", codec, dtype="float32", flip=False, batch_size=30, block=30)
    manifest = Manifest.load(tmp_path / "out")
    data = read_all(manifest)
    images = torch.from_numpy(np.stack([source.load(int(i), 8) for i in data["id"]])).permute(0, 3, 1, 2)
    assert (manifest.dtype, data["moments"].dtype) == ("float32", np.float32)
    assert np.array_equal(data["moments"][:, 0], codec.encode(images.float() / 127.5 - 1))
    assert [f for f in verify(manifest) if f is not None] == []


def test_random_crops(folder, tmp_path):
    crop = RandomResized(scale_min=0.3)
    manifest = run(folder, tmp_path / "out", crop=crop, seed=4).manifest
    assert manifest.transform == f"{Decode().text}; {crop.text}"
    data, source = read_all(Manifest.load(tmp_path / "out")), open_source(folder)
    for i, latents in zip(data["id"], data["latents"], strict=True):
        for view, pixels in zip(
            latents, (expected := source.load(int(i), 8, crop, 4), expected[:, ::-1]), strict=True
        ):
            assert np.array_equal(np.rint((view.astype(np.float32) + 1) * 127.5).transpose(1, 2, 0), pixels)


def test_progress_and_report(folder, tmp_path):
    told, resumed = [], []
    report = encode(
        open_source(folder), PixelCodec(), tmp_path / "out", options(), told.append, resumed=resumed.append
    )
    assert (sum(told), resumed) == (30, [0])
    assert (report.images, report.resumed, report.ranks) == (30, 0, 1)
    assert 0 < report.decoding + report.codec + report.writing <= report.busy <= report.whole
    assert "30 images in 2 view(s) -> 5 block(s) in 5 shard(s) of up to 0.00922 MB: " in str(report)


# --- going on ----------------------------------------------------------------------------------------------


def stop_after(images):
    """A progress function that stops the encode after so many."""
    seen = 0

    def progress(more):
        nonlocal seen
        seen += more
        if seen >= images:
            raise KeyboardInterrupt

    return progress


def test_an_encode_that_was_stopped_goes_on(folder, tmp_path):
    run(folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(folder), PixelCodec(), tmp_path / "out", options(), stop_after(16))
    assert partial(tmp_path) == ["parts", PLAN, "run", "shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(DataError, match=r"out.partial: its encode is unfinished"):
        Manifest.load(tmp_path / "out.partial")
    told, resumed = [], []
    report = encode(
        open_source(folder), PixelCodec(), tmp_path / "out", options(), told.append, resumed=resumed.append
    )
    assert (sum(told), resumed, report.images, report.resumed) == (16, [14], 16, 14)
    assert "; 14 images were done before" in str(report)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_the_same_command_again_changes_nothing(folder, tmp_path):
    (tmp_path / "out").mkdir()
    run(folder, tmp_path / "out")  # an empty one is taken
    before = files(tmp_path / "out")
    (tmp_path / "out" / PLAN).write_text("{}")  # its writer was killed before the very last step
    report = run(folder, tmp_path / "out", workers=1, max_bad=7)
    assert "all was there already" in str(report)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "fields", [{"seed": 1}, {"flip": False}, {"block": 6}, {"dtype": "float32"}, {"image_size": 4}]
)
def test_another_command_is_refused(folder, tmp_path, fields):
    run(folder, tmp_path / "out")
    before = files(tmp_path / "out")
    key = next(iter(fields))
    named = {"block": r".*block: 7 there, 6 here"}.get(key, f"{key}: ")
    with pytest.raises(DataError, match=rf"out exists already, and is something else \({named}"):
        run(folder, tmp_path / "out", **fields)
    assert files(tmp_path / "out") == before
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(folder), PixelCodec(), tmp_path / "new", options(), stop_after(1))
    with pytest.raises(DataError, match=rf"new.partial is of another command \({key}: "):
        run(folder, tmp_path / "new", **fields)


def test_what_is_no_data_set_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"out exists already, and is no data set: remove it"):
        run(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_images_that_changed_in_between_are_refused(folder, tmp_path):
    source = open_source(folder)
    with pytest.raises(KeyboardInterrupt):
        encode(source, PixelCodec(), tmp_path / "out", options(), stop_after(16))
    fewer = replace(source, names=source.names[:-1], labels=source.labels[:-1])
    with pytest.raises(DataError, match=r"begun with other images: 30 there, 29 here; give it back"):
        encode(fewer, PixelCodec(), tmp_path / "out", options())
    relabelled = replace(source, labels=source.labels[::-1])
    with pytest.raises(DataError, match=r"begun with other labels of the same images; give it back"):
        encode(relabelled, PixelCodec(), tmp_path / "out", options())
    other_vae = VaeCodec(tiny_vae())
    with pytest.raises(DataError, match=r"another command \(another codec: 'pixels' there, 'vae' here"):
        encode(source, other_vae, tmp_path / "out", options())


@pytest.mark.parametrize("lost", ["record", "shard", "half a shard", "all records"])
def test_what_is_lost_is_made_again(folder, tmp_path, lost):
    run(folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(folder), PixelCodec(), tmp_path / "out", options(), stop_after(23))
    there = tmp_path / "out.partial"
    shard = there / "shard-000001.tar"
    for path in {"record": ["parts/000001.json"], "shard": [shard.name]}.get(lost, []):
        (there / path).unlink()
    if lost == "half a shard":
        os.truncate(shard, shard.stat().st_size // 2)
    if lost == "all records":
        for path in there.glob("parts/*.json"):
            path.unlink()
    run(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_rank_that_was_killed_at_the_last_step(folder, tmp_path):
    """The manifest is there, some of what ranks share is gone already."""
    run(folder, tmp_path / "out")
    whole = files(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(folder), PixelCodec(), tmp_path / "new", options(), stop_after(30))
    for name, content in whole.items():
        (tmp_path / "new.partial" / name).write_bytes(content)
    for path in sorted((tmp_path / "new.partial" / "parts").iterdir())[::2]:
        path.unlink()
    run(folder, tmp_path / "new")
    assert files(tmp_path / "new") == whole


# --- faults ------------------------------------------------------------------------------------------------


def damage(folder, root, stems):
    """The images with some that cannot be read."""
    for path in sorted(folder.rglob("*.png")):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        (root / path.parent.name / path.name).write_bytes(data[:60] if path.stem in stems else data)
    return root


@pytest.fixture
def damaged(folder, tmp_path):
    return damage(folder, tmp_path / "damaged", ("03", "17"))


@pytest.mark.parametrize("max_bad", [0, 1])
def test_damaged_images_are_listed_at_the_end(damaged, tmp_path, max_bad):
    with pytest.raises(DataError, match=rf"2 image\(s\) cannot be read, {max_bad} allowed") as error:
        run(damaged, tmp_path / "out", max_bad=max_bad)
    listed = (tmp_path / "out.partial" / "bad.txt").read_text().splitlines()
    assert sorted(line.split(": ")[0] for line in listed) == ["a/03.png", "b/17.png"]
    assert all(line in str(error.value) for line in listed)
    assert len([n for n in partial(tmp_path) if n.endswith(".tar")]) == 5  # nothing done is lost
    assert not (tmp_path / "out").exists()


def moments_by_id(folder):
    data = read_all(Manifest.load(folder))
    return dict(zip(data["id"].tolist(), data["moments"], strict=True))


def test_damaged_images_may_be_left_out(folder, damaged, tmp_path):
    report = run(damaged, tmp_path / "out", VaeCodec(tiny_vae()), max_bad=2)
    assert "2 unreadable left out: " in str(report)
    manifest = Manifest.load(tmp_path / "out")
    assert set(manifest.bad) == {"a/03.png", "b/17.png"}
    assert manifest.class_counts == (9, 9, 10)
    assert [f for f in verify(manifest) if f is not None] == []
    run(folder, tmp_path / "whole", VaeCodec(tiny_vae()))
    ours, whole = moments_by_id(tmp_path / "out"), moments_by_id(tmp_path / "whole")
    assert sorted(ours) == [i for i in range(30) if i not in (3, 17)]  # the others keep their ids
    assert all(np.array_equal(values, whole[i]) for i, values in ours.items())  # to the last bit


def test_what_was_left_out_before_is_not_taken_where_none_may_be(damaged, tmp_path):
    run(damaged, tmp_path / "out", max_bad=2, shard_mb=0.01)
    before = files(tmp_path / "out")
    said = r"without 2 image\(s\) .*\.png, .*\.png\), {} allowed: take it as it is with --max_bad=2, or mend them"
    for allowed in (0, 1):
        with pytest.raises(DataError, match=said.format(allowed)):
            run(damaged, tmp_path / "out", max_bad=allowed, shard_mb=0.01)
    report = run(damaged, tmp_path / "out", max_bad=2, shard_mb=0.01)
    assert "all was there already; 2 unreadable left out: " in str(report)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("bad", ["none", "some"])
def test_other_shards_are_something_else(folder, tmp_path, monkeypatch, bad):
    """With images left out, too."""
    images = damage(folder, tmp_path / "images", ("03", "17") if bad == "some" else ())
    monkeypatch.setattr("dit.data.encoding.parts.MANY", 1)
    run(images, tmp_path / "out", max_bad=2, shard_mb=1)
    with pytest.raises(
        DataError, match=r"is something else \(shards.shard-000000.tar: (28|30) there, [567] here"
    ):
        run(images, tmp_path / "out", max_bad=2, shard_mb=0.001)
    run(images, tmp_path / "out", max_bad=2, shard_mb=2)  # the same shards


@pytest.mark.parametrize("field", ["samples", "class_counts"])
def test_a_set_without_other_images_is_something_else(damaged, tmp_path, field):
    """What can be counted follows from the images left out."""
    run(damaged, tmp_path / "out", max_bad=2)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.samples == 28
    other = {"samples": {"bad": manifest.bad[:1]}, "class_counts": {"bad": ("c/29.png", "c/28.png")}}[field]
    replace(manifest, **other).save(tmp_path / "out")
    with pytest.raises(DataError, match=rf"is something else \(.*{field}: "):
        run(damaged, tmp_path / "out", max_bad=2)


def test_a_larger_budget_finishes_what_is_there(damaged, tmp_path):
    run(damaged, tmp_path / "at once", max_bad=2)
    with pytest.raises(DataError, match="0 allowed"):
        run(damaged, tmp_path / "out")
    made = {p.name: p.stat().st_ino for p in (tmp_path / "out.partial").glob("*.tar")}
    report = run(damaged, tmp_path / "out", max_bad=2)
    assert (report.images, report.resumed) == (0, 30)
    assert {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.tar")} == made
    assert files(tmp_path / "out") == files(tmp_path / "at once")


def test_mended_images_are_taken_in(folder, damaged, tmp_path):
    run(folder, tmp_path / "whole")
    with pytest.raises(DataError, match="2 image"):
        run(damaged, tmp_path / "out")
    shutil.copy(folder / "a" / "03.png", damaged / "a" / "03.png")
    with pytest.raises(DataError, match="1 image"):
        run(damaged, tmp_path / "out")
    shutil.copy(folder / "b" / "17.png", damaged / "b" / "17.png")
    made = {p.name: p.stat().st_ino for p in (tmp_path / "out.partial").glob("*.tar")}
    report = run(damaged, tmp_path / "out")
    assert report.images == 7  # of the one part that lacked something
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (
        sum(
            {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.tar")}[n] == i
            for n, i in made.items()
        )
        == 4
    )


def test_a_part_that_is_written_again_is_not_done_meanwhile(folder, damaged, tmp_path):
    """Else a shard could meet the record of the one before it."""
    with pytest.raises(DataError, match="2 image"):
        run(damaged, tmp_path / "out")
    shutil.copy(folder / "a" / "03.png", damaged / "a" / "03.png")
    assert len(list((tmp_path / "out.partial").glob("parts/*.json"))) == 5
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(damaged), PixelCodec(), tmp_path / "out", options(), stop_after(1))
    assert len(list((tmp_path / "out.partial").glob("parts/*.json"))) == 4


def test_an_image_that_is_mended_while_it_runs(folder, damaged, tmp_path):
    run(folder, tmp_path / "whole")
    shutil.copy(folder / "a" / "03.png", damaged / "a" / "03.png")
    told = []

    def mend(more):
        told.append(more)
        if sum(told) == 30:
            shutil.copy(folder / "b" / "17.png", damaged / "b" / "17.png")

    encode(open_source(damaged), PixelCodec(), tmp_path / "out", options(), mend)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_images_of_a_finished_part_are_not_read_again(folder, tmp_path):
    run(folder, tmp_path / "whole")
    images = damage(folder, tmp_path / "images", ())
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(images), PixelCodec(), tmp_path / "out", options(), stop_after(30))
    ids = BlockReader(Manifest.load(tmp_path / "whole")).read(0)["id"]
    damage(images, images, [f"{i:02d}" for i in ids])
    run(images, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_only_damaged_images(tmp_path):
    (tmp_path / "set").mkdir()
    for name in "abc":
        (tmp_path / "set" / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 3 images can be read, first [abc].png: "):
        run(tmp_path / "set", tmp_path / "out", max_bad=5, block=1)


def test_a_part_without_a_readable_image_has_no_shard(folder, tmp_path):
    first = run(folder, tmp_path / "whole", block=2).manifest
    ids = BlockReader(Manifest.load(tmp_path / "whole")).read(0)["id"]
    damaged = damage(folder, tmp_path / "damaged", [f"{i:02d}" for i in ids])
    manifest = run(damaged, tmp_path / "out", max_bad=2, block=2).manifest
    assert "all was there already" in str(run(damaged, tmp_path / "out", max_bad=2, block=2))
    assert [s.name for s in manifest.shards] == [s.name for s in first.shards[1:]]
    assert [f for f in verify(Manifest.load(tmp_path / "out")) if f is not None] == []


def test_with_very_many_damaged_images_it_gives_up(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(200):
        (tmp_path / "set" / f"{i:03d}.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"104 image\(s\) cannot be read, 3 allowed; gave up looking for more"
    ):
        run(tmp_path / "set", tmp_path / "out", max_bad=3)
    assert len((tmp_path / "out.partial" / "bad.txt").read_text().splitlines()) == 104


@pytest.mark.parametrize(
    ("factor", "dtype", "says"),
    [
        (torch.inf, torch.float32, "the codec gives latents that are not finite; take another codec"),
        (1e6, torch.float16, "that are not finite; set codec.dtype to float32 (it is float16)"),
        (1e6, torch.float32, "and are not finite in float16; try --dtype=float32"),
    ],
)
def test_latents_that_are_not_finite_are_named(folder, tmp_path, factor, dtype, says):
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(factor)
    codec = VaeCodec(vae, dtype)
    with pytest.raises(DataError, match=rf"[abc]/\d\d.png: .*{re.escape(says)}"):
        run(folder, tmp_path / "out", codec)
    assert partial(tmp_path) == ["parts", PLAN, "run"]


def test_a_codec_that_does_not_keep_its_promise(folder, tmp_path):
    codec = VaeCodec(tiny_vae())
    codec.channels = 5
    with pytest.raises(DataError, match=r"the codec gives \(2, 2, 3, 4, 4\) an image, not \(2, 2, 5, 4, 4\)"):
        run(folder, tmp_path / "out", codec)


def test_where_nothing_can_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file is a file, and no folder can be made in it"):
        run(folder, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 0}, "image_size: .* got 0"),
        ({"image_size": 10**12}, "image_size: .* 8192.* got 1000000000000"),
        ({"block": 0}, "block: .* got 0"),
        ({"batch_size": -1}, "batch_size: .* got -1"),
        ({"shard_mb": 0}, "shard_mb: .* got 0"),
        ({"max_bad": -1}, "max_bad: .* got -1"),
        ({"workers": -1}, "workers: .* got -1"),
        ({"posterior": "mean"}, "posterior: "),
        ({"dtype": "float64"}, "dtype: "),
        ({"crop": "center"}, "did you mean centre"),
    ],
)
def test_impossible_options(fields, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(EncodeOptions, {"image_size": 8, **fields})


def test_a_batch_that_no_memory_holds(folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"batch_size 64 at image_size 8192 takes 48 GiB a batch, .*lower batch_size"
    ):
        run(folder, tmp_path / "out", image_size=8192, batch_size=64)
    assert list(tmp_path.iterdir()) == []


def test_out_in_a_folder_that_is_not_there_yet(folder, tmp_path):
    run(folder, tmp_path / "new" / "deep" / "out")
    assert Manifest.load(tmp_path / "new" / "deep" / "out").samples == 30


def test_out_or_what_is_beside_it_is_a_file(folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="out is a file: remove it or choose another name"):
        run(folder, tmp_path / "out")
    (tmp_path / "new.partial").write_text("mine")
    with pytest.raises(DataError, match=r"new.partial is a file: remove it or choose another OUT"):
        run(folder, tmp_path / "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"out": "mine", "new.partial": "mine"}


def test_an_image_size_that_the_codec_cannot_halve(folder, tmp_path):
    with pytest.raises(ConfigError, match="image_size 9 is not a multiple of the codec's factor 2"):
        run(folder, tmp_path / "out", VaeCodec(tiny_vae()), image_size=9)
    assert list(tmp_path.iterdir()) == []


# --- how files become pixels -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """20 images in one class: 0 to 4 on their sides, 5 to 11 half transparent, the others as they are."""
    root = tmp_path_factory.mktemp("odd") / "set"
    (root / "c").mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for i in range(20):
        how = {"exif": exif} if i < 5 else {}
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (10, 8, 3), np.uint8))
        if 5 <= i < 12:
            picture.putalpha(128)
        picture.save(root / "c" / f"{i:02d}.png", **how)
    return root


COUNTED = {"turned": 5, "transparent": 7}


def test_what_was_done_to_images_is_counted_and_recorded(odd, tmp_path):
    report = run(odd, tmp_path / "out", flip=False)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.counted == report.manifest.counted == COUNTED
    assert manifest.transform.startswith(
        "upright by EXIF orientation; ICC profiles to sRGB; transparency on white; "
    )
    assert (
        "note: of 20 images, 5 turned upright by their EXIF orientation\nnote: of 20 images, 7 with"
        in str(report)
    )
    assert "note: of 20 images, 5 turned" in str(
        run(odd, tmp_path / "out", flip=False)
    )  # all was there already
    data, source = read_all(manifest), open_source(odd)
    for i, latents in zip(data["id"], data["latents"], strict=True):
        got = np.rint((latents[0].astype(np.float32) + 1) * 127.5).astype(np.uint8)
        assert np.array_equal(got.transpose(1, 2, 0), source.load(int(i), 8))


def test_counts_survive_a_stop(odd, tmp_path):
    run(odd, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(odd), PixelCodec(), tmp_path / "out", options(), stop_after(8))
    run(odd, tmp_path / "out")
    assert Manifest.load(tmp_path / "out").counted == COUNTED
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_images_left_out_are_not_counted(odd, tmp_path):
    shutil.copytree(odd, tmp_path / "set")
    for name in ("00", "05"):
        (tmp_path / "set" / "c" / f"{name}.png").write_bytes(b"")
    manifest = run(tmp_path / "set", tmp_path / "out", max_bad=2).manifest
    assert manifest.counted == {"turned": 4, "transparent": 6}


def test_nothing_is_counted_of_ordinary_images(folder, tmp_path):
    manifest = run(folder, tmp_path / "out").manifest
    assert manifest.counted == {}
    assert "counted" not in json.loads((tmp_path / "out" / "manifest.json").read_bytes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exif": "ignore"}, "exif: 'turn' there, 'ignore' here"),
        ({"background": "black"}, "background: '#ffffff' there, '#000000' here"),
        ({"icc": "ignore"}, "icc: 'convert' there, 'ignore' here"),
    ],
)
def test_other_pixels_are_another_command(odd, tmp_path, change, words):
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(odd), PixelCodec(), tmp_path / "out", options(), stop_after(8))
    with pytest.raises(DataError, match=rf"of another command \({words}\)"):
        run(odd, tmp_path / "out", decode=Decode(**change))
    run(odd, tmp_path / "out")
    with pytest.raises(DataError, match=r"is something else \(crop, exif, icc or background: "):
        run(odd, tmp_path / "out", decode=Decode(**change))


def test_more_pixels_may_be_allowed_when_going_on(odd, tmp_path):
    with pytest.raises(DataError, match=r"8 x 10 = 80 pixels, expected at most 79; --max_pixels=80 takes it"):
        run(odd, tmp_path / "out", decode=Decode(max_pixels=79))
    assert run(odd, tmp_path / "out", decode=Decode(max_pixels=80)).manifest.samples == 20


# --- data sets from before there was a choice --------------------------------------------------------------


def older(folder, out, stop=None):
    """What an older version wrote, or began to: its plan says nothing of how files become pixels."""
    source, fields = open_source(folder), options(decode=None)
    if stop is None:
        return encode(source, PixelCodec(), out, fields)
    with pytest.raises(KeyboardInterrupt):
        encode(source, PixelCodec(), out, fields, stop_after(stop))
    assert "decode" not in json.loads((out.with_name(out.name + ".partial") / PLAN).read_bytes())["options"]
    return None


def test_what_an_older_version_began_goes_on_as_it_was(odd, tmp_path):
    older(odd, tmp_path / "whole")
    older(odd, tmp_path / "out", 8)
    with pytest.warns(
        Notice, match="is of an older version and stays as it was begun: no image is turned upright"
    ):
        run(odd, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert Manifest.load(tmp_path / "out").transform == options().crop.text
    with pytest.warns(Notice, match="older version"):
        assert "all was there already" in str(run(odd, tmp_path / "out"))
    run(odd, tmp_path / "new")
    assert files(tmp_path / "new")["shard-000000.tar"] != files(tmp_path / "out")["shard-000000.tar"]


def test_an_older_one_does_not_go_on_in_another_way(odd, tmp_path):
    older(odd, tmp_path / "out", 8)
    with pytest.raises(DataError, match="older version, which had no --exif, --background and --icc"):
        run(odd, tmp_path / "out", decode=Decode(background="black"))
    with pytest.warns(Notice, match="older version"):
        run(odd, tmp_path / "out", decode=Decode(max_pixels=10**9))


def test_plans_of_older_versions_have_kept_their_form():
    """To the digit what the version before wrote for these options."""
    assert planned(PixelCodec(), options(decode=None))["options"] == {
        "image_size": 8,
        "flip": True,
        "block": 7,
        "shard_mb": 512.0,
        "seed": 0,
        "batch_size": 4,
        "posterior": "moments",
        "dtype": "float16",
        "crop": {"name": "centre"},
    }


# --- numeric class folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numeric(tmp_path_factory):
    """12 class folders, 0 to 11, of three images each."""
    root = tmp_path_factory.mktemp("numeric") / "set"
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (36, 8, 8, 3), np.uint8)):
        (root / str(i % 12)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / str(i % 12) / f"{i}.png")
    return root


def as_text(source):
    """As versions before numbered the classes."""
    return replace(source.numbered_by(tuple(sorted(source.classes))), classes_before=None)


def test_numeric_folders_are_sorted_as_numbers(numeric, tmp_path):
    manifest = run(numeric, tmp_path / "out").manifest
    assert manifest.classes == tuple(map(str, range(12)))
    names, stored = manifest.read_names(), read_all(manifest)
    folders = [int(names[i].split("/")[0]) for i in stored["id"].tolist()]
    assert folders == stored["label"].tolist()


def test_what_was_begun_or_done_in_the_order_of_text_goes_on_in_it(numeric, tmp_path):
    source = open_source(numeric)
    encode(as_text(source), PixelCodec(), tmp_path / "before", options())
    done = files(tmp_path / "before")
    with pytest.raises(KeyboardInterrupt):
        encode(as_text(source), PixelCodec(), tmp_path / "out", options(), progress=stop_after(9))
    assert (tmp_path / "out.partial" / PLAN).exists()
    for out in ("out", "before"):
        assert run(numeric, tmp_path / out).manifest.classes == tuple(sorted(map(str, range(12))))
        assert files(tmp_path / out) == done
    assert run(numeric, tmp_path / "new").manifest.classes == tuple(map(str, range(12)))


def test_what_an_older_version_began_keeps_its_classes_and_its_way_of_decoding(numeric, tmp_path):
    source = as_text(open_source(numeric))
    encode(source, PixelCodec(), tmp_path / "whole", options(decode=None))
    with pytest.raises(KeyboardInterrupt):
        encode(source, PixelCodec(), tmp_path / "out", options(decode=None), stop_after(9))
    for _ in range(2):  # goes on, and is there already
        with pytest.warns(Notice, match="is of an older version and stays as it was begun"):
            manifest = run(numeric, tmp_path / "out").manifest
        assert manifest.classes == tuple(sorted(map(str, range(12))))
        assert manifest.transform == options().crop.text
        assert files(tmp_path / "out") == files(tmp_path / "whole")

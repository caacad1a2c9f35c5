"""tools/shards.py: what it says of whole and of broken data sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit.config import ConfigError
from dit.data import DataError
from dit.data.shards.manifest import Manifest
from tests.data.foreign.foreign_shards import array_of, write_shards
from tests.data.helpers import edit_manifest, flip_byte, write_dataset
from tests.data.storage.http_server import serving
from tools.shards import index, info, verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "set", [4, 4, 4, 4, 2], views=2)


def faults(manifest, capsys, **options):
    with pytest.raises(SystemExit) as end:
        verify(manifest.root, **options)
    assert end.value.code == 1
    return capsys.readouterr().out


def test_a_whole_data_set(manifest, capsys):
    verify(manifest.root)
    assert "18 samples in 5 blocks are whole" in capsys.readouterr().out


def test_an_altered_byte(manifest, capsys):
    block = manifest.blocks[1]
    flip_byte(manifest.path(0), block.offset + 999)
    out = faults(manifest, capsys)
    assert "shard-000000.tar  -" in out
    assert "sha256" in out
    assert f"record 000000-0001, bytes {block.offset} to {block.offset + block.bytes}" in out
    assert "altered: its xxh3" in out
    assert "record 000000-0000" not in out


def test_a_truncated_shard(manifest, capsys):
    block = manifest.blocks[2]
    os.truncate(manifest.path(0), block.offset + 10)
    out = faults(manifest, capsys)
    assert f"{block.offset + 10} bytes, the manifest says {manifest.shards[0].bytes}" in out
    assert "record 000000-0002" in out
    assert f"truncated: the file ends at byte {block.offset + 10}" in out


def test_a_missing_shard(manifest, capsys):
    Path(manifest.path(1)).unlink()
    out = faults(manifest, capsys)
    assert "shard-000001.tar  -" in out
    assert "missing" in out
    assert "1 fault(s)" in out


def test_bytes_after_the_last_block(manifest, capsys):
    flip_byte(manifest.path(0), manifest.shards[0].bytes - 1)
    assert "shard-000000.tar  -" in faults(manifest, capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": [8.0, 8.625]}, "mean"),
        ({"std": [5.0, 5.3]}, "std"),
        ({"class_counts": [3, 4, 4, 4, 3]}, "class_counts"),
        ({"names": {"file": "names.txt", "count": 17, "sha256": "x"}}, "names.txt"),
    ],
)
def test_a_manifest_that_says_something_else(manifest, capsys, changes, words):
    edit_manifest(manifest.root, **changes)
    assert words in faults(manifest, capsys)


def test_info(manifest, capsys):
    info(manifest.root)
    out = capsys.readouterr().out
    for words in ("18 in 5 block(s)", "moments float16 2 x 2 x 2 x 3 x 3", "made up", manifest.digest, "a  "):
        assert words in out


def test_info_says_what_was_done_to_images(manifest, capsys):
    edit_manifest(manifest.root, counted={"turned": 3, "transparent": 1})
    info(manifest.root)
    assert "3 turned upright by their EXIF orientation; 1 with transparency" in capsys.readouterr().out
    info(manifest.root, json=True)
    assert json.loads(capsys.readouterr().out)["counted"] == {"turned": 3, "transparent": 1}


def test_info_says_in_a_few_words_what_the_codec_is(tmp_path, capsys):
    config = {"block_out_channels": [128, 256], "latent_channels": 4, "in_channels": 3, "mid": "x" * 600}
    for codec, words in (
        (
            {"name": "vae", "config": config, "sha256": "0123456789abcdef"},
            "vae, 128-256, 4 channels, weights 01234567",
        ),
        (
            {"name": "vae", "class": "AutoencoderDC", "channels": 32, "config": {"a": 1}},
            "vae, AutoencoderDC, 32 channels",
        ),
        ({"name": "pixels"}, "pixels"),
    ):
        made = write_dataset(tmp_path / words, [4, 4], codec=codec)
        info(made.root)
        assert f"\ncodec        {words}\n" in capsys.readouterr().out
        info(made.root, json=True)
        assert json.loads(capsys.readouterr().out)["codec"] == codec


def test_info_as_json(manifest, capsys):
    info(manifest.root, json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["blocks"], found["shards"]) == (18, 5, 2)
    assert found["bytes"] == sum(s.bytes for s in manifest.shards)
    assert (found["digest"], found["mean"]) == (manifest.digest, list(manifest.mean))
    assert found["stream"]["batch"] == 18
    assert found["stream"]["memory_bytes"] > 0


def test_info_says_what_a_stream_of_it_takes(manifest, capsys):
    info(manifest.root)
    out = capsys.readouterr().out
    assert "at a global batch of 18 on one rank, window 2" in out
    assert "neighbours in a shard land" in out


def test_json(manifest, capsys):
    verify(manifest.root, json=True)
    assert json.loads(capsys.readouterr().out) == {
        "path": manifest.root,
        "whole": True,
        "faults": [],
        "strays": [],
    }
    Path(manifest.path(1)).rename(f"{manifest.root}/shard-000009.tar")
    found = json.loads(faults(manifest, capsys, json=True))
    assert found["whole"] is False
    assert found["faults"] == [{"file": "shard-000001.tar", "where": "", "what": "missing"}]
    assert found["strays"] == ["shard-000009.tar"]


def test_over_http(manifest, capsys):
    with serving(Path(manifest.root)) as server:
        verify(server.url)
        info(server.url)
        flip_byte(manifest.path(0), 700)
        with pytest.raises(SystemExit):
            verify(server.url)
    out = capsys.readouterr().out
    assert "are whole" in out
    assert manifest.digest in out
    assert "record 000000-0000" in out


def test_index_then_verify_then_info(tmp_path, capsys):
    folder = str(tmp_path)
    write_shards(tmp_path, [6, 5], lambda i: {"npy": array_of(i), "flip.npy": array_of(i), "cls": i % 5})
    (tmp_path / "classes").write_text("".join(f"{n}\n" for n in "abcdef"))
    keys = {"codec.channels": "2", "codec.factor": "4"}
    options = {"flipped": "flip.npy", "classes": f"{folder}/classes", "scale": 0.5, "threads": 2}
    index(folder, folder, codec="unknown", **options, **keys)
    assert "11 samples in 2 shard(s), 6 classes" in capsys.readouterr().out
    made = Manifest.load(folder)
    assert (made.classes, made.image_size, made.foreign.scale) == (tuple("abcdef"), 12, 0.5)
    assert made.codec["config"]["scaling_factor"] == 0.5
    verify(folder)
    info(folder)
    out = capsys.readouterr().out
    assert "KEY.npy float16 2 x 3 x 3, times 0.5, KEY.flip.npy, KEY.cls" in out


def test_what_index_refuses(tmp_path):
    write_shards(tmp_path, [2])
    for options, words in (
        ({"codec": "unknown"}, "channels: is required"),
        ({"codec": "vea"}, "unknown codec 'vea'"),
        ({"codec": "pixels", "scale": 0.0}, "scale is 0.0"),
        ({"codec": "pixels"}, "has 2 channels, the codec has 3"),
        ({"codec": "pixels", "classes": "imagenet"}, "did you mean imagenet1k"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            index(str(tmp_path), str(tmp_path), **options)
    assert [p.name for p in tmp_path.iterdir()] == ["latents-000.tar"]


def test_no_data_set(tmp_path):
    for command in (verify, info):
        with pytest.raises(DataError, match=r"no manifest.json"):
            command(str(tmp_path))


def shards(*arguments):
    return subprocess.run(
        [sys.executable, "tools/shards.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(manifest):
    flip_byte(manifest.path(0), 700)
    done = shards("verify", manifest.root, "--threads=2")
    assert done.returncode == 1
    assert "record 000000-0000" in done.stdout


def test_the_command_that_indexes(tmp_path):
    write_shards(tmp_path / "shards", [5])
    arguments = ["--codec=unknown", "--codec.channels=2", "--label=none", "--block=2"]
    done = shards("index", str(tmp_path / "shards"), str(tmp_path / "out"), *arguments)
    assert done.returncode == 0, done.stderr
    made = Manifest.load(tmp_path / "out")
    assert (made.samples, made.block, made.unlabelled) == (5, 2, 5)

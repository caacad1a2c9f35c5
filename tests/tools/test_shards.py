"""tools/shards.py: what it says of whole and of broken data sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit.data import DataError
from tests.data.helpers import flip_byte, write_dataset
from tools.shards import info, verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "set", [4, 4, 4, 4, 2], views=2)


def faults(manifest, capsys):
    with pytest.raises(SystemExit) as end:
        verify(manifest.root)
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
    assert f"record 00000001, bytes {block.offset} to {block.offset + block.bytes}" in out
    assert "altered: its crc32" in out
    assert "record 00000000" not in out


def test_a_truncated_shard(manifest, capsys):
    block = manifest.blocks[2]
    os.truncate(manifest.path(0), block.offset + 10)
    out = faults(manifest, capsys)
    assert f"{block.offset + 10} bytes, the manifest says {manifest.shards[0].bytes}" in out
    assert "record 00000002" in out
    assert f"truncated: the file ends at byte {block.offset + 10}" in out


def test_a_missing_shard(manifest, capsys):
    manifest.path(1).unlink()
    out = faults(manifest, capsys)
    assert "shard-000001.tar  -" in out
    assert "missing" in out
    assert "record 00000003" in out
    assert "record 00000004" in out


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
    file = Path(manifest.root) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert words in faults(manifest, capsys)


def test_info(manifest, capsys):
    info(manifest.root)
    out = capsys.readouterr().out
    for words in ("18 in 5 block(s)", "moments float16 2 x 2 x 2 x 3 x 3", "made up", manifest.digest, "a  "):
        assert words in out


def test_no_data_set(tmp_path):
    for command in (verify, info):
        with pytest.raises(DataError, match=r"no manifest.json"):
            command(str(tmp_path))


def test_the_command(manifest):
    flip_byte(manifest.path(0), 700)
    done = subprocess.run(
        [sys.executable, "tools/shards.py", "verify", manifest.root],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "record 00000000" in done.stdout

"""Shards that are there whole or not at all, and statistics that merge."""

import json
import os
import resource
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.data import DataError
from dit.data.shards.records import END, parse_members, parse_npy, record_bytes
from dit.data.shards.write import ChannelStats, ShardFile, ShardWriter, names_file


def block(n, start=0):
    ids = np.arange(start, start + n)
    return {
        "latents": np.full((n, 1, 2, 3, 3), ids.reshape(-1, 1, 1, 1, 1), np.float16),
        "label": ids % 3,
        "id": ids.astype(np.uint64),
    }


def members(path):
    return {name: parse_npy(data) for name, data in parse_members(memoryview(path.read_bytes()[: -len(END)]))}


# --- shards ------------------------------------------------------------------------------------------------


def test_a_shard_has_its_name_when_it_is_whole(tmp_path):
    with ShardFile(tmp_path, "shard-000012.tar", number=12, tag=".mine") as shard:
        shard.add(block(4))
        shard.add(block(2, 4))
        assert [p.name for p in tmp_path.iterdir()] == [".shard-000012.tar.mine.partial"]
        written = shard.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["shard-000012.tar"]
    assert (
        written.bytes
        == (tmp_path / "shard-000012.tar").stat().st_size
        == record_bytes(block(4)) * 2 + len(END)
    )
    assert [(b.shard, b.samples) for b in shard.blocks] == [(12, 4), (12, 2)]
    held = members(tmp_path / "shard-000012.tar")
    assert list(held)[::3] == ["000012-0000.latents.npy", "000012-0001.latents.npy"]
    assert held["000012-0001.id.npy"].tolist() == [4, 5]


def test_a_shard_that_is_not_finished_leaves_nothing(tmp_path):
    with ShardFile(tmp_path, "shard-000000.tar") as shard:
        shard.add(block(4))
    assert list(tmp_path.iterdir()) == []


def test_two_that_write_the_same_shard_do_not_meet(tmp_path):
    with ShardFile(tmp_path, "a.tar", tag=".1") as one, ShardFile(tmp_path, "a.tar", tag=".2") as two:
        one.add(block(4))
        two.add(block(4))
        assert one.finish() == two.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_file_that_cannot_grow_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_one(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def write_one(folder):
    with ShardFile(folder, "a.tar") as shard:
        for i in range(10):
            shard.add(block(50, i))
        shard.finish()


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12), limit=st.integers(1, 12_000))
def test_shards_keep_to_their_limit(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, limit) as writer:
        for i, n in enumerate(sizes):
            writer.add(block(n, 10 * i))
        writer.finish()
    assert sorted(p.name for p in folder.iterdir()) == [s.name for s in writer.shards]
    for i, shard in enumerate(writer.shards):
        own = [b for b in writer.blocks if b.shard == i]
        assert shard.bytes == sum(b.bytes for b in own) + len(END) == os.path.getsize(folder / shard.name)
        assert shard.bytes <= limit or len(own) == 1
        ids = [v for k, v in members(folder / shard.name).items() if k.endswith("id.npy")]
        assert [len(v) for v in ids] == [b.samples for b in own]
    assert [b.samples for b in writer.blocks] == sizes
    following = [writer.blocks.index(next(b for b in writer.blocks if b.shard == i)) for i in range(1, i + 1)]
    for first in following:  # no shard ends before it has to
        at_least = sum(b.bytes for b in writer.blocks if b.shard == writer.blocks[first].shard - 1)
        assert at_least + writer.blocks[first].bytes + len(END) > limit


def test_names_are_lines():
    data, names = names_file(["a/1.png", "b/ü.png"])
    assert (data.decode(), names.count) == ("a/1.png\nb/ü.png\n", 2)
    with pytest.raises(DataError, match=r"the name 'b\\nc' has a line break"):
        names_file(["a", "b\nc"])


# --- statistics --------------------------------------------------------------------------------------------


def stats_of(data):
    stats = ChannelStats()
    stats.add(data)
    return stats


@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 100), moments=st.booleans())
def test_merged_statistics_are_those_of_the_whole(cuts, seed, moments):
    data = np.random.default_rng(seed).standard_normal((40, 1 + moments, 3, 2, 2)) + 5
    merged = ChannelStats()
    for part in np.split(data, sorted(cuts)):
        merged.merge(stats_of(part) if len(part) else ChannelStats())
    variance = data[:, 0].var((0, 2, 3)) + ((data[:, 1] ** 2).mean((0, 2, 3)) if moments else 0)
    np.testing.assert_allclose(merged.mean, data[:, 0].mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(merged.std, np.sqrt(variance), rtol=1e-12)
    assert merged.count == 40 * 4


def test_merging_is_stable():
    """Latents far from zero: a sum of squares in float32, or a naive one in float64, loses them."""
    rng = np.random.default_rng(0)
    data = 3e4 + 1e-3 * rng.standard_normal((64, 1, 2, 4, 4))
    added, merged = ChannelStats(), ChannelStats()
    for part in np.split(data, [1, 5, 40]):
        added.add(part)
        merged.merge(stats_of(part))
    for stats in (added, merged):
        np.testing.assert_allclose(stats.mean, data.mean((0, 1, 3, 4)), rtol=1e-14)
        np.testing.assert_allclose(stats.std, data.std((0, 1, 3, 4)), rtol=1e-7)


@given(seed=st.integers(0, 1000), scale=st.floats(1e-30, 1e30))
def test_statistics_come_back_from_json_exactly(seed, scale):
    stats = stats_of(np.random.default_rng(seed).standard_normal((3, 2, 2, 2, 2)) * scale)
    back = ChannelStats.from_plain(json.loads(json.dumps(stats.to_plain())))
    assert back.count == stats.count
    for name in ("mean", "spread", "noise"):
        assert np.array_equal(getattr(back, name), getattr(stats, name))
    empty = ChannelStats.from_plain(json.loads(json.dumps(ChannelStats().to_plain())))
    back.merge(empty)
    assert np.array_equal(back.std, stats.std)

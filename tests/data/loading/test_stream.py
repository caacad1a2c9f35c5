"""Batches from shards: contents, ranks, resuming, prefetching, memory and faults."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError
from dit.data import DataError
from dit.data.loading.stream import Stream
from dit.rng import Draws, Purpose
from tests.data.helpers import CLASSES, flip_byte, sample_of, write_dataset

SIZES = [7, 7, 7, 3, 7, 5, 7, 7, 1, 7, 7, 6]  # 71 samples


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", SIZES, views=2)


@pytest.fixture
def stream_of(manifest):
    """Makes streams of a data set and closes them."""
    made = []

    def make(*args, of=manifest, kind=Stream, **kwargs):
        made.append(kind(of, *args, **kwargs))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def ids_by_place(manifest):
    """ids[block][row], read by nothing but numpy."""
    ids = np.random.default_rng(0).permutation(manifest.samples)
    ends = np.cumsum([b.samples for b in manifest.blocks])
    return np.split(ids, ends[:-1])


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("moments", "label", "id", "view", "slots"))


def test_a_batch_holds_the_samples_of_the_order(manifest, stream_of):
    stream, ids = stream_of(3, 10, lanes=5), ids_by_place(manifest)
    for step in (0, 1, 6, 7, 20):
        batch = stream.batch(step)
        block, row = stream.order.locate(step)
        expected = np.array([ids[b][r] for b, r in zip(block, row, strict=True)])
        assert batch.id.tolist() == expected.tolist()
        assert batch.label.tolist() == (expected % CLASSES).tolist()
        draws = Draws(3, step, torch.arange(10), 10)
        assert torch.equal(batch.view, draws.integers(Purpose.VIEW, 2))
        whole = torch.from_numpy(sample_of(expected, 2, True))
        assert torch.equal(batch.moments, whole[torch.arange(10), batch.view])
        assert batch.moments.shape == (10, 2, 2, 3, 3)
        assert batch.moments.dtype == torch.float16
        assert batch.step == step


def test_stored_latents_come_as_one_moment(tmp_path, stream_of):
    made = write_dataset(tmp_path / "set", [4, 4, 3], views=1, posterior=False)
    batch = stream_of(0, 5, of=made).batch(0)
    assert batch.moments.shape == (5, 1, 2, 3, 3)
    assert torch.equal(batch.moments[:, 0, 0, 0, 0].long(), batch.id)
    assert batch.view.tolist() == [0] * 5


@settings(max_examples=25, deadline=None)
@given(
    share=st.integers(1, 5),
    size=st.sampled_from([1, 2, 3, 4, 6]),
    lanes=st.sampled_from([1, 2, 4, 5, 64]),
    window=st.integers(1, 3),
    start=st.integers(0, 30),
)
def test_ranks_together_see_what_one_sees(manifest, share, size, lanes, window, start):
    batch, made = share * size, []
    try:
        made.append(Stream(manifest, 1, batch, lanes=lanes, window=window))
        made.extend(Stream(manifest, 1, batch, r, size, lanes=lanes, window=window) for r in range(size))
        for step in range(start, start + 3):
            whole, *parts = (s.batch(step) for s in made)
            for name in ("moments", "label", "id", "view", "slots"):
                assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    finally:
        for stream in made:
            stream.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_epoch_on_any_number_of_ranks(manifest, stream_of, size):
    streams = [stream_of(0, 8, r, size, lanes=4) for r in range(size)]
    assert {s.steps_per_epoch for s in streams} == {71 // 8}
    for epoch in range(3):
        steps = range(epoch * 8, (epoch + 1) * 8)
        seen = [i for step in steps for s in streams for i in s.batch(step).id.tolist()]
        assert len(seen) == len(set(seen)) == 64


@pytest.mark.parametrize("ahead", [0, 3])
def test_resuming_opens_only_the_current_windows(manifest, stream_of, ahead):
    unbroken = stream_of(0, 8, lanes=4, window=2)
    for step in range(20):
        batch = unbroken.batch(step, ahead)
        resumed = stream_of(0, 8, lanes=4, window=2)
        assert same(resumed.batch(step), batch)
        needed = set()
        for lane in range(4):
            for position in (step * 2, step * 2 + 1):
                w = resumed.order.window_at(lane, position)
                needed |= set(w.block[step * 2 - w.start if w.start <= step * 2 else 0 :].tolist())
        assert resumed.reads == len(needed)


def test_a_block_is_read_once_a_lane(tmp_path, stream_of):
    made = write_dataset(tmp_path / "set", [4] * 200)
    stream = stream_of(0, 8, of=made, lanes=4, window=2)
    for step in range(stream.steps_per_epoch):
        stream.batch(step)
        assert stream._filler._ring.depth <= 2 * 4 // 2 + 3  # memory does not grow with the data
    assert 200 <= stream.reads <= 200 + 4  # where a lane ends inside a block, the next lane reads it too


def test_lanes_that_begin_in_the_same_block_share_its_read(manifest, stream_of):
    stream = stream_of(0, 8, lanes=8, window=2)
    stream.batch(0)
    assert stream.reads <= len(SIZES)


def test_blocks_smaller_than_a_step_of_a_lane(tmp_path, stream_of):
    """A step then needs several windows at once, and the cache has to grow."""
    made = write_dataset(tmp_path / "set", [1] * 60)
    stream = stream_of(0, 20, of=made, lanes=1, window=1)
    for epoch in range(2):
        seen = [i for step in range(3 * epoch, 3 * epoch + 3) for i in stream.batch(step).id.tolist()]
        assert sorted(seen) == list(range(60))


def test_stated_memory(manifest, stream_of):
    """Of every step that a window reaches into (14 samples, 2 a step, and begun ones), and those ahead."""
    sample = 2 * 2 * 3 * 3 * 2  # moments, channels, height, width, bytes: one view
    assert stream_of(0, 8, lanes=4, window=2).memory_bytes() == (14 // 2 + 1 + 2) * 8 * sample
    assert stream_of(0, 8, 1, 2, lanes=4, window=2).memory_bytes(3) == (14 // 2 + 1 + 2 + 3) * 4 * sample


def test_memory_is_what_is_stated(manifest, stream_of):
    stream = stream_of(0, 8, lanes=4, window=2)
    for step in range(30):
        stream.batch(step, ahead=3)
        assert sum(array.nbytes for array in stream._filler._ring.big.values()) == stream.memory_bytes(3)


def test_a_batch_is_its_own(manifest, stream_of):
    """What is read later, to the memory that it was put together in, does not change it."""
    stream, again = stream_of(0, 8, lanes=4), stream_of(0, 8, lanes=4)
    held = [stream.batch(step) for step in range(40)]
    assert all(same(batch, again.batch(step)) for step, batch in enumerate(held))


def test_iterating_gives_the_batches_in_order_through_epochs(manifest, stream_of):
    ahead, one_by_one = stream_of(5, 9), stream_of(5, 9)
    for step, batch in zip(range(4, 30), ahead.iterate(4, 30), strict=True):
        assert batch.step == step
        assert same(batch, one_by_one.batch(step))


def test_iterating_reads_no_further_than_it_is_asked(manifest, stream_of):
    short, whole = stream_of(0, 8, lanes=1, window=1), stream_of(0, 8, lanes=1, window=1)
    assert len(list(short.iterate(0, 3, prefetch=5))) == 3
    for step in range(3):
        whole.batch(step)
    assert short.reads == whole.reads


class Recording(Stream):
    """Notes the steps it made."""

    def batch(self, step, ahead=0):
        made = super().batch(step, ahead)
        self.made = [*getattr(self, "made", []), step]
        return made


def prefetching():
    return [t for t in threading.enumerate() if t.name == "dit-prefetch"]


def test_prefetching_is_bounded_and_ends_when_closed(stream_of):
    stream = stream_of(0, 8, kind=Recording)
    batches = stream.iterate(0, prefetch=3)
    next(batches)
    thread = prefetching()[0]
    while len(stream.made) < 5:
        assert thread.is_alive()
        time.sleep(0.01)
    thread.join(timeout=0.3)
    assert thread.is_alive()
    assert stream.made == [0, 1, 2, 3, 4]  # one taken, three waiting, one in hand
    batches.close()
    assert not prefetching()


def test_an_error_comes_after_the_batches_before_it(tmp_path, stream_of):
    made = write_dataset(tmp_path / "set", SIZES)
    stream = stream_of(0, 4, of=made, lanes=1, window=1)
    windows = [set(stream.order.window_at(0, p).pieces) for p in range(32)]
    block = next(iter(windows[20] - windows[0]))
    flip_byte(made.path(made.blocks[block].shard), made.blocks[block].offset + 700)
    first_bad = next(p for p, w in enumerate(windows) if block in w) // 4
    batches, good = stream.iterate(0), []
    with pytest.raises(DataError, match="xxh3"):
        good.extend(batches)
    assert [batch.step for batch in good] == list(range(first_bad))
    assert not prefetching()
    assert same(stream.batch(0), stream_of(0, 4, of=made, lanes=1, window=1).batch(0))  # still of use


def test_an_altered_byte_is_named(tmp_path, stream_of):
    made = write_dataset(tmp_path / "set", SIZES)
    block = made.blocks[4]
    flip_byte(made.path(block.shard), block.offset + block.bytes - 520)
    with pytest.raises(DataError) as error:
        stream_of(0, 71, of=made).batch(0)
    text = str(error.value)
    assert made.shards[block.shard].name in text
    assert f"record 000001-0001 (bytes {block.offset} to {block.offset + block.bytes})" in text
    assert "altered" in text


def test_a_truncated_shard_is_named(tmp_path, stream_of):
    made = write_dataset(tmp_path / "set", SIZES)
    block = made.blocks[5]
    os.truncate(made.path(block.shard), block.offset + 1000)
    with pytest.raises(
        DataError, match=f"record 000001-0002 .*truncated: the file ends at byte {block.offset + 1000}"
    ):
        stream_of(0, 71, of=made).batch(0)


def test_a_missing_shard_is_named(tmp_path, stream_of):
    made = write_dataset(tmp_path / "set", SIZES)
    Path(made.path(1)).unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar: record 000001-000\d .*No such file"):
        stream_of(0, 71, of=made).batch(0)


@pytest.mark.parametrize(
    ("verify", "time_kept", "noticed"),
    [("first", False, True), ("first", True, False), ("always", True, True)],
)
def test_a_file_that_changes_between_epochs(tmp_path, stream_of, verify, time_kept, noticed):
    """`first` trusts a block again only while its file's size, time and inode stay; `always` never does."""
    made = write_dataset(tmp_path / "set", [4] * 40)
    stream = stream_of(0, 4, of=made, lanes=1, window=1, verify=verify)
    stream.batch(0)
    block = made.blocks[stream.order.window_at(0, 0).pieces[0]]
    path = Path(made.path(block.shard))
    before = path.stat()
    flip_byte(path, block.offset + 800)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if time_kept else 1)))
    for step in range(1, 10):  # until the block has left the memory
        stream.batch(step)
    if noticed:
        with pytest.raises(DataError, match="altered"):
            stream.batch(0)
    else:
        assert stream.batch(0).step == 0


def test_sizes_that_do_not_fit(manifest):
    with pytest.raises(ConfigError, match="a global batch of 72 is larger than the data set of 71 samples"):
        Stream(manifest, 0, 72)
    with pytest.raises(ConfigError, match="does not divide among 3 ranks"):
        Stream(manifest, 0, 8, 0, 3)

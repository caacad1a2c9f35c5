"""The loader's benchmark, small: that all contenders read the same data, and that figures come out."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dit.bench.speed import loader
from dit.bench.speed.loader import LoaderBench
from dit.config import ConfigError, from_dict
from dit.data import DataError

SMALL = LoaderBench(samples=700, plain=300, batch=64, repeats=1, lanes=4, ranks=(2,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def test_the_contenders_read_the_same_latents(folder):
    import webdataset

    files = loader.write_files(folder, SMALL)
    array = np.load(files.array, mmap_mode="r")
    stream = loader.open_stream(files.blocks, SMALL)
    batch = stream.batch(3)
    assert np.array_equal(batch.moments[:, 0].numpy(), array[batch.id.numpy()])
    assert (batch.label == batch.id % loader.CLASSES).all()
    plain = list(webdataset.WebDataset(files.plain, shardshuffle=False).decode().to_tuple("npy", "cls"))
    assert len(plain) == SMALL.plain
    assert all(np.array_equal(latent, array[i]) and label == i for i, (latent, label) in enumerate(plain))
    assert loader.ours(stream, SMALL)(1) == loader.memory_map(array, SMALL)(1) == 10 * 64
    assert loader.plain_webdataset(files.plain, SMALL)(0) == SMALL.plain
    stream.close()


@pytest.mark.slow
def test_figures_are_of_the_same_turns(folder):
    """Each ratio lies within what the rates that it is made of allow; memory is what the stream states."""
    ticks = []
    found = loader.run(folder, SMALL, lambda: ticks.append(1))
    assert len(ticks) == loader.turns(SMALL)
    names = ["ours", "memory map", "ours, first epoch", "plain webdataset"]
    assert list(found["rates"]) == list(found["cpu_us"]) == names
    rates = {name: found["rates"][name] for name in names} | found["first_batch"]
    for ratio, over, under in (
        (found["of memory map"], "ours", "memory map"),
        (found["of plain webdataset"], "ours", "plain webdataset"),
        (found["checksums"], "ours, first epoch", "ours"),
        (found["first_batch"]["ratio"], "resume", "fresh"),
    ):
        above, below = rates[over], rates[under]
        assert above["low"] / below["high"] <= ratio["low"] * (1 + 1e-9), (over, under)
        assert ratio["high"] <= above["high"] / below["low"] * (1 + 1e-9), (over, under)
    assert list(found["ranks"]) == [2]
    steps = 700 // 4 // (64 // 4)  # that a lane's window of two blocks can reach into: all of an epoch's
    assert found["memory_bytes"] == (steps + 1 + 2 + SMALL.prefetch) * 64 * 8192


def test_the_first_epoch_is_one_that_checks(folder, tmp_path):
    """A byte that changes while size and time stay: later epochs trust the block, `first epoch` finds it."""
    files = loader.write_files(tmp_path, SMALL)
    streams = [loader.open_stream(files.blocks, SMALL) for _ in range(2)]
    later, checked = loader.ours(streams[0], SMALL), loader.first_epoch(streams[1], SMALL)
    assert later(0) == checked(0) == SMALL.steps * SMALL.batch
    shard, block = Path(files.blocks.path(0)), files.blocks.blocks[1]
    before = shard.stat()
    with shard.open("r+b") as file:
        file.seek(block.offset + block.bytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert later(1) == SMALL.steps * SMALL.batch
    with pytest.raises(DataError, match="altered"):
        checked(1)
    for stream in streams:
        stream.close()


def test_a_rank_that_dies_ends_the_others(folder):
    """They would wait at the barrier, and their parent for them, for ever."""
    manifest = loader.write_files(folder, SMALL).blocks
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(loader._ranks, manifest, SMALL, 2, lambda: None)
        while len(children := multiprocessing.active_children()) < 2 and not waiting.done():
            time.sleep(0.01)
        os.kill(max(child.pid for child in children), signal.SIGKILL)
        with pytest.raises(DataError, match=r"2 ranks read at once: rank 1 died with exit code -9"):
            waiting.result(60)
    for child in children:
        child.join(10)
        assert child.exitcode == -9


def test_data_that_are_there_are_taken_and_others_are_written_anew(folder):
    before = loader.write_files(folder, SMALL).array.stat().st_mtime_ns
    assert loader.write_files(folder, SMALL).array.stat().st_mtime_ns == before
    other = LoaderBench(samples=600, plain=200, batch=64)
    assert loader.write_files(folder, other).blocks.samples == 600
    assert len(loader.write_files(folder, other).plain) == 1


def test_sizes_that_make_no_sense():
    with pytest.raises(ConfigError, match="at most samples"):
        from_dict(LoaderBench, {"samples": 100, "plain": 200})

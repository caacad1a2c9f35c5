"""The loader's benchmark, small: that all contenders read the same data, and that figures come out."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

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
def test_all_figures(folder):
    ticks = []
    found = loader.run(folder, SMALL, lambda: ticks.append(1))
    assert len(ticks) == loader.turns(SMALL)
    assert found["rates"].keys() == found["cpu_us"].keys()
    assert all(spread["low"] > 0 for spread in found["rates"].values())
    for name in ("of memory map", "of plain webdataset", "checksums"):
        assert found[name]["low"] <= found[name]["median"] <= found[name]["high"]
    assert found["ranks"][2]["rate"] > 0
    assert found["memory_bytes"] < found["peak_rss_bytes"]


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

"""The node's cache: what is read is right, whatever the limit, the readers, the damage and who is killed."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError, from_dict
from dit.data.loading.stream import Stream
from dit.data.shards.blocks import BlockError, BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.readers import open_reader
from dit.data.storage.nodecache import LOCK, PARTIAL, NodeCacheConfig
from tests.data.foreign.foreign_shards import write_foreign
from tests.data.helpers import flip_byte, write_dataset
from tests.data.storage.http_server import serving

SIZES = [5, 5, 3, 5, 2, 5, 5, 1, 4, 5]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", SIZES, views=2)


@pytest.fixture(scope="module")
def truth(source):
    reader = BlockReader(source)
    return [reader.read(i) for i in range(len(SIZES))]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def reader_of(manifest, folder, limit: int | None = None, **kwargs) -> BlockReader:
    limit = 10**9 if limit is None else limit
    return BlockReader(manifest, cache=NodeCacheConfig(folder=str(folder), limit_gb=limit / 1e9), **kwargs)


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in found)


def files(folder) -> list[Path]:
    return [path for path in Path(folder).iterdir() if path.name != LOCK]


def held(folder) -> int:
    """Bytes of what is in the folder."""
    total = 0
    if not Path(folder).exists():
        return 0
    for path in files(folder):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def counted(folder) -> int:
    """Bytes in use, as the processes agree on."""
    return int((Path(folder) / LOCK).read_bytes())


# --- what is read, found and kept --------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    reads=st.lists(st.tuples(st.integers(0, 2), st.integers(0, len(SIZES) - 1)), min_size=30, max_size=60),
    limit=st.integers(3584, 30_000),
    restarts=st.sets(st.integers(0, 59), max_size=3),
)
def test_any_reads_by_any_readers_under_any_limit(source, truth, reads, limit, restarts):
    """Against a model that is one line of an ordered dictionary: exactly what was not used for longest is gone."""
    with tempfile.TemporaryDirectory() as folder:
        readers = [reader_of(source, folder, limit) for _ in range(3)]
        model, hits = OrderedDict[int, int](), 0
        for place, (who, index) in enumerate(reads):
            if place in restarts:
                hits -= readers[who].cache_stats.hits
                readers[who] = reader_of(source, folder, limit)
            assert same(readers[who].read(index), truth[index])
            assert held(folder) <= limit
            size = source.blocks[index].bytes
            if index in model:
                hits += 1
                model.move_to_end(index)
            else:
                while sum(model.values()) + size > limit:
                    model.popitem(last=False)
                model[index] = size
            assert sum(reader.cache_stats.hits for reader in readers) == hits
            assert held(folder) == sum(model.values()) == (counted(folder) if model else 0)


def test_uses_are_told_apart_by_their_times(source, folder):
    """The kernel's own times of files stand still for milliseconds, in which several blocks are read."""
    reader, times = reader_of(source, folder), []
    for index in (*range(len(SIZES)), 0, 0):
        began = time.time_ns()
        reader.read(index)
        times.append(max(path.stat().st_atime_ns for path in files(folder)))
        assert began <= times[-1] <= time.time_ns()
    assert times == sorted(set(times))


def test_a_second_epoch_asks_for_nothing(source, truth, folder):
    with serving(Path(source.root)) as server:
        reader = reader_of(Manifest.load(server.url), folder)
        for epoch in range(3):
            assert all(same(reader.read(index), truth[index]) for index in range(len(SIZES)))
            if epoch == 0:
                asked = len(server.served)
        assert len(server.served) == asked
    stats, whole = reader.cache_stats, sum(b.bytes for b in source.blocks)
    assert (stats.hits, stats.misses, stats.stored) == (2 * len(SIZES), len(SIZES), len(SIZES))
    assert (stats.fetched, stats.evicted, stats.damaged) == (whole, 0, 0)
    assert held(folder) == counted(folder) == whole


def test_foreign_shards_are_kept_too(folder, tmp_path):
    write_foreign(tmp_path / "set", [9, 4], block=5)
    with serving(tmp_path / "set") as server:
        manifest = Manifest.load(server.url)
        settings = NodeCacheConfig(folder=str(folder))
        plain, first, second = (open_reader(manifest, "first", cache) for cache in (None, settings, settings))
        for reader in (first, second):
            for index in range(len(manifest.blocks)):
                assert same(reader.read(index), plain.read(index))
    assert (first.cache_stats.hits, first.cache_stats.stored) == (0, len(manifest.blocks))
    assert second.cache_stats.hits == len(manifest.blocks)


def test_batches_are_the_same_whether_cached_or_not(source, folder):
    with serving(Path(source.root)) as server:
        asked = []
        for settings in (None, NodeCacheConfig(folder=str(folder)), NodeCacheConfig(folder=str(folder))):
            stream = Stream(Manifest.load(server.url), seed=1, global_batch=4, lanes=2, cache=settings)
            before = len(server.served)
            batches = [(b.id.tolist(), b.moments) for b in stream.iterate(0, 2 * stream.steps_per_epoch)]
            asked.append(len(server.served) - before)
            stream.close()
            if settings is None:
                expected = batches
            assert [ids for ids, _ in batches] == [ids for ids, _ in expected]
            assert all(a.equal(b) for (_, a), (_, b) in zip(batches, expected, strict=True))
    assert len(SIZES) <= asked[1] < asked[0]  # a block that two lanes want at the same moment may come twice
    assert asked[2] == 0


def test_another_process_and_another_copy_find_the_blocks(source, truth, folder, tmp_path):
    reader_of(source, folder).read(3)
    copy = Manifest.load(shutil.copytree(source.root, tmp_path / "copy"))
    for manifest in (source, copy):
        reader = reader_of(manifest, folder)
        assert same(reader.read(3), truth[3])
        assert (reader.cache_stats.hits, reader.cache_stats.misses) == (1, 0)


def test_a_limit_that_is_less_than_a_block(source, folder):
    most = max(b.bytes for b in source.blocks)
    with pytest.raises(ConfigError, match=rf"is {most - 1} bytes, and a block of .* has {most}; raise it"):
        reader_of(source, folder, most - 1)
    assert not folder.exists()


def test_without_a_folder_there_is_no_cache(source):
    assert BlockReader(source, cache=NodeCacheConfig()).cache_stats is None
    assert BlockReader(source).cache_stats is None


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_that_is_none(limit):
    with pytest.raises(ConfigError, match=r"limit_gb is .*, expected more than 0"):
        from_dict(NodeCacheConfig, {"folder": "/tmp/x", "limit_gb": limit})


def test_variables_in_the_folder(source, tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    reader_of(source, "$NODE_DISK/cache").read(0)
    assert len(files(tmp_path / "cache")) == 1
    monkeypatch.delenv("NODE_DISK")
    with pytest.raises(ConfigError, match="NODE_DISK"):
        reader_of(source, "$NODE_DISK/cache")


def test_what_is_not_the_caches_is_left_alone(source, folder):
    folder.mkdir()
    (folder / "thesis.tex").write_bytes(bytes(100_000))
    (folder / "a").mkdir()
    reader = reader_of(source, folder, 12_000)
    for index in range(len(SIZES)):
        reader.read(index)
    assert reader.cache_stats.evicted > 0
    assert (folder / "thesis.tex").stat().st_size == 100_000
    assert counted(folder) == held(folder) - 100_000 - (folder / "a").stat().st_size


# --- damage ------------------------------------------------------------------------------------------------


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = {
    "a bit": lambda path: flip_byte(path, 3000),
    "the last bit": lambda path: flip_byte(path, path.stat().st_size - 1),
    "cut": lambda path: os.truncate(path, 1000),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "zeros": overwrite,
}


@pytest.mark.parametrize("fresh", [True, False], ids=["new reader", "same reader"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_fetched_again(source, truth, folder, damage, fresh):
    reader = reader_of(source, folder)
    reader.read(0)
    reader.read(0)
    (path,) = files(folder)
    DAMAGE[damage](path)
    if fresh:
        reader = reader_of(source, folder)
    assert same(reader.read(0), truth[0])
    assert reader.cache_stats.damaged == 1
    assert held(folder) == counted(folder) == source.blocks[0].bytes
    found = reader_of(source, folder)
    assert same(found.read(0), truth[0])
    assert (found.cache_stats.hits, found.cache_stats.damaged) == (1, 0)


def test_a_link_in_the_cache_is_not_followed(source, truth, folder, tmp_path):
    reader_of(source, folder).read(0)
    (path,) = files(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    reader = reader_of(source, folder)
    assert same(reader.read(0), truth[0])
    assert reader.cache_stats.hits == 0


def test_damage_that_no_file_time_shows_is_seen_where_all_is_verified(source, truth, folder):
    reader = reader_of(source, folder, verify="always")
    reader.read(0)
    reader.read(0)
    (path,) = files(folder)
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert same(reader.read(0), truth[0])
    assert reader.cache_stats.damaged == 1


def test_a_damaged_source_is_blamed_and_not_kept(source, tmp_path, folder):
    copy = Manifest.load(shutil.copytree(source.root, tmp_path / "copy"))
    flip_byte(copy.path(0), copy.blocks[0].offset + 1000)
    reader = reader_of(copy, folder)
    for _ in range(2):
        with pytest.raises(BlockError, match=r"shard-000000\.tar: record .*altered"):
            reader.read(0)
    assert files(folder) == []
    assert (reader.cache_stats.misses, reader.cache_stats.damaged) == (2, 0)


# --- folders that cannot be used ---------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_refused(source, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"data.cache.folder = .*/cache cannot be used: Not a directory; give a"
    ):
        reader_of(source, tmp_path / "file" / "cache")


def test_a_variable_that_is_not_set_is_refused(source):
    with pytest.raises(ConfigError, match=r"a variable in it is not set \(it gives \$NOT_SET_HERE/cache\)"):
        reader_of(source, "$NOT_SET_HERE/cache")


def test_a_disk_that_is_full_is_said_once(source, truth, folder):
    """The kernel refuses to let a file grow, as a full disk would; what was kept before is of use all the same."""
    reader = reader_of(source, folder)
    reader.read(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.warns(UserWarning, match="from now on: File too large") as warned:
            assert all(same(reader.read(index), truth[index]) for index in (1, 2, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(warned) == 1
    assert (reader.cache_stats.hits, reader.cache_stats.stored) == (1, 1)
    assert held(folder) == counted(folder) == source.blocks[0].bytes


def test_a_folder_that_is_emptied_fills_again(source, truth, folder):
    reader = reader_of(source, folder)
    for _ in range(2):
        for index in range(3):
            assert same(reader.read(index), truth[index])
        shutil.rmtree(folder)
    assert (reader.cache_stats.misses, reader.cache_stats.stored) == (6, 6)


# --- threads and processes ---------------------------------------------------------------------------------


def test_threads_under_a_tight_limit(source, truth, folder):
    """Blocks vanish while they are read."""
    limit = 3 * max(b.bytes for b in source.blocks)
    readers = [reader_of(source, folder, limit) for _ in range(2)]

    order = np.random.default_rng(0).integers(0, len(SIZES), 600).tolist()

    def read(i: int) -> bool:
        index = order[i]
        return same(readers[i % 2].read(index), truth[index]) and held(folder) <= limit

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(600)))
    assert held(folder) == counted(folder)
    assert not [path for path in files(folder) if path.name.endswith(PARTIAL)]
    stats = [reader.cache_stats for reader in readers]
    assert sum(s.hits + s.misses for s in stats) == 600
    assert sum(s.stored - s.evicted for s in stats) == len(files(folder))
    assert min(s.hits for s in stats) > 0


def test_a_slow_download_holds_up_nobody(source, truth, folder):
    with serving(Path(source.root)) as server:
        slow = reader_of(Manifest.load(server.url), folder)
        server.open.clear()
        thread = threading.Thread(target=slow.read, args=(0,))
        thread.start()
        while len(server.served) < 2:
            time.sleep(0.001)
        quick = reader_of(source, folder)
        for index in (0, 1, 2, 0, 1, 2):
            assert same(quick.read(index), truth[index])
        assert thread.is_alive()
        server.open.set()
        thread.join()
    assert slow.cache_stats.misses == 1
    assert slow.cache_stats.stored == 0  # the quick one had been faster
    assert quick.cache_stats.stored == 3


def test_what_a_process_left_half_written_is_removed(source, folder):
    reader_of(source, folder).read(0)
    (path,) = files(folder)
    path.rename(path.with_name(path.name + PARTIAL))
    reader = reader_of(source, folder)
    reader.read(1)
    assert len(files(folder)) == 1
    reader.read(0)
    assert reader.cache_stats.stored == 2
    assert held(folder) == counted(folder)


HAMMER = """
import sys
import numpy as np
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.storage.nodecache import NodeCacheConfig

root, folder, limit, seed = sys.argv[1:]
manifest = Manifest.load(root)
reader = BlockReader(manifest, cache=NodeCacheConfig(folder=folder, limit_gb=int(limit) / 1e9))
draws = np.random.default_rng(int(seed))
truth = [BlockReader(manifest).read(i)["id"] for i in range(len(manifest.blocks))]
print("ready", flush=True)
for _ in sys.stdin:
    for index in draws.integers(0, len(truth), 50):
        assert np.array_equal(reader.read(int(index))["id"], truth[index])
    print(reader.cache_stats.hits, reader.cache_stats.stored, reader.cache_stats.damaged, flush=True)
"""


def test_processes_hammer_one_folder_and_some_are_killed(source, truth, folder):
    limit = int(3.5 * max(b.bytes for b in source.blocks))
    processes = [hammer(source, folder, limit, seed) for seed in range(3)]
    largest, draws = 0, np.random.default_rng(0)
    for kill in range(6):
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        victim = processes.pop(0)
        until = time.monotonic() + float(draws.uniform(0.0, 0.02))
        while time.monotonic() < until:
            largest = max(largest, held(folder))
        victim.kill()
        victim.communicate()
        for process in processes:
            hits, stored, damaged = map(int, process.stdout.readline().split())
            assert hits > 0
            assert stored > 0
            assert damaged == 0
        processes.append(hammer(source, folder, limit, 10 + kill))
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert 0 < largest <= limit
    check_folder(source, truth, folder, limit)


def hammer(source, folder, limit: int, seed: int) -> subprocess.Popen:
    words = [sys.executable, "-c", HAMMER, source.root, str(folder), str(limit), str(seed)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def check_folder(source, truth, folder, limit: int) -> None:
    """That what stayed is whole, and a new process counts it right and makes room in it."""
    hashes = {b.xxh3 for b in source.blocks}
    assert all(
        xxhash.xxh3_64_hexdigest(path.read_bytes()) in hashes
        for path in files(folder)
        if path.suffix != PARTIAL
    )
    reader = reader_of(source, folder, limit)
    for index in range(len(SIZES)):
        assert same(reader.read(index), truth[index])
    assert held(folder) == counted(folder) <= limit
    assert not [path for path in files(folder) if path.suffix == PARTIAL]
    assert reader.cache_stats.damaged == 0

"""The loader against its upper bound (fancy indexing of a memory map) and what it replaces (plain webdataset).

100,000 latents of 8 KiB, warm page cache, one consumer process: samples a second and microseconds of CPU a sample,
the first batch of a fresh start and of a resume in the middle of an epoch, the cost of checksums, several ranks on a
node at once, memory.
"""

from __future__ import annotations

import io
import multiprocessing
import queue
import resource
import tarfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from dit.bench.speed.turns import Contender, MedianRange, ratio, take_turns
from dit.config import ConfigError, config
from dit.data import DataError
from dit.data.loading.stream import Stream
from dit.data.shards.manifest import Manifest
from dit.data.shards.write import ShardWriter, write_names

SHAPE = (4, 32, 32)  # float16: 8 KiB
CLASSES = 1000
PATIENCE = 600  # seconds that a rank waits for the others to have read an epoch
SIZES = "sizes"  # a file that says what lies in the folder


@config
class LoaderBench:
    """Sizes. samples: in the data set. plain: of them in per-sample shards, for webdataset. repeats: turns.

    ranks: how many of them read at once, for each figure of several on a node.
    """

    samples: int = 100_000  # latents in the data set
    plain: int = 20_000  # of them in per-sample shards, for webdataset
    batch: int = 256  # samples a batch
    repeats: int = 5  # turns of each contender
    lanes: int = 64  # data sequences that a batch is filled from
    window: int = 2  # blocks a lane shuffles over
    readers: int = 2  # threads that read blocks
    prefetch: int = 4  # batches made ahead
    ranks: tuple[int, ...] = (1, 2, 4)  # processes that read at once, for each figure of several on a node

    def __post_init__(self) -> None:
        if self.plain > self.samples or self.batch > self.samples or self.repeats < 1:
            raise ConfigError(
                f"plain ({self.plain}) and batch ({self.batch}) are at most samples ({self.samples}), repeats "
                f"({self.repeats}) at least 1"
            )

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.samples // self.batch


@dataclass(frozen=True)
class Files:
    """The same latents three times: our shards, one array in one file, a tar member each."""

    blocks: Manifest
    array: Path
    plain: list[str]


def write_files(folder: Path, cfg: LoaderBench) -> Files:
    """Write the data, or take those that are there."""
    shards = sorted(str(p) for p in (folder / "plain").glob("*.tar"))
    if not (folder / SIZES).is_file() or (folder / SIZES).read_text("utf-8") != f"{cfg.samples} {cfg.plain}":
        for name in ("blocks", "plain"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        array = open_memmap(folder / "array.npy", "w+", np.float16, (cfg.samples, *SHAPE))
        rng = np.random.default_rng(0)
        for start in range(0, cfg.samples, 4096):
            rows = array[start : start + 4096]
            rows[:] = rng.standard_normal(rows.shape, np.float32)
        array.flush()
        write_blocks(folder / "blocks", array)
        shards = _write_plain(folder / "plain", array[: cfg.plain])
        (folder / SIZES).write_text(f"{cfg.samples} {cfg.plain}", "utf-8")
    return Files(Manifest.load(folder / "blocks"), folder / "array.npy", shards)


def write_blocks(folder: Path, array: np.ndarray) -> None:
    """Write latents (n, *SHAPE) as a data set in blocks of 256."""
    ids = np.arange(len(array))
    with ShardWriter(folder, 512_000_000) as writer:
        for start in range(0, len(array), 256):
            part = slice(start, start + 256)
            latents = np.ascontiguousarray(array[part])[:, None]
            writer.add({"latents": latents, "label": ids[part] % CLASSES, "id": ids[part].astype(np.uint64)})
        writer.finish()
    names = write_names(folder, [f"{i:06d}" for i in ids])
    Manifest(
        samples=len(array),
        array="latents",
        shape=(1, *SHAPE),
        views=("original",),
        posterior="sample",
        image_size=256,
        transform="none: random numbers",
        classes=tuple(str(i) for i in range(CLASSES)),
        class_counts=tuple(np.bincount(ids % CLASSES, minlength=CLASSES).tolist()),
        unlabelled=0,
        mean=(0.0,) * SHAPE[0],
        std=(1.0,) * SHAPE[0],
        codec={"name": "none"},
        seed=0,
        block=256,
        names=names,
        shards=tuple(writer.shards),
        blocks=tuple(writer.blocks),
    ).save(folder)


def _write_plain(folder: Path, array: np.ndarray, per_shard: int = 5000) -> list[str]:
    for old in folder.glob("*.tar"):
        old.unlink()
    shards = []
    for start in range(0, len(array), per_shard):
        shards.append(str(folder / f"{start // per_shard:06d}.tar"))
        with tarfile.open(shards[-1], "w") as tar:
            for i, latent in enumerate(array[start : start + per_shard], start):
                buffer = io.BytesIO()
                np.save(buffer, latent)
                for name, data in (
                    (f"{i:06d}.npy", buffer.getvalue()),
                    (f"{i:06d}.cls", b"%d" % (i % CLASSES)),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return shards


# --- contenders --------------------------------------------------------------------------------------------


def open_stream(manifest: Manifest, cfg: LoaderBench, rank: int = 0, size: int = 1) -> Stream:
    """Open the stream that is measured."""
    return Stream(manifest, 0, cfg.batch, rank, size, cfg.lanes, cfg.window, readers=cfg.readers)


def ours(stream: Stream, cfg: LoaderBench) -> Callable[[int], int]:
    """Make a contender that reads an epoch a turn, on and on."""

    def run(turn: int) -> int:
        steps = stream.iterate(turn * cfg.steps, (turn + 1) * cfg.steps, cfg.prefetch)
        return sum(len(batch.label) for batch in steps)

    return run


def first_epoch(stream: Stream, cfg: LoaderBench) -> Callable[[int], int]:
    """Make a contender that reads an epoch a turn in which every block is checked, as in the first one."""
    epoch = ours(stream, cfg)

    def run(turn: int) -> int:
        for source in stream.sources:
            source.reader.distrust()
        return epoch(turn)

    return run


def memory_map(array: np.ndarray, cfg: LoaderBench) -> Callable[[int], int]:
    """Make a contender that reads an epoch a turn, in a new random order."""

    def run(turn: int) -> int:
        order = np.random.default_rng(turn).permutation(len(array))
        return sum(
            len(torch.from_numpy(array[order[s * cfg.batch : (s + 1) * cfg.batch]])) for s in range(cfg.steps)
        )

    return run


def plain_webdataset(shards: list[str], cfg: LoaderBench) -> Callable[[int], int]:
    """Make a contender that reads per-sample shards as their users do: shuffled in a buffer of 1000, batched."""
    import webdataset

    def run(turn: int) -> int:
        pipe = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=turn).shuffle(1000).decode()
        batches = pipe.to_tuple("npy", "cls").batched(cfg.batch)
        return sum(len(latents) for latents, _ in batches)

    return run


# --- figures -----------------------------------------------------------------------------------------------


def run(folder: Path, cfg: LoaderBench, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Measure all figures, as JSON values. progress: called `turns(cfg)` times."""
    files = write_files(folder, cfg)
    stream = open_stream(files.blocks, cfg)
    checked = open_stream(files.blocks, cfg)
    array = np.load(files.array, mmap_mode="r")
    contenders = [
        Contender("ours", ours(stream, cfg)),
        Contender("memory map", memory_map(array, cfg)),
        Contender("ours, first epoch", first_epoch(checked, cfg)),
        Contender("plain webdataset", plain_webdataset(files.plain, cfg)),
    ]
    found = take_turns(contenders, cfg.repeats, 1, progress)
    rate = {name: f.rate for name, f in found.items()}
    figures = {
        "rates": {name: vars(MedianRange.of(f.rate)) for name, f in found.items()},
        "cpu_us": {name: vars(MedianRange.of(f.cpu)) for name, f in found.items()},
        "of memory map": vars(ratio(rate["ours"], rate["memory map"])),
        "of plain webdataset": vars(ratio(rate["ours"], rate["plain webdataset"])),
        "checksums": vars(ratio(rate["ours, first epoch"], rate["ours"])),
        "first_batch": _first_batches(files.blocks, cfg, progress),
        "ranks": {n: _ranks(files.blocks, cfg, n, progress) for n in cfg.ranks},
        "memory_bytes": stream.memory_bytes(cfg.prefetch),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for opened in (stream, checked):
        opened.close()
    return figures


def turns(cfg: LoaderBench) -> int:
    """Say how often `run` calls `progress`."""
    return 4 * (cfg.repeats + 1) + cfg.repeats + len(cfg.ranks)


def _first_batches(
    manifest: Manifest, cfg: LoaderBench, progress: Callable[[], object]
) -> dict[str, dict[str, float]]:
    """Milliseconds from nothing to a batch: of a fresh start, and of a resume in the middle of an epoch."""
    times: dict[str, list[float]] = {"fresh": [], "resume": []}
    for _ in range(cfg.repeats):
        for name, step in (("fresh", 0), ("resume", cfg.steps // 2 + 3)):
            start = time.perf_counter()
            stream = open_stream(manifest, cfg)
            stream.batch(step)
            times[name].append(1e3 * (time.perf_counter() - start))
            stream.close()
        progress()
    by_name = {name: vars(MedianRange.of(values)) for name, values in times.items()}
    return by_name | {"ratio": vars(ratio(times["resume"], times["fresh"]))}


def _ranks(
    manifest: Manifest, cfg: LoaderBench, size: int, progress: Callable[[], object]
) -> dict[str, float]:
    """Samples a second of all ranks of a node together in the second epoch, and CPU microseconds a sample."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(size, timeout=PATIENCE), context.Queue()
    processes = [
        context.Process(target=_rank, args=(manifest, cfg, rank, size, barrier, results), daemon=True)
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        found = _results(processes, results)
    except BaseException:
        for process in processes:
            if process.pid is not None:
                process.kill()
        raise
    for process in processes:
        process.join()
    progress()
    samples = cfg.steps * cfg.batch
    return {
        "rate": samples / max(seconds for seconds, _ in found),
        "cpu_us": 1e6 * sum(cpu for _, cpu in found) / samples,
    }


def _results(processes: Sequence[BaseProcess], results: Any) -> list[tuple[float, float]]:
    """What each rank put there. Raises DataError where one died: the others would wait for it for ever."""
    found: list[tuple[float, float]] = []
    while len(found) < len(processes):
        died = [(rank, p.exitcode) for rank, p in enumerate(processes) if p.exitcode]
        try:
            found.append(results.get(timeout=0.2))
        except queue.Empty:
            if died:
                who = ", ".join(f"rank {rank} died with exit code {code}" for rank, code in died)
                raise DataError(
                    f"{len(processes)} ranks read at once: {who}; what it said stands above"
                ) from None
    return found


def _rank(manifest: Manifest, cfg: LoaderBench, rank: int, size: int, barrier: Barrier, results: Any) -> None:
    torch.set_num_threads(1)
    stream = open_stream(manifest, cfg, rank, size)
    deque(stream.iterate(0, cfg.steps, cfg.prefetch), maxlen=0)
    barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    deque(stream.iterate(cfg.steps, 2 * cfg.steps, cfg.prefetch), maxlen=0)
    results.put((time.perf_counter() - start, time.process_time() - cpu))
    stream.close()

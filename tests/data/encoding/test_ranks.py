"""Encoding by several ranks, some of which are killed: always the bytes of one undisturbed process."""

import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit.data import DataError
from dit.data.codecs.autoencoders import VaeCodec
from dit.data.codecs.codec import PixelCodec
from dit.data.encoding import encode as encode_module
from dit.data.encoding.encode import EncodeOptions, _Run, encode
from dit.data.encoding.job import Job
from dit.data.encoding.part_encoder import PartEncoder
from dit.data.encoding.parts import Books
from dit.data.shards.manifest import Manifest
from dit.data.shards.verify import verify
from dit.data.sources.images import ImageSource, open_source
from tests.data.encoding.zygote import Zygote
from tests.data.helpers import endless, tiny_vae

KILLED = -9
HERE = "tests.data.encoding.test_ranks"


def made_up(images, size=8):
    """Images from memory, without labels for some."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
    return ImageSource(
        tuple(f"{i}.png" for i in range(images)),
        np.arange(images) % 4 - 1,
        ("a", "b", "c"),
        lambda i: Image.fromarray(pixels[i]),
    )


def codec_of(name):
    return PixelCodec() if name == "pixels" else VaeCodec(tiny_vae())


def rank(images, out, codec, rank, size, options):
    """One rank's whole life, for a process of its own."""
    report = encode(open_source(images), codec_of(codec), out, EncodeOptions(**options), rank=rank, size=size)
    print("images", report.images)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(encode_module, "POLL", (0.001, 0.01))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with Zygote(tmp_path_factory.mktemp("zygote")) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """240 images of 16x16, without classes."""
    root = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (240, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(root / f"{i:03d}.png")
    return root


OPTIONS = {"image_size": 16, "block": 8, "batch_size": 5, "workers": 1}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """By one process, undisturbed: {codec: its files}."""
    root = tmp_path_factory.mktemp("whole")
    for codec in ("pixels", "vae"):
        encode(open_source(folder), codec_of(codec), root / codec, EncodeOptions(**OPTIONS))
        assert [f for f in verify(Manifest.load(root / codec)) if f is not None] == []
    return {codec: files(root / codec) for codec in ("pixels", "vae")}


# --- processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["pixels", "vae"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_bytes_do_not_depend_on_the_ranks(zygote, folder, whole, tmp_path, codec, size):
    out = tmp_path / "out"
    ranks = [
        zygote.start(f"{HERE}:rank", str(folder), str(out), codec, r, size, {**OPTIONS, "workers": r + 1})
        for r in range(size)
    ]
    for pid in ranks:
        assert zygote.wait(pid) == 0, zygote.output(pid)
    assert files(out) == whole[codec]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_numbers_they_share_the_work_too(zygote, folder, whole, tmp_path):
    """The same command, started twice by hand."""
    command = (f"{HERE}:rank", str(folder), str(tmp_path / "out"), "vae", 0, 1, OPTIONS)
    ranks = [zygote.start(*command) for _ in range(2)]
    for pid in ranks:
        assert zygote.wait(pid) == 0, zygote.output(pid)
    assert files(tmp_path / "out") == whole["vae"]


def test_the_others_take_over_from_a_killed_rank(zygote, folder, whole, tmp_path):
    out = tmp_path / "out"
    with endless(out):
        doomed, heir = (
            zygote.start(f"{HERE}:rank", str(folder), str(out), "vae", r, 2, OPTIONS) for r in range(2)
        )
        while not list(tmp_path.glob("out.partial/parts/*.json")):
            time.sleep(0.001)
        assert zygote.kill(doomed) == KILLED
    assert zygote.wait(heir) == 0, zygote.output(heir)
    assert files(out) == whole["vae"]


def kill_and_restart(zygote, folder, out, options, codec, kills, longest, rng):
    """Two ranks; one of them is killed at a random moment and started again, so many times."""

    def start(r):
        return zygote.start(f"{HERE}:rank", str(folder), str(out), codec, r, 2, options)

    with endless(out):
        ranks = [start(0), start(1)]
        for _ in range(kills):
            time.sleep(rng.uniform(0, longest))
            which = rng.randrange(2)
            assert zygote.kill(ranks[which]) == KILLED  # it was at work
            ranks[which] = start(which)
    for pid in ranks:
        assert zygote.wait(pid) == 0, zygote.output(pid)


@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_killed_at_random_moments(zygote, folder, whole, tmp_path, seed):
    rng = random.Random(seed)
    kill_and_restart(zygote, folder, tmp_path / "out", OPTIONS, "vae", 3, 0.1, rng)
    assert files(tmp_path / "out") == whole["vae"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_of_two_ranks_killed_ten_times(zygote, folder, tmp_path, seed):
    """The same with 1,920 images; and a rank that is alone, killed as often."""
    large = tmp_path / "images"
    large.mkdir()
    for copy in range(8):
        for path in folder.iterdir():
            shutil.copy(path, large / f"{copy}-{path.name}")
    options = {**OPTIONS, "image_size": 32, "block": 16}
    encode(open_source(large), codec_of("vae"), tmp_path / "whole", EncodeOptions(**options))
    rng = random.Random(seed)
    kill_and_restart(zygote, large, tmp_path / "out", options, "vae", 10, 0.4, rng)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    alone = [f"{HERE}:rank", str(large), str(tmp_path / "alone"), "vae", 0, 1, options]
    for _ in range(10):  # and alone, started again each time
        pid = zygote.start(*alone)
        time.sleep(rng.uniform(0, 1))
        zygote.kill(pid)
    pid = zygote.start(*alone)
    assert zygote.wait(pid) == 0, zygote.output(pid)
    assert files(tmp_path / "alone") == files(tmp_path / "whole")


# --- threads: any number of ranks, parts and interruptions ---------------------------------------------------


class Stop(Exception):
    """What interrupts a rank here."""


def interrupted(source, out, options, images):
    """A rank that stops after so many images of its own; whether it did."""
    seen = 0

    def progress(more):
        nonlocal seen
        seen += more
        if seen > images:
            raise Stop

    try:
        encode(source, PixelCodec(), out, options, progress)
    except Stop:
        return True
    return False


@settings(max_examples=12)
@given(
    images=st.integers(1, 50),
    block=st.integers(1, 9),
    batch=st.integers(1, 12),
    shard_kb=st.integers(1, 40),
    size=st.integers(1, 4),
    stops=st.lists(st.integers(0, 40), max_size=2),
    flip=st.booleans(),
)
def test_any_sizes_ranks_and_stops(tmp_path_factory, images, block, batch, shard_kb, size, stops, flip):
    root, source = tmp_path_factory.mktemp("any"), made_up(images)
    options = EncodeOptions(
        image_size=8, block=block, batch_size=batch, shard_mb=shard_kb / 1000, workers=1, flip=flip
    )
    encode(source, PixelCodec(), root / "whole", options)
    for images_until in stops:
        if not interrupted(source, root / "out", options, images_until):
            break
    with ThreadPoolExecutor(size) as pool:
        told = [[] for _ in range(size)]
        futures = [
            pool.submit(
                encode,
                source,
                PixelCodec(),
                root / "out",
                options,
                told[r].append,
                rank=r,
                size=size,
                resumed=told[r].append,
            )
            for r in range(size)
        ]
        reports = [f.result() for f in futures]
    assert files(root / "out") == files(root / "whole")
    assert sorted(p.name for p in root.iterdir()) == ["out", "whole"]
    assert [sum(counts) for counts in told] == [images] * size
    assert all(r.manifest.digest == reports[0].manifest.digest for r in reports)
    manifest = Manifest.load(root / "out")
    assert [f for f in verify(manifest) if f is not None] == []
    shutil.rmtree(root)


def test_two_ranks_at_the_same_part(tmp_path):
    """As happens where locks do not reach other nodes: the same bytes, one after the other."""
    job = Job(made_up(40), PixelCodec(), EncodeOptions(image_size=8, block=5, batch_size=2, workers=2))
    books = [Books(tmp_path / "out", job.plan()) for _ in range(2)]
    barrier = threading.Barrier(2, timeout=20)

    def write(mine):
        mine.open()
        with PartEncoder(job, mine.folder, mine.tag) as encoder:
            done = []
            for part in job.parts:
                barrier.wait()
                done.append(encoder.write(part, None, 0, lambda n: None, lambda bad: None))
                mine.record(part, done[-1])
            return [(d.shard, d.blocks, d.stats, d.label_counts) for d in done]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(write, books)
    assert one == other
    report = encode(job.source, job.codec, tmp_path / "out", job.options)
    assert (report.images, report.resumed) == (0, 40)
    encode(job.source, job.codec, tmp_path / "whole", job.options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_part_that_a_living_rank_holds_is_waited_for(tmp_path):
    job = Job(made_up(40), PixelCodec(), EncodeOptions(image_size=8, block=5, workers=1))
    books, waited = Books(tmp_path / "out", job.plan()), []
    books.open()
    held = books.claim(job.parts[3], unlocked=False)
    held.__enter__()

    def waiting(what):
        waited.append((what.parts, what.ranks))
        assert len(list(books.folder.glob("*.tar"))) == 7
        if len(waited) == 3:
            held.__exit__(None, None, None)  # as when that rank dies

    encode(job.source, job.codec, tmp_path / "out", job.options, rank=1, size=2, waiting=waiting)
    assert waited == [((3,), ())] * 3
    encode(job.source, job.codec, tmp_path / "whole", job.options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_without_locks_ranks_keep_to_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("dit.data.encoding.parts.try_lock", lambda descriptor: None)
    job = Job(made_up(40), PixelCodec(), EncodeOptions(image_size=8, block=5, workers=1))
    with ThreadPoolExecutor(3) as pool:
        call = (encode, job.source, job.codec, tmp_path / "out", job.options)
        reports = [f.result() for f in [pool.submit(*call, rank=r, size=3) for r in range(3)]]
    assert [r.finished for r in reports] == [True, False, False]
    assert [r.images for r in reports[1:]] == [15, 10]
    encode(job.source, job.codec, tmp_path / "whole", job.options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_without_locks_it_says_who_has_to_be_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr("dit.data.encoding.parts.try_lock", lambda descriptor: None)
    job = Job(made_up(40), PixelCodec(), EncodeOptions(image_size=8, block=5, workers=1))
    waited = []

    def waiting(what):
        waited.append(what)
        if len(waited) == 2:
            raise Stop

    def encode_as(rank, size):
        encode(job.source, job.codec, tmp_path / "out", job.options, rank=rank, size=size, waiting=waiting)

    with pytest.raises(Stop):
        encode_as(1, 3)  # the others are dead
    assert [(sorted(w.parts), w.ranks) for w in waited] == [([0, 2, 3, 5, 6], (0, 2))] * 2
    assert 0 <= waited[0].seconds < waited[1].seconds
    waited.clear()
    with pytest.raises(Stop):
        encode_as(2, 3)
    assert {w.ranks for w in waited} == {(0,)}
    waited.clear()
    encode_as(0, 3)
    assert waited == []
    encode(job.source, job.codec, tmp_path / "whole", job.options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_without_locks_the_last_step_is_left_to_rank_0(tmp_path, monkeypatch):
    monkeypatch.setattr("dit.data.encoding.parts.try_lock", lambda descriptor: None)
    first, waited = a_rank(made_up(40), tmp_path / "out", 0), []
    first._write_what_is_free()

    def waiting(what):
        waited.append((what.parts, what.ranks))
        first._look()
        assert first._finish()

    job = first.job
    encode(job.source, job.codec, tmp_path / "out", job.options, rank=1, size=2, waiting=waiting)
    assert waited == [((), (0,))]


# --- ranks that disagree about which images can be read ------------------------------------------------------


def without(source, unreadable):
    """The source on a node that cannot read these images."""

    def opened(index):
        if index in unreadable:
            raise OSError("no decoder for it here")
        return source.open(index)

    return replace(source, open=opened)


def a_rank(source, out, rank, **fields):
    """Rank `rank` of two, to be taken a step at a time."""
    options = EncodeOptions(image_size=8, block=5, workers=1, max_bad=5, **fields)
    job = Job(source, PixelCodec(), options)
    books = Books(out, job.plan())
    books.open()

    def nothing(*_):
        pass

    encoder = PartEncoder(job, books.folder, books.tag)
    return _Run(job, books, encoder, (rank, 2), (nothing, nothing, nothing))


def part_of(job, image):
    return next(p for p in job.parts if image in job.order[p.start : p.stop])


def test_a_part_that_another_rank_wrote_again_is_not_finished_as_it_was(tmp_path):
    source, out = made_up(40), tmp_path / "out"
    blind, seeing = a_rank(without(source, {7}), out, 0), a_rank(source, out, 1)
    blind._write_what_is_free()
    assert [image.id for image in blind._bad()] == [7]
    seeing._write_what_is_free()
    assert seeing.mine == {part_of(seeing.job, 7).number}
    assert not blind._finish()
    assert blind._finish()
    manifest = Manifest.load(out)
    assert (manifest.samples, manifest.bad) == (40, ())
    assert [f for f in verify(manifest) if f is not None] == []
    encode(source, PixelCodec(), tmp_path / "whole", seeing.job.options)
    assert files(out) == files(tmp_path / "whole")


def test_nobody_finishes_while_a_part_is_written_again(tmp_path):
    source, out = made_up(40), tmp_path / "out"
    blind = a_rank(without(source, {7}), out, 0)
    blind._write_what_is_free()
    part = part_of(blind.job, 7)
    with Books(out, blind.job.plan()).claim(part, unlocked=False) as held:
        assert held
        assert not blind._finish()
        assert blind.done[part.number].bad
    assert blind._finish()
    assert Manifest.load(out).bad == ("7.png",)


def test_a_part_with_bad_images_is_held_while_the_set_is_finished(tmp_path):
    source, out = made_up(40), tmp_path / "out"
    blind = a_rank(without(source, {7}), out, 0)
    blind._write_what_is_free()
    part, finish = part_of(blind.job, 7), blind.books.finish

    def finishing(*content):
        with Books(out, blind.job.plan()).claim(part, unlocked=False) as held:
            assert not held
        finish(*content)

    blind.books.finish = finishing
    assert blind._finish()


def test_ranks_that_each_miss_another_image_of_a_part_do_not_write_it_for_ever(tmp_path):
    source, out = made_up(5), tmp_path / "out"
    one, other = a_rank(without(source, {1, 2}), out, 0), a_rank(without(source, {3}), out, 1)
    for rank in (one, other):
        rank._write_what_is_free()
        assert rank.mine == {0}  # the second took it to be able to write all of it
    for rank in (one, other):
        rank.mine.clear()
        rank.done.clear()
        rank._write_what_is_free()
        assert rank.mine == set()  # and the first knows that it would leave out more
    assert one._finish()
    assert Manifest.load(out).bad == ("3.png",)


@settings(max_examples=15)
@given(unreadable=st.lists(st.sets(st.integers(1, 9)), min_size=2, max_size=3), locks=st.booleans())
def test_ranks_that_disagree_come_to_an_end(tmp_path_factory, unreadable, locks):
    root, source = tmp_path_factory.mktemp("disagree"), made_up(10)
    options = EncodeOptions(image_size=8, block=5, batch_size=3, workers=1, max_bad=10)
    size = len(unreadable)

    def encode_as(rank):
        seen = 0

        def progress(more):
            nonlocal seen
            seen += more
            assert seen < 200, "it writes again and again"

        def waiting(what):
            assert what.seconds < 20, f"{what.parts} {what.ranks} have no end"

        seer = without(source, unreadable[rank])
        place = {"rank": rank, "size": size}
        return encode(seer, PixelCodec(), root / "out", options, progress, **place, waiting=waiting)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(size) as pool:
        if not locks:
            patch.setattr("dit.data.encoding.parts.try_lock", lambda descriptor: None)
        futures = [pool.submit(encode_as, r) for r in range(size)]
        reports = [f.result() for f in futures]
    manifest = reports[0].manifest
    assert [f for f in verify(Manifest.load(root / "out")) if f is not None] == []
    left_out = {int(name.removesuffix(".png")) for name in manifest.bad}
    assert manifest.samples == 10 - len(left_out)
    assert set.intersection(*unreadable) <= left_out <= set.union(*unreadable)
    shutil.rmtree(root)


# --- processes that fail -----------------------------------------------------------------------------------


def little_disk(images, out, limit):
    """A rank whose files may have so many bytes."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(DataError, match=r"cannot write to .*File too large; parts that are done are kept"):
        encode(open_source(images), PixelCodec(), out, EncodeOptions(**OPTIONS))


def test_a_full_disk(zygote, folder, whole, tmp_path):
    """Here: files that may not grow. With room the same command goes on."""

    def stop(images):
        if list((tmp_path / "out.partial" / "parts").glob("*.json")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(open_source(folder), PixelCodec(), tmp_path / "out", EncodeOptions(**OPTIONS), stop)
    pid = zygote.start(f"{HERE}:little_disk", str(folder), str(tmp_path / "out"), 20_000)
    assert zygote.wait(pid) == 0, zygote.output(pid)
    assert not list(tmp_path.glob("out.partial/.*"))  # what cannot be finished takes no room
    encode(open_source(folder), PixelCodec(), tmp_path / "out", EncodeOptions(**OPTIONS))
    assert files(tmp_path / "out") == whole["pixels"]

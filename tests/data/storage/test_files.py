"""Where shards lie: every storage reads the same bytes; a real web server that goes wrong in every way it can."""

import dataclasses
import importlib.util
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.data import DataError
from dit.data.loading.stream import Stream
from dit.data.shards.blocks import BlockError, BlockReader
from dit.data.shards.manifest import FILE, Manifest
from dit.data.storage import web
from dit.data.storage.files import AnyStorage, fill, open_storage
from dit.data.storage.remote import Retry, join, public, split, text_of
from dit.data.storage.web import HttpStorage
from tests.data.helpers import flip_byte, write_dataset
from tests.data.storage.http_server import FAULTS, serving

SIZE = 5000
CONTENT = np.random.default_rng(0).bytes(SIZE)
NAME = "a file #1 of 100%.bin"
FAST = Retry(attempts=4, first=0.001, longest=0.01)
SECRETS = ("hunter2", "s3cr3t")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / NAME).write_bytes(CONTENT)
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def roots(folder):
    """A folder with the same files, for each kind of storage."""
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/files/{file.name}": file.read_bytes() for file in folder.iterdir()})
    with serving(folder) as server:
        yield {
            "local": str(folder),
            "file": f"file://{folder}",
            "memory": "memory://files/",
            "http": server.url,
        }


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


def read(storage, offset: int, size: int, name: str = NAME) -> bytes:
    buffer = bytearray(size)
    storage.read(name, offset, memoryview(buffer))
    return bytes(buffer)


KINDS = pytest.mark.parametrize("kind", ["local", "file", "memory", "http"])


# --- what all storages do ----------------------------------------------------------------------------------


@KINDS
def test_whole_files(roots, kind):
    storage = open_storage(roots[kind])
    assert (storage.bytes(NAME), storage.size(NAME)) == (CONTENT, SIZE)
    assert (storage.bytes("empty"), storage.size("empty")) == (b"", 0)


@KINDS
@settings(max_examples=30)
@given(st.lists(st.integers(0, SIZE), min_size=2, max_size=2, unique=True).map(sorted))
def test_any_range(roots, kind, ends):
    start, stop = ends
    assert read(open_storage(roots[kind]), start, stop - start) == CONTENT[start:stop]


@KINDS
@pytest.mark.parametrize("offset", [SIZE - 1, SIZE, SIZE + 1000])
def test_a_file_that_ends_too_early(roots, kind, offset):
    with pytest.raises(EOFError, match=f"truncated: the file ends at byte {SIZE}"):
        read(open_storage(roots[kind]), offset, 2)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    """Found by the read itself, though its size was right when it was opened."""
    (tmp_path / "file").write_bytes(CONTENT[:100])
    buffer = memoryview(bytearray(61))
    with (tmp_path / "file").open("rb") as opened:
        fill(opened.fileno(), 10, buffer[:60])
        assert buffer[:60] == CONTENT[10:70]
        with pytest.raises(EOFError, match="truncated: the file ended at byte 100 while it was read"):
            fill(opened.fileno(), 40, buffer)


def test_a_read_that_gives_less_goes_on():
    """As Linux does after 2 GiB, and for a signal; here a file that has a limit of its own for a read: a page."""
    with Path("/proc/self/smaps").open("rb") as opened:
        assert len(os.pread(opened.fileno(), 20_000, 0)) < 20_000, (
            "no short read here: find another such file"
        )
        buffer = memoryview(bytearray(20_000))
        fill(opened.fileno(), 0, buffer)
    assert bytes(buffer[-100:]).strip(b"\0")


@KINDS
def test_no_such_file(roots, kind):
    storage = open_storage(roots[kind])
    for call in (storage.bytes, storage.size, lambda name: read(storage, 0, 1, name=name)):
        with pytest.raises(FileNotFoundError) as raised:
            call("missing")
        assert "missing" in str(raised.value.filename)


@KINDS
def test_files_named_by_whole_paths_and_urls(roots, kind):
    storage = AnyStorage("/nowhere")
    location = (
        f"{roots['http']}/a%20file%20%231%20of%20100%25.bin" if kind == "http" else join(roots[kind], NAME)
    )
    assert read(storage, 7, 20, name=location) == CONTENT[7:27]
    assert storage.size(location) == SIZE


WORDS = st.text("ab %#&+é", min_size=1).filter(str.strip)


@given(
    st.sampled_from(["http://h/a", "https://h", "s3://b/c", "/a/b"]), WORDS, st.sampled_from(["", "?sig=1/2"])
)
def test_a_location_splits_into_what_it_was_joined_from(root, name, query):
    root += query if "://" in root else ""
    assert split(join(root, name)) == (root, name)


# --- a server that goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*sorted(set(FAULTS) - {"flipped"}), 408, 425, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(server, fault):
    storage = HttpStorage(server.url, FAST)
    server.fail(fault, 2)
    assert read(storage, 1000, 2000) == CONTENT[1000:3000]
    assert len(server.served) == 3


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, FileNotFoundError),
        (410, FileNotFoundError),
        (401, PermissionError),
        (403, PermissionError),
        (400, OSError),
    ],
)
def test_what_will_not_pass_is_not(server, status, kind):
    server.fail(status, 2)
    with pytest.raises(kind, match=server.host):
        read(HttpStorage(server.url, FAST), 0, 10)
    assert len(server.served) == 1


def test_attempts_are_counted_and_come_to_an_end(server):
    storage = HttpStorage(server.url, dataclasses.replace(FAST, attempts=5))
    server.fail(503, 100)
    last = f"503 Service Unavailable, at attempt 5, the last: '{server.url}/a%20file"
    with pytest.warns(UserWarning, match=r"503 .*; trying again"), pytest.raises(OSError, match=last):
        read(storage, 0, 10)
    assert len(server.served) == 5
    assert storage.retries == 4


def test_attempts_end_in_time(server):
    server.fail(503, 100)
    began = time.monotonic()
    storage = HttpStorage(server.url, Retry(attempts=1000, first=0.3, longest=0.3, total=2.0))
    with pytest.warns(UserWarning, match="again"), pytest.raises(OSError, match="the last"):
        read(storage, 0, 10)
    assert len(server.served) < 15
    assert time.monotonic() - began < 20  # 300 s of pauses without an end


@given(st.integers(1, 9), st.floats(0.01, 1), st.floats(0.01, 20))
def test_pauses(attempt, first, longest):
    retry = Retry(first=first, longest=longest)
    mean = min(longest, first * 2 ** (attempt - 1))
    pauses = {retry.pause(attempt) for _ in range(5)}
    assert all(0.5 * mean <= p <= 1.5 * mean for p in pauses)
    assert len(pauses) > 1


def test_a_server_that_falls_silent(server, monkeypatch):
    server.open.clear()
    with monkeypatch.context() as impatient:
        impatient.setattr(web, "SILENCE", 0.1)
        with pytest.raises(OSError, match=r"[Tt]imeout"):
            read(HttpStorage(server.url, Retry(attempts=2, first=0.001)), 0, 10)
    server.open.set()
    assert read(HttpStorage(server.url, FAST), 0, 10) == CONTENT[:10]


def test_nobody_listens(folder):
    with serving(folder) as server:
        url = server.url
    with pytest.raises(OSError, match=f"the last: '{url}"):
        read(HttpStorage(url, Retry(attempts=2, first=0.001)), 0, 10)


def test_a_server_that_ignores_ranges_is_refused_before_all_has_come(tmp_path):
    (tmp_path / "big").write_bytes(bytes(100 << 20))
    with serving(tmp_path) as server:
        server.ranges = False
        storage = HttpStorage(server.url, FAST)
        with pytest.raises(OSError, match="ignores byte ranges"):
            read(storage, 0, 1000, name="big")
        assert len(server.served) == 1
        assert server.sent < 50 << 20
        assert storage.size("big") == 100 << 20


def test_such_a_server_is_good_for_files_of_one_block(server):
    server.ranges = False
    assert read(HttpStorage(server.url, FAST), 0, SIZE) == CONTENT


# --- threads and processes ---------------------------------------------------------------------------------


def test_threads_wait_together(server):
    storage = open_storage(server.url)
    server.delay = 0.1
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: read(storage, i, 100), range(32)))
    assert found == [CONTENT[i : i + 100] for i in range(32)]
    assert server.busiest == 8
    assert time.monotonic() - began < 3.2  # 0.4 if all goes well; so many are the pauses one after the other


def test_a_fork_reads_on(server):
    storage = open_storage(server.url)
    assert read(storage, 0, 100) == CONTENT[:100]
    child = os.fork()
    if child == 0:
        try:
            with ThreadPoolExecutor(4) as pool:
                good = all(pool.map(lambda i: read(storage, i, 9) == CONTENT[i : i + 9], range(20)))
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert read(storage, 5, 100) == CONTENT[5:105]


# --- secrets -----------------------------------------------------------------------------------------------


def test_users_and_signatures_open_what_they_should(server):
    server.user, server.query = "me:hunter2", "sig=s3cr3t%2Fx%3D"
    storage = open_storage(f"http://me:hunter2@{server.host}?sig=s3cr3t%2Fx%3D")
    assert read(storage, 3, 100) == CONTENT[3:103]
    for url in (server.url, f"http://me:hunter2@{server.host}", f"http://{server.host}?sig=s3cr3t%2Fx%3D"):
        with pytest.raises(PermissionError, match=r"40[13]"):
            read(open_storage(url), 3, 100)


def failure_of(call) -> str:
    """What a call says that fails."""
    with pytest.raises((OSError, DataError)) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize(
    "fault", [401, 404, 500, "hang up", "break off", "shifted", "nobody", "host", "protocol"]
)
def test_secrets_are_not_told(server, fault):
    host = {"nobody": "127.0.0.1:1", "host": "no-such-host.invalid"}.get(fault, server.host)
    protocol = "htttp" if fault == "protocol" else "http"
    root = f"{protocol}://me:hunter2@{host}/x?sig=s3cr3t"
    if fault not in ("nobody", "host", "protocol"):
        server.fail(fault, 100)
    texts = []
    if fault != "protocol":
        texts.append(failure_of(lambda: read(HttpStorage(root, Retry(attempts=1)), 0, 10)))
    if fault in (401, 404, 500, "protocol"):
        texts.append(failure_of(lambda: Manifest.load(root)))
    for text in texts:
        assert not any(secret in text for secret in SECRETS), text
        assert f"{protocol}://***@{host}" in text


def test_secrets_in_others_messages():
    told = text_of(KeyError("no https://me:hunter2@h/a?sig=s3cr3t, no s3://hunter2@b"))
    assert told == """KeyError: 'no https://***@h/a?*** no s3://***@b'"""


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/a/me:pw@b?c", "/a/me:pw@b?c"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("ftp://me:p@w@host/a", "ftp://***@host/a"),
        ("https://h/a?X-Amz-Signature=1\n2", "https://h/a?***"),
    ],
)
def test_what_is_shown_of_a_location(location, shown):
    assert public(location) == shown


# --- packages and protocols --------------------------------------------------------------------------------


def missing_packages() -> dict[str, str]:
    """Protocol -> package, of those that fsspec knows and this environment cannot read."""
    homes = {name: known["class"].split(".")[0] for name, known in known_implementations.items()}
    return {name: home for name, home in homes.items() if importlib.util.find_spec(home) is None}


@pytest.mark.parametrize("protocol", sorted(missing_packages()))
def test_a_missing_package_is_named(protocol):
    with pytest.raises(DataError, match=rf"{protocol}://bucket/x: .*pip install \w+"):
        open_storage(f"{protocol}://bucket/x")


def test_an_unknown_protocol():
    with pytest.raises(DataError, match=r"nonsense://x: .*nonsense"):
        open_storage("nonsense://x")


# --- data sets ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", [5, 5, 5, 5, 2], views=2)


def test_a_data_set_on_a_server_is_the_same(data_set):
    with serving(Path(data_set.root)) as server:
        server.fail(503, 1, FILE)
        server.fail("break off", 1, ".tar")
        there = Manifest.load(f"{server.url}/{FILE}")
        assert dataclasses.replace(there, root=data_set.root) == data_set
        assert there.read_names() == data_set.read_names()
        streams = [Stream(m, seed=3, global_batch=4, lanes=2) for m in (data_set, there)]
        for here, far in zip(*(stream.iterate(0, 12) for stream in streams), strict=True):
            assert (here.moments.equal(far.moments), here.id.equal(far.id)) == (True, True)
        for stream in streams:
            stream.close()


def test_blocks_are_asked_for_by_their_range(data_set):
    with serving(Path(data_set.root)) as server:
        reader = BlockReader(Manifest.load(server.url))
        server.served.clear()
        for index in (3, 0):
            reader.read(index)
        blocks = [data_set.blocks[index] for index in (3, 0)]
        assert server.served == [
            (f"/{data_set.shards[b.shard].name}", f"bytes={b.offset}-{b.offset + b.bytes - 1}")
            for b in blocks
        ]


def test_no_manifest_there(server):
    with pytest.raises(DataError, match=f"{server.url}/x: no manifest.json"):
        Manifest.load(f"{server.url}/x/")
    server.fail(403)
    with pytest.raises(DataError, match=f"{server.url}/manifest.json: cannot be read: 403 Forbidden"):
        Manifest.load(server.url)


def test_broken_blocks_on_a_server_are_named(data_set, tmp_path):
    for name in (FILE, "names.txt", *(shard.name for shard in data_set.shards)):
        (tmp_path / name).write_bytes(Path(data_set.root, name).read_bytes())
    first, last = data_set.blocks[1], data_set.blocks[-1]
    flip_byte(tmp_path / data_set.shards[0].name, first.offset + 1000)
    os.truncate(tmp_path / data_set.shards[1].name, last.offset + 100)
    with serving(tmp_path) as server:
        reader = BlockReader(Manifest.load(server.url))
        for index, words in ((1, "altered"), (len(data_set.blocks) - 1, "truncated: the file ends at byte")):
            block = data_set.blocks[index]
            with pytest.raises(BlockError) as raised:
                reader.read(index)
            where = f"{server.url}/{data_set.shards[block.shard].name}: record {data_set.record(index)}"
            place = f"(bytes {block.offset} to {block.offset + block.bytes})"
            assert str(raised.value).startswith(f"{where} {place}: {words}")
        assert reader.read(0)["id"].shape == (5,)


def test_bytes_altered_on_their_way_are_seen_at_every_reading(data_set):
    with serving(Path(data_set.root)) as server:
        reader = BlockReader(Manifest.load(server.url))
        reader.read(0)
        server.fail("flipped")
        with pytest.raises(BlockError, match="altered"):
            reader.read(0)
        reader.read(0)


# --- S3 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(data_set, monkeypatch):
    """A data set in a bucket of a real S3 server on this machine, found by fsspec's configuration."""
    needed = "is needed for the test of S3: pip install s3fs 'moto[s3]' flask flask-cors"
    pytest.importorskip("s3fs", reason=f"s3fs {needed}")
    moto = pytest.importorskip("moto.server", reason=f"moto {needed}")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "me", "secret": "hunter2"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    system = fsspec.filesystem("s3")
    system.mkdir("bucket")
    for file in Path(data_set.root).iterdir():
        system.pipe(f"bucket/set/{file.name}", file.read_bytes())
    yield "s3://bucket/set"
    server.stop()


def test_a_data_set_in_a_bucket_is_the_same(bucket, data_set):
    there = Manifest.load(bucket)
    assert dataclasses.replace(there, root=data_set.root) == data_set
    readers = BlockReader(there), BlockReader(data_set)
    with ThreadPoolExecutor(4) as pool:
        for far, here in pool.map(lambda i: [r.read(i) for r in readers], range(len(data_set.blocks))):
            assert all(np.array_equal(far[name], here[name]) for name in here)
    storage, shard = open_storage(bucket), data_set.shards[0]
    assert storage.size(shard.name) == shard.bytes
    for offset in (shard.bytes - 1, shard.bytes, shard.bytes + 100):
        with pytest.raises(EOFError, match=f"truncated: the file ends at byte {shard.bytes}"):
            read(storage, offset, 2, name=shard.name)
    with pytest.raises(FileNotFoundError, match="s3://bucket/set/missing"):
        read(storage, 0, 2, name="missing")
    with pytest.raises(DataError, match=r"s3://bucket/other: no manifest\.json"):
        Manifest.load("s3://bucket/other")
    assert storage.retries == 0

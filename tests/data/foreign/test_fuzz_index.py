"""Whatever goes wrong with a shard made elsewhere: indexing it gives its samples, or a DataError that names it.

Each case breaks one of two good shards. Whether what came out are its samples, tarfile, numpy, torch and json say,
which read the broken shard by themselves: what no reader can see (another bit of a latent) is no fault of the index.
"""

import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dit.data import DataError
from dit.data.foreign.index import index
from dit.data.foreign.probe import IndexOptions
from dit.data.shards.readers import open_reader
from tests.data.foreign.foreign_shards import CODEC, array_of, as_json, pt, write_shards

SIZES, BROKEN = [4, 3], "latents-001.tar"
FAST, ALL = 200, 1000
LAYOUTS = {
    "npy": lambda i: {"npy": array_of(i), "cls": i % 3},
    "json": lambda i: {"npy": array_of(i), "json": {"label": i % 3, "caption": "x"}},
    "pt": lambda i: {"pt": pt(array_of(i)), "cls": i % 3},
}
Members = list[tuple[tarfile.TarInfo, bytes]]
Sample = tuple[str, np.ndarray, int]
TYPES = "<f3 zzz |O O8 <f4 >f2 <i2 <u2 M8 m8 V2 V0 <c4 e half <U1 a3 1f f9999999 S5000000000 ? T bool".split()  # noqa: SIM905 (a list of words)
SHAPES = [
    "(3, 2, 3)",
    "(18,)",
    "(2, 3, 3, 1)",
    "()",
    "(0, 4611686018427387904)",
    "(2, 3, 99999999999)",
    "(-2,)",
]
LABELS = [
    b"-2",
    b"1_0",
    b"5000000",
    b"9" * 5000,
    b"",
    b"1.0",
    b"cat",
    b"+1",
    b" 2\n",
    b"\xd9\xa1",
    b"0x1",
    b"-1",
]
JSON = [
    b"[" * 200_000,
    b'{"label":' * 100_000,
    b'{"label": 1',
    b'{"label": NaN}',
    b'{"label": 1e3}',
    b'{"label": ' + b"9" * 5000 + b"}",
    b"\xff\xfe",
    b"3",
    as_json(label=2),
    *(as_json(label=value) for value in (True, None, "1", -2, 10**12, [1], {})),
]


# --- corruptions -------------------------------------------------------------------------------------------------


def bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def bit_of_a_header(data: bytearray, rng: random.Random) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        start = rng.choice(tar.getmembers()).offset
    data[start + rng.randrange(512)] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def gone(data: bytearray, rng: random.Random) -> None:
    """At most 1024 bytes: a whole sample more could be missed by nobody who reads the shard alone."""
    start = 512 * rng.randrange(len(data) // 512)
    del data[start : start + rng.choice([1, 512, 1024])]


def put_in(data: bytearray, rng: random.Random) -> None:
    start = rng.choice([1, 512]) * rng.randrange(len(data) // 512)
    data[start:start] = bytes(rng.choice([1, 512, 1024]))


def zeros(data: bytearray, rng: random.Random) -> None:
    start, count = rng.randrange(len(data) - 1000), rng.randrange(1, 1000)
    data[start : start + count] = bytes(count)


def noise(data: bytearray, rng: random.Random) -> None:
    start, count = rng.randrange(len(data) - 1000), rng.randrange(1, 600)
    data[start : start + count] = rng.randbytes(count)


def tar_in_a_tar(data: bytearray, rng: random.Random) -> None:
    data[:] = bytes(data) * 2


def anew(change: Callable[[Members, random.Random], None]) -> Callable[[bytearray, random.Random], None]:
    """A change of the members of a tar, which is a good tar afterwards."""

    def apply(data: bytearray, rng: random.Random) -> None:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]
        change(members, rng)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for info, content in members:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        data[:] = out.getvalue()

    apply.__name__ = change.__name__
    return apply


def replaced(members: Members, rng: random.Random, endings: str, change: Callable[[bytes], bytes]) -> None:
    """The contents of one of the members of these endings."""
    chosen = [i for i, (info, _) in enumerate(members) if info.name.endswith(endings)]
    place = rng.choice(chosen or range(len(members)))
    members[place] = (members[place][0], change(members[place][1]))


@anew
def another_type(members: Members, rng: random.Random) -> None:
    word = rng.choice(TYPES).encode()
    replaced(members, rng, "npy", lambda data: data.replace(b"'<f2'", b"'%s'" % word))


@anew
def another_type_with_the_right_length(members: Members, rng: random.Random) -> None:
    word = rng.choice(TYPES).encode()
    room = len(word) - 3  # taken from the spaces that fill the header
    words = lambda data: data.replace(b"'<f2'", b"'%s'" % word).replace(b" " * max(room, 0) + b"\n", b"\n", 1)  # noqa: E731
    replaced(
        members, rng, "npy", lambda data: words(data) if room >= 0 else data.replace(b"'<f2'", b"'%s'" % word)
    )


@anew
def another_shape(members: Members, rng: random.Random) -> None:
    word = rng.choice(SHAPES).encode()
    fit = lambda data: data[10:128].replace(b"(2, 3, 3)", word).rstrip().ljust(117)[:117] + b"\n"  # noqa: E731
    replaced(
        members,
        rng,
        "npy",
        lambda data: data[:10] + fit(data) + data[128:] if b"NUMPY" in data else data[:99],
    )


@anew
def another_label(members: Members, rng: random.Random) -> None:
    replaced(members, rng, "cls", lambda data: rng.choice(LABELS))


@anew
def another_json(members: Members, rng: random.Random) -> None:
    replaced(members, rng, "json", lambda data: rng.choice(JSON))


@anew
def bits_of_contents(members: Members, rng: random.Random) -> None:
    def flipped(data: bytes) -> bytes:
        changed = bytearray(data or b"\0")
        bit(changed, rng)
        return bytes(changed)

    replaced(members, rng, rng.choice(["npy", "cls", "json", "pt"]), flipped)


@anew
def shortened(members: Members, rng: random.Random) -> None:
    replaced(
        members, rng, rng.choice(["npy", "cls", "json", "pt"]), lambda data: data[: rng.randrange(len(data))]
    )


@anew
def a_member_left_out(members: Members, rng: random.Random) -> None:
    del members[rng.randrange(len(members))]


@anew
def a_member_twice(members: Members, rng: random.Random) -> None:
    members.insert(rng.randrange(len(members)), rng.choice(members))


@anew
def two_members_swapped(members: Members, rng: random.Random) -> None:
    one, two = rng.sample(range(len(members)), 2)
    members[one], members[two] = members[two], members[one]


CORRUPTIONS = [
    bit, bit_of_a_header, cut, gone, put_in, zeros, noise, tar_in_a_tar, another_type,
    another_type_with_the_right_length, another_shape, another_label, another_json, bits_of_contents, shortened,
    a_member_left_out, a_member_twice, two_members_swapped,
]  # fmt: skip


# --- what others read --------------------------------------------------------------------------------------------


def read_by_others(shard: Path) -> list[Sample]:
    """Key, array and label of each sample, in order."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar.getmembers():
            key, _, extension = member.name.partition(".")
            found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return [(key, array_in(members), label_in(members)) for key, members in found.items()]


def array_in(members: dict[str, bytes]) -> np.ndarray:
    if "pt" in members:
        return torch.load(io.BytesIO(members["pt"]), weights_only=True).numpy()
    return np.load(io.BytesIO(members["npy"]), allow_pickle=False).astype(np.float16)


def label_in(members: dict[str, bytes]) -> int:
    said = members["cls"].decode() if "cls" in members else json.loads(members["json"])["label"]
    assert isinstance(said, str | bool | int | float)
    return int(float(said))


def as_indexed(folder: Path, out: Path) -> list[Sample]:
    shards = sorted(str(p) for p in folder.glob("*.tar"))
    made = index(shards, out, CODEC, IndexOptions(block=2))
    reader = open_reader(made)
    blocks = [reader.read(i) for i in range(len(made.blocks))]
    rows = [row for b in blocks for row in zip(b["latents"][:, 0], b["label"].tolist(), strict=True)]
    return [(name, *row) for name, row in zip(made.read_names(), rows, strict=True)]


def alike(one: list[Sample], two: list[Sample]) -> bool:
    return len(one) == len(two) and all(
        a[0] == b[0] and np.array_equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, list[bytes]]:
    """The bytes of both shards, by layout."""
    folder = tmp_path_factory.mktemp("good")
    return {
        name: [p.read_bytes() for p in write_shards(folder / name, SIZES, m)] for name, m in LAYOUTS.items()
    }


def write(folder: Path, shards: list[bytes]) -> Path:
    folder.mkdir()
    for number, data in enumerate(shards):
        (folder / f"latents-{number:03d}.tar").write_bytes(data)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_good_shard_is_read_as_others_read_it(good, tmp_path, layout):
    folder = write(tmp_path / "in", good[layout])
    others = [s for shard in sorted(folder.iterdir()) for s in read_by_others(shard)]
    assert len(others) == sum(SIZES)
    assert alike(as_indexed(folder, tmp_path / "out"), others)


@pytest.mark.parametrize(
    "number", [*range(FAST), *(pytest.param(n, marks=pytest.mark.slow) for n in range(FAST, ALL))]
)
def test_any_corruption(good, tmp_path, number):
    rng = random.Random(number)
    corruption = CORRUPTIONS[number % len(CORRUPTIONS)]
    layout = list(LAYOUTS)[number // len(CORRUPTIONS) % len(LAYOUTS)]
    which = rng.randrange(2)  # the first shard says how samples are stored
    broken = bytearray(good[layout][which])
    corruption(broken, rng)
    shards = [bytes(broken) if i == which else data for i, data in enumerate(good[layout])]
    folder = write(tmp_path / "in", shards)
    what = (corruption.__name__, layout, which)
    try:
        found = as_indexed(folder, tmp_path / "out")
    except DataError as error:
        assert re.search(rf"{folder}/latents-00{which}\.tar", str(error)), (what, str(error))  # noqa: PT017
        assert not (tmp_path / "out").exists(), what
        return
    others = [s for shard in sorted(folder.iterdir()) for s in read_by_others(shard)]
    assert len(found) == sum(SIZES), what
    assert alike(found, others), what


def test_the_cases_that_run_by_default_are_all_corruptions_of_all_layouts():
    assert len(CORRUPTIONS) * len(LAYOUTS) <= FAST

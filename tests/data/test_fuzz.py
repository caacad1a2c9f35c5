"""Whatever goes wrong with a data set on disk: it is found, it is named, and it never changes what is trained on.

Each case breaks a copy of a data set in one way (corruptions.py). Then `verify` must name the file; streaming an epoch
must raise a DataError that names it, or yield what the whole data set yields, to the bit; and no other exception may
come out of either.
"""

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dit.data import DataError
from dit.data.manifest import FILE, Manifest
from dit.data.stream import Batch, Stream
from dit.data.verify import check_manifest, verify
from tests.data.corruptions import CORRUPTIONS, Broken, Done
from tests.data.foreign.foreign_shards import array_of, members_of, pt, write_foreign
from tests.data.helpers import write_dataset

SIZES = [5, 5, 5, 3, 5, 5]  # 28 samples
FAST, ALL = 2 * len(CORRUPTIONS), 12 * len(CORRUPTIONS)
FIELDS = ("moments", "label", "id", "view", "eps", "valid")


def sizes(extra: int) -> list[int]:
    return [5] * 6 if extra else SIZES


def foreign(folder: Path, extra: int, **options) -> Manifest:
    flipped = lambda i: {"npy": array_of(i + extra), "flip.npy": array_of(i + extra)[..., ::-1].copy()}  # noqa: E731
    return write_foreign(
        folder,
        [10, 8, 10 + extra // 50],
        lambda i: {**members_of(i), **flipped(i)},
        block=5,
        flipped="flip.npy",
        **options,
    )


def tensors(folder: Path, extra: int) -> Manifest:
    """Moments in .pt files, with log variances."""
    members = lambda i: {"pt": pt(array_of(i + extra, 4)), "json": {"label": i % 3}}  # noqa: E731
    return write_foreign(
        folder, [10, 8, 10 + extra // 50], members, block=5, array="moments", spread="logvar"
    )


KINDS = {
    "moments": lambda folder, extra: write_dataset(folder, sizes(extra), views=2),
    "eps": lambda folder, extra: write_dataset(folder, sizes(extra), posterior=False, eps=True),
    "foreign": foreign,
    "foreign tensors": tensors,
}


@dataclass
class Known:
    """A good data set, another one like it, and what an epoch of it is."""

    folder: Path
    other: Path
    epoch: list[Batch]


def epoch(folder: Path) -> list[Batch]:
    stream = Stream(Manifest.load(folder), 3, 7, lanes=7)
    try:
        return list(stream.iterate(0, stream.steps_per_epoch))
    finally:
        stream.close()


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = [(getattr(x, f), getattr(y, f)) for x, y in zip(a, b, strict=False) for f in FIELDS]
    return len(a) == len(b) and all(
        x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory, digits) -> dict[str, Known]:
    root, found = tmp_path_factory.mktemp("fuzz"), {}
    for name, make in KINDS.items():
        for extra in (0, 50):
            make(root / f"{name}-{extra}", extra)
        found[name] = Known(root / f"{name}-0", root / f"{name}-50", epoch(root / f"{name}-0"))
    found["encoded"] = Known(digits.moments, digits.moments_val, epoch(digits.moments))
    return found


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """What became of the cases; printed at the end (pytest -s shows it)."""
    counts: Counter[str] = Counter()
    yield counts
    print("\nfuzz: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))


def fuzz(number: int, known: dict[str, Known], folder: Path) -> tuple[str, Done]:
    """Case `number`: what was done to a copy of which data set in `folder`."""
    kinds, names = list(known), list(CORRUPTIONS)
    kind, corruption = (
        kinds[(number + number // len(names)) % len(kinds)],
        CORRUPTIONS[names[number % len(names)]],
    )
    rng = random.Random(number)
    for _ in range(100):  # a few change nothing: zeros over zeros
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(known[kind].folder, folder)
        done = corruption(Broken(folder, known[kind].other, rng))
        if contents(folder) != contents(known[kind].folder):
            return kind, done
    raise AssertionError(f"{names[number % len(names)]} never changes {kind}")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}


def check_verify(folder: Path, done: Done, tally: Counter[str]) -> None:
    try:
        manifest, faults = check_manifest(folder)
        faults += [] if manifest is None else verify(manifest, threads=2)
    except DataError as error:
        assert FILE in str(error)  # noqa: PT017
        named = {FILE}
    else:
        assert faults, done
        named = {f.file for f in faults}
    assert done.forged or named & set(done.files), (done, named)
    tally["found by verify"] += 1


def check_stream(folder: Path, done: Done, whole: list[Batch], tally: Counter[str]) -> None:
    try:
        found = epoch(folder)
    except DataError as error:
        assert done.forged or any(name in str(error) for name in done.files), (done, str(error))  # noqa: PT017
        assert str(folder) in str(error)  # noqa: PT017
        tally["refused by the stream"] += 1
        return
    if not done.forged:
        assert same(found, whole), done
    tally["streamed to the bit" if same(found, whole) else "forged, streamed as the manifest says"] += 1


@pytest.mark.parametrize(
    "number",
    [*range(FAST), *(pytest.param(n, marks=pytest.mark.slow) for n in range(FAST, ALL))],
)
def test_any_corruption(number, known, tally, tmp_path):
    kind, done = fuzz(number, known, tmp_path / "set")
    check_verify(tmp_path / "set", done, tally)
    check_stream(tmp_path / "set", done, known[kind].epoch, tally)
    tally["cases"] += 1


def test_what_is_whole_is_found_whole(known):
    for it in known.values():
        manifest, faults = check_manifest(it.folder)
        assert faults + verify(manifest) == []
        assert same(epoch(it.folder), it.epoch)


def test_enough_cases():
    assert ALL >= 200

"""Whatever goes wrong with a data set on disk: it is found, it is named, and it never changes what is trained on.

Each case breaks a copy of a data set in one way (corruptions.py). Then `verify` must name the file; streaming an epoch
must raise a DataError that names it, or yield what the whole data set yields, to the bit; and no other exception may
come out of either. A manifest that was forged, checksum and all, is believed: then the stream may also yield exactly
those samples that it lists, each as it was written.

The first FAST cases run by default: every corruption of every kind of data set at least once. The others, up to ALL,
are marked slow. What becomes of tars given to `shards.py index` is in foreign/test_fuzz_index.py.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from dit.data import DataError
from dit.data.loading.stream import Batch, Stream
from dit.data.shards.manifest import FILE, Manifest
from dit.data.shards.readers import open_reader
from dit.data.shards.verify import check_manifest, verify
from tests.data.corruptions import CORRUPTIONS, Broken, Done
from tests.data.foreign.foreign_shards import array_of, members_of, pt, write_foreign
from tests.data.helpers import edit_manifest, write_dataset

SIZES = [5, 5, 5, 3, 5, 5]  # 28 samples
FAST, ALL = 200, 400
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
ALL_KINDS = [*KINDS, "encoded"]


@dataclass
class Known:
    """A good data set, another one like it, and what an epoch of it is. samples: (label, array, eps or None) by id."""

    folder: Path
    other: Path
    epoch: list[Batch]
    samples: dict[int, tuple[int, np.ndarray, np.ndarray | None]]


def known_of(folder: Path, other: Path) -> Known:
    manifest, samples = Manifest.load(folder), {}
    reader = open_reader(manifest)
    for index in range(len(manifest.blocks)):
        arrays = reader.read(index)
        eps = arrays.get("eps", [None] * len(arrays["id"]))
        for row in zip(arrays["id"], arrays["label"], arrays[manifest.array], eps, strict=True):
            samples[int(row[0])] = (int(row[1]), *row[2:])
    return Known(folder, other, epoch(folder), samples)


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
        found[name] = known_of(root / f"{name}-0", root / f"{name}-50")
    found["encoded"] = known_of(Path(digits.moments), Path(digits.moments_val))
    assert list(found) == ALL_KINDS
    return found


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """What became of the cases; printed at the end (pytest -s shows it)."""
    counts: Counter[str] = Counter()
    yield counts
    print("\nfuzz: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))


def fuzz(number: int, known: dict[str, Known], folder: Path) -> tuple[str, Done]:
    """Case `number`: what was done to a copy of which data set in `folder`."""
    kind, name = case(number)
    rng = random.Random(number)
    for _ in range(100):  # a few change nothing: zeros over zeros
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(known[kind].folder, folder)
        done = CORRUPTIONS[name](Broken(folder, known[kind].other, rng))
        if contents(folder) != contents(known[kind].folder):
            return kind, done
    raise AssertionError(f"{name} never changes {kind}")


def case(number: int) -> tuple[str, str]:
    """Kind of data set and corruption of case `number`."""
    names = list(CORRUPTIONS)
    return ALL_KINDS[(number + number // len(names)) % len(ALL_KINDS)], names[number % len(names)]


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


def check_stream(folder: Path, done: Done, known: Known, tally: Counter[str]) -> None:
    try:
        found = epoch(folder)
    except DataError as error:
        # what contradicts a forged manifest may be any shard
        files = [*done.files, *(p.name for p in folder.glob("*.tar"))] if done.forged else done.files
        assert any(name in str(error) for name in files), (done, str(error))  # noqa: PT017
        assert str(folder) in str(error)  # noqa: PT017
        tally["refused by the stream"] += 1
        return
    if same(found, known.epoch):
        tally["streamed to the bit"] += 1
        return
    assert done.forged, done
    check_as_forged(found, Manifest.load(folder), known, done)
    tally["forged, streamed as the manifest says"] += 1


def check_as_forged(found: list[Batch], says: Manifest, known: Known, done: Done) -> None:
    """That batches hold samples of the blocks that a forged manifest lists, each once, as they were written."""
    reader = open_reader(says)
    listed = {int(i) for index in range(len(says.blocks)) for i in reader.read(index)["id"]}
    seen = [int(i) for batch in found for i in batch.id]
    assert len(set(seen)) == len(seen) == 7 * (says.samples // 7), done
    assert set(seen) <= listed <= set(known.samples), done
    for batch in found:
        assert batch.valid is None or batch.valid.all(), done
        for row, identity in enumerate(batch.id.tolist()):
            label, array, eps = known.samples[identity]
            assert batch.label[row] == (-1 if says.foreign and says.foreign.label is None else label), done
            array = as_said(array[int(batch.view[row])], says)
            assert np.array_equal(batch.moments[row].numpy().ravel(), array.ravel()), done
            assert (batch.eps is None) == (eps is None), done
            assert eps is None or np.array_equal(batch.eps[row].numpy().ravel(), eps.ravel()), done


def as_said(array: np.ndarray, says: Manifest) -> np.ndarray:
    """An array whose scale was 1, with the scale that a forged manifest has; log variances know of none."""
    if says.foreign is None or says.foreign.scale == 1.0:
        return array
    scaled = (array.astype(np.float32) / np.float32(says.foreign.scale)).astype(array.dtype)
    return np.stack([scaled[0], array[1]]) if says.array == "moments" else scaled


@pytest.mark.parametrize(
    "number",
    [*range(FAST), *(pytest.param(n, marks=pytest.mark.slow) for n in range(FAST, ALL))],
)
def test_any_corruption(number, known, tally, tmp_path):
    kind, done = fuzz(number, known, tmp_path / "set")
    check_verify(tmp_path / "set", done, tally)
    check_stream(tmp_path / "set", done, known[kind], tally)
    tally["cases"] += 1


def test_what_is_whole_is_found_whole(known):
    for it in known.values():
        manifest, faults = check_manifest(it.folder)
        assert faults + verify(manifest) == []
        assert same(epoch(it.folder), it.epoch)


def test_the_cases_that_run_by_default_are_all_corruptions_of_all_kinds():
    assert {case(number) for number in range(FAST)} == set(product(ALL_KINDS, CORRUPTIONS))


def test_a_forged_scale_and_forged_labels_are_believed(known, tmp_path):
    """Which few of the cases above come to: the data cannot contradict them, but verify does."""
    for kind, changes in (
        ("foreign", {"scale": 2.0}),
        ("foreign tensors", {"scale": 0.25}),
        ("foreign", {"label": None}),
    ):
        folder = tmp_path / f"{kind} {changes}"
        shutil.copytree(known[kind].folder, folder)
        values = json.loads((folder / FILE).read_text())
        edit_manifest(folder, foreign={**values["foreign"], **changes})
        counts: Counter[str] = Counter()
        done = Done((FILE,), str(changes), forged=True)
        check_verify(folder, done, counts)
        check_stream(folder, done, known[kind], counts)
        assert counts == {"found by verify": 1, "forged, streamed as the manifest says": 1}

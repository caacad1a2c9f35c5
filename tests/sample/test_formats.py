"""Forms of drawn images: what other programs find in them, and that what is damaged is not read back."""

from __future__ import annotations

import contextlib
import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import dit.sample.formats
from dit.data.sources.images import open_source
from dit.sample.formats import DAMAGE, FORMATS, Format, Latents

COUNT, SIZE = 7, 3
LABELS = np.array([2, 0, 1, -1, 2, 0, 1])
FORMS = [*(form for _, form in FORMATS.items()), Latents]


def values(form: Format) -> np.ndarray:
    """Images, or latents, of which no two are alike."""
    generator = np.random.default_rng(0)
    if form.array == "latents":
        return generator.standard_normal((COUNT, 4, 5, 6)).astype(np.float32)
    return generator.integers(0, 256, (COUNT, 5, 6, 3), np.uint8)


def written(form: Format, folder: Path, labels: np.ndarray = LABELS) -> np.ndarray:
    held = values(form)
    with form.writing(folder, COUNT) as add:
        for first in range(0, COUNT, SIZE):
            add(held[first : first + SIZE], labels[first : first + SIZE])
    return held


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_written_is_read_back(tmp_path: Path, kind: type[Format], monkeypatch) -> None:
    monkeypatch.setattr(dit.sample.formats, "SHARD_BYTES", 5000)  # two images a shard
    form = kind()
    held = written(form, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(form.names)
    found = list(form.read(tmp_path))
    assert len(found) == COUNT
    assert (np.stack(found) == held).all()
    assert found[0].dtype == held.dtype
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    written(form, tmp_path)  # over what a start that was killed has left
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("kind", FORMS)
def test_a_bit_that_is_flipped_in_an_image_is_found(tmp_path: Path, kind: type[Format]) -> None:
    """At the places of the values, in every form: a checksum says so."""
    form = kind()
    written(form, tmp_path)
    file = sorted(p for p in tmp_path.rglob("*") if p.suffix in (".npz", ".png", ".tar"))[0]
    data = bytearray(file.read_bytes())
    at = data.find(b"IDAT") + 10 if b"IDAT" in data else 400
    data[at] ^= 4
    file.write_bytes(data)
    with pytest.raises(DAMAGE):
        list(form.read(tmp_path))


@pytest.mark.parametrize("kind", FORMS)
def test_a_file_that_is_cut_off_is_found(tmp_path: Path, kind: type[Format]) -> None:
    form = kind()
    written(form, tmp_path)
    file = sorted(p for p in tmp_path.rglob("*") if p.suffix in (".npz", ".png", ".tar"))[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    found = 0
    with contextlib.suppress(*DAMAGE):
        found = len(list(form.read(tmp_path)))
    assert found < COUNT, "a tar may end between its members: whoever reads it knows how many there should be"


@pytest.mark.parametrize("name", ["png", "webdataset"])
def test_an_image_that_is_gone_is_missed(tmp_path: Path, name: str) -> None:
    form = FORMATS[name]()
    written(form, tmp_path)
    if name == "png":
        (tmp_path / "images" / "00000003.png").unlink()
    else:
        shard = tmp_path / "shards" / "000000.tar"
        with tarfile.open(shard) as old:
            members = [(m, old.extractfile(m).read()) for m in old if not m.name.startswith("00000003")]  # type: ignore[union-attr]
        with tarfile.open(shard, "w") as new:
            for member, data in members:
                new.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match="00000004"):
        list(form.read(tmp_path))


def test_png_and_its_table(tmp_path: Path) -> None:
    held = written(FORMATS["png"](), tmp_path)
    with Image.open(tmp_path / "images" / "00000004.png") as image:
        assert (np.asarray(image) == held[4]).all()
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {"file": "00000001.png", "label": "0"}
    assert [row["label"] for row in rows] == ["2", "0", "1", "", "2", "0", "1"]


def test_shards_are_read_by_webdataset(tmp_path: Path) -> None:
    """No member of a class where an image has none; the library decodes the others' as numbers."""
    held = written(FORMATS["webdataset"](), tmp_path)
    urls = str(tmp_path / "shards" / "000000.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(COUNT)]
    assert [s.get("cls", -1) for s in samples] == LABELS.tolist()
    assert all((s["png"] == image).all() for s, image in zip(samples, held, strict=True))


@pytest.mark.parametrize(("name", "place"), [("png", "images"), ("webdataset", "shards")])
def test_they_are_images_that_can_be_encoded(tmp_path: Path, name: str, place: str) -> None:
    labels = np.where(LABELS < 0, 0, LABELS)
    held = written(FORMATS[name](), tmp_path, labels)
    source = open_source(str(tmp_path / place))
    assert len(source) == COUNT
    if name == "webdataset":
        assert source.labels.tolist() == labels.tolist()
    assert len(held) == COUNT

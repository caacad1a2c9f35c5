"""Images in an npz of the ADM suite: arr_0 the images, arr_1 their labels, and perhaps mu, sigma, mu_s, sigma_s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit.evals.metrics.metric import Statistics
from dit.evals.pictures.archive import Archive, Rows
from dit.evals.pictures.pictures import Pictures, PicturesError, labels_hash

PAIRS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # as ADM's evaluator stores them
SHOWN = 64  # images looked at for a message


@dataclass(frozen=True)
class ArchivedPictures(Pictures):
    """Rows of an array as images; grey ones are given three equal channels."""

    rows: Rows | None = None

    def __len__(self) -> int:
        return 0 if self.rows is None else self.rows.shape[0]

    def block(self, index: Sequence[int]) -> np.ndarray:
        """Read runs of neighbouring rows at once."""
        assert self.rows is not None
        numbers = np.asarray(index)
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        parts = [self.rows.read(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, breaks)]
        images = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if not self.converted:
            return images
        return np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)


def open_npz(path: Path, named: str = "", spec: Mapping[str, Any] | None = None) -> Pictures:
    """The images of an npz, and the statistics that lie with them; images are streamed.

    Raises PicturesError for what is no uint8 (N, H, W, 3), with what it is and how to mend it; grey images are taken,
    and `converted` says so.
    """
    archive = Archive(path)
    moments = {kind: _moments(archive, *names) for kind, names in PAIRS.items() if names[0] in archive}
    named = named or str(path)
    if "arr_0" not in archive and moments:
        about: dict[str, Any] = {"kind": "statistics of ADM", "crc": f"{archive.members['mu'].CRC:08x}"}
        return ArchivedPictures(named, (0, 0), None, about, moments=moments)
    rows = archive.rows(_name_of_images(archive))
    converted = _checked(rows, named)
    labels = _labels(archive, rows.shape[0], named)
    about = {"kind": "npz", "images": rows.shape[0], "crc": f"{rows.crc:08x}", "labels": labels_hash(labels)}
    size = (rows.shape[1], rows.shape[2])
    return ArchivedPictures(named, size, labels, about, (), converted, spec, moments, rows)


def _name_of_images(archive: Archive) -> str:
    if "arr_0" in archive:
        return "arr_0"
    names = [name for name in archive.members if len(archive.rows(name).shape) in (3, 4)]
    if len(names) == 1:
        return names[0]
    raise PicturesError(
        f"{archive.path}: expected images as arr_0, uint8 (N, H, W, 3), as numpy.savez(FILE, images, labels) writes "
        f"them; it holds {', '.join(archive.members) or 'nothing'}"
    )


def _checked(rows: Rows, named: str) -> str:
    """What is done to the images of an array, "" for nothing. PicturesError where they cannot be taken."""
    shape, dtype, name = rows.shape, rows.dtype, f"{named}: {rows.name}"
    if len(shape) == 2:
        raise PicturesError(
            f"{name} is {shape} {dtype}: features and no images? `evaluate.py features` takes those"
        )
    if len(shape) not in (3, 4):
        raise PicturesError(f"{name} is {shape} {dtype}, expected images (N, H, W, 3) uint8")
    if not shape[0] or 0 in shape:
        raise PicturesError(f"{name} is {shape}: it is empty")
    if dtype != np.uint8:
        raise PicturesError(f"{name} is {shape} {dtype}, expected uint8{_mending(rows)}")
    if len(shape) == 3 or shape[3] == 1:
        return "grey repeated in three channels"
    if shape[3] == 3:
        return ""
    if shape[1] in (1, 3):
        raise PicturesError(
            f"{name} is {shape}: its channels come first; save images.transpose(0, 2, 3, 1), (N, H, W, 3)"
        )
    alpha = ": composite the transparency (on which colour is yours to say)" if shape[3] == 4 else ""
    raise PicturesError(f"{name} is {shape}: {shape[3]} channels, expected 3 (RGB) or 1 (grey){alpha}")


def _mending(rows: Rows) -> str:
    """What values are there, and the line that makes uint8 of them."""
    if rows.dtype.kind not in "fiub":
        return ""
    first = rows.read(0, min(SHOWN, rows.shape[0])).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(first.reshape(len(first), -1)).all(1))
    if len(bad):
        return f"; image {bad[0]} is not finite: what drew it failed"
    low, high = first.min(), first.max()
    line = _line(rows.dtype, low, high)
    return (
        f"; its first images are in [{low:.4g}, {high:.4g}]: how they become bytes changes figures, so say it yourself"
        + (f", as by {line}" if line else "")
    )


def _line(dtype: np.dtype, low: float, high: float) -> str:
    """Python that makes uint8 of values in [low, high]; "" where they are in no range that is in use."""
    if low >= 0 and high <= 1:
        return "(images * 255.0).round().astype(numpy.uint8)"
    if dtype == np.uint16 and high > 255:
        return "(images / 257).round().astype(numpy.uint8)"
    if dtype.kind == "f" and low >= -1.5 and high <= 1.5:
        return "((images + 1) * 127.5).round().clip(0, 255).astype(numpy.uint8)"
    if low >= -8 and high <= 263:  # of an interpolation, or exact
        return "images.clip(0, 255).round().astype(numpy.uint8)"
    return ""


def _labels(archive: Archive, count: int, named: str) -> np.ndarray | None:
    if "arr_1" not in archive:
        return None
    labels = archive.whole("arr_1")
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise PicturesError(
            f"{named}: arr_1 is {labels.shape} {labels.dtype}, expected the labels of {count} images, whole numbers "
            f"({count},)"
        )
    if count and labels.max() > np.iinfo(np.int64).max:
        raise PicturesError(f"{named}: arr_1 has the label {labels.max()}, which is no class")
    return labels.astype(np.int64)


def _moments(archive: Archive, mean: str, cov: str) -> Statistics:
    if cov not in archive:
        raise PicturesError(f"{archive.path}: has {mean} and no {cov}")
    m, c = (archive.whole(name).astype(np.float64) for name in (mean, cov))
    if m.ndim != 1 or c.shape != (len(m), len(m)) or not (np.isfinite(m).all() and np.isfinite(c).all()):
        raise PicturesError(
            f"{archive.path}: {mean} {m.shape} and {cov} {c.shape} are no mean and covariance"
        )
    return Statistics(m, c)

"""Images in Parquet files, as Hugging Face's `datasets` lays them out.

A column `image` of {bytes, path} or of bytes, and a column `label` of whole numbers, whose names are in the schema's
metadata. Labels and paths are read at once. Bytes can only be read a row group at a time, which in the random
order of encoding would be a row group for each image; so at the first image all are written once to a local file
(spill.py), in memory of a few pages of the file, and read from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dit.data import DataError
from dit.data.sources.arrow import may_hold_labels, take_labels
from dit.data.sources.classes import USUAL, LabelChoice, LabelColumn
from dit.data.sources.source import ImageSource, check_size, files_of, listing
from dit.data.sources.spill import Spill
from dit.progress import Bar

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS = 16  # decoded at a time
STREAMED = {"buffer_size": 1 << 20, "pre_buffer": False}  # else a whole row group is read into memory


class Kind(NamedTuple):
    """A kind of column: Hugging Face's name of it, usual names of such columns, and the flag to choose one with."""

    type: str
    usual: tuple[str, ...]
    flag: str


IMAGE = Kind("Image", ("image", "img"), "--image_column")
LABEL = Kind("ClassLabel", USUAL, "--label_column")


@dataclass(frozen=True)
class Layout:
    """Which columns hold what: Parquet's names, such as image.bytes. path, label: None where there is none."""

    bytes: str
    path: str | None
    label: str | None
    classes: tuple[str, ...] | None  # None: the labels have no names
    unlabelled: str = field(
        default="", compare=False, repr=False
    )  # why there are no labels, where that may be in doubt


@dataclass
class ParquetImages:
    """Gives the file of image i; the first call writes the images of all files to a local file."""

    files: Sequence[Path]
    layout: Layout
    count: int
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _spill: Spill | None = None

    def __call__(self, index: int) -> bytes:
        with self._lock:
            if self._spill is None:
                self._spill = Spill(self._key(), self.count, self._size(), self._records)
        check_size(self._spill.size(index), f"row {index}")
        return self._spill.read(index)

    def _key(self) -> str:
        state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return hashlib.sha256(json.dumps([self.layout.bytes, self.count, state]).encode()).hexdigest()[:32]

    def _size(self) -> int:
        size = 8 * self.count
        for path in self.files:
            with _opened(path) as file:
                size += sum(chunk.total_uncompressed_size for chunk in _chunks(file, self.layout.bytes))
        return size

    def _records(self) -> Iterator[bytes]:
        with Bar[None](total=self.count, unit="img", desc="unpack Parquet", leave=False, delay=2) as bar:
            for path in self.files:
                with _opened(path) as file:
                    for batch in file.iter_batches(ROWS, columns=[self.layout.bytes], use_threads=False):
                        yield from _leaf(batch.column(0)).to_pylist()
                        bar.update(len(batch))


@dataclass(frozen=True)
class Columns:
    """Those of images and of labels, by name; None: as found. label "": none, the images have no labels."""

    image: str | None = None
    label: str | None = None

    def __bool__(self) -> bool:
        return self != Columns()


def open_parquet(
    spec: str,
    choice: LabelChoice = LabelChoice(),  # noqa: B008
    columns: Columns = Columns(),
) -> ImageSource | None:
    """One or several Parquet files of images; where they have no `path` of their own, names are FILE:ROW.

    Raises DataError for files that cannot be read or differ in their columns or classes, for rows that hold no
    bytes, for labels without a name, and where it is not clear which column holds what.
    """
    files = files_of(spec, ".parquet")
    if not files:
        return None
    layout = _common_layout(files, columns)
    labels = LabelColumn(choice.type)
    paths, rows, empty = list[str | None](), list[str](), list[str]()
    for path in files:
        with _opened(path) as file:
            _take_labels(file, layout, labels)
            own = _paths(file, layout)
            empty += [f"{path.name}:{row} ({own[row]})" for row in _without_bytes(file, layout)]
        paths += own
        rows += [f"{path.name}:{row}" for row in range(len(own))]
    if empty:
        head = f"{spec}: {len(empty)} of {len(rows)} rows hold no bytes; write the images themselves, not their paths"
        raise DataError(listing(head, empty))
    head, out = f"{spec}: column '{layout.label}'", "leave the labels out with --label_column="
    numbers, classes = labels.numbered(head, lambda i: rows[i], layout.classes, way_out=out)
    unique = len({path for path in paths if path}) == len(paths)
    names = tuple(str(path) for path in paths) if unique else tuple(rows)
    by = f"labels from column '{layout.label}'" if layout.label else ""
    opener = ParquetImages(files, layout, len(rows))
    return ImageSource(names, numbers, classes, opener, labelled_by=by or layout.unlabelled)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True, **STREAMED) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: not a whole Parquet file, or a damaged one ({error}); copy it again"
        ) from None


def _common_layout(files: Sequence[Path], columns: Columns) -> Layout:
    layouts = []
    for path in files:
        with _opened(path) as file:
            layouts.append(_layout(path, file.schema_arrow, columns))
    odd = [
        f"{path.name}: {layout}" for path, layout in zip(files, layouts, strict=True) if layout != layouts[0]
    ]
    if odd:
        head = f"{len(odd)} file(s) have other columns or classes than {files[0]} ({layouts[0]})"
        raise DataError(listing(head, odd))
    return layouts[0]


def _layout(path: Path, schema: pa.Schema, columns: Columns) -> Layout:
    import pyarrow.types as types

    features = _features(path, schema)
    image = _column(path, schema, features, IMAGE, columns.image)
    if image is None:
        raise DataError(
            f"{path}: no column of images; expected 'image', found {', '.join(schema.names)}: choose one with "
            "--image_column=NAME"
        )
    kind = schema.field(image).type
    inner = {f.name: f.type for f in kind} if types.is_struct(kind) else {}
    if not _is_binary(inner.get("bytes", kind)):
        raise DataError(f"{path}: column '{image}' is {kind}, expected bytes or a struct of bytes and path")
    label = _column(path, schema, features, LABEL, columns.label)
    if label is None and columns.label is None:
        _check_unlabelled(path, schema)
    if label is not None and not may_hold_labels(schema.field(label).type):
        raise DataError(
            f"{path}: column '{label}' is {schema.field(label).type}, expected whole numbers or names"
        )
    names = features.get(label or "", {}).get("names")
    return Layout(
        bytes=f"{image}.bytes" if inner else image,
        path=f"{image}.path" if types.is_string(inner.get("path", kind)) else None,
        label=label,
        classes=tuple(str(name) for name in names) if isinstance(names, list) else None,
        unlabelled=_unlabelled(schema, image) if label is None and columns.label is None else "",
    )


def _unlabelled(schema: pa.Schema, image: str) -> str:
    """Which other columns might hold labels."""
    others = ", ".join(f.name for f in schema if f.name != image and may_hold_labels(f.type))
    return f"of the other columns, {others}, --label_column=NAME takes one" if others else ""


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _features(path: Path, schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What Hugging Face says of the columns; nothing where another program wrote the file."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: damaged metadata 'huggingface' in its schema ({type(error).__name__}: {error})"
        ) from None


def _column(
    path: Path, schema: pa.Schema, features: dict[str, dict[str, Any]], kind: Kind, chosen: str | None
) -> str | None:
    """The column that was chosen; else the one that is said to be of this kind, else the one with a usual name."""
    if chosen:
        if chosen not in schema.names:
            found = f"found {', '.join(schema.names)}"
            raise DataError(f"{path}: no column '{chosen}' ({kind.flag}={chosen}); {found}")
        return chosen
    if chosen is not None:
        return None
    said = [name for name in schema.names if features.get(name, {}).get("_type") == kind.type]
    called = [name for name in kind.usual if name in (said or schema.names)]
    if kind is LABEL:  # one of the less usual names may be that of something else
        called = [n for n in called if n in LABEL.usual[:3] or may_hold_labels(schema.field(n).type)]
    if len(said) > 1 and not called:
        raise DataError(
            f"{path}: several columns of {kind.type}: {', '.join(said)}; choose one with {kind.flag}=NAME"
        )
    return next(iter([*called, *said]), None)


def _check_unlabelled(path: Path, schema: pa.Schema) -> None:
    """DataError where there is a column that may hold the labels, under another name."""
    import pyarrow.types as types

    whole = [name for name in schema.names if types.is_integer(schema.field(name).type)]
    if whole:
        raise DataError(
            f"{path}: no column {'/'.join(LABEL.usual)}; found {', '.join(whole)}: choose one with --label_column=NAME "
            "(--label_column= for images without labels)"
        )


def _leaf(column: pa.Array) -> pa.Array:
    """The only field of a column that is a struct."""
    import pyarrow.types as types

    return column.flatten()[0] if types.is_struct(column.type) else column


def _take_labels(file: pq.ParquetFile, layout: Layout, labels: LabelColumn) -> None:
    """The label of each row, whatever its type; -1 where the file has none."""
    if not layout.label:
        labels.extend([], np.full(file.metadata.num_rows, -1))
    else:
        take_labels(file.read(columns=[layout.label]).column(0), labels)


def _paths(file: pq.ParquetFile, layout: Layout) -> list[str | None]:
    """The path of each row, None where there is none."""
    if not layout.path:
        return [None] * file.metadata.num_rows
    chunks = file.read(columns=[layout.path]).column(0).chunks
    return [path for chunk in chunks for path in _leaf(chunk).to_pylist()]


def _chunks(file: pq.ParquetFile, column: str) -> list[pq.ColumnChunkMetaData]:
    """What the file says of a column in each row group."""
    groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
    chunks = (group.column(c) for group in groups for c in range(group.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema == column]


def _without_bytes(file: pq.ParquetFile, layout: Layout) -> list[int]:
    """The rows that hold no bytes; only row groups that may have some are read."""
    empty: list[int] = []
    start = 0
    for group, chunk in enumerate(_chunks(file, layout.bytes)):
        known = chunk.is_stats_set and chunk.statistics.has_null_count
        if not known or chunk.statistics.null_count:
            row = start
            for batch in file.iter_batches(ROWS, [group], columns=[layout.bytes], use_threads=False):
                valid = _leaf(batch.column(0)).is_valid().to_pylist()
                empty += [row + i for i, there in enumerate(valid) if not there]
                row += len(batch)
        start += file.metadata.row_group(group).num_rows
    return empty

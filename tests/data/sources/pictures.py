"""Small images, and tars and Parquet files of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, width: int = 20, height: int = 16, mode: str = "RGB") -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """The file of picture(seed)."""
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def tar_bytes(files: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of these files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar of these files on disk."""
    path.write_bytes(tar_bytes(files))
    return path


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None] | None,
    classes: Sequence[str] | None = None,
    *,
    paths: Sequence[str | None] | None = None,
    column: str = "image",
    group: int = 3,
    **options: Any,
) -> Path:
    """Images as Hugging Face's `datasets` writes them, in row groups of `group` rows.

    paths: 0.png, 1.png, ... by default.
    """
    if paths is None:
        paths = [f"{row}.png" for row in range(len(images))]
    rows = [{"bytes": image, "path": p} for image, p in zip(images, paths, strict=True)]
    columns = {column: pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    features: dict[str, Any] = {column: {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"_type": "ClassLabel", "names": list(classes)} if classes else {"dtype": "int64"}
    table = pa.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, path, row_group_size=group, **options)
    return path

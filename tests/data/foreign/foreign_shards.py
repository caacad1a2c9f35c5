"""Per-sample shards as other tools write them: by the webdataset library, one sample after the other."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from dit.data.foreign.index import UnknownCodec, index
from dit.data.foreign.probe import IndexOptions
from dit.data.foreign.shard_list import find_shards
from dit.data.shards.manifest import Manifest

CHANNELS, SIZE, CLASSES = 2, 3, 5
CODEC = UnknownCodec(channels=CHANNELS, scaling_factor=0.18215)


def array_of(i: int, channels: int = CHANNELS, dtype: type = np.float16) -> np.ndarray:
    """Sample i, (C, H, W): numbers that no two samples share."""
    return np.random.default_rng(i).standard_normal((channels, SIZE, SIZE)).astype(dtype)


def pt(array: np.ndarray, dtype: torch.dtype | None = None) -> bytes:
    """What torch.save makes of it."""
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(array).to(dtype), buffer)
    return buffer.getvalue()


def members_of(i: int) -> dict[str, Any]:
    return {"npy": array_of(i), "cls": i % CLASSES}


def write_shards(
    folder: Path, sizes: Sequence[int], members: Callable[[int], dict[str, Any]] = members_of
) -> list[Path]:
    """Shards of so many samples each; members: of sample i, as the webdataset library writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for number, size in enumerate(sizes):
        paths.append(folder / f"latents-{number:03d}.tar")
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for i in range(first, first + size):
                writer.write({"__key__": f"sample{i:04d}", **members(i)})
        first += size
    return paths


def write_foreign(
    folder: Path,
    sizes: Sequence[int],
    members: Callable[[int], dict[str, Any]] = members_of,
    codec: UnknownCodec = CODEC,
    **options: Any,
) -> Manifest:
    """Shards and their index, in one folder."""
    write_shards(folder, sizes, members)
    given = {"image_size": 24, "block": 4, **options}
    return index(find_shards(str(folder)), folder, codec, IndexOptions(**given))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **kwargs: Any) -> Path:
    """A tar of these members, by Python's tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **kwargs) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def npy(array: np.ndarray, **kwargs: Any) -> bytes:
    """What np.save makes of it."""
    buffer = io.BytesIO()
    np.save(buffer, array, **kwargs)
    return buffer.getvalue()


def as_json(**values: Any) -> bytes:
    return json.dumps(values).encode()

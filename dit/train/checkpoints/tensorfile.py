"""Safetensors files written in pieces, with their checksum, so that other threads go on meanwhile.

The library's own `save_file` first copies everything to bytes and holds the interpreter while it does: training would
stand still. Reading is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_CHUNK = 16 << 20  # bytes written and hashed at a time, outside the interpreter's lock
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Write tensors that lie on the CPU to a safetensors file, through to the disk; its sha256 and its bytes.

    Raises OSError, and KeyError for a dtype that the format lacks.
    """
    order = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # each aligned to its size
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with path.open("wb") as file, ThreadPoolExecutor(1, "sha256") as beside:
        parts = [memoryview(len(text).to_bytes(8, "little")), memoryview(text)]
        for view in [*parts, *(_bytes(tensors[name]) for name in order)]:
            for at in range(0, len(view), _CHUNK):
                piece = view[at : at + _CHUNK]
                hashed = beside.submit(digest.update, piece)
                file.write(piece)
                hashed.result()
            written += len(view)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), written


def holds(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file holds just these tensors, bit for bit, and these metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}) != dict(metadata) or set(file.keys()) != set(tensors):
                return False
            return all(same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    except (OSError, SafetensorError):  # of something else, or damaged
        return False


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU are of the same dtype, shape and bits; a NaN is like itself here."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_raw(one), _raw(other))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> memoryview:
    """Its bytes, without a copy where it is contiguous."""
    return _raw(tensor).numpy().data

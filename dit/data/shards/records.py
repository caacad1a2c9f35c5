"""Records: the arrays of a block as tar members, one npy file each.

A record is three tar members, KEY.moments.npy (or KEY.latents.npy) first, then KEY.label.npy and KEY.id.npy; where
the manifest's `eps` is set, KEY.eps.npy stands between the first and the others.
`tar tf` lists them and the webdataset library reads them as one sample of arrays. The big array starts at byte
HEAD of its record, a multiple of 64 bytes.
"""

from __future__ import annotations

import io
import math
import re
import tarfile
from collections.abc import Iterator

import numpy as np

from dit.data import DataError

TAR_BLOCK = 512
NPY_HEADER = 128  # numpy pads its headers to multiples of 64 bytes; arrays of six axes or fewer fit in 128
HEAD = TAR_BLOCK + NPY_HEADER
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_FIELDS = re.compile(
    rb"\{'descr': '([<>|=]?\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), ?\} *\n"
)
END = bytes(2 * TAR_BLOCK)  # what ends a tar


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Make what stands before the data in an .npy file of this C-contiguous array: 128 bytes."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    header = buffer.getvalue()
    if len(header) != NPY_HEADER:
        raise DataError(
            f"arrays of shape {shape} need an npy header of {len(header)} bytes, not {NPY_HEADER}"
        )
    return header


def member_bytes(data: int) -> int:
    """Return what an array of so many bytes takes in a tar, headers and padding included."""
    return HEAD + data + -(NPY_HEADER + data) % TAR_BLOCK


def record_bytes(arrays: dict[str, np.ndarray]) -> int:
    """Return what a record of these arrays takes in a tar."""
    return sum(member_bytes(array.nbytes) for array in arrays.values())


def parse_npy_header(data: bytes | memoryview) -> tuple[np.dtype, tuple[int, ...], int]:
    """Parse (dtype, shape, header's length) from the start of an .npy file. Raises ValueError.

    Not by np.lib.format, which compiles the header with `ast`: before Python 3.13 two threads doing that may at times
    get a SystemError (cpython issue 106905).
    """
    head = bytes(data[:NPY_HEADER])
    if head[:8] != NPY_MAGIC:
        raise ValueError(f"begins with {head[:8]!r}, which is not the magic of npy files of version 1.0")
    length = len(NPY_MAGIC) + 2 + int.from_bytes(head[8:10], "little")
    match = NPY_FIELDS.fullmatch(head[10:length])
    if match is None:
        raise ValueError(f"cannot use an npy header of {head[10:length]!r}; expected rows of plain numbers")
    try:
        dtype = np.dtype(match[1].decode())
    except TypeError as error:
        raise ValueError(f"cannot use an npy header of {head[10:length]!r}: {error}") from None
    if match[2] == b"True" or dtype.hasobject:
        raise ValueError(
            f"an array of {dtype}, Fortran order {match[2].decode()}; expected rows of plain numbers"
        )
    return dtype, tuple(int(n) for n in match[3].split(b",") if n.strip()), length


def pack(key: str, arrays: dict[str, np.ndarray]) -> list[bytes | memoryview]:
    """Make a record, as pieces to write one after the other: the same bytes for the same arrays, always."""
    pieces: list[bytes | memoryview] = []
    for name, values in arrays.items():
        array = np.ascontiguousarray(values)
        header, data = npy_header(array.shape, array.dtype), array.reshape(-1).view(np.uint8).data
        info = tarfile.TarInfo(f"{key}.{name}.npy")  # time, owner and group stay 0: nothing of the machine
        info.size = len(header) + len(data)
        pieces += [info.tobuf(tarfile.USTAR_FORMAT), header, data, bytes(-info.size % TAR_BLOCK)]
    return pieces


def parse_npy(data: memoryview) -> np.ndarray:
    """Return the array in the bytes of an .npy file, without a copy. Raises ValueError; never unpickles."""
    dtype, shape, start = parse_npy_header(data)
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} of {dtype} does not fit {len(data) - start} bytes")
    return np.frombuffer(data[start:], dtype).reshape(shape)


def parse_members(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Yield (name, contents) of the tar members in `data`. ValueError or tarfile.TarError where they break off."""
    position = 0
    while position < len(data):
        info = tarfile.TarInfo.frombuf(bytes(data[position : position + TAR_BLOCK]), "utf-8", "strict")
        start = position + TAR_BLOCK
        if not 0 <= info.size <= len(data) - start:
            raise ValueError(f"'{info.name}' says it has {info.size} bytes but the record ends before")
        yield info.name, data[start : start + info.size]
        position = start + info.size + (-info.size % TAR_BLOCK)

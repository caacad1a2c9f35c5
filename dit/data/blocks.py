"""Blocks: records of a WebDataset tar that hold up to a few hundred samples as arrays.

A record is three tar members, KEY.moments.npy (or KEY.latents.npy) first, then KEY.label.npy and KEY.id.npy; where
the manifest's `eps` is set, KEY.eps.npy stands between the first and the others.
`tar tf` lists them and the webdataset library reads them as one sample of arrays. The big array starts at byte
HEAD of its record, so a block is read with one system call straight to where its samples will be picked from.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import tarfile
import threading
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from dit.data import DataError
from dit.data.manifest import Manifest

TAR_BLOCK = 512
NPY_HEADER = 128  # numpy pads its headers to multiples of 64 bytes; arrays of six axes or fewer fit in 128
HEAD = TAR_BLOCK + NPY_HEADER
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_FIELDS = re.compile(
    rb"\{'descr': '([<>|=]?\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), ?\} *\n"
)
END = bytes(2 * TAR_BLOCK)  # what ends a tar


# --- the format --------------------------------------------------------------------------------------------


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What stands before the data in an .npy file of this C-contiguous array: 128 bytes."""
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
    """What an array of so many bytes takes in a tar, headers and padding included."""
    return HEAD + data + -(NPY_HEADER + data) % TAR_BLOCK


def parse_npy_header(data: bytes | memoryview) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, header's length) from the start of an .npy file. Raises ValueError.

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
    dtype = np.dtype(match[1].decode())
    if match[2] == b"True" or dtype.hasobject:
        raise ValueError(
            f"an array of {dtype}, Fortran order {match[2].decode()}; expected rows of plain numbers"
        )
    return dtype, tuple(int(n) for n in match[3].split(b",") if n.strip()), length


def pack(key: str, arrays: dict[str, np.ndarray]) -> list[bytes | memoryview]:
    """A record as pieces to write one after the other: the same bytes for the same arrays, always."""
    pieces: list[bytes | memoryview] = []
    for name, values in arrays.items():
        array = np.ascontiguousarray(values)
        header, data = npy_header(array.shape, array.dtype), array.reshape(-1).view(np.uint8).data
        info = tarfile.TarInfo(f"{key}.{name}.npy")  # time, owner and group stay 0: nothing of the machine
        info.size = len(header) + len(data)
        pieces += [info.tobuf(tarfile.USTAR_FORMAT), header, data, bytes(-info.size % TAR_BLOCK)]
    return pieces


def parse_npy(data: memoryview) -> np.ndarray:
    """The array in the bytes of an .npy file, without a copy. Raises ValueError; never unpickles."""
    dtype, shape, start = parse_npy_header(data)
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} of {dtype} does not fit {len(data) - start} bytes")
    return np.frombuffer(data[start:], dtype).reshape(shape)


def parse_members(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """(name, contents) of the tar members in `data`. Raises ValueError or tarfile.TarError where they break off."""
    position = 0
    while position < len(data):
        info = tarfile.TarInfo.frombuf(bytes(data[position : position + TAR_BLOCK]), "utf-8", "strict")
        start = position + TAR_BLOCK
        if start + info.size > len(data):
            raise ValueError(f"'{info.name}' says it has {info.size} bytes but the record ends before")
        yield info.name, data[start : start + info.size]
        position = start + info.size + (-info.size % TAR_BLOCK)


# --- reading -----------------------------------------------------------------------------------------------


class BlockError(DataError):
    """A block that cannot be had as it was written. what: the reason alone; the text says also where."""

    def __init__(self, what: str, text: str):
        self.what = what
        super().__init__(text)


class BlockReader:
    """Reads single blocks of a data set, checking all that can be checked. Threads may share one.

    verify: check a block's crc32, names, types and shapes "always", or "first": when this process reads it for the
    first time, and again when the shard's size, time or inode has changed since (it costs more than the read).
    `reads` counts the blocks read.
    """

    def __init__(self, manifest: Manifest, verify: Literal["first", "always"] = "first"):
        self.manifest = manifest
        self.verify = verify
        self.reads = 0
        # what is read in place, in a record's order
        self.big: dict[str, np.dtype[Any]] = {manifest.array: np.dtype(manifest.dtype)}
        if manifest.eps:
            self.big["eps"] = np.dtype(np.float32)
        self._sample_bytes = [math.prod(manifest.shape) * dtype.itemsize for dtype in self.big.values()]
        self._verified: dict[int, tuple[int, int, int]] = {}  # block -> state of its shard
        self._lock = threading.Lock()

    @property
    def block_bytes(self) -> int:
        """Bytes that the samples of a full block take in memory."""
        return self.manifest.block * sum(self._sample_bytes)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Block `index`: {"moments" or "latents": (n, *shape), "label": (n,) int64, "id": (n,) uint64}.

        With "eps": (n, *shape) float32 where the data set stores noise.
        """
        shape = (self.manifest.blocks[index].samples, *self.manifest.shape)
        rows = {name: np.empty(shape, dtype) for name, dtype in self.big.items()}
        label, identity = self.read_into(index, *rows.values())
        return {**rows, "label": label, "id": identity}

    def read_into(self, index: int, *rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read block `index`, its big arrays into `rows`, one for each of `big`, (n, ...) C-contiguous.

        Returns (label, id). Raises DataError with the shard, the record and the place in the file.
        """
        block, small = self.manifest.blocks[index], member_bytes(8 * self.manifest.blocks[index].samples)
        bodies = [r.reshape(-1).view(np.uint8).data for r in rows]
        sizes = [block.samples * size for size in self._sample_bytes]
        whole = sum(member_bytes(size) for size in sizes) + 2 * small
        if [len(b) for b in bodies] != sizes or block.bytes != whole:
            raise self.fault(
                index, f"{block.samples} samples take {whole} bytes: the manifest contradicts itself"
            )
        padding = [member_bytes(size) - HEAD - size for size in sizes]
        heads = [bytearray(pad + HEAD) for pad in (0, *padding[:-1])]  # what stands before each body
        tail = bytearray(padding[-1] + 2 * small)
        parts = [memoryview(p) for pair in zip(heads, bodies, strict=True) for p in pair] + [memoryview(tail)]
        state = self._fill(index, list(parts))
        with self._lock:
            self.reads += 1
            known = self.verify == "first" and self._verified.get(index) == state
        if not known:
            crc = functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)
            if crc != block.crc32:
                raise self.fault(
                    index, f"altered: its crc32 is {crc:08x}, the manifest has {block.crc32:08x}"
                )
            self._check(index, [h[-HEAD:] for h in heads], sizes, tail[padding[-1] :])
            with self._lock:
                self._verified[index] = state
        label = np.frombuffer(tail, np.int64, block.samples, padding[-1] + HEAD)
        identity = np.frombuffer(tail, np.uint64, block.samples, padding[-1] + small + HEAD)
        return label, identity

    def _fill(self, index: int, buffers: list[memoryview]) -> tuple[int, int, int]:
        """Read the record's bytes into the buffers; returns the file's (inode, size, time)."""
        block = self.manifest.blocks[index]
        path = self.manifest.path(block.shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self.fault(index, f"cannot be opened: {error.strerror}") from None
        try:
            stat = os.fstat(descriptor)
            if stat.st_size < block.offset + block.bytes:
                raise self.fault(index, f"truncated: the file ends at byte {stat.st_size}")
            read_exactly(descriptor, buffers, block.offset)
        except OSError as error:
            raise self.fault(index, f"cannot be read: {error.strerror}") from None
        finally:
            os.close(descriptor)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _check(self, index: int, heads: list[bytearray], sizes: list[int], tail: bytearray) -> None:
        """That a record is built as the manifest says. tail: the members after the big ones."""
        n, names = self.manifest.blocks[index].samples, []
        shape = (n, *self.manifest.shape)
        try:
            for head, size, dtype in zip(heads, sizes, self.big.values(), strict=True):
                info = tarfile.TarInfo.frombuf(bytes(head[:TAR_BLOCK]), "utf-8", "strict")
                found = parse_npy_header(bytes(head[TAR_BLOCK:]))
                if found != (dtype, shape, NPY_HEADER) or info.size != NPY_HEADER + size:
                    raise ValueError(f"'{info.name}' is {found[0]} of {found[1]}, not {dtype} of {shape}")
                names.append(info.name)
            arrays = {name: parse_npy(data) for name, data in parse_members(memoryview(tail))}
        except (ValueError, tarfile.TarError) as error:
            raise self.fault(index, f"not what the manifest describes: {error}") from None
        key, names = names[0].split(".")[0], [*names, *arrays]
        if names != [f"{key}.{part}.npy" for part in (*self.big, "label", "id")]:
            expected = ", ".join([*self.big, "label"])
            raise self.fault(index, f"holds {', '.join(names)}, expected {expected} and id")
        for array, expect in zip(arrays.values(), (np.int64, np.uint64), strict=True):
            if array.shape != (n,) or array.dtype != expect:
                raise self.fault(
                    index, f"a {array.dtype} array of shape {array.shape}, expected {expect} of ({n},)"
                )

    def fault(self, index: int, what: str) -> BlockError:
        """An error about block `index`: shard, record and offset, what is wrong and what to do."""
        block = self.manifest.blocks[index]
        return BlockError(
            what,
            f"{self.manifest.path(block.shard)}: record {record_key(index)} (bytes {block.offset} to "
            f"{block.offset + block.bytes}): {what}. Copy the file again or encode again; "
            f"`tools/shards.py verify {self.manifest.root}` lists all that is broken",
        )


def record_key(index: int) -> str:
    """The key of block `index` in its tar."""
    return f"{index:08d}"


def read_exactly(descriptor: int, buffers: list[memoryview], offset: int) -> None:
    """Fill the buffers from a file's `offset` on (a system call may give less than it was asked for)."""
    while buffers:
        count = os.preadv(descriptor, buffers, offset)
        if count == 0:
            raise OSError(0, f"file ended at byte {offset} while it was read")
        offset += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers = [buffers[0][count:], *buffers[1:]]

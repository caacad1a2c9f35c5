"""Blocks: records of a WebDataset tar that hold up to a few hundred samples as arrays.

A record is three tar members, KEY.moments.npy (or KEY.latents.npy) first, then KEY.label.npy and KEY.id.npy.
`tar tf` lists them and the webdataset library reads them as one sample of arrays. The big array starts at byte
HEAD of its record, so a block is read with one system call straight to where its samples will be picked from.
"""

from __future__ import annotations

import io
import math
import os
import re
import tarfile
import threading
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from dit.data import DataError
from dit.data.manifest import DTYPE, Manifest

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
        self.dtype = np.dtype(DTYPE)
        self._sample_bytes = math.prod(manifest.shape) * self.dtype.itemsize
        self._verified: dict[int, tuple[int, int, int]] = {}  # block -> state of its shard
        self._lock = threading.Lock()

    @property
    def block_bytes(self) -> int:
        """Bytes that the samples of a full block take in memory."""
        return self.manifest.block * self._sample_bytes

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Block `index`: {"moments" or "latents": (n, *shape) float16, "label": (n,) int64, "id": (n,) uint64}."""
        rows = np.empty((self.manifest.blocks[index].samples, *self.manifest.shape), self.dtype)
        label, identity = self.read_into(index, rows)
        return {self.manifest.array: rows, "label": label, "id": identity}

    def read_into(self, index: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read block `index`, its big array into `rows` (n, ...) C-contiguous float16; returns (label, id).

        Raises DataError with the shard, the record and the place in the file.
        """
        block = self.manifest.blocks[index]
        body = rows.reshape(-1).view(np.uint8).data
        whole = member_bytes(len(body)) + 2 * member_bytes(8 * block.samples)
        if len(body) != block.samples * self._sample_bytes or block.bytes != whole:
            raise self.fault(
                index, f"{block.samples} samples take {whole} bytes: the manifest contradicts itself"
            )
        head, tail = bytearray(HEAD), bytearray(whole - HEAD - len(body))
        state = self._fill(index, [memoryview(head), body, memoryview(tail)])
        with self._lock:
            self.reads += 1
            known = self.verify == "first" and self._verified.get(index) == state
        if not known:
            crc = zlib.crc32(tail, zlib.crc32(body, zlib.crc32(head)))
            if crc != block.crc32:
                raise self.fault(
                    index, f"altered: its crc32 is {crc:08x}, the manifest has {block.crc32:08x}"
                )
            self._check(index, head, tail, len(body))
            with self._lock:
                self._verified[index] = state
        n, after = block.samples, HEAD + len(body)  # where `tail` begins in the record
        label = np.frombuffer(tail, np.int64, n, member_bytes(len(body)) + HEAD - after)
        identity = np.frombuffer(tail, np.uint64, n, len(tail) - member_bytes(8 * n) + HEAD)
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

    def _check(self, index: int, head: bytearray, tail: bytearray, body: int) -> None:
        """That a record is built as the manifest says."""
        n = self.manifest.blocks[index].samples
        try:
            info = tarfile.TarInfo.frombuf(bytes(head[:TAR_BLOCK]), "utf-8", "strict")
            found = parse_npy_header(bytes(head[TAR_BLOCK:]))
            if found != (self.dtype, (n, *self.manifest.shape), NPY_HEADER) or info.size != NPY_HEADER + body:
                raise ValueError(
                    f"'{info.name}' is {found[0]} of {found[1]}, not {DTYPE} of {(n, *self.manifest.shape)}"
                )
            padding = -info.size % TAR_BLOCK
            arrays = {name: parse_npy(data) for name, data in parse_members(memoryview(tail)[padding:])}
        except (ValueError, tarfile.TarError) as error:
            raise self.fault(index, f"not what the manifest describes: {error}") from None
        key = info.name.split(".")[0]
        names = [info.name, *arrays]
        if names != [f"{key}.{part}.npy" for part in (self.manifest.array, "label", "id")]:
            raise self.fault(index, f"holds {', '.join(names)}, expected {self.manifest.array}, label and id")
        for array, dtype in zip(arrays.values(), (np.int64, np.uint64), strict=True):
            if array.shape != (n,) or array.dtype != dtype:
                raise self.fault(
                    index, f"a {array.dtype} array of shape {array.shape}, expected {dtype} of ({n},)"
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

"""Memory in many places, filled by one system call: how a block's samples get to the batches that they belong to."""

from __future__ import annotations

import ctypes
import os

import numpy as np

MOST_PIECES = 1024  # that one system call takes (IOV_MAX of Linux)
_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_preadv.restype = ctypes.c_ssize_t


class Pieces:
    """Pieces of writable memory in turn. Whoever makes them sees to it that the memory stays until they are filled.

    vectors: (n, 2) uint64, address and bytes of each: an array of the system's `struct iovec`.
    """

    def __init__(self, vectors: np.ndarray):
        self.vectors = np.ascontiguousarray(vectors, np.uint64)

    @classmethod
    def of(cls, *arrays: np.ndarray) -> Pieces:
        """C-contiguous arrays, each a piece."""
        if not all(array.flags.c_contiguous and array.flags.writeable for array in arrays):
            raise ValueError("pieces of memory have to be contiguous and writable")
        return cls(np.array([(a.ctypes.data, a.nbytes) for a in arrays], np.uint64).reshape(-1, 2))

    @classmethod
    def over(cls, buffers: list[memoryview]) -> Pieces:
        """Writable buffers, each a piece (those of no bytes left out)."""
        return cls.of(*(np.frombuffer(buffer, np.uint8) for buffer in buffers if len(buffer)))

    @classmethod
    def joined(cls, *pieces: Pieces) -> Pieces:
        """One after the other."""
        return cls(np.concatenate([p.vectors for p in pieces]))

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return int(self.vectors[:, 1].sum())

    def fill(self, data: np.ndarray) -> None:
        """Copy a C-contiguous array of as many bytes. ValueError where it has others."""
        if not data.flags.c_contiguous or data.nbytes != self.nbytes:
            raise ValueError(f"{data.nbytes} bytes for pieces of {self.nbytes}")
        start = data.ctypes.data
        for address, size in self.vectors.tolist():
            ctypes.memmove(address, start, size)
            start += size

    def read(self, descriptor: int, offset: int) -> None:
        """Fill them from a file's `offset` on. OSError; EOFError where the file ends before."""
        rest = self.vectors
        while len(rest):
            part = rest[:MOST_PIECES]
            count = _preadv(descriptor, part.ctypes.data, len(part), offset)
            if count < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            if count == 0:
                raise EOFError(f"truncated: the file ended at byte {offset} while it was read")
            offset += count
            if len(part) == len(rest) and count == int(part[:, 1].sum()):
                return  # mostly
            ends = np.cumsum(part[:, 1])
            whole = int(np.searchsorted(ends, count, side="right"))  # pieces that are full now
            begun = count - int(ends[whole - 1]) if whole else count
            rest = rest[whole:]
            if begun:  # the call gave less than it was asked for
                rest = rest.copy()
                rest[0] += np.array([begun, -begun]).astype(np.uint64)

"""What libjpeg says of a damaged JPEG, which Pillow keeps to itself: it decodes grey or noise and reports success.

The JPEG's entropy-coded data are read once more, by the very library that Pillow has loaded, for its warnings alone, in
0.4 (progressive: 0.8) of the time of decoding. Errors of libjpeg do not return, so only bytes that Pillow has just
decoded are read, of the kinds that are read in the same way; and the library's version and sizes are asked of itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from ctypes import c_char_p, c_int, c_long, c_size_t, c_ulong, c_void_p
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import _imaging

PADDING = 16  # stray bytes at the end of the data that some encoders write
EXTRANEOUS = b"Corrupt JPEG data: %d extraneous bytes before marker 0xd9"  # 0xd9: the end of the image
DAMAGE = (b"Corrupt JPEG data", b"Premature end of JPEG file", b"Inconsistent progression")
HARMLESS = b"Corrupt JPEG data: bad ICC marker"
HUFFMAN_OR_ARITHMETIC = (
    0xC0,
    0xC1,
    0xC2,
    0xC9,
    0xCA,
)  # frames of 8x8 blocks (ITU-T T.81, table B.1); not lossless
NO_FRAMES = (0xC4, 0xC8, 0xCC)  # markers among theirs: Huffman tables, reserved, arithmetic conditioning
STRUCT_BYTES = 4096  # more than jpeg_decompress_struct has in any version
MessageCallback = ctypes.CFUNCTYPE(None, c_void_p)
FormatFunction = ctypes.CFUNCTYPE(None, c_void_p, ctypes.c_char * 200)


class _ErrorManager(ctypes.Structure):
    """`jpeg_error_mgr` of jpeglib.h, the same since version 6b."""

    _fields_ = (
        ("error_exit", MessageCallback),
        ("emit_message", c_void_p),
        ("output_message", MessageCallback),
        ("format_message", c_void_p),
        ("reset_error_mgr", c_void_p),
        ("msg_code", c_int),
        ("msg_parm", c_int * 20),
        ("trace_level", c_int),
        ("num_warnings", c_long),
        ("tables", ctypes.c_byte * 256),
    )


class _Library(NamedTuple):
    functions: Any
    version: int  # JPEG_LIB_VERSION it was compiled for
    size: int  # bytes of jpeg_decompress_struct


_state = threading.local()  # of the call that this thread is in: its error manager, and the warnings so far


def damage_of(data: bytes) -> str | None:
    """The first thing that libjpeg warns of in a JPEG which Pillow has just decoded; None where it has nothing to say.

    None as well for kinds of JPEG and builds of Pillow that cannot be asked.
    """
    library = _library()
    if library is None or _frame(data) not in HUFFMAN_OR_ARITHMETIC:
        return None
    errors, info = _ErrorManager(), ctypes.create_string_buffer(STRUCT_BYTES)
    _state.errors, _state.warnings = errors, []
    call = library.functions
    call.jpeg_std_error(ctypes.byref(errors))
    errors.error_exit, errors.output_message = _exit, _note
    ctypes.cast(info, ctypes.POINTER(c_void_p))[0] = ctypes.addressof(errors)
    call.jpeg_CreateDecompress(info, library.version, library.size)
    try:
        call.jpeg_mem_src(info, data, len(data))
        call.jpeg_read_header(info, 1)
        call.jpeg_read_coefficients(info)
    finally:
        call.jpeg_destroy_decompress(info)
    return next((w.decode("ascii", "replace") for w in _state.warnings if _is_damage(w)), None)


def _is_damage(warning: bytes) -> bool:
    stray = [EXTRANEOUS % count for count in range(1, PADDING + 1)]
    return warning.startswith(DAMAGE) and warning != HARMLESS and warning not in stray


@lru_cache(1)
def _library() -> _Library | None:
    """libjpeg as Pillow has it; None where its functions are not to be seen from outside."""
    functions = ctypes.CDLL(_imaging.__file__)  # which finds what it is linked to
    try:
        functions.jpeg_std_error.argtypes = (c_void_p,)
        functions.jpeg_CreateDecompress.argtypes = (c_void_p, c_int, c_size_t)
        functions.jpeg_mem_src.argtypes = (c_void_p, c_char_p, c_ulong)
        functions.jpeg_read_header.argtypes = (c_void_p, c_int)
        functions.jpeg_read_coefficients.argtypes = (c_void_p,)
        functions.jpeg_read_coefficients.restype = c_void_p
        functions.jpeg_destroy_decompress.argtypes = (c_void_p,)
    except AttributeError:
        return None
    said: list[int] = []
    errors, info = _ErrorManager(), ctypes.create_string_buffer(STRUCT_BYTES)
    functions.jpeg_std_error(ctypes.byref(errors))
    errors.error_exit = note = MessageCallback(lambda _: said.append(errors.msg_parm[0]))
    ctypes.cast(info, ctypes.POINTER(c_void_p))[0] = ctypes.addressof(errors)
    # its first errors are about the version and the size, in this order, and name the right ones; it goes on after both
    functions.jpeg_CreateDecompress(info, 0, 0)
    functions.jpeg_destroy_decompress(info)
    del note
    is_known = len(said) == 2 and said[0] in (62, 70, 80, 90) and 400 < said[1] < STRUCT_BYTES
    return _Library(functions, *said) if is_known else None


@MessageCallback
def _note(info: int) -> None:
    """Keep a warning; libjpeg prints only the first one unless it believes that there was none yet."""
    text = (ctypes.c_char * 200)()
    FormatFunction(_state.errors.format_message)(info, text)
    _state.warnings.append(text.value)
    _state.errors.num_warnings = -1


@MessageCallback
def _exit(info: int) -> None:
    """An error in what Pillow decoded without one: libjpeg is in no state to go on, and has nowhere to return to."""
    text = (ctypes.c_char * 200)()
    FormatFunction(_state.errors.format_message)(info, text)
    print(f"error: libjpeg failed while a JPEG was checked: {text.value!r}", file=sys.stderr, flush=True)
    os._exit(1)


def _frame(data: bytes) -> int | None:
    """The marker of the frame, which says how it is coded; None where there is none before the first scan."""
    return next(
        (marker for marker in _markers(data) if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)),
        None,
    )


def _markers(data: bytes) -> Iterator[int]:
    """The markers up to the first scan (0xDA)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # fill bytes
            at += 1
            continue
        yield data[at + 1]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")

"""Which files are images: by the endings of their names, and by their first bytes where those say nothing."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping


class Refused(ValueError):
    """Why an image is not taken, where it is this code and not Pillow that says so."""


HEAD = 256  # bytes of a file by which it is known
# By Pillow's names of the formats: endings of files. Not EPS, which runs a program, and nothing of vectors or layers.
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "QOI": (".qoi",),
}
FORMATS = tuple(ENDINGS)
IMAGES = frozenset(ending for endings in ENDINGS.values() for ending in endings)
# Those that were images before the others were: where both are there for one sample, these are it.
USUAL = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
# Endings that say what a file is, so that nobody opens a million captions to see that they are no images.
_OTHER = """
    txt text md rst csv tsv json jsonl ndjson xml yaml yml toml ini cfg conf html htm log srt vtt tex bib cls label
    labels caption captions tags prompt meta index idx lst list map names sha1 sha256 md5 sum npy npz pt pth pkl pickle
    mat h5 hdf5 safetensors ckpt onnx bin arrow parquet feather db sqlite lmdb mdb tar gz tgz bz2 xz zst lz4 7z rar zip
    tfrecord tfrecords rec beton lock part partial crdownload aria2 mp4 m4v avi mov mkv webm mpg mpeg wav mp3 flac ogg
    m4a aac mid pdf doc docx ppt pptx xls xlsx odt rtf py ipynb js css sh bat c h cpp java m r ts so dll exe pyc
    svg eps ps ai psd xcf ico cur heic heif jxl exr hdr pfm tga dds dcm nii cr2 cr3 nef arw dng raf orf rw2 obj ply
    stl glb gltf blend ttf otf woff url lnk webloc
"""
OTHERS = frozenset(f".{word}" for word in _OTHER.split())
JUNK_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))
JUNK_FOLDERS = frozenset(("__macosx", "@eadir"))  # of macOS in archives, of Synology beside images


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image by its ending; hidden files and the like do not."""
    return ending_of(name) in IMAGES and not is_junk(name)


def is_usual(name: str) -> bool:
    """Whether it is one of those that always counted."""
    return ending_of(name) in USUAL and not is_junk(name)


def says_nothing(name: str) -> bool:
    """Whether the ending leaves open what a file is: only its first bytes tell."""
    ending = ending_of(name)
    return ending not in IMAGES and ending not in OTHERS and not is_junk(name)


def is_junk(path: str) -> bool:
    """Whether this is what systems leave beside files (hidden ones, `__MACOSX/`, Thumbs.db): no image, not counted."""
    *folders, name = path.split("/")
    return (
        name.startswith(".")
        or name.lower() in JUNK_FILES
        or any(part.lower() in JUNK_FOLDERS for part in (*folders, name))
    )


def ending_of(name: str) -> str:
    """The ending in small letters, with its dot; "" for none."""
    return os.path.splitext(name)[1].lower()


def count_endings(names: Iterable[str]) -> Counter[str]:
    """How many files there are of each ending."""
    return Counter(map(ending_of, names))


def shown_endings(counts: Mapping[str, int], most: int = 6) -> str:
    """Such as `3 .txt, 2 .json, 1 without an ending`, the most frequent first."""
    rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    words = [f"{count} {ending or 'without an ending'}" for ending, count in rows[:most]]
    rest = sum(count for _, count in rows[most:])
    return ", ".join([*words, *([f"{rest} of other endings"] if rest else [])])


# --- by the first bytes ------------------------------------------------------------------------------------

STARTS: Mapping[bytes, str] = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"qoif": "QOI",
}
# Two letters alone would make images of texts.
PATTERNS: Mapping[str, re.Pattern[bytes]] = {
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "BMP": re.compile(
        rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL
    ),  # size of its header
    "PPM": re.compile(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s"),
    "AVIF": re.compile(rb".{4}ftyp(avi[fs]|m(if|sf)1.{4}(.{4})*?avi[fs])", re.DOTALL),
}


def format_of(head: bytes) -> str | None:
    """Pillow's name of the format that a file's first bytes (HEAD of them do) are of; None for no image."""
    known = (name for start, name in STARTS.items() if head.startswith(start))
    return next(known, next((name for name, pattern in PATTERNS.items() if pattern.match(head)), None))

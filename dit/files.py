"""Files and their names: text read in any locale, paths as people type them, writes that are whole or not at all."""

from __future__ import annotations

import codecs
import csv
import errno
import fcntl
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit.errors import UserError

MARKS = {  # a file that begins so is in that encoding; UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\})")
# As flock says it; EBADF of a folder, or of a file that is open for reading alone, over NFS.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}


class FileError(UserError):
    """A file that is no text, or a path that leads nowhere by itself."""


# --- text --------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A text file, whatever the locale: UTF-8, or UTF-16 and UTF-32 that begin with their mark. Lines end in "\\n".

    FileError where it is anything else, with the first place that says so; OSError where it cannot be read.
    """
    return decoded(path.read_bytes(), str(path))


def decoded(data: bytes, named: str) -> str:
    """As `read_text`, of a file's bytes. named: the file, in messages."""
    mark = next((m for m in MARKS if data.startswith(m)), b"")
    encoding = MARKS.get(mark, "utf-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        raise FileError(_no_text(data, place, encoding, named)) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise FileError(
            f"{named}: line {line} has a zero byte: a binary file, or UTF-16 without its mark at the beginning; "
            "expected text in UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _no_text(data: bytes, place: int, encoding: str, named: str) -> str:
    """Which byte is at fault, where, and how such a file is converted."""
    before = data[:place]
    line = (
        before.count(b"\n") + 1
        if encoding == "utf-8"
        else len(before.decode(encoding, "replace").split("\n"))
    )
    told = f"{named}: line {line} is not {encoding.upper()} (byte 0x{data[place]:02x}, number {place} of the file"
    if encoding != "utf-8":
        return f"{told}): the file is damaged or cut off"
    row = data[before.rfind(b"\n") + 1 :].split(b"\n", 1)[0][:200].decode("cp1252", "replace").strip()[:60]
    return f'{told}; "{row}" if it is Latin-1): iconv -f CP1252 -t UTF-8 {named} > NEW writes it as UTF-8'


# --- paths -------------------------------------------------------------------------------------------------


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Give the text of a CSV file: a line of the columns' names, and one for each row, which has no other keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_line(line: str | bytes) -> Any:
    """Read a line of a log; numbers that are none (NaN, Infinity, 1e999), for which JSON has no words, are None.

    Raises ValueError for what is no JSON, such as a line that a kill has cut off.
    """

    def number(word: str) -> float | None:
        value = float(word)
        return value if math.isfinite(value) else None

    return json.loads(line, parse_constant=lambda _: None, parse_float=number)


def path_text(given: object, what: str) -> str:
    """The text of a path or URL that a program gives. FileError for what is none; what: the argument's name."""
    if isinstance(given, str | os.PathLike) and isinstance(text := os.fspath(given), str):
        return text
    raise FileError(f"{what}: expected a path, as text or a Path, got {type(given).__name__}")


def beside(path: Path, ending: str) -> Path:
    """The path with an ending at its name. FileError for the root, which has no name."""
    if not path.name:
        raise FileError(f"{path} is no place to write a result to: give a folder in it")
    return path.with_name(path.name + ending)


def expand(path: str) -> str:
    """A path with ~, ~user, $NAME and ${NAME} filled in, when it is used: what was typed is what is recorded.

    URLs stay as they are. FileError for a variable that is not set, a user who is not known, and for no path at all.
    """
    if URL.match(path):
        return path
    if "\0" in path:
        raise FileError(f"{path!r}: a path cannot hold a zero character")
    if not path.strip():
        raise FileError("an empty path was given, which a shell makes of a variable that is not set")

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise FileError(f"'{path}': {found[0]} is no name of a variable; expected $NAME or ${{NAME}}")
        if not os.environ.get(name):
            state = "empty" if name in os.environ else "not set"
            raise FileError(
                f"'{path}': the environment variable {name} is {state}; set it, or write the path out"
            )
        return os.environ[name]

    filled = VARIABLE.sub(value, path)
    home = os.path.expanduser(filled)
    if home.startswith("~") and not os.path.lexists(home):
        user = home.split("/", 1)[0]
        raise FileError(
            f"'{path}': no home folder of {user} is known; write the path out (./{user} for a name)"
        )
    try:
        os.fsencode(home)
    except UnicodeEncodeError as error:
        lacking, encoding = home[error.start : error.end], error.encoding
        raise FileError(
            f"'{path}': file names are in {encoding} in this locale, which lacks '{lacking}'; set LC_ALL=C.UTF-8"
        ) from None
    return home


def sought(path: Path | str) -> str:
    """What to add to a message of a missing path: of a relative one, which may have been meant for another folder,
    where it was looked for; nothing for others.
    """
    if os.path.isabs(path) or URL.match(str(path)):
        return ""
    return f" (the path is relative to {os.getcwd()}; a whole one holds anywhere)"


# --- locking -----------------------------------------------------------------------------------------------


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file unless another process holds it: whether this one does now; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def lies_at(path: Path, descriptor: int) -> bool:
    """Tell whether an open file is the one that lies there: whoever held its lock may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# --- writing -----------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes, tag: str = "") -> None:
    """Write a file so that it is there whole or not at all, even if the machine stops.

    tag: goes into the name it has while it is written; writers that may be at it at the same time need their own.
    Raises OSError, which names the file also where the system does not, as on a full disk; what was there stays.
    """
    beside = path.with_name(f".{path.name}{tag}.partial")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is not None:  # of opening it
            raise
        beside.unlink()  # or it would take what space there is
        raise OSError(error.errno, error.strerror, str(path)) from None
    beside.replace(path)
    sync(path.parent)


def write_picture(path: Path, figure: Any, dpi: int) -> None:
    """Write a figure of matplotlib as a PNG, whole or not at all. Raises OSError as `write_atomically`."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=dpi)
    write_atomically(path, held.getvalue())


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder (files made, renamed), last through a stop of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

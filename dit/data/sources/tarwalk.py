"""What lies where in a tar, for tars that nobody has to trust: nothing is unpacked and nothing is skipped.

`tarfile` takes a damaged header in the middle of a tar for its end, and what follows is lost without a word. Here
each header is parsed by `TarInfo.frombuf`, and everything that is not a plain file or folder inside the tar is refused
with the tar, the member and the byte it stands at.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Never

from dit.data import DataError
from dit.data.sources.source import listing

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENSION = 1 << 20  # bytes of a long name or a pax header; real ones have less than a few thousand
KINDS = {
    tarfile.LNKTYPE: "a link; write the tar anew with `tar --dereference --hard-dereference`",
    tarfile.SYMTYPE: "a link; write the tar anew with `tar --dereference`",
    tarfile.CHRTYPE: "a device; only files and folders belong here",
    tarfile.BLKTYPE: "a device; only files and folders belong here",
    tarfile.FIFOTYPE: "a pipe; only files and folders belong here",
    tarfile.GNUTYPE_SPARSE: "a sparse file; write the tar anew without --sparse",
}
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A file in a tar: path inside it (without a leading ./), and bytes from the start of the tar's file."""

    path: str
    header: int  # where its headers begin
    offset: int  # where its data begin
    size: int  # of its data

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.offset + _padded(self.size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def walk(file: BinaryIO, name: str, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Yield the files in an uncompressed tar, in its order. file: open for reading, seekable; name: for messages.

    start, stop: the bytes of the file that are the tar (one that lies in another tar); the whole file by default.
    Raises DataError with name, member and byte for: headers that are damaged or missing, data that go past the end,
    no end mark (a tar that was cut off), anything after the end mark, absolute or climbing ('..') paths, paths
    that are not UTF-8, two files of one path, links, devices, pipes, sparse files and kinds unknown here.
    """
    return _Walk(file, name, start, stop).members()


class _Walk:
    def __init__(self, file: BinaryIO, name: str, start: int, stop: int | None):
        self.file, self.name, self.at = file, name, start
        self.stop = file.seek(0, 2) if stop is None else stop
        self.first = start  # of the headers of the member at hand: its long name may come before its own
        self.member = ""
        self.extended: dict[str, bytes] = {}  # what the headers before it say

    def fail(self, what: str) -> Never:
        member = f", member {self.member!r}" if self.member else ""
        raise DataError(f"{self.name}: byte {self.first}{member}: {what}")

    def broken(self, why: object) -> Never:
        self.fail(f"not a whole, uncompressed tar ({why}); copy it again, or unpack it if it is compressed")

    def read(self, size: int) -> bytes:
        """Read the next bytes."""
        self.file.seek(self.at)
        data = self.file.read(min(size, self.stop - self.at))
        if len(data) < size:
            self.broken("it ends without the mark that ends a tar")
        self.at += size
        return data

    def members(self) -> Iterator[Member]:
        seen: dict[str, int] = {}
        twice: list[str] = []
        while any(header := self.read(BLOCK)):
            info = self.parse(header)
            if info.type in LONG + PAX:
                self.extend(info)
                continue
            member = self.plain(info)
            if member is not None:
                if seen.setdefault(member.path, member.header) != member.header:
                    twice.append(f"{member.path!r} (bytes {seen[member.path]} and {member.header})")
                yield member
            self.extended, self.first, self.member = {}, self.at, ""
        self.ended()
        if twice:
            raise DataError(listing(f"{self.name}: {len(twice)} member(s) of a name that another has", twice))

    def parse(self, header: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            self.broken(error)
        self.member = info.name
        if info.size < 0:
            self.fail(f"a size of {info.size} bytes")
        return info

    def extend(self, info: tarfile.TarInfo) -> None:
        """Take in a long name, or pax records (POSIX.1-2001: "LENGTH KEY=VALUE\\n"), of the member that follows."""
        if info.size > MAX_EXTENSION:
            self.fail(f"a header of {info.size} bytes, expected at most {MAX_EXTENSION}")
        data = self.read(_padded(info.size))[: info.size]
        if info.type in LONG:
            self.extended["path" if info.type == tarfile.GNUTYPE_LONGNAME else "link"] = data.split(b"\0")[0]
            return
        while data:
            length, space, _ = data.partition(b" ")
            size = int(length) if space and length.isdigit() and len(length) < 8 else 0
            key, equals, value = data[len(length) + 1 : size - 1].partition(b"=")
            if not equals or size > len(data) or data[size - 1 : size] != b"\n":
                self.broken("a damaged pax header")
            word, data = key.decode("utf-8", "replace"), data[size:]
            if word.startswith("GNU.sparse"):
                self.fail(f"is {KINDS[tarfile.GNUTYPE_SPARSE]}")
            if info.type == tarfile.XGLTYPE and word in ("path", "size"):
                self.fail(f"a global header that sets the {word} of all members")
            if info.type == tarfile.XHDTYPE:
                self.extended[word] = value

    def plain(self, info: tarfile.TarInfo) -> Member | None:
        """Return the member if it is a file, None for a folder; whatever else it is, is refused."""
        path = self.extended.get("path", info.name.encode("utf-8", "surrogateescape"))
        self.member = path.decode("utf-8", "surrogateescape")
        size = self.extended.get("size", b"%d" % info.size)
        if not size.isdigit() or len(size) > 30:
            self.fail(f"a size of {size!r} bytes")
        if info.type not in (*PLAIN, tarfile.DIRTYPE):
            kind = info.type.decode("ascii", "replace")
            self.fail(f"is {KINDS.get(info.type, f'of a kind {kind!r} that is neither a file nor a folder')}")
        self.check_path(path)
        if self.at + int(size) > self.stop:
            self.fail(
                f"its {int(size)} bytes go past the end of the tar at byte {self.stop}: was it cut off?"
            )
        if info.type == tarfile.DIRTYPE:
            if int(size):
                self.fail(f"a folder with {int(size)} bytes of data")
            return None
        member = Member(self.member.removeprefix("./"), self.first, self.at, int(size))
        self.at = member.end
        return member

    def check_path(self, path: bytes) -> None:
        if path.startswith(b"/"):
            self.fail("an absolute path; write the tar anew from inside the folder, with relative ones")
        if not path or b".." in path.split(b"/"):
            self.fail("a path that is empty or leads out of the tar ('..')")
        try:
            path.decode("utf-8")
        except UnicodeDecodeError:
            self.fail("a path that is not UTF-8: rename the file and write the tar anew")

    def ended(self) -> None:
        """Check that only zeros follow the mark: of two tars in one file, some readers see both and some the first."""
        if self.extended:
            self.broken("it ends after the headers of a member")
        while self.at < self.stop:
            data = self.read(min(1 << 20, self.stop - self.at))
            if data.strip(b"\0"):
                self.first = self.at - len(data.lstrip(b"\0"))
                self.fail("something after the mark that ends the tar; join tars with `tar --concatenate`")

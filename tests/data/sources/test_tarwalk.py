"""Walking tars: the same members as `tarfile` in good ones, DataError and nothing else in the others."""

import io
import tarfile
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.data import DataError
from dit.data.sources.tarwalk import BLOCK, MAX_EXTENSION, walk
from tests.data.sources.pictures import tar_bytes

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
FILES = {"cat/a.png": b"a" * 700, "cat/b.png": b"", "ant/c.png": b"c" * 512}
WORDS = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30
).filter(lambda word: word not in (".", ".."))
PATHS = st.lists(WORDS, min_size=1, max_size=8).map("/".join)


def walked(data, **where):
    return list(walk(io.BytesIO(data), "some.tar", **where))


def walked_or_refused(data):
    """The members, or what DataError says; no other error is one."""
    try:
        return walked(data)
    except DataError as error:
        return str(error)


def header(name="cat/a.png", size=b"00000001274", kind=b"0", data=b"x" * 700, prefix=b""):
    """A member with a right checksum, whatever its fields, with data and padding."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    raw = name if isinstance(name, bytes) else name.encode()
    block[:100] = raw.ljust(100, b"\0")
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[345:500] = prefix.ljust(155, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % BLOCK)


def records(fields):
    """Pax records, some of which are wrong."""
    return b"".join(f"{len(k + v) + 4} {k}={v}\n".encode() for k, v in fields.items())


END = bytes(2 * BLOCK)
GOOD = header()


@given(files=st.dictionaries(PATHS, st.binary(max_size=1500), max_size=5), form=st.sampled_from(FORMATS[1:]))
def test_good_tars_give_what_tarfile_gives(files, form):
    data = tar_bytes(files, form)
    members = walked(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar]
    assert [(m.path, m.offset, m.size) for m in members] == expected
    assert [data[m.offset : m.offset + m.size] for m in members] == list(files.values())
    assert all(a.end == b.header for a, b in pairwise(members))


def test_folders_and_global_headers_are_passed_over():
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hi"}
    ) as tar:
        folder = tarfile.TarInfo("./cat")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("./cat/a.png"))
    assert [m.path for m in walked(buffer.getvalue())] == ["cat/a.png"]


@given(inner=st.dictionaries(PATHS, st.binary(max_size=1500), max_size=3), before=st.integers(0, 3))
def test_a_tar_in_a_tar_is_read_in_place(inner, before):
    nested = tar_bytes(inner)
    outer = tar_bytes({f"{i}.bin": b"0" * 600 for i in range(before)} | {"inner.tar": nested})
    place = walked(outer)[-1]
    members = walked(outer, start=place.offset, stop=place.offset + place.size)
    assert {m.path: outer[m.offset : m.offset + m.size] for m in members} == inner


@pytest.mark.parametrize("form", FORMATS)
def test_a_tar_cut_anywhere_is_refused(form):
    data = tar_bytes(FILES, form)
    needed = walked(data)[-1].end + BLOCK  # one block of zeros ends a tar
    assert walked(data[:needed]) == walked(data)
    for cut in [*range(0, needed, BLOCK), *range(1, needed, 97)]:
        with pytest.raises(DataError, match=r"^some.tar: byte \d+.*(not a whole|past the end)"):
            walked(data[:cut])


@given(st.data(), st.sampled_from(FORMATS))
def test_an_altered_header_is_never_passed_over(choose, form):
    """A damaged header in the middle must not end the tar: what follows it would be lost without a word."""
    data = bytearray(tar_bytes(FILES, form))
    members = walked(bytes(data))
    place = choose.draw(st.sampled_from(members)).header + choose.draw(st.integers(0, BLOCK - 1))
    data[place] ^= choose.draw(st.integers(1, 255))
    found = walked_or_refused(bytes(data))
    assert found == members or str(found).startswith(
        "some.tar: byte "
    )  # equal: padding of the checksum's own field


@given(
    st.lists(
        st.builds(
            header,
            name=st.binary(max_size=100) | PATHS.map(lambda p: p.encode()[:100]),
            size=st.binary(max_size=12) | st.integers(0, 8**11 - 1).map(lambda n: b"%011o" % n),
            kind=st.binary(min_size=1, max_size=1)
            | st.sampled_from([b"0", b"5", b"x", b"g", b"L", b"K", b"S"]),
            data=st.binary(max_size=1100) | st.dictionaries(st.text(), st.text()).map(records),
            prefix=st.binary(max_size=155),
        ),
        max_size=4,
    ),
    st.binary(max_size=600),
)
def test_any_headers_give_members_inside_the_tar_or_a_data_error(headers, after):
    data = b"".join(headers) + after + END
    found = walked_or_refused(data)
    if isinstance(found, str):
        assert found.startswith("some.tar: ")
    else:
        assert all(0 <= m.header < m.offset <= m.offset + m.size <= len(data) for m in found)
        assert not any(m.path.startswith("/") or ".." in m.path.split("/") for m in found)


def pax(key, value, kind=b"x"):
    body = f" {key}={value}\n"
    record = f"{len(body) + 2}{body}".encode()
    assert len(record) == len(body) + 2
    return header("x", b"%011o" % len(record), kind, record)


HOSTILE = {
    "an absolute path": (header("/etc/passwd"), "'/etc/passwd': an absolute path"),
    "a climbing path": (header("cat/../../a.png"), r"'cat/../../a.png': .*leads out of the tar"),
    "a climbing long path": (pax("path", "../up.png") + GOOD, r"'../up.png': .*leads out of the tar"),
    "an absolute long path": (
        header("././@LongLink", b"%011o" % 7, b"L", b"/a.png\0") + GOOD,
        "'/a.png': an absolute path",
    ),
    "no path": (header(""), "a path that is empty"),
    "a path that is not UTF-8": (header(b"cat/\xff.png"), r"'cat/\\udcff.png': a path that is not UTF-8"),
    "a hard link": (header(kind=b"1"), "is a link"),
    "a symbolic link": (header("notes.txt", kind=b"2"), "'notes.txt': is a link"),
    "a character device": (header(kind=b"3"), "is a device"),
    "a block device": (header(kind=b"4"), "is a device"),
    "a pipe": (header(kind=b"6"), "is a pipe"),
    "an old sparse file": (header(kind=b"S"), "is a sparse file"),
    "a new sparse file": (pax("GNU.sparse.major", "1") + GOOD, "is a sparse file"),
    "a kind nobody knows": (header(kind=b"Z"), "of a kind 'Z'"),
    "a volume": (header(kind=b"M"), "of a kind 'M'"),
    "a negative size": (header(size=b"-0000000001"), "a size of -1 bytes"),
    "a negative binary size": (header(size=b"\xff" * 11 + b"\0"), "a size of -256 bytes"),
    "a huge size": (header(size=b"77777777777"), "its 8589934591 bytes go past the end"),
    "a huge binary size": (header(size=b"\x80" + b"\x7f" * 11), r"its \d{27} bytes go past the end"),
    "a size that is none": (header(size=b"12x"), "not a whole, uncompressed tar"),
    "a pax size that is none": (pax("size", "-5") + GOOD, "a size of b'-5' bytes"),
    "a huge pax size": (pax("size", "9" * 15) + GOOD, "go past the end"),
    "a size for all": (pax("size", "5", b"g") + GOOD, "a global header that sets the size"),
    "a path for all": (pax("path", "b", b"g") + GOOD, "a global header that sets the path"),
    "a pax header without a length": (
        header("x", b"%011o" % 5, b"x", b"a=b\n\n") + GOOD,
        "damaged pax header",
    ),
    "a pax header that ends early": (
        header("x", b"%011o" % 7, b"x", b"99 a=b\n") + GOOD,
        "damaged pax header",
    ),
    "a huge pax header": (
        header("x", b"%011o" % (MAX_EXTENSION + 1), b"x", bytes(MAX_EXTENSION + BLOCK)),
        r"a header of \d+ bytes",
    ),
    "headers of nothing": (pax("path", "b"), "ends after the headers of a member"),
    "a folder with data": (header(kind=b"5"), "a folder with 700 bytes"),
}


@pytest.mark.parametrize("first", [b"", header("ok.png")], ids=["first", "second"])
@pytest.mark.parametrize(("hostile", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_members_are_refused_where_they_stand(hostile, words, first):
    with pytest.raises(DataError, match=rf"^some.tar: byte {len(first)}.*{words}"):
        walked(first + hostile + END)


def test_what_the_table_above_is_made_of_is_a_good_tar():
    assert [m.path for m in walked(header() + pax("path", "b") + header("ok.png") + END)] == [
        "cat/a.png",
        "b",
    ]


def test_two_tars_in_one_file_are_refused():
    first = header() + END
    with pytest.raises(DataError, match=rf"byte {len(first)}: something after the mark that ends the tar"):
        walked(first + header("b.png") + END)
    assert len(walked(first + bytes(3 << 20))) == 1  # padding of any length is none


def test_names_that_are_there_twice_are_all_listed():
    names = [f"{i}.png" for i in range(7)]
    with pytest.raises(DataError) as error:
        walked(b"".join(header(name) for name in [*names, *names, "once.png"]) + END)
    lines = str(error.value).splitlines()
    assert lines[0] == "some.tar: 7 member(s) of a name that another has:"
    assert lines[1] == f"  '0.png' (bytes 0 and {7 * len(GOOD)})"
    assert lines[5:] == [f"  '4.png' (bytes {4 * len(GOOD)} and {11 * len(GOOD)})", "  ... and 2 more"]

"""Text in any encoding and locale, paths as they are typed, whole files or none."""

from __future__ import annotations

import ast
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.errors import UserError
from dit.files import FileError, decoded, expand, read_text, sought, write_atomically
from tests.surroundings import files_of_at_most

ROOT = Path(__file__).resolve().parents[1]
GERMAN = "# Größe\nrun_dir: läufe/π\n"


# --- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"], ids=["plain", "mark", "powershell", "utf-32"]
)
def test_text_is_read_in_each_encoding_that_says_so(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(GERMAN.replace("\n", "\r\n").encode(encoding))
    assert read_text(path) == GERMAN


def test_both_byte_orders_are_read() -> None:
    assert decoded(b"\xff\xfe" + GERMAN.encode("utf-16-le"), "a") == GERMAN
    assert decoded(b"\xfe\xff" + GERMAN.encode("utf-16-be"), "a") == GERMAN


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_any_text_comes_back(text: str, encoding: str) -> None:
    assert decoded(text.encode(encoding), "a") == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (GERMAN.encode("latin-1", "replace"), ["line 1 is not UTF-8", "byte 0xf6, number 4", '"# Größe"']),
        (b"a\nb\nc: \x80\n", ["line 3 is not UTF-8", "byte 0x80, number 7", '"c: €"', "iconv -f CP1252"]),
        (b"a: 1\nb\0c\n", ["line 2 has a zero byte", "UTF-16 without its mark"]),
        (GERMAN.encode("utf-16-le"), ["not UTF-8"]),
        ("plain\n".encode("utf-16-le"), ["line 1 has a zero byte", "UTF-16 without its mark"]),
        (b"\xff\xfea\0b", ["not UTF-16-LE", "damaged or cut off"]),
        (b"\x89PNG\r\n\x1a\n\0\0", ["line 1 is not UTF-8", "byte 0x89"]),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, data: bytes, says: list[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in says), str(caught.value)
    assert isinstance(caught.value, UserError)


LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C.UTF-8"},
]


@pytest.mark.parametrize("variables", LOCALES, ids=[v["LC_ALL"] for v in LOCALES])
def test_a_configuration_is_the_same_in_every_locale(tmp_path: Path, variables: dict[str, str]) -> None:
    """Read from UTF-8 and UTF-16, printed, written and read again by a process of that locale."""
    (tmp_path / "base.yaml").write_bytes("note: größer\n".encode())
    (tmp_path / "a.yaml").write_bytes("base: base.yaml\nrun_dir: läufe/π\n".encode("utf-16"))
    code = (
        "import sys; from dit.config import config; from dit.configfile import load, write_yaml\n"
        "@config\nclass Run:\n    run_dir: str = 'x'\n    note: str = 'y'\n"
        "cfg = load(Run, sys.argv[1] + '/a.yaml')\n"
        "write_yaml(sys.argv[1] + '/out.yaml', cfg)\n"
        "assert load(Run, sys.argv[1] + '/out.yaml') == cfg\n"
        "assert cfg.run_dir == 'l\\u00e4ufe/\\u03c0' and cfg.note == 'gr\\u00f6\\u00dfer', ascii(cfg)\n"
    )
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def untold(tree: ast.AST) -> list[int]:
    """Lines of calls that open text in the locale's encoding."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
        if owner in ("tarfile", "zipfile", "archive") or any(k.arg == "encoding" for k in node.keywords):
            continue
        if isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text"):
            found += [node.lineno] if len(node.args) < (1 if name == "read_text" else 2) else []
        if name in ("open", "fdopen"):
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [node.lineno] if any(set(m) <= set("rwax+t") for m in modes) else []
    return found


def test_no_text_file_is_opened_in_the_locales_encoding() -> None:
    files = sorted([*ROOT.glob("dit/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("launch/*.py")])
    found = {str(f): lines for f in files if (lines := untold(ast.parse(f.read_text(encoding="utf-8"))))}
    assert len(files) > 100
    assert found == {}


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("p.read_text()", 1),
        ("p.write_text(x)", 1),
        ("p.open('w')", 1),
        ("open(p, 'a+')", 1),
        ("p.read_text('utf-8')", 0),
        ("p.write_text(x, encoding='utf-8')", 0),
        ("read_text(p)", 0),
        ("p.open('rb')", 0),
        ("os.open(p, os.O_RDONLY)", 0),
        ("data.open()", 0),
    ],
)
def test_the_check_of_encodings_sees(code: str, count: int) -> None:
    assert len(untold(ast.parse(code))) == count


# --- paths -------------------------------------------------------------------------------------------------


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/scratch/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/a", "runs/a"),
        ("/a/b", "/a/b"),
        ("~", "/home/me"),
        ("~/runs/a", "/home/me/runs/a"),
        ("a/~/b", "a/~/b"),
        ("a~", "a~"),
        ("./~x", "./~x"),
        ("$DATA/x", "/scratch/data/x"),
        ("${DATA}x/$DATA", "/scratch/datax//scratch/data"),
        ("$HOME/x", "/home/me/x"),
        ("~root/x", os.path.join(pwd.getpwnam("root").pw_dir, "x")),
        ("cost$", "cost$"),
        ("a$1", "a$1"),
        ("{000..099}.tar", "{000..099}.tar"),
        ("https://host/~me/$DATA", "https://host/~me/$DATA"),
        ("s3://bucket/$UNSET", "s3://bucket/$UNSET"),
        ("simplecache::s3://b/~", "simplecache::s3://b/~"),
        ("digits:train", "digits:train"),
    ],
)
def test_a_path_is_filled_in(typed: str, meant: str) -> None:
    assert expand(typed) == meant
    assert expand(expand(typed)) == meant


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("$UNSET/x", "'$UNSET/x': the environment variable UNSET is not set"),
        ("a/${UNSET}", "the environment variable UNSET is not set"),
        ("$EMPTY/x", "the environment variable EMPTY is empty"),
        ("${DATA:-x}", "${DATA:-x} is no name of a variable"),
        ("${}", "${} is no name of a variable"),
        ("~nobody-of-that-name/x", "no home folder of ~nobody-of-that-name is known"),
        ("", "an empty path"),
        ("a\0b", "cannot hold a zero character"),
        ("  ", "an empty path"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(typed: str, says: str) -> None:
    with pytest.raises(FileError) as caught:
        expand(typed)
    assert says in str(caught.value)


def test_a_name_that_the_locale_cannot_write_is_refused() -> None:
    code = "from dit.files import expand\ntry: expand('l\\u00e4ufe')\nexcept ValueError as e: print(ascii(str(e)))"
    environment = {**os.environ, **LOCALES[0], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (
        b"file names are in ascii in this locale, which lacks '\\xe4'; set LC_ALL=C.UTF-8" in done.stdout
    ), done


def test_a_file_whose_name_begins_like_a_user_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~old-of-nobody").touch()
    assert expand("~old-of-nobody") == "~old-of-nobody"


def test_a_relative_path_that_is_missing_says_where_it_was_sought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sought("a/b") == f" (the path is relative to {tmp_path}; a whole one holds anywhere)"
    assert sought("/a/b") == sought("s3://a/b") == ""


# --- writing -----------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data in (b"first", b"the second, longer"):
        write_atomically(path, data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"good")
    (tmp_path / ".a.json.partial").mkdir()  # in the way of the next one
    with pytest.raises(OSError, match="partial"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"good"


def test_a_file_that_has_no_room_is_named_and_takes_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"good")
    with files_of_at_most(4096), pytest.raises(OSError, match=r"File too large: .*a.json'"):
        write_atomically(path, bytes(5000))
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]

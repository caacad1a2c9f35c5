"""Whole files or none."""

from pathlib import Path

import pytest

from dit.files import write_atomically


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

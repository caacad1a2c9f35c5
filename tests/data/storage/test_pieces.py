"""Memory in many places: filled by copies and by system calls, in any cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.data.storage.pieces import MOST_PIECES, Pieces


def cut(sizes):
    """Arrays of these sizes, not next to each other."""
    memory = np.zeros(sum(sizes) + 3 * len(sizes), np.uint8)
    starts = np.cumsum([0, *(n + 3 for n in sizes)])[:-1]
    return [memory[a : a + n] for a, n in zip(starts, sizes, strict=True)]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(0, 5))
def test_filled_in_turn(tmp_path_factory, sizes, offset):
    data = np.random.default_rng(len(sizes)).integers(0, 256, offset + sum(sizes), np.uint8)
    file = tmp_path_factory.getbasetemp() / "pieces"
    file.write_bytes(data.tobytes())
    copied, read = cut(sizes), cut(sizes)
    Pieces.of(*copied).fill(data[offset:])
    with file.open("rb") as opened:
        Pieces.of(*[a for a in read if len(a)]).read(opened.fileno(), offset)
    for arrays in (copied, read):
        assert np.array_equal(np.concatenate(arrays), data[offset:])


def test_more_pieces_than_a_system_call_takes(tmp_path):
    data = np.arange(3 * MOST_PIECES + 7, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    arrays = cut([1] * len(data))
    with (tmp_path / "file").open("rb") as opened:
        Pieces.of(*arrays).read(opened.fileno(), 0)
    assert np.array_equal(np.concatenate(arrays), data)


@pytest.mark.parametrize("missing", [1, 5, 6, 11])
def test_a_file_that_is_shorter(tmp_path, missing):
    (tmp_path / "file").write_bytes(bytes(12 - missing))
    with (tmp_path / "file").open("rb") as opened, pytest.raises(EOFError, match=f"at byte {12 - missing} "):
        Pieces.of(*cut([3, 4, 5])).read(opened.fileno(), 0)


def test_errors_of_the_system(tmp_path):
    with (tmp_path / "file").open("wb") as opened, pytest.raises(OSError, match="Bad file descriptor"):
        Pieces.of(*cut([3])).read(opened.fileno(), 0)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="4 bytes for pieces of 3"):
        Pieces.of(*cut([3])).fill(np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        Pieces.of(np.zeros((4, 4), np.uint8)[:, :2])

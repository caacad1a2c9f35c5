"""How values stand in messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit.errors import shown
from dit.scalars import Scalar


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1, "1"),
        (1e-4, "0.0001"),
        ("a b", "'a b'"),
        ("two\nlines", "'two\\nlines'"),
        (Scalar("010"), "010"),
        (Path("a/b"), "'a/b'"),
        (("a", None, 0), "['a', null, 0]"),
        ({"name": "vp", "betas": [0.1, False]}, "{name: 'vp', betas: [0.1, false]}"),
        ([], "[]"),
    ],
)
def test_no_message_needs_python_to_be_read(value: object, text: str) -> None:
    assert shown(value) == text

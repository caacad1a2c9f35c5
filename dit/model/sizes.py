"""Widths, depths and heads by name."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Width, depth and heads of a model."""

    width: int
    depth: int
    heads: int


SIZES: dict[str, Size] = {
    "nano": Size(64, 2, 2),  # these three are ours, for CPUs and tests
    "micro": Size(128, 4, 4),
    "tiny": Size(192, 12, 3),
    "S": Size(384, 12, 6),  # these four are the paper's, table 1
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}

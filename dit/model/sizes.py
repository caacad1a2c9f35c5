"""Widths, depths and heads by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dit.config import ConfigError, did_you_mean


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


def check_size(size: str | None, given: Mapping[str, int | None], head_width: int | None) -> None:
    """Refuse an unknown size, and a size given in two ways or in half of one. given: what a `Size` has, or None."""
    there = [name for name, value in given.items() if value is not None]
    if size is not None and size not in SIZES:
        raise ConfigError(f"unknown size '{size}'{did_you_mean(size, SIZES)}")
    if size is not None and there:
        raise ConfigError(
            f"got size '{size}' and also {', '.join(there)}; leave out one of the two ways to say it"
        )
    if given["heads"] is not None and head_width is not None:
        raise ConfigError(f"got heads {given['heads']} and head_width {head_width}; leave out one of the two")
    if there and len(there) + (head_width is not None) < len(given):
        raise ConfigError(f"got only {', '.join(there)}; without `size`, give width, depth and heads")

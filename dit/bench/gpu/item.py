"""What one item of the GPU benchmark is: its name, what it may take, and what it is given to tell by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """What an item has found. text: in a line, for a table. figures: all of it, JSON values."""

    text: str
    figures: dict[str, Any]


def unheard(found: Found) -> None:
    """Tell nobody; a function with a name, which a new process can be handed."""


@dataclass(frozen=True)
class Place:
    """Where an item runs. out: the folder of results. tell: takes what is known so far, which a time limit keeps."""

    is_toy: bool
    out: Path
    tell: Callable[[Found], object] = unheard

    def pick(self, full: T, toy: T) -> T:
        """A setting at full size, for a GPU, or at toy size, to see on any machine that the item runs."""
        return toy if self.is_toy else full


@dataclass(frozen=True)
class Item:
    """A measurement in a process of its own.

    seconds: that it takes on an H100 or H200, from the process's start on, compilation included; it begins only where
    so many are left. what: it measures, in words. run: does it; what it raises is recorded, and stops no other.
    """

    name: str
    seconds: float
    what: str
    run: Callable[[Place], Found]

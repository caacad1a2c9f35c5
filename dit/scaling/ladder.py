"""The sizes of a scaling experiment: a list of them, or a rule that makes depth and heads of each width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dit.config import ConfigError, Registry, config

Whole = Annotated[int, Field(ge=1)]


@config
class Size:
    """One size of the network."""

    width: Whole  # channels of a token
    depth: Whole  # blocks of the transformer
    heads: Whole  # of the attention, divides width


@dataclass(frozen=True)
class Rung:
    """A size by its name in the experiment, such as w64d4."""

    name: str
    size: Size


class Ladder(ABC):
    """Gives the sizes of an experiment, the smallest first."""

    @abstractmethod
    def sizes(self) -> Sequence[Size]:
        """Give the sizes, in any order. Raises ConfigError where the rule makes none of a width."""

    def notes(self) -> list[str]:
        """Say what was rounded, a line each."""
        return []


LADDERS: Registry[Ladder] = Registry("ladder")


@LADDERS.register("list")
@config
class ListedSizes(Ladder):
    """Sizes as they are listed."""

    sizes_: tuple[Size, ...]  # [{width: 64, depth: 4, heads: 2}, ...]

    def sizes(self) -> Sequence[Size]:
        """Give what is listed."""
        return self.sizes_


@LADDERS.register("aspect")
@config
class ConstantAspect(Ladder):
    """One width a head and one ratio of width to depth at every width, as in most published ladders."""

    widths: tuple[Whole, ...]  # channels of a token, one for each size
    head_width: Whole = 64  # channels of one head; divides every width
    aspect: Annotated[float, Field(gt=0)] = 32.0  # width over depth, which is rounded to whole blocks

    def __post_init__(self) -> None:
        odd = [width for width in self.widths if width % self.head_width]
        if odd:
            raise ConfigError(
                f"ladder.widths: {odd[0]} is no multiple of ladder.head_width = {self.head_width}; heads share the "
                "width equally"
            )

    def sizes(self) -> Sequence[Size]:
        """Give each width its depth and heads."""
        return [Size(width=w, depth=self._depth(w), heads=w // self.head_width) for w in self.widths]

    def _depth(self, width: int) -> int:
        return max(1, round(width / self.aspect))

    def notes(self) -> list[str]:
        """Say at which widths width over depth is not the asked-for ratio."""
        off = [w for w in self.widths if self._depth(w) * self.aspect != w]
        if not off:
            return []
        each = ", ".join(f"{w / self._depth(w):.3g} at width {w}" for w in off)
        return [f"depth is whole blocks: width over depth is {each}, in place of {self.aspect:g}"]


def rungs(ladder: Ladder) -> list[Rung]:
    """Name the sizes of a ladder, the smallest first. ConfigError for none, or for one that is there twice."""
    sizes = sorted(ladder.sizes(), key=lambda size: (size.width**2 * size.depth, size.heads))
    if not sizes:
        raise ConfigError("ladder has no size: list one or more")
    twice = [size for size, count in Counter(sizes).items() if count > 1]
    if twice:
        raise ConfigError(f"ladder has {_name(twice[0])} with {twice[0].heads} heads twice: leave one out")
    shapes = Counter(_name(size) for size in sizes)
    return [Rung(_name(s) + (f"h{s.heads}" if shapes[_name(s)] > 1 else ""), s) for s in sizes]


def _name(size: Size) -> str:
    return f"w{size.width}d{size.depth}"

"""An axis of choice for the tests of configuration."""

from __future__ import annotations

from dit.config import Registry, config

SHAPES: Registry[Shape] = Registry("shape")


class Shape:
    """An axis."""


@SHAPES.register("round")
@config
class Round(Shape):
    radius: float = 1.0


@SHAPES.register("square")
@config
class Square(Shape):
    side: float = 1.0
    corners: int = 4

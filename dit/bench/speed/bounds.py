"""Figures beside the bounds that they have to meet, as lines of text."""

from __future__ import annotations

from dit.bench.speed.turns import MedianRange


def bound_line(name: str, figure: dict[str, float], bound: float, enough: bool, most: bool = False) -> str:
    """Tell a figure and its bound (the least, or the `most`), and where enough was measured whether it is met."""
    spread = MedianRange(**figure)
    met = spread.median <= bound if most else spread.median >= bound
    verdict = f": {'met' if met else 'missed'}" if enough else ""
    return f"{name:28s} {spread} (at {'most' if most else 'least'} {bound:g}{verdict})"

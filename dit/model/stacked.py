"""Layers whose weight is several matrices, one above the other, and that are several to an optimizer of matrices."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Linear)


def stacked(layer: Layer, count: int) -> Layer:
    """Mark a layer's weight as `count` matrices of equal height (`dit/train/engines/muon.py` takes each by itself)."""
    layer.weight.stacked = count  # type: ignore[attr-defined]
    return layer

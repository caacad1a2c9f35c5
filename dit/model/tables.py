"""A network's computed buffers: placed where the weights came from elsewhere, and made anew for another input."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import torch

from dit.model.dims import Dims, grid_of
from dit.model.dit import DiT
from dit.model.embed import PatchEmbed


def place_tables(model: DiT, dtype: torch.dtype, but: Collection[str] = ()) -> None:
    """Give a network that was made on the meta device its computed buffers, all but those of these names."""
    for name, table in model.tables().items():
        if name not in but:
            place, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(place), leaf, table.to(dtype))


def resize(model: DiT, input_size: tuple[int, int]) -> None:
    """Take inputs (B, C, *input_size) from now on: no parameter hangs on it. ConfigError as `grid_of`."""
    grid = grid_of(input_size, model.dims.patch)
    device, dtype = model.position.device, model.position.dtype
    for module in model.modules():
        if isinstance(getattr(module, "dims", None), Dims):
            cast(Any, module).dims = replace(cast(Any, module).dims, grid=grid)
        if isinstance(module, PatchEmbed):
            module.size = model.dims.image_size
    place_tables(model, dtype)
    model.to(device)

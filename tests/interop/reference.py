"""State dicts as the DiT and SiT repositories write them: names and shapes spelled out, numbers random."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.model.embed import position_table

TINY = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}


def shapes(
    input_size: int = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    hidden_size: int = 1152,
    depth: int = 28,
    num_heads: int = 16,
    mlp_ratio: float = 4.0,
    num_classes: int = 1000,
    learn_sigma: bool = True,
) -> dict[str, tuple[int, ...]]:
    """name -> shape of models.py's DiT; the defaults are DiT-XL/2 at 256 x 256 pixels."""
    d, p, m = hidden_size, patch_size, int(hidden_size * mlp_ratio)
    block = {
        "attn.qkv": (3 * d, d),
        "attn.proj": (d, d),
        "mlp.fc1": (m, d),
        "mlp.fc2": (d, m),
        "adaLN_modulation.1": (6 * d, d),
    }
    layers: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (d, in_channels, p, p),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        **{f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()},
        "final_layer.linear": (p * p * in_channels * (1 + learn_sigma), d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    found: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (input_size // p) ** 2, d),
        "y_embedder.embedding_table.weight": (num_classes + 1, d),
    }
    for name, shape in layers.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def weights(seed: int = 0, std: float = 0.1, **arguments: int) -> dict[str, Tensor]:
    """A random state dict of these arguments (TINY's where not given), nothing zero, with the fixed position table."""
    given = {**TINY, **arguments}
    generator = torch.Generator().manual_seed(seed)
    made = {name: std * torch.randn(shape, generator=generator) for name, shape in shapes(**given).items()}
    side = given["input_size"] // given["patch_size"]
    made["pos_embed"] = position_table(given["hidden_size"], (side, side)).float()[None]
    return made

"""Networks that each have one component more than a plain DiT, and one that has many: for the tests of all."""

from __future__ import annotations

from typing import Any

from dit.config import from_dict
from dit.model.dit import DiTConfig

COMPONENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms norm": {"block": {"norm": "rms"}},
    "rms norm without gain": {"block": {"norm": {"name": "rms", "gain": False}}},
    "layer norm with gain": {"block": {"norm": {"name": "layer", "affine": True}}},
    "qk layer norm": {"block": {"qk_norm": {"name": "layer", "affine": True, "epsilon": 1e-5}}},
    "swiglu": {"block": {"mlp": "swiglu"}},
    "no biases": {"block": {"mlp": {"name": "gelu", "bias": False}, "qkv_bias": False}},
    "rope": {"block": {"rope": "halves"}},
    "rope alone": {"block": {"rope": "alternating"}, "position_table": False},
    "no shift": {"block": {"shift": False}},
    "one modulation": {"block": {"modulation": "single"}},
    "modulation of low rank": {"block": {"modulation": {"name": "lora", "rank": 4}}},
    "value residual": {"block": {"value_residual": True}},
    "registers": {"registers": 3},
    "registers and rope": {"registers": 3, "block": {"rope": "halves"}},
    "class tokens": {"cond": [{"name": "class", "context": 2}], "context_from": 1},
    "bottleneck": {"bottleneck": 5},
    "head width": {"head_width": 16},
    "time": {"time_period": 10.0, "time_scale": 1000.0},
    "output norm": {"output_norm": "rms"},
    "many": {
        "block": {"norm": "rms", "qk_norm": "rms", "mlp": "swiglu", "rope": "halves", "shift": False},
        "cond": [{"name": "class", "context": 2}],
        "context_from": 1,
        "registers": 1,
        "bottleneck": 8,
    },
}


def modern(name: str, **more: Any) -> DiTConfig:
    """A network of width 32 with two blocks and that component."""
    heads = {} if "head_width" in COMPONENTS[name] else {"heads": 4}
    return from_dict(DiTConfig, {"width": 32, "depth": 2, **heads, "patch": 2, **COMPONENTS[name], **more})

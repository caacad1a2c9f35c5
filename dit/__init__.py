"""A training system for diffusion transformers: exact, elastic and reproducible from a run directory.

    import dit

    model = dit.load("runs/quickstart/dit")
    images = model.sample(num_samples=8, classes=[3], cfg_scale=2)

What there is lives in `dit.api`, which is imported when one of its names is first used: `import dit` takes no torch.
Within the package nobody imports from here.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from dit.version import __version__

if TYPE_CHECKING:  # so that editors and type checkers know the names
    from dit.api import (
        ConfigError,
        DataError,
        DiTConfig,
        Draws,
        Endpoints,
        Experiment,
        Notice,
        Objective,
        Sampler,
        SamplerSpec,
        Stopped,
        TrainedModel,
        UserError,
        encode,
        fit,
        load,
    )

__all__ = [
    "ConfigError",
    "DataError",
    "DiTConfig",
    "Draws",
    "Endpoints",
    "Experiment",
    "Notice",
    "Objective",
    "Sampler",
    "SamplerSpec",
    "Stopped",
    "TrainedModel",
    "UserError",
    "__version__",
    "encode",
    "fit",
    "load",
]


# Wherever diffusers finds torchao (the extra fp8) it imports it, and both tell of parts that nobody uses here.
for _name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)


if not TYPE_CHECKING:  # or a type checker would believe in any name

    def __getattr__(name: str) -> Any:
        """Give a name of `dit.api`, which is imported now. Raises AttributeError for any other."""
        if name not in __all__:
            raise AttributeError(f"module 'dit' has no attribute {name!r}; it has {', '.join(__all__)}")
        found = globals()[name] = getattr(importlib.import_module("dit.api"), name)
        return found


def __dir__() -> list[str]:
    """List the names of `dit.api` too, for help and completion."""
    return sorted({*globals(), *__all__})

"""The reference numbers of LightningDiT and DDT as what a user has: a state dict, and what must be said beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.interop import ddt, lightningdit
from dit.interop.ddt import DDT
from dit.interop.format import Format
from dit.interop.lightningdit import LightningDiT
from dit.interop.weights import Pretrained
from tests.gaussian import golden

VARIANTS = ("standard", "qknorm_noshift", "layernorm_mlp_rope")


@dataclass(frozen=True)
class Golden:
    """One network's weights. command: of tools/convert.py, with these flags; build: `from_state_dict`."""

    command: str
    flags: tuple[str, ...]
    format: Format[Any]
    build: Callable[..., Pretrained]
    place: str  # of its entries in the file of numbers

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """All that the file holds."""
        return _numbers(self.command)

    @property
    def arguments(self) -> dict[str, Any]:
        """The reference's arguments."""
        found: dict[str, Any] = json.loads(str(self.numbers[f"{self.place}config"]))
        return found

    def state(self) -> dict[str, Tensor]:
        """The state dict, in tensors of its own."""
        start = f"{self.place}w/"
        found = {k.removeprefix(start): w for k, w in self.numbers.items() if k.startswith(start)}
        return {name: torch.from_numpy(w).clone() for name, w in found.items()}

    def network(self) -> Pretrained:
        """Ours, as a user of Python gets it."""
        return self.build(self.state(), **self.arguments)


@cache
def _numbers(name: str) -> dict[str, np.ndarray]:
    return golden(name)


SIZES = ("--num_encoder_blocks=3", "--input_size=8")
GOLDENS = {
    **{
        f"lightningdit-{variant}": Golden(
            "lightningdit", (), LightningDiT(), lightningdit.from_state_dict, f"{variant}/"
        )
        for variant in VARIANTS
    },
    "ddt": Golden("ddt", SIZES, DDT(num_encoder_blocks=3, input_size=8), ddt.from_state_dict, ""),
}

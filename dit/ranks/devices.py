"""Which device somebody asks for, by name."""

from __future__ import annotations

import torch

from dit.errors import UserError
from dit.ranks.group import World


def chosen_device(name: str | None, world: World, key: str) -> torch.device:
    """Find the device that `name` says: "cpu", "cuda" (this rank's GPU), "cuda:1"; None is the rank's own.

    key: what asked, for messages, such as "--device". Raises UserError where there is no such device here.
    """
    if name is None:
        return world.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{key}={name}: no such device; expected cpu, cuda, cuda:0, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}={name}: no GPU here")
    if name == "cuda":
        return world.device
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).split("\n", 1)[0]
        raise UserError(f"{key}={name}: no such device here ({line}); expected cpu or cuda") from None
    return device

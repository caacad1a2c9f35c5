"""What EMA and checkpoints know of an engine: named fragments of fp32 master weights, wherever they live.

ZeRO cuts parameters into pieces on different ranks, at cuts that depend on the stage and the number of ranks.
A fragment names a piece by (parameter, offset), so that state saved under one cut can be loaded under another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit.ranks.group import World

ADAM_STATE = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements that this rank holds.

    name, shape: of the whole parameter. offset: of the first element, in the flattened parameter.
    weight: (numel,) fp32, a view of the master copy: writing to it changes the master.
    state: the optimizer's tensors for the same elements, views likewise; none of a frozen parameter.
    is_owned: whether this rank writes it to checkpoints (replicas on other ranks do not).
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    weight: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    is_owned: bool = True

    @property
    def numel(self) -> int:
        """Elements held here."""
        return self.weight.numel()


class Engine(Protocol):
    """What the training loop needs of an engine. Every method is called by every rank."""

    world: World
    device: torch.device
    updates: int  # optimizer updates applied
    skipped: int  # updates skipped because a gradient was not finite

    @property
    def stage(self) -> int:
        """Of ZeRO; at 3 forward passes are collective, and every rank must make as many."""

    @property
    def about(self) -> str:
        """Which engine and which optimizer really run, in a few words."""

    @property
    def module(self) -> nn.Module:
        """The model; at stage 3 its parameters are empty between passes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's forward pass under the engine's precision."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""

    def step(self, lr: float) -> bool:
        """After the last micro-batch: clip, update at `lr`, clear gradients. False if the update was skipped."""

    def grad_norm(self) -> float:
        """Norm of the last step's whole gradient before clipping; inf or nan where the update was skipped."""

    def fragments(self) -> list[Fragment]:
        """This rank's pieces of all parameters, frozen ones too, in an order that does not change."""

    def sync_weights(self) -> None:
        """Make the model compute with the fragments' weights as they are now."""

    def set_updates(self, updates: int) -> None:
        """Continue as if this many updates had been applied (Adam's bias correction follows)."""

    def close(self) -> None:
        """Give back what it holds, for what this process does next; it is of no use afterwards."""


def ensure_adam_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """The optimizer's state for `flat`, made as AdamW itself would at its first step if it is not there."""
    state = optimizer.state[flat]
    if "step" not in state:
        fused = bool(optimizer.param_groups[0].get("fused"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        for key in ADAM_STATE:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format).detach()
    return state  # type: ignore[no-any-return]


def whole_parameters(
    module: nn.Module, optimizer: torch.optim.Optimizer, is_owned: bool = True
) -> list[Fragment]:
    """Make the fragments of an unsharded model: each parameter in one piece."""
    found = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            state = ensure_adam_state(optimizer, p)
            views = {key: state[key].view(-1) for key in ADAM_STATE}
            found.append(Fragment(name, tuple(p.shape), 0, p.detach().view(-1), views, is_owned))
    return found + frozen_parameters(module, is_owned)


def frozen_parameters(module: nn.Module, is_owned: bool = True) -> list[Fragment]:
    """Make fragments of the parameters that an unsharded model does not train: without an optimizer's state."""
    return [
        Fragment(name, tuple(p.shape), 0, p.detach().view(-1), is_owned=is_owned)
        for name, p in module.named_parameters()
        if not p.requires_grad
    ]


def named(optimizer: torch.optim.Optimizer) -> str:
    """Tell an optimizer's kind, and whether its kernel is fused."""
    fused = bool(optimizer.param_groups[0].get("fused"))
    return f"{type(optimizer).__name__} {'fused' if fused else 'not fused'}"


def set_adam_step(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the step count of every state (each its own tensor: a shared one would count double)."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)

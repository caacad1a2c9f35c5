"""What EMA and checkpoints know of an engine: named fragments of fp32 master weights, wherever they live.

ZeRO cuts parameters into pieces on different ranks, at cuts that depend on the stage and the number of ranks.
A fragment names a piece by (parameter, offset), so that state saved under one cut can be loaded under another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit.ranks.group import World

ADAM_STATE = ("exp_avg", "exp_avg_sq")
MOMENTUM = ("momentum",)  # what Muon keeps of a matrix


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements that this rank holds.

    name, shape: of the whole parameter. offset: of the first element, in the flattened parameter.
    weight: (numel,) fp32, a view of the master copy: writing to it changes the master.
    state: the optimizer's tensors for the same elements, views likewise; none of a frozen parameter.
    is_owned: whether this rank writes it to checkpoints (replicas on other ranks do not).
    place: in the optimizer's tensors; None of a frozen parameter.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    weight: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    is_owned: bool = True
    place: Place | None = None

    @property
    def numel(self) -> int:
        """Elements held here."""
        return self.weight.numel()


@dataclass(frozen=True)
class Place:
    """Where a run of one trained parameter's elements lies in a tensor that the optimizer updates.

    name, shape, offset, numel: as of its fragment. stacked: matrices in the parameter, one above the other. flat: the
    tensor; start: of the first element in it. bundle: number of the one of `Bundles` that the tensor is in; group: of
    that one's parameter group.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    flat: Tensor
    start: int
    numel: int
    group: int
    bundle: int
    stacked: int = 1

    def fragment(self, optimizer: torch.optim.Optimizer, is_owned: bool = True) -> Fragment:
        """The fragment, with the optimizer's state, which is made where it is not there."""
        kinds = state_kinds(optimizer.param_groups[self.group])
        state = ensure_state(optimizer, self.flat, kinds)
        views = {kind: state[kind].view(-1).narrow(0, self.start, self.numel) for kind in kinds}
        weight = self.flat.detach().view(-1).narrow(0, self.start, self.numel)
        return Fragment(self.name, self.shape, self.offset, weight, views, is_owned, self)


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
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that updates the fragments."""

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


def state_kinds(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What the optimizer keeps of each number in a parameter group."""
    return MOMENTUM if group.get("matrices") else ADAM_STATE


def ensure_state(optimizer: torch.optim.Optimizer, flat: Tensor, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """The optimizer's state for `flat`, made as AdamW itself would at its first step if it is not there."""
    state = optimizer.state[flat]
    if "step" not in state:
        fused = bool(optimizer.param_groups[0].get("fused"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        for key in kinds:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format).detach()
    return state  # type: ignore[no-any-return]


def whole_parameters(
    module: nn.Module, optimizer: torch.optim.Optimizer, is_owned: bool = True
) -> list[Fragment]:
    """Make the fragments of an unsharded model: each parameter in one piece."""
    found = [place.fragment(optimizer, is_owned) for place in whole_places(module, optimizer)]
    return found + frozen_parameters(module, is_owned)


def whole_places(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Place]:
    """Where an unsharded model's trained parameters are: each is a tensor of its own, updated with its group."""
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    return [
        Place(name, tuple(p.shape), 0, p, 0, p.numel(), groups[id(p)], groups[id(p)], stacked(p))
        for name, p in module.named_parameters()
        if p.requires_grad
    ]


# What the optimizer updates in one step each, the same number of them on every rank: the number of a parameter group,
# and the tensors of it. At stage 3 a group may be of several.
Bundles = Sequence[tuple[int, Sequence[Tensor]]]


def whole_bundles(optimizer: torch.optim.Optimizer) -> Bundles:
    """Those of an unsharded model: the groups."""
    return [(i, list(group["params"])) for i, group in enumerate(optimizer.param_groups)]


def stacked(p: Tensor) -> int:
    """Matrices that a parameter holds, one above the other (dit/model/stacked.py)."""
    return getattr(p, "stacked", 1)


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
    how = getattr(optimizer, "how", "fused" if fused else "not fused")
    return f"{type(optimizer).__name__} {how}"


def set_adam_step(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the step count of every state (each its own tensor: a shared one would count double)."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)

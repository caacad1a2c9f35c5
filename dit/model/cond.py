"""Conditioners: each embeds its keys of the batch's `cond` into one `Injection`.

A conditioner is the one place where `drop` (or a missing label) becomes the null condition. Every new branch
starts at zero: its last layers are listed in `zero_layers()`, so adding it leaves the output unchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dit.config import ConfigError, Registry, config
from dit.flow.predict import Cond, check_labels
from dit.model.dims import Dims


class Injection(NamedTuple):
    """What the conditioners give the network. An empty slot does nothing.

    A tuple, because ZeRO-3 finds the tensors that a module gives out in tuples, lists and dicts alone.
    """

    vector: Tensor | None = None  # (B, D), added to the time embedding
    tokens: Tensor | None = None  # (B, N, D), for blocks that attend to them
    channels: Tensor | None = None  # (B, C', H, W), put beside the input's channels
    residuals: tuple[Tensor, ...] = ()  # (B, T, D) each, the i-th added after block i
    context: Tensor | None = None  # (B, N, D), put before the image's tokens


def joined(injections: Iterable[Injection]) -> Injection:
    """All at once: vectors and residuals add up, tokens and channels are put one after the other."""
    total = Injection()
    for given in injections:
        total = Injection(
            vector=_both(total.vector, given.vector, torch.add),
            tokens=_both(total.tokens, given.tokens, _concatenate),
            channels=_both(total.channels, given.channels, _concatenate),
            residuals=tuple(_both(a, b, torch.add) for a, b in zip_longest(total.residuals, given.residuals)),
            context=_both(total.context, given.context, _concatenate),
        )
    return total


def _concatenate(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], dim=1)


def _both(a: Any, b: Any, combine: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """`combine` of two tensors; the one that is there if the other is None."""
    return b if a is None else a if b is None else combine(a, b)


class ConditionerConfig(ABC):
    """A kind of conditioner: builds it and knows its size."""

    extra_channels = 0  # input channels it adds
    gives_tokens = False
    context = 0  # tokens that it puts into the sequence

    @abstractmethod
    def build(self, dims: Dims) -> nn.Module:
        """A conditioner: cond -> Injection."""

    @abstractmethod
    def parameters(self, dims: Dims) -> int:
        """Its parameters."""

    def multiply_adds(self, dims: Dims) -> int:
        """Count those of its matrix products in the forward pass, per image."""
        return 0


CONDITIONERS: Registry[ConditionerConfig] = Registry("conditioner")


@CONDITIONERS.register("class")
@config
class ClassLabel(ConditionerConfig):
    """The class label, `cond["label"]`."""

    # tokens of it in the sequence, beside the vector that modulates; each adds a learned place (arXiv 2511.13720)
    context: Annotated[int, Field(ge=0)] = 0

    def build(self, dims: Dims) -> nn.Module:
        """The conditioner for these shapes."""
        return ClassConditioner(dims.num_classes, dims.width, self.context)

    def parameters(self, dims: Dims) -> int:
        """A row for each class and one for the null condition, and one for each token's place."""
        return (dims.num_classes + 1 + self.context) * dims.width


class ClassConditioner(nn.Module):
    """A table of class embeddings; the last row is the null condition.

    The null row is read through the table and never through a branch, so that the table gets a gradient on
    every rank in every step, whatever labels it draws (ZeRO waits for every parameter).
    """

    def __init__(self, num_classes: int, width: int, context: int = 0):
        super().__init__()
        self.num_classes, self.context = num_classes, context
        self.table = nn.Embedding(num_classes + 1, width)
        self.places = nn.Embedding(context, width) if context else None

    def forward(self, cond: Cond) -> Injection:
        """label (B,) int64, negative for none, and drop (B,) bool if present -> vector (B, D), and tokens (B, N, D).

        ValueError for labels that are no class, on a CPU. On an accelerator looking at them would wait for the device:
        there the lookup fails, and never reads the null row; who takes labels in (data, samplers) checks them before.
        """
        if "label" not in cond:
            raise ValueError(
                f"the class conditioner needs cond['label'] ((B,) int64, -1 for none); got {sorted(cond)}"
            )
        label = cond["label"]
        if label.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(label, self.num_classes)
        absent = label < 0
        if "drop" in cond:
            absent = absent | cond["drop"]
        beyond = label + (label >= self.num_classes)  # num_classes itself, the null row's index, is no label
        vector = self.table(torch.where(absent, self.num_classes, beyond))  # (B, D)
        if self.places is None:
            return Injection(vector=vector)
        places = self.places(torch.arange(self.context, device=vector.device))  # (N, D)
        return Injection(vector=vector, context=vector.unsqueeze(1) + places)


def check_context(context: int, context_from: int, depth: int, carries_value: bool) -> None:
    """Raise ConfigError for tokens that would join behind the last block, or a place to join where there are none.

    context: tokens in the sequence. context_from: the first of `depth` blocks that has them. carries_value: whether
    values go from the first block to the others.
    """
    if context_from and carries_value:
        raise ConfigError(
            "value_residual needs the same tokens in every block: leave it out, or context_from at 0"
        )
    if context_from and (not context or context_from >= depth):
        raise ConfigError(
            f"context_from is {context_from}: it says which of the {depth} blocks is the first with tokens of `cond` "
            "in its sequence, and needs some: cond: [{name: class, context: 32}]"
        )

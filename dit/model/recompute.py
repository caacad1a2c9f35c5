"""Which activations a network computes again in the backward pass, in place of keeping them (arXiv 1604.06174).

A block that is checkpointed keeps its input, or also what its matrix products and its attention gave out: then only
norms, modulations, activations and rotations are computed again (selective recomputation, arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dit.config import ConfigError

Keep = Literal["input", "products"]
# Work done again by a block that keeps its products, as a share of its forward pass: an assumption for eager blocks,
# whose elementwise operations move 290 bytes a token and channel of the forward and backward pass together.
ELEMENTWISE = 0.25
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")  # of aten, and attention's kernels
ATTENTION = "_scaled_dot_product_"


@dataclass(frozen=True)
class Recompute:
    """The first `blocks` blocks of a network are checkpointed (None = all of them), and keep what `keep` says.

    The first, because the backward pass comes to them last: what the others kept is gone by then, and there is room for
    one block in full.
    """

    blocks: int | None = 0
    keep: Keep = "input"

    @classmethod
    def of(cls, blocks: bool | int, keep: Keep, total: int) -> Recompute:
        """Read what a configuration says of a network of `total` blocks; ConfigError for more than there are."""
        if isinstance(blocks, bool):
            return cls(None if blocks else 0, keep)
        if blocks > total:
            raise ConfigError(
                f"checkpoint_blocks is {blocks}, and there are {total} blocks: take true for all of them"
            )
        return cls(blocks, keep)

    def at(self, index: int) -> Keep | None:
        """Tell what block number `index`, from 0, keeps; None where it is not checkpointed."""
        return self.keep if self.blocks is None or index < self.blocks else None

    def after(self, count: int) -> Recompute:
        """Make the same for what follows the first `count` blocks."""
        return self if self.blocks is None else Recompute(max(0, self.blocks - count), self.keep)

    def count(self, total: int) -> int:
        """Count the checkpointed of `total` blocks."""
        return total if self.blocks is None else min(self.blocks, total)

    def work(self, total: int) -> float:
        """Estimate what is computed again, as a share of the forward pass of `total` blocks."""
        share = 1.0 if self.keep == "input" else ELEMENTWISE
        return share * self.count(total) / total

    def words(self, total: int) -> str:
        """Say it in a few words."""
        kept = {"input": "keep their input alone", "products": "keep their matrix products and attention"}
        count = self.count(total)
        return f"{count} of {total} blocks {kept[self.keep]}" if count else "every block keeps all"


NOTHING = Recompute()


def ways(total: int) -> Iterator[Recompute]:
    """Yield the ways for a network of `total` blocks, that with the least work first."""
    found = [Recompute(count, keep) for keep in ("input", "products") for count in range(1, total + 1)]
    yield NOTHING
    yield from sorted(found, key=lambda way: (way.work(total), way.keep == "input"))


def run_kept(block: nn.Module, keep: Keep | None, carried: dict[str, Any], *inputs: Any) -> Any:
    """Run a block as `block(*inputs, **carried)`, with a backward pass from what `keep` says (None = everything).

    Losses and gradients are those of a block that keeps everything, to the bit where kernels give the same twice.
    """
    if keep is None or not torch.is_grad_enabled():
        return block(*inputs, **carried)
    if keep == "products":  # inside of the module's call: an engine's hooks around it are not to be run again
        return block(*inputs, **carried, keeps_products=True)
    run = partial(block, **carried)
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


def may_keep_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a block's forward: with the keyword `keeps_products` all else is computed again.

    In a block that is compiled the keyword changes nothing: the compiler computes the cheap parts again by itself.
    """

    @wraps(forward)
    def kept(self: nn.Module, *inputs: Any, keeps_products: bool = False, **carried: Any) -> Any:
        if not keeps_products or torch.compiler.is_compiling():
            return forward(self, *inputs, **carried)
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        run = partial(forward, self, **carried)
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return kept


def _policy(context: Any, operation: Any, *args: Any, **given: Any) -> CheckpointPolicy:
    """Keep what matrix products and attention give out."""
    name = operation.__name__.split(".")[0]
    is_kept = operation.namespace == "aten" and (name in PRODUCTS or name.startswith(ATTENTION))
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

"""What is drawn is looked at before it is kept: a NaN would become a black picture, an infinity a white one."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.errors import UserError


class NotFiniteError(UserError):
    """What a model or a codec made has values that are NaN or infinite. The text names the first sample."""


def first_not_finite(values: Tensor) -> int | None:
    """The place in the batch (B, ...) of the first sample with a value that is not finite, or None."""
    bad = ~torch.isfinite(values).flatten(1).all(1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def check_finite(values: Tensor, index: Tensor, label: Tensor, what: str, advice: str) -> Tensor:
    """`values` (B, ...) as they are. index, label: (B,) of each image. what: whose values they are, in words.

    Raises NotFiniteError naming the first image with a value that is not finite, and what may mend it.
    """
    place = first_not_finite(values)
    if place is None:
        return values
    share = float((~torch.isfinite(values[place])).double().mean())
    of_class = "no class" if int(label[place]) < 0 else f"class {int(label[place])}"
    raise NotFiniteError(
        f"image {int(index[place])} ({of_class}): {share:.0%} of {what} are not finite; {advice}"
    )

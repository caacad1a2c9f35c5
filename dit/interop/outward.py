"""Our networks as the DiT and SiT repositories' state dicts: the way back of `dit.interop.weights`."""

from __future__ import annotations

from torch import Tensor

from dit.config import flatten, to_dict
from dit.errors import shown
from dit.flow.objective import Objective
from dit.flow.path import NoisePath
from dit.flow.predict import ReverseVelocity
from dit.interop.weights import PATCHES, POSITION, Arguments, WeightsError, ratio_of, their_name
from dit.model.dit import DiT, DiTConfig

SHAPES = ("size", "width", "depth", "heads", "head_width", "patch", "mlp_ratio", "num_classes", "learn_sigma")
# keys of a model that change none of its numbers but by rounding
UNSEEN = ("checkpoint_blocks", "checkpoint_keep", "kernels.name", "stored_position", "attention", "residual")


def to_theirs(model: DiT) -> dict[str, Tensor]:
    """The reference's state dict of our network's weights; its tensors are the network's own.

    WeightsError for a network that the reference does not have.
    """
    return named_as_theirs(model)


def check_has_no_more(model: DiT, also: tuple[str, ...] = (), reference: DiTConfig | None = None) -> None:
    """Refuse, by WeightsError, a network whose configuration differs from the reference's in more than shapes.

    also: dotted keys that may differ too. reference: our config of theirs, by default DiT's.
    """
    ours, theirs = (flatten(to_dict(cfg)) for cfg in (model.cfg, reference or DiTConfig()))
    keys = sorted({*ours, *theirs} - {*SHAPES, *UNSEEN, *also})
    differing = [k for k in keys if not k.startswith("parametrization.") and ours.get(k) != theirs.get(k)]
    if differing:
        rows = (f"{k} {shown(theirs.get(k))} there, {shown(ours.get(k))} here" for k in differing)
        raise WeightsError(f"the reference has no such network; it differs in {'; '.join(rows)}")


def check_flow(project: str, objective: Objective, path: NoisePath) -> None:
    """Refuse, by WeightsError, an objective that does not predict the velocity from noise to data on this path."""
    if (objective.path, objective.prediction) != (path, ReverseVelocity()):
        raise WeightsError(
            f"{project} samples {ReverseVelocity()} on {path}; these weights predict {objective.prediction} on "
            f"{objective.path}: configs/objectives/sit.yaml trains such weights"
        )


def named_as_theirs(
    model: DiT, also: tuple[str, ...] = (), arguments: Arguments | None = None
) -> dict[str, Tensor]:
    """As `to_theirs`, of a network whose configuration may differ in the keys `also` too.

    arguments: the reference's for this network, where they are not DiT's.
    """
    known = arguments_of(model) if arguments is None else arguments
    check_has_no_more(model, also, known.model())
    named = {their_name(name, known.names): p.detach() for name, p in model.named_parameters()}
    if unknown := sorted(named.keys() ^ known.shapes().keys() - {POSITION, *known.tables}):
        raise WeightsError(f"the reference has no such network; it differs in {', '.join(unknown[:5])}")
    patches = named[PATCHES].unflatten(1, (model.dims.channels, model.dims.patch, model.dims.patch))
    return {POSITION: model.position[None], **named, PATCHES: patches}


def check_attention(model: DiT) -> None:
    """Refuse, by WeightsError, a network whose logits are scaled in another way than the reference's."""
    d = model.dims
    if d.attention_scale is not None:
        raise WeightsError(
            f"the reference scales attention's logits by 1/√(head width), this network by {d.attention_scale:.4g} "
            "(model.parametrization.base_head_width)"
        )


def arguments_of(model: DiT) -> Arguments:
    """The reference's arguments for our network, whatever blocks that has."""
    check_attention(model)
    d = model.dims
    if d.grid[0] != d.grid[1]:
        raise WeightsError(f"the reference knows square inputs only, this network's is {d.image_size}")
    return Arguments(
        input_size=d.image_size[0],
        patch_size=d.patch,
        in_channels=d.channels,
        hidden_size=d.width,
        depth=d.depth,
        num_heads=d.heads,
        mlp_ratio=ratio_of(d.mlp_width, d.width),
        num_classes=d.num_classes,
        learn_sigma=d.out_channels == 2 * d.channels,
    )

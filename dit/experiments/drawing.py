"""Images and pairs drawn from a trained model into folders: what they depend on is recorded, and compared first."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.data.shards.pairs import Origin, Pairs
from dit.experiments.diffusion import SampleConfig
from dit.experiments.draw_order import DrawOrder
from dit.experiments.trained import Trained
from dit.experiments.unmade import OLDER, Unmade, compared, formats_of, unmade_of
from dit.experiments.views import View, views_of
from dit.model.sharing import EncoderSharing, encoder_share
from dit.outputs import RECORD, read_record
from dit.ranks import group
from dit.ranks.asked import EndAsked
from dit.sample.drawing import Batch, Product, default_batch, draw
from dit.sample.formats import format_of
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.labels import Labels
from dit.sample.pictures import (
    GRID,
    Pictures,
)
from dit.sample.trajectory import check_followed
from dit.unfinished import Blocks, partial_of, unfinished
from dit.version import code_version

ALREADY = ", drawn already by the same spec; give --overwrite to draw them anew"


def produce(
    trained: Trained,
    spec: SamplerSpec,
    order: DrawOrder,
    world: group.World,
    asked: EndAsked | None = None,
) -> None:
    """Draw what is ordered, or go on with what was begun, and say what became of it. Collective.

    asked: where a signal says that it is to end: it raises Stopped then, and what is drawn is kept.

    Raises OutputError where something else lies there, ConfigError for what cannot be drawn, NotFiniteError naming
    the first image that is none.
    """
    check_labelled(spec, order.classes, trained)
    keys = order.codec_keys if order.out and not order.preview else None
    sampler = trained.sampler(spec, keys, world.device, order.precision, order.share_encoder)
    _ = sampler.denoise  # opens what guidance names, before anything is drawn
    size, found_in = group.on_main(lambda: _batch_size(order))
    if world.is_main and found_in is not None:
        print(f"{size} images at a time, as in {found_in}; --batch_size says otherwise")
    record = _record(trained, sampler, order, size)
    unmade = group.on_main(lambda: unmade_of(order, record))
    views = views_of(order.trajectory, order.interpolate)
    if order.trajectory:
        check_followed(sampler)
    unseen = group.on_main(lambda: _unseen(views, order, record))
    if unmade:
        if world.is_main:
            print(settings_line(spec, order.asked, trained.experiment.sample))
        _draw(trained, sampler, order, unmade, record, world, asked)
        if world.is_main and isinstance(sampler.sharing, EncoderSharing):
            print(shared_line(trained, sampler.sharing))
    labels = Labels(order.classes, order.label_order, sampler.spec.seed)
    for view in (view for view in views if view.file in unseen):
        assert order.out is not None
        group.on_main(partial(view.draw, order.out, sampler, labels, compared(record)))
    if world.is_main:
        for made in filter(None, (order.out, order.save_pairs)):
            print(_line(made, order, made in unmade))
        for view in views:
            print(f"{view.files(order.out or Path())[0]}{'' if view.file in unseen else ALREADY}")


def _record(trained: Trained, sampler: Sampler, order: DrawOrder, size: int) -> dict[str, Any]:
    """What is written down of a drawing in batches of this size."""
    return described(trained, sampler) | {
        "codec": dict(order.codec_keys),
        "precision": order.precision,
        "compile": trained.compiled,
        "share_encoder": order.share_encoder,
        "classes": order.classes,
        "label_order": order.label_order,
        "batch_size": size,
        "num_samples": order.num_samples,
        "preview": order.preview,
    }


def _batch_size(order: DrawOrder) -> tuple[int, Path | None]:
    """Images at a time, and the record that says so, where it is one of what was drawn there before.

    What was begun with some number of them goes on with it, as nobody asked for another one.
    """
    places = [place for place in (order.out, order.save_pairs) if place is not None]
    if order.batch_size is None and not order.overwrite:
        for record in (folder / RECORD for place in places for folder in (partial_of(place), place)):
            size = read_record(record).get("batch_size") if record.is_file() else None
            if isinstance(size, int) and size > 0 and size != default_batch(order.num_samples):
                return size, record
    return order.batch_size or default_batch(order.num_samples), None


def _unseen(views: Sequence[View], order: DrawOrder, record: Mapping[str, Any]) -> list[str]:
    """The pictures, by their files, that are not there yet. OutputError, as `claim`."""
    how: dict[str, Any] = {"overwrite": order.overwrite, "kind": Pictures.KIND, "older": OLDER}
    spec, out = compared(record), order.out
    return [view.file for view in views if out is not None and not view.is_there(out, spec, **how)]


@dataclass(frozen=True)
class _PairsDrawn:
    """Pairs as a product of drawing."""

    out: Path
    pairs: Pairs
    sampler: Sampler

    @property
    def blocks(self) -> Blocks:
        return self.pairs.blocks

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents", "eps"})

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        index, label = batch.index[: batch.wanted], batch.label[: batch.wanted]
        return self.pairs.arrays(batch.latents[: batch.wanted], self.sampler.noise(index), index, label)

    def write(self, labels: Tensor, about: Mapping[str, Any]) -> None:
        self.pairs.write(self.out, about)


def _draw(
    trained: Trained,
    sampler: Sampler,
    order: DrawOrder,
    unmade: Mapping[Path, Unmade],
    record: dict[str, Any],
    world: group.World,
    asked: EndAsked | None,
) -> None:
    """Draw into the blocks of each folder, and put together what they hold."""
    size, spec = (order.num_samples, record["batch_size"]), compared(record)
    labels = Labels(order.classes, order.label_order, sampler.spec.seed)
    products: list[Product] = []
    with contextlib.ExitStack() as stack:
        for out, state in unmade.items():
            blocks = stack.enter_context(unfinished(out, record, spec, size, order.overwrite, OLDER))
            if out == order.save_pairs:
                origin = Origin.of(trained.contract, sampler.spec.seed)
                products.append(_PairsDrawn(out, Pairs(blocks, origin), sampler))
            else:
                forms = tuple(dict.fromkeys([*formats_of(state.held), *order.forms]))
                pictures = Pictures(out, blocks, sampler, forms, order.preview)
                products.append(pictures)
                if state.held is not None:
                    group.on_main(partial(pictures.take, state.held, state.damaged))
        draw(sampler, labels, products, world, asked)
        for product in products:
            group.on_main(partial(product.write, labels(torch.arange(order.num_samples)), record))


def _line(made: Path, order: DrawOrder, is_new: bool) -> str:
    """What a folder holds now."""
    already = "" if is_new else ALREADY
    if made == order.save_pairs:
        return f"{order.num_samples} pairs in {made}: train on them with objective.coupling=reflow{already}"
    forms = [name for form in order.forms for name in format_of(form).names if name != "labels.csv"]
    places = " and ".join(str(made / name) for name in forms)
    what = "latents" if order.preview else "images"
    return f"{order.num_samples} {what} in {places}; look at {made / GRID}{already}"


def settings_line(spec: SamplerSpec, asked: Collection[str], own: SampleConfig) -> str:
    """Say what is drawn with, and which of it, where nobody asked for it, is not what the run's own pictures had.

    asked: fields of the spec. own: the run's; one that draws no pictures and sets nothing for them has none.
    """
    flags, theirs = spec_flags(spec), spec_flags(own)
    has_own = own.every or theirs != spec_flags(SampleConfig())
    other = [words for fields, words in theirs.items() if words != flags[fields] and not {*fields} & {*asked}]
    note = f"; the run's own pictures: {' '.join(other)}" if has_own and other else ""
    return f"drawing with {' '.join(flags.values())}{note}"


def spec_flags(spec: SamplerSpec) -> dict[tuple[str, ...], str]:
    """What of a spec decides about the kind of pictures, as flags of the command line, by the fields they stand for."""
    guidance = f" --guidance={shlex.quote(json.dumps(to_dict(spec)['guidance']))}" if spec.guidance else ""
    return {
        ("solver",): _member_flags("solver", spec.solver),
        ("num_steps",): f"--num_steps={spec.num_steps}",
        ("grid",): _member_flags("grid", spec.grid),
        ("cfg_scale", "guidance"): f"--cfg_scale={spec.cfg_scale:g}{guidance}",
    }


def _member_flags(family: str, member: Any) -> str:
    """Its name, and those of its fields that are not as they are by default."""
    values = to_dict(member)
    name, defaults = values.pop("name"), to_dict(type(member)())
    words = [f"--{family}.{key}={value}" for key, value in values.items() if value != defaults[key]]
    return " ".join([f"--{family}={name}", *words])


def shared_line(trained: Trained, sharing: EncoderSharing) -> str:
    """What sharing the encoder has saved, of the samples that went through the network of this process."""
    channels, height, width = trained.contract["shape"]
    model, classes = trained.experiment.model, len(trained.contract["classes"])
    share, kept = (
        encoder_share(model, (height, width), channels, classes),
        1 - sharing.encoded / sharing.asked,
    )
    return (
        f"the encoder, {share:.0%} of an evaluation's FLOPs, was left out of {kept:.1%} of the evaluations: "
        f"{share * kept:.0%} of the FLOPs are saved"
    )


def check_labelled(spec: SamplerSpec, chosen: list[int], trained: Trained) -> None:
    """Refuse guidance by class of images of no class, which would cost as always and change nothing: ConfigError."""
    if spec.needs_label and set(chosen) == {-1} and trained.contract["classes"]:
        raise ConfigError(
            "guidance by class has no effect on --classes=-1, no class; leave one of the two out"
        )


def described(trained: Trained, sampler: Sampler) -> dict[str, Any]:
    """What made the samples: the models, the spec, the machine and the code."""
    return {
        "checkpoint": str(trained.path),
        "digest": trained.digest,
        "step": trained.step,
        "weights": trained.weights,
        "guidance_checkpoints": sampler.open.opened if sampler.open else {},
        "sampler": to_dict(sampler.spec),
        "device": sampler.device.type,
        "code": code_version(),
    }

"""Images and pairs drawn from a trained model into folders: what they depend on is recorded, and compared first."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.data.shards.pairs import Origin, Pairs
from dit.experiments.diffusion import SampleConfig
from dit.experiments.trained import Precision, Trained
from dit.experiments.views import View, views_of
from dit.outputs import RECORD, OutputError, claim, read_record
from dit.ranks import group
from dit.sample.between import Between
from dit.sample.drawing import Batch, Product, default_batch, draw
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.labels import LabelOrder, Labels
from dit.sample.pictures import (
    GRID,
    LATENTS,
    OLD_FORMATS,
    Pictures,
    format_of,
    is_placing,
    refuse_foreign,
)
from dit.sample.trajectory import check_followed
from dit.unfinished import Blocks, partial_of, unfinished
from dit.version import code_version

GROWING = "num_samples"  # of pictures: more may be drawn to those that are there
NOT_COMPARED = (
    "checkpoint",
    "device",
    "code",
    "formats",
)  # where the checkpoint lies, and what drew: `digest` says what it is


ALREADY = ", drawn already by the same spec; give --overwrite to draw them anew"
OLDER = {"label_order": "balanced", "preview": False}  # what records mean that lack these keys


@dataclass(frozen=True)
class DrawOrder:
    """What is to be drawn, and where to.

    batch_size: images at a time; None = as what is there already, else `default_batch`. codec_keys: {"codec.path":
    ...}, over where training had it. asked: fields of the spec that are no defaults, but were asked for. out: folder
    for pictures. save_pairs: folder for a data set of noise and latents. overwrite: what is there is replaced.
    label_order: how images get their classes (`Labels`). formats: of the pictures, names in FORMATS or LATENTS.
    preview: latents and their false colours alone; no codec is opened. trajectory, interpolate: pictures beside them.
    """

    classes: list[int]
    num_samples: int
    batch_size: int | None = None
    precision: Precision = "fp32"
    codec_keys: Mapping[str, str] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    out: Path | None = None
    save_pairs: Path | None = None
    overwrite: bool = False
    label_order: LabelOrder = "balanced"
    formats: tuple[str, ...] = OLD_FORMATS
    preview: bool = False
    trajectory: bool = False
    interpolate: Between | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        """In which forms the pictures are given."""
        return (LATENTS,) if self.preview else self.formats

    def __post_init__(self) -> None:
        if self.num_samples < 1 or (self.batch_size is not None and self.batch_size < 1):
            size = "" if self.batch_size is None else f" and batch_size {self.batch_size}"
            raise ConfigError(f"num_samples {self.num_samples}{size} must be at least 1")
        if self.out is not None and self.out == self.save_pairs:
            raise ConfigError(f"--out and --save_pairs are both {self.out}: give each a folder of its own")


def produce(trained: Trained, spec: SamplerSpec, order: DrawOrder, world: group.World) -> None:
    """Draw what is ordered, or go on with what was begun, and say what became of it. Collective.

    Raises OutputError where something else lies there, ConfigError for what cannot be drawn, NotFiniteError naming
    the first image that is none.
    """
    check_labelled(spec, order.classes, trained)
    keys = order.codec_keys if order.out and not order.preview else None
    sampler = trained.sampler(spec, keys, world.device, order.precision)
    _ = sampler.denoise  # opens what guidance names, before anything is drawn
    size, found_in = group.on_main(lambda: _batch_size(order))
    if world.is_main and found_in is not None:
        print(f"{size} images at a time, as in {found_in}; --batch_size says otherwise")
    record = described(trained, sampler) | {
        "codec": dict(order.codec_keys),
        "precision": order.precision,
        "classes": order.classes,
        "label_order": order.label_order,
        "batch_size": size,
        "num_samples": order.num_samples,
        "preview": order.preview,
    }
    unmade = group.on_main(lambda: _unmade(order, record))
    views = views_of(order.trajectory, order.interpolate)
    if order.trajectory:
        check_followed(sampler)
    unseen = group.on_main(lambda: _unseen(views, order, record))
    if unmade:
        if world.is_main:
            print(settings_line(spec, order.asked, trained.experiment.sample))
        _draw(trained, sampler, order, unmade, record, world)
    labels = Labels(order.classes, order.label_order, sampler.spec.seed)
    for view in (view for view in views if view.file in unseen):
        assert order.out is not None
        group.on_main(partial(view.draw, order.out, sampler, labels, compared(record)))
    if world.is_main:
        for made in filter(None, (order.out, order.save_pairs)):
            print(_line(made, order, made in unmade))
        for view in views:
            print(f"{view.files(order.out or Path())[0]}{'' if view.file in unseen else ALREADY}")


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


def _unmade(order: DrawOrder, record: Mapping[str, Any]) -> dict[Path, dict[str, Any] | None]:
    """The folders that are not complete, with the record of what is complete of them. OutputError, as `claim`."""
    found: dict[Path, dict[str, Any] | None] = {}
    spec = compared(record)
    if order.out is not None:
        held = _claim_pictures(order.out, order, spec)
        if held is None or held[GROWING] < order.num_samples or not {*order.forms} <= {*_formats(held)}:
            found[order.out] = held
    if order.save_pairs is not None:
        out, file = order.save_pairs, order.save_pairs / RECORD
        held = claim([file], spec, record=file, overwrite=order.overwrite, kind="data set", older=OLDER)
        if out.exists() and not file.is_file() and any(out.iterdir()):
            raise OutputError(f"{out} exists already: remove it or choose another name")
        if held is None:
            found[out] = None
    return found


def _claim_pictures(out: Path, order: DrawOrder, spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """As `claim`; what a job that was killed left while it gave the files their places is replaced."""
    overwrite = order.overwrite or is_placing(out)
    files = Pictures.files(out, order.forms)
    how: dict[str, Any] = {"growing": GROWING, "kind": Pictures.KIND, "older": OLDER}
    held = claim(files, spec, record=files[-1], overwrite=overwrite, **how)
    if not is_placing(out):
        refuse_foreign(out, order.forms, overwrite)
    return held


def _formats(held: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The forms of what a record is of."""
    return () if held is None else tuple(held.get("formats", OLD_FORMATS))


def _unseen(views: Sequence[View], order: DrawOrder, record: Mapping[str, Any]) -> list[str]:
    """The pictures, by their files, that are not there yet. OutputError, as `claim`."""
    how: dict[str, Any] = {"overwrite": order.overwrite, "kind": Pictures.KIND, "older": OLDER}
    spec, out = compared(record), order.out
    return [view.file for view in views if out is not None and not view.is_there(out, spec, **how)]


def compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record decides about the images."""
    return {key: value for key, value in record.items() if key not in NOT_COMPARED}


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
    unmade: Mapping[Path, dict[str, Any] | None],
    record: dict[str, Any],
    world: group.World,
) -> None:
    """Draw into the blocks of each folder, and put together what they hold."""
    size, spec = (order.num_samples, record["batch_size"]), compared(record)
    labels = Labels(order.classes, order.label_order, sampler.spec.seed)
    products: list[Product] = []
    with contextlib.ExitStack() as stack:
        for out, held in unmade.items():
            blocks = stack.enter_context(unfinished(out, record, spec, size, order.overwrite, OLDER))
            if out == order.save_pairs:
                origin = Origin.of(trained.contract, sampler.spec.seed)
                products.append(_PairsDrawn(out, Pairs(blocks, origin), sampler))
            else:
                forms = tuple(dict.fromkeys([*_formats(held), *order.forms]))
                pictures = Pictures(out, blocks, sampler, forms, order.preview)
                products.append(pictures)
                if held is not None:
                    group.on_main(partial(pictures.take, held))
        draw(sampler, labels, products, world)
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

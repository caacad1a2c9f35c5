"""Figures of trained runs over the settings they are drawn with: each cell is drawn once, and kept. Collective."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.evals.evaluation import (
    Compared,
    Evaluation,
    in_space,
    metrics_of,
    sides_of,
)
from dit.evals.extraction import Kept, block_features, extracted, in_rounds
from dit.evals.figures import names_in
from dit.evals.held_out import tell_shared
from dit.evals.metrics.resampling import LEVEL
from dit.evals.order import Order
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import Pictures, content
from dit.evals.record import append, run_of
from dit.evals.sides import Sides
from dit.evals.sweep.cells import Cell, CellFolder, Measured, as_json, space_as_json
from dit.evals.sweep.floors import Floor, floor_of
from dit.evals.sweep.picture import draw as draw_picture
from dit.evals.sweep.results import Results
from dit.evals.sweep.table import as_csv, markdown
from dit.evals.telling import rows_of
from dit.experiments.drawing import described
from dit.experiments.sweep_blocks import NEEDS, DrawnBlock, read_blocks
from dit.experiments.sweep_cells import Asked, Models, SweepOrder, asked_cells, one_size, shared_protocol
from dit.files import write_atomically
from dit.outputs import RECORD, claim, write_record
from dit.progress import Bar
from dit.ranks import group
from dit.ranks.asked import telling
from dit.sample.denoise import stopping
from dit.sample.drawing import draw_batches, warn_if_far
from dit.sample.finite import NotFiniteError
from dit.sample.generate import Sampler
from dit.sample.labels import Labels
from dit.sample.tally import Tally
from dit.unfinished import Blocks, unfinished
from dit.version import code_version

FILES = ("sweep.csv", "sweep.md", "sweep.png", "sweep.json")  # the last one says what the others are
KEPT = "all that was drawn is kept; the same command goes on"
MADE = {"made_by": "evaluate.py sweep"}


def sweep(order: SweepOrder, world: group.World) -> Results:
    """Measure what is lacking of a sweep, and write its table, CSV and picture.

    Collective. All that can be wrong with a cell (weights, guidance, solver, codec) is found before the first is drawn.
    """
    files = [order.out / name for name in FILES]
    group.on_main(
        lambda: claim(files, MADE, record=files[-1], overwrite=order.overwrite, kind="folder of a sweep")
    )
    models = Models(order, world.device)
    asked = group.together(lambda: list(asked_cells(order, models)))
    size = one_size(asked)
    compared = _order(order, order.reference, size)
    with telling(lambda: f"no cell is begun: {KEPT}"):
        sides = sides_of(compared, world, "samples", order.count)
        floors = _floors(order, sides, size, world)
    cells = [a.cell(order, sides) for a in asked]
    folder = CellFolder(order.out)
    there = group.on_main(lambda: [_held(folder, cell, order) is not None for cell in cells])
    todo = [
        i
        for i, (cell, done) in enumerate(zip(cells, there, strict=True))
        if cell.spec is not None and not done
    ]
    if world.is_main and any(there):
        print(f"{sum(there)} of {len(cells)} cells are there already")
    work = _Work(order, compared, sides, models, folder, world)
    left = [*todo]
    with (
        Bar[None](total=len(todo) * order.count, unit="image", desc="sweep", hidden=not world.is_main) as bar,
        telling(lambda: f"{len(cells) - len(left)} of {len(cells)} cells are finished: {KEPT}"),
    ):
        for number, i in enumerate(todo, 1):
            bar.note(f"cell {number} of {len(todo)}: {cells[i]}")
            work.do(asked[i], cells[i], bar)
            left.remove(i)
    return group.on_main(partial(_written, order, cells, sides, floors))


def _order(order: SweepOrder, named: str, size: int) -> Order:
    """What is compared with: files of images at the size that is drawn, arrays as they are."""
    is_array = Path(named).suffix.lower() == ".npz" or (Path(named) / RECORD).is_file()
    pixels = order.options.image_size or (None if is_array else size)
    options = dataclasses.replace(order.options, image_size=pixels, held_out=None)
    return Order("", named, order.spaces, options, order.metric_keys, order.workers, order.asked)


def _floors(order: SweepOrder, sides: Mapping[str, Sides], size: int, world: group.World) -> dict[str, Floor]:
    """How far real images are, by feature space; none where there are no held-out images. Collective."""
    named = order.options.held_out
    if named is None:
        return {}
    how = _order(order, named, size)
    pictures = group.together(lambda: open_pictures(named, how.options.image_size))
    if len(pictures) < order.count:
        raise ConfigError(
            f"held_out: {named} has {len(pictures)} images, and a cell has {order.count}: distances are larger for "
            f"fewer images, so a floor is of as many; give more, or --num_samples={len(pictures)}"
        )
    networks = {name: side.network for name, side in sides.items()}
    found = extracted(pictures, np.arange(len(pictures)), networks, how.how, world, "held-out")

    def floors() -> dict[str, Floor]:
        tell_shared(None, next(iter(sides.values())).seen, found.seen)
        floors = {}
        for name, side in sides.items():
            held = found.sets[name]
            metrics, _ = metrics_of(how, held, side)
            floors[name] = floor_of(held, side, metrics, order.count, order.splits, names_in(side.network))
        return floors

    return group.on_main(floors)


# --- drawing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DrawnPictures(Pictures):
    """Images that were measured as they were drawn, and are not kept."""

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)


@dataclass(frozen=True)
class _Work:
    """What every cell is drawn and measured with."""

    order: SweepOrder
    compared: Order
    sides: Mapping[str, Sides]
    models: Models
    folder: CellFolder
    world: group.World

    def do(self, asked: Asked, cell: Cell, bar: Bar[None]) -> None:
        """Draw a cell, measure it, keep it and add it to the run's evaluations. Collective."""
        assert cell.spec is not None
        trained = group.together(lambda: self.models.get(asked.path, asked.setting.weights))
        first = self.models.sampler(asked.path, asked.setting.weights)
        sampler = dataclasses.replace(first, spec=cell.spec, tally=Tally())
        classes = trained.classes("all")
        labels = Labels(classes)
        about = described(trained, sampler) | {
            "codec": dict(self.order.codec_keys), "precision": self.models.precision(trained), "classes": classes,
            "batch_size": self.order.batch, "num_samples": self.order.count,
        }  # fmt: skip
        shown = labels(torch.arange(self.order.count))
        with self._unfinished(cell, about) as blocks:
            missing = blocks.missing(NEEDS)
            bar.update(self.order.count - sum(len(blocks.samples(k)) for k in missing))
            work = partial(self._block, sampler, blocks, missing, labels)
            for count, failed in in_rounds(len(missing), work, self.world):
                if failed:  # as every rank sees
                    break
                bar.update(count)
            group.on_main(lambda: self._keep(cell, about, shown, list(read_blocks(blocks, [*self.sides]))))

    def _unfinished(self, cell: Cell, about: Mapping[str, Any]) -> AbstractContextManager[Blocks]:
        """Where blocks of a cell are kept until it is finished; those of other batches are no use."""
        size = (self.order.count, self.order.batch)
        spec = {"protocol": as_json(cell.protocol), "batch_size": self.order.batch}
        record = {**spec, "cell": str(cell), "code": about["code"], "device": about["device"]}
        return unfinished(self.folder.file(cell), record, spec, size, overwrite=True)

    def _block(
        self, sampler: Sampler, blocks: Blocks, missing: Sequence[int], labels: Labels, which: int
    ) -> tuple[int, str]:
        """Draw a missing block's images, compute their features and keep them; how many, and what failed."""
        number = missing[which]
        made = self._drawn(sampler, blocks.samples(number), labels)
        made.keep(blocks, number, [*self.sides])
        return len(blocks.samples(number)), made.failed

    def _drawn(self, sampler: Sampler, numbers: range, labels: Labels) -> DrawnBlock:
        """Images and their features."""
        drawing = dataclasses.replace(sampler, tally=Tally())
        networks = {name: side.network for name, side in self.sides.items()}
        try:
            denoise = stopping(drawing.denoise, self.order.asked)
            (batch,) = draw_batches(drawing, labels, [numbers], self.order.batch, denoise)
            images = drawing.pictures(batch.latents, batch.index, batch.label, batch.wanted)
        except NotFiniteError as error:
            return DrawnBlock(failed=str(error))
        digests, features = block_features(images, networks, self.order.batch)
        size = (images.shape[1], images.shape[2])
        return DrawnBlock(digests, features, size, drawing.tally, batch.reach)

    def _keep(self, cell: Cell, about: Mapping[str, Any], labels: Tensor, done: Sequence[DrawnBlock]) -> None:
        """Compute the figures, and write them down. On rank 0."""
        options = self.order.options
        failed = next((block.failed for block in done if block.failed), None)
        drawn = {key: about[key] for key in ("checkpoint", "step", "device", "code", "batch_size")}
        if failed is not None:
            self.folder.write(cell, {**drawn, "not_finite": failed, "spaces": {}})
            return
        warn_if_far(max(block.reach for block in done))
        counted = Tally.sum([block.tally for block in done]).per_image()
        named = f"sweep, not kept: {cell}"
        spec = {**about, **counted}
        pictures = _DrawnPictures(named, done[0].size, labels.numpy(), {}, (), "", spec)
        found = content(b"".join(block.digests for block in done))
        spaces = []
        for name, side in self.sides.items():
            sink = Kept(self.order.count)
            for block in done:
                sink.add(block.features[name])
            compared = Compared(pictures, np.arange(self.order.count), sink.set(named), side)
            spaces.append(in_space(name, compared, self.compared))
        how = (
            {"resamples": options.bootstrap, "seed": options.seed, "level": LEVEL}
            if options.bootstrap
            else None
        )
        run = run_of(about)
        if (
            run is not None
        ):  # before the cell is finished: killed in between, it is drawn and recorded once more
            append(run, rows_of(Evaluation(spaces, pictures, found, {}, None, how)))
        kept = {space.name: space_as_json(space) for space in spaces}
        self.folder.write(cell, {**drawn, **counted, "content": found, "bootstrap": how, "spaces": kept})


# --- and telling -------------------------------------------------------------------------------------------------


def _held(folder: CellFolder, cell: Cell, order: SweepOrder) -> Measured | None:
    return None if cell.spec is None else folder.read(cell, order.resampling)


def _written(
    order: SweepOrder, cells: Sequence[Cell], sides: Mapping[str, Sides], floors: Mapping[str, Floor]
) -> Results:
    """Write table, CSV and picture from what is kept of the cells. On rank 0."""
    folder = CellFolder(order.out)
    found = [(cell, _held(folder, cell, order)) for cell in cells]
    shared = {**shared_protocol(order, sides), "precision": order.precision, "grid": to_dict(order.axes.grid)}
    results = Results.of(found, shared, floors)
    places = dict(zip(FILES, (order.out / name for name in FILES), strict=True))
    order.out.mkdir(parents=True, exist_ok=True)
    write_atomically(places["sweep.csv"], as_csv(results).encode())
    write_atomically(places["sweep.md"], markdown(results).encode())
    if results.spaces:
        draw_picture(results, places["sweep.png"])
    else:
        places["sweep.png"].unlink(missing_ok=True)
    about = {
        "axes": to_dict(order.axes),
        "runs": dict(order.runs),
        "protocol": shared,
        "code": code_version(),
    }
    write_record(places["sweep.json"], {**MADE, **about, **results.as_json()})
    return results

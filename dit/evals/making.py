"""Making a statistics file: one pass over images, on any ranks."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dit.config import to_dict
from dit.errors import UserError
from dit.evals.extraction import Kept, Pass, Sink, Summed, extract
from dit.evals.features.network import FeatureNetwork, FeatureSpace
from dit.evals.pictures.choice import chosen, described
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import Pictures
from dit.evals.reference import SpaceStatistics, is_reference, read_about, save, space_name
from dit.evals.sides import built
from dit.outputs import OutputError, claim_file, differences
from dit.ranks import group
from dit.version import code_version


class Both:
    """A sink of both kinds: features are kept, and summed."""

    def __init__(self, count: int):
        self.kept, self.summed = Kept(count), Summed()

    def add(self, arrays: dict[str, Any]) -> None:
        """Add a block to both."""
        self.kept.add(arrays)
        self.summed.add(arrays)


@dataclass(frozen=True)
class Taken:
    """What is taken of the images, and kept of their features.

    image_size: as `open_pictures` has it. num_images: that many, at random; None: all. keep: keep all features, for
    figures that look at single images, as those of nearest neighbours.
    """

    image_size: int | None = None
    num_images: int | None = None
    keep: bool = False


def make_reference(
    images: str,
    out: Path,
    spaces: Sequence[FeatureSpace],
    how: Pass,
    world: group.World,
    taken: Taken = Taken(),
    overwrite: bool = False,
) -> bool:
    """Write the statistics of images in each feature space to `out`; False where the same are there. Collective.

    Memory: of features that are not kept, their sums. Raises OutputError where something else lies at `out`.
    """
    pictures = group.together(lambda: open_pictures(images, taken.image_size))
    index = group.together(lambda: chosen(pictures, taken.num_images, "num_images"))
    networks = {space_name(n.identity): n for n in built(spaces, pictures, world)}
    if overwrite and out.is_file() and not (zipfile.is_zipfile(out) and is_reference(out)):
        raise OutputError(
            f"{out} is there and holds no statistics: it is kept; give another place to write to"
        )
    spec = _spec(pictures, networks, spaces, taken.keep, described(pictures, index))
    if group.on_main(lambda: claim_file(out, partial(_is_same, out, spec), overwrite=overwrite)):
        return False
    sinks: dict[str, Sink] = {name: Both(len(index)) if taken.keep else Summed() for name in networks}
    seen = extract(pictures, index, networks, sinks, how, world, "reference")
    if len(index) < 2:
        raise UserError(f"{images}: {len(index)} image, and a covariance is of at least 2")
    about = {"named": images, "content": seen.content, "count": len(index), **described(pictures, index)}
    about |= {"made": spec, "code": code_version()}

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save(out, about, {name: _statistics(networks[name], sink) for name, sink in sinks.items()}, seen)

    group.on_main(write)
    return True


def _spec(
    pictures: Pictures,
    networks: Mapping[str, FeatureNetwork],
    spaces: Sequence[FeatureSpace],
    keep: bool,
    taken: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides about the file, as far as it is known before the pixels are read."""
    identities = {name: dict(network.identity) for name, network in networks.items()}
    return {"images": dict(pictures.about), "taken": dict(taken), "networks": identities, "keep": keep,
            "features": [to_dict(space) for space in spaces if space.fitted]}  # fmt: skip


def _is_same(out: Path, spec: Mapping[str, Any]) -> bool:
    """Whether a statistics file is what would be written. OutputError that names the differences where it is not."""
    held = read_about(out).get("made", {})
    rows = differences(held, spec)
    if rows:
        raise OutputError(
            "\n".join(
                [f"{out} holds other statistics:", *rows, "Give --overwrite to replace it, or another place."]
            )
        )
    return True


def _statistics(network: FeatureNetwork, sink: Sink) -> SpaceStatistics:
    summed, kept = (sink.summed, sink.kept.arrays) if isinstance(sink, Both) else (sink, {})
    assert isinstance(summed, Summed)
    features = summed.statistics("features")
    assert features is not None  # two images at least
    return SpaceStatistics(network.identity, features, summed.statistics("spatial"), kept, network.state())

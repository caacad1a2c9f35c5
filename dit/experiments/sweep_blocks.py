"""What is drawn of a sweep's cell, block by block: digests and features, kept beside the cell until it is finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit.evals.extraction import Arrays
from dit.sample.tally import Tally
from dit.unfinished import Blocks

NEEDS = frozenset({"digests", "size", "tally", "reach", "failed"})


@dataclass(frozen=True)
class DrawnBlock:
    """What one block of images gave. failed: what was said of an image that is none, or ""; then the rest is empty.

    features: by the space's name. size: pixels (H, W). reach: the largest absolute value of the latents.
    """

    digests: bytes = b""
    features: Mapping[str, Arrays] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    tally: Tally = field(default_factory=Tally)
    reach: float = 0.0
    failed: str = ""

    def keep(self, blocks: Blocks, number: int, spaces: Sequence[str]) -> None:
        """Write it as block `number`. spaces: names of all, in an order that is always the same."""
        arrays: dict[str, np.ndarray] = {
            "digests": np.frombuffer(self.digests, np.uint8),
            "size": np.asarray(self.size, np.int64),
            "tally": np.asarray(self.tally.counts, np.int64),
            "reach": np.asarray(self.reach, np.float64),
            "failed": np.asarray(self.failed),
        }
        for name, held in self.features.items():
            arrays |= {f"{spaces.index(name)}-{kind}": rows for kind, rows in held.items()}
        blocks.add(number, arrays)


def read_blocks(blocks: Blocks, spaces: Sequence[str]) -> Iterator[DrawnBlock]:
    """The blocks that lie there, in the order of the images."""
    for number in sorted(blocks.there()):
        arrays = blocks.read(number)
        features: dict[str, Arrays] = {name: {} for name in spaces}
        for key in arrays.keys() - NEEDS - {"id"}:
            place, _, kind = key.partition("-")
            features[spaces[int(place)]][kind] = arrays[key]
        height, width = arrays["size"].tolist()
        yield DrawnBlock(
            arrays["digests"].tobytes(),
            features,
            (height, width),
            Tally(*arrays["tally"].tolist()),
            float(arrays["reach"]),
            str(arrays["failed"]),
        )

"""What is measured on a GPU, in order of worth: an addition is one entry here.

An entry's function takes a `Place` and gives a `Found`; in `seconds` count the process's start and compilation. Each
runs at toy size on a CPU too (`--toy`), and `tests/bench/gpu` runs them all so.
"""

from __future__ import annotations

from functools import partial

from dit.bench.gpu import measures, training
from dit.bench.gpu.item import Item

ITEMS: tuple[Item, ...] = (
    Item("ceilings", 20, "what the device reaches: a large product, a large copy", measures.ceilings),
    Item(
        "step-XL", 140, "P1, whole: training step of XL/2", partial(training.step, size="XL", is_whole=True)
    ),
    Item("step-S", 60, "P1, whole: training step of S/2", partial(training.step, size="S", is_whole=True)),
    Item("tests", 60, "the tests that need a GPU", measures.tests),
    Item("step-B", 45, "P1, short: training step of B/2", partial(training.step, size="B", is_whole=False)),
    Item("step-L", 60, "P1, short: training step of L/2", partial(training.step, size="L", is_whole=False)),
    Item(
        "plain-S", 90, "P2: S/2 beside a plain DiT, eager, compiled", partial(measures.beside_plain, size="S")
    ),
    Item("plain-XL", 200, "P2: the same of XL/2", partial(measures.beside_plain, size="XL")),
    Item(
        "stages",
        90,
        "S/2 at ZeRO stages 0-3 beside the step without DeepSpeed",
        partial(measures.beside_plain, size="S", stages=(0, 1, 2, 3)),
    ),
    Item("sample", 90, "P6: sampling of XL/2 with guidance", measures.sampling),
    Item("trace", 75, "where the time of a step of XL/2 goes", measures.trace),
)
NAMES = tuple(item.name for item in ITEMS)

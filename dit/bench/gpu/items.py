"""What is measured on a GPU, in order of worth: an addition is one entry here.

An entry's function takes a `Place` and gives a `Found`; in `seconds` count the process's start and compilation. Each
runs at toy size on a CPU too (`--toy`), and `tests/bench/gpu` runs them all so.
"""

from __future__ import annotations

from functools import partial

from dit.bench.gpu import measures, parts, training
from dit.bench.gpu.item import Item
from dit.bench.speed import step as step_bench

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
    Item("kernels", 90, "a block's passes by model.kernels, eager and compiled", parts.kernels),
    Item(
        "residual",
        60,
        "S/2 with a float32 and a bfloat16 residual stream",
        partial(
            training.variants, size="S", key="residual", values=("float32", "bfloat16"), precision="bf16"
        ),
    ),
    Item(
        "heads",
        90,
        "XL/2 with heads of 72, 64 and 128",
        partial(training.variants, size="XL", key="head_width", values=(None, 64, 128)),
    ),
    Item("attention", 30, "torch's kernels of attention at head widths of 64, 72, 128", parts.attention),
    Item(
        "fp8",
        120,
        "XL/2 in bfloat16 and in float8",
        partial(training.variants, size="XL", key="fp8", values=(None, "tensorwise"), precision="bf16"),
    ),
    Item(
        "graphs",
        60,
        "S/2 at a batch of 32: torch alone, with a CUDA graph, DeepSpeed",
        partial(measures.beside_plain, size="S", stages=(0,), also=(step_bench.GRAPH,)),
    ),
    Item("updates", 30, "an update and its average, by each way", partial(parts.updates, size="XL")),
    Item("overhead", 60, "P5: the loop's share of a step of S/2", partial(parts.overhead, size="S")),
    Item("sample", 90, "P6: sampling of XL/2 with guidance", measures.sampling),
    Item("memory", 90, "P7: peak memory beside its prediction", parts.memory),
    Item("trace", 75, "where the time of a step of XL/2 goes", measures.trace),
    Item(
        "parity-residual",
        150,
        "S/2, 300 steps: losses with a bfloat16 stream",
        partial(parts.as_good, study="residual"),
    ),
    Item("parity-fp8", 300, "S/2, 300 steps: losses in float8", partial(parts.as_good, study="fp8")),
)
NAMES = tuple(item.name for item in ITEMS)

"""The figures of `dit/bench/speed/step.py` as lines of text, a contender each."""

from __future__ import annotations

from typing import Any

from dit.bench.speed.turns import MedianRange

HEADER = (
    f"{'':26s} {'images/s':>24s} {'CPU ms an image':>24s} {'x plain, CPU':>22s} {'x plain, wall':>22s} "
    f"{'of product':>10s} {'MFU':>6s} {'GiB':>6s}  what ran"
)
WITHIN = 1.1  # times ours, at most, that the plain model's bare forward and backward pass may take


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table; `x plain` is how many times as quick as what it is compared with."""
    spread = [MedianRange(**row[key]) for key in ("images_per_s", "cpu_ms", "quicker_cpu", "quicker_wall")]
    mfu = f"{row['mfu']:6.1%}" if "mfu" in row else f"{'-':>6s}"
    peak = f"{row['peak_bytes'] / 2**30:6.1f}" if "peak_bytes" in row else f"{'-':>6s}"
    compiled = row.get("quicker_wall_than_compiled")
    more = f"; {MedianRange(**compiled)} x the compiled plain loop" if compiled else ""
    return (
        f"{name:26s} {spread[0]!s:>24s} {spread[1]!s:>24s} {spread[2]!s:>22s} {spread[3]!s:>22s} "
        f"{row['of_product']:10.1%} {mfu} {peak}  {row['engine']}, micro-batch {row['micro_batch']}{more}"
    )


def closing(figures: dict[str, Any]) -> str:
    """What DeepSpeed itself takes at each stage, and whether the baseline is a straw man."""
    lines = [
        f"DeepSpeed at stage {stage}: {MedianRange(**more)} ms an image above the same step without it"
        for stage, more in figures.get("deepspeed_ms", {}).items()
    ]
    bare = figures.get("bare_plain_of_ours")
    if bare is not None:
        verdict = "met" if bare["median"] <= WITHIN else "MISSED: the baseline is a straw man"
        lines.append(
            f"forward + backward alone, plain / ours: {MedianRange(**bare)} (at most {WITHIN}: {verdict})"
        )
    return "\n".join(lines)

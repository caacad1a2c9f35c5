"""The items' measurements, by what other benchmarks here measure, at the sizes that a GPU is lent for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from dit.bench.gpu.item import Found, Place
from dit.bench.sampling import images
from dit.bench.sampling.images import SampleBench
from dit.bench.speed import step as step_bench
from dit.bench.speed.steppers import StepBench
from dit.bench.speed.turns import MedianRange, protocol
from dit.bench.trace import record
from dit.bench.trace.record import TraceBench
from dit.config import from_dict
from dit.ranks import group

ROOT = Path(__file__).resolve().parents[3]
BATCH = 256


def precision(place: Place) -> Literal["bf16", "fp32"]:
    """What is computed in."""
    return place.pick("bf16", "fp32")


def ceilings(place: Place) -> Found:
    """The device by name, and what it reaches at most: a large matrix product, a large copy."""
    with group.session() as world:
        device = world.device
        product = step_bench.product_rate(device, precision(place))
        copied = copy_rate(device, place.pick(2**32, 2**26))
        how = protocol()
        figures = {"protocol": how, "product_flops": product, "copy_bytes_per_s": copied}
        if device.type == "cuda":
            figures["memory_bytes"] = torch.cuda.mem_get_info(device)[1]
    return Found(f"{how['device']}: {product / 1e12:.4g} TFLOP/s, {copied / 1e12:.4g} TB/s", figures)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second that are read and written, of the best of five copies of `size` bytes."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):  # the first one finds the pages
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def tests(place: Place) -> Found:
    """The tests that need a GPU; at toy size they are only collected."""
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        words + place.pick([], ["--collect-only"]),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing was said"]
    figures = {"status": done.returncode, "output": (done.stdout + done.stderr)[-8000:]}
    found = Found(said[-1], figures)
    if done.returncode:
        place.tell(found)  # which is kept, beside the error
        raise RuntimeError(f"pytest ended with status {done.returncode}: {said[-1]}")
    return found


def beside_plain(place: Place, size: str, stages: tuple[int, ...] = (), also: tuple[str, ...] = ()) -> Found:
    """Our step beside a plain DiT's, eager and compiled; with `stages` of ZeRO, beside the eager one alone.

    also: further contenders of the step's bench, by their names there.
    """
    how: dict[str, Any] = {
        "size": [place.pick(size, "nano")],
        "patch": place.pick(2, 8),
        "batch": place.pick(BATCH, 4),
        "micro_batch": place.pick({"XL": 64, "L": 128}.get(size, BATCH), 4),
        "precision": precision(place),
        "compile": True,
        "stages": [*stages],
        "steps": place.pick(5, 1),
        "repeats": place.pick(4, 1),
    }
    cfg = from_dict(StepBench, how)
    compiled = () if stages else (step_bench.PLAIN_COMPILED,)
    ours = [f"ours, stage {stage}" for stage in stages]
    only = frozenset({step_bench.PLAIN, step_bench.LOCAL, *compiled, *ours, *also})

    def found(figures: dict[str, Any]) -> Found:
        return Found("; ".join(_compared(figures)), {"protocol": how, **figures})

    report = step_bench.Report(write=lambda figures: place.tell(found(figures)))
    return found(step_bench.run(cfg, report, only))


def _compared(figures: dict[str, Any]) -> Iterator[str]:
    for sized in figures.values():
        for name, row in sized["rows"].items():
            than = row.get("quicker_wall_than_compiled")
            more = f", {MedianRange(**than).median:.3g} x the compiled" if than else ""
            yield (
                f"{name} {MedianRange(**row['images_per_s']).median:.4g} images/s, "
                f"{MedianRange(**row['quicker_wall']).median:.3g} x plain{more}"
            )


def sampling(place: Place) -> Found:
    """Images a second beside a plain loop, and what guidance costs."""
    how = {
        "size": place.pick("XL", "nano"),
        "patch": place.pick(2, 8),
        "batch": place.pick(64, 2),
        "precision": precision(place),
        "compile": True,
        "repeats": place.pick(3, 1),
        "num_steps": place.pick(8, 2),
    }
    found = images.run(from_dict(SampleBench, how))
    of_plain, cost = MedianRange(**found["of_plain"]), MedianRange(**found["interval_cost"])
    rate = MedianRange(**found["images_per_s"][images.OURS])
    text = f"{rate.median:.4g} images/s guided, {of_plain} x the plain loop; in the interval {cost} x no guidance"
    return Found(text, {"protocol": how, **found})


def trace(place: Place) -> Found:
    """Where the time of a step goes; the trace lies beside the results."""
    how = {
        "size": place.pick("XL", "nano"),
        "patch": place.pick(2, 8),
        "batch": place.pick(64, 2),
        "precision": precision(place),
        "compile": True,
        "stage": None,
        "steps": place.pick(2, 1),
        "warmup": place.pick(5, 1),
    }
    found = record.run(from_dict(TraceBench, how), place.out)
    shares = sorted(found["shares"].items(), key=lambda pair: -pair[1])
    text = ", ".join(f"{part} {share:.1%}" for part, share in shares if share >= 0.01)
    return Found(text, {"protocol": how, **found})

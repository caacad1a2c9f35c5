"""The parts of a traced step as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit.bench.trace.classes import OTHER

SHOWN = 0.02  # share of the step from which an operation is named


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Write what `record.run` gives."""
    whole, plain = found["step_ms"], found["untraced_step_ms"]
    where = "the device's time" if found["on"] == "device" else "the time of the CPU thread that trains"
    yield f"{found['engine']}: {found['steps']} step(s), {where}"
    for part, ms in found["parts_ms"].items():
        if ms > 0 or part == OTHER:
            yield f"{part:26s} {ms:10.3f} ms {ms / whole:7.1%}"
            for name, its in found["most"].get(part, {}).items():
                if its >= SHOWN * whole:
                    yield f"    {its:21.3f} ms {its / whole:7.1%}  {name[:60]}"
    yield f"{'step':26s} {whole:10.3f} ms {1:7.1%}  (untraced {plain:.3f} ms: tracing costs {whole / plain - 1:+.0%})"
    hidden = found["communication_ms"] - found["parts_ms"]["communication"]
    if hidden > 0:
        yield f"{'communication, hidden':26s} {hidden:10.3f} ms"

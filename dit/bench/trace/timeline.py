"""From the events of a trace (Chrome's format, microseconds) to the parts of a training step, which add up to it.

On a CPU a step is what its thread does: each moment belongs to the innermost operation. On a GPU it is what the device
does: each moment belongs to a kernel that runs then, computation before communication, so that only what is not hidden
counts as sent; moments without a kernel are idle.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dit.bench.trace.classes import (
    COMMUNICATION,
    HOST,
    IDLE,
    OTHER,
    PARTS,
    REGIONS,
    STEP,
    classify,
)

Event = Mapping[str, Any]
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
ON_HOST = {"cpu_op", "user_annotation", "python_function"}


@dataclass
class Breakdown:
    """Milliseconds a step. parts: all of PARTS, that add up to step. names: of operations, most first. sent:
    communication, hidden or not."""

    step: float
    steps: int
    is_device: bool
    parts: dict[str, float]
    names: dict[str, dict[str, float]] = field(default_factory=dict)
    sent: float = 0.0


@dataclass(frozen=True)
class _Span:
    start: float
    end: float
    name: str
    thread: Any
    mark: str = ""  # the region, where this is the mark of one


def breakdown(events: Iterable[Event]) -> Breakdown:
    """Take a trace apart. ValueError where no step is marked in it."""
    complete = [event for event in events if event.get("ph") == "X"]
    host = sorted(
        (_span(event) for event in complete if event.get("cat") in ON_HOST), key=lambda s: (s.start, -s.end)
    )
    steps = [span for span in host if span.name == STEP]
    if not steps:
        raise ValueError(f"there is no mark '{STEP}' in this trace")
    kernels = [event for event in complete if event.get("cat") in ON_DEVICE]
    if kernels:
        return _of_device(complete, kernels, host, len(steps))
    return _of_thread([span for span in host if span.thread == steps[0].thread], steps)


def _span(event: Event) -> _Span:
    start, name = float(event["ts"]), str(event["name"])
    mark = name if name in REGIONS else ""
    return _Span(
        start, start + float(event.get("dur", 0.0)), name, (event.get("pid"), event.get("tid")), mark
    )


def _summed(found: Mapping[tuple[str, str], float], steps: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(part, name) -> microseconds, as milliseconds a step: by part, and in each part by name, most first."""
    parts = dict.fromkeys(PARTS, 0.0)
    names: dict[str, dict[str, float]] = defaultdict(dict)
    for (part, name), spent in sorted(found.items(), key=lambda item: -item[1]):
        parts[part] += spent / 1e3 / steps
        names[part][name] = spent / 1e3 / steps
    return parts, dict(names)


# --- a CPU ---------------------------------------------------------------------------------------------------


def _of_thread(spans: Sequence[_Span], steps: Sequence[_Span]) -> Breakdown:
    """Give each moment of the steps to the innermost operation, and each operation's own time to its part."""
    own: dict[tuple[str, str], float] = defaultdict(float)
    open_: list[tuple[_Span, str]] = []  # from the step inwards, each with the region that it is in
    at = 0.0

    def pass_to(moment: float) -> None:
        nonlocal at
        if open_ and moment > at:
            span, region = open_[-1]
            own[_part(span, region), span.name] += moment - at
        at = max(at, moment)

    for span in spans:
        while open_ and open_[-1][0].end <= span.start:
            pass_to(open_[-1][0].end)
            open_.pop()
        if open_ or span.name == STEP:
            pass_to(span.start)
            at = max(at, span.start) if open_ else span.start
            open_.append((span, span.mark or (open_[-1][1] if open_ else "")))
    while open_:
        pass_to(open_[-1][0].end)
        open_.pop()
    parts, names = _summed(own, len(steps))
    whole = sum(span.end - span.start for span in steps) / 1e3 / len(steps)
    return Breakdown(whole, len(steps), False, parts, names, parts[COMMUNICATION])


def _part(span: _Span, region: str) -> str:
    if span.name == STEP:
        return HOST
    part = classify(span.name, is_kernel=False)
    return (
        region
        if region and part != COMMUNICATION
        else HOST
        if part == OTHER and "::" not in span.name
        else part
    )


# --- a GPU ---------------------------------------------------------------------------------------------------


def _of_device(
    complete: Sequence[Event], kernels: Sequence[Event], host: Sequence[_Span], steps: int
) -> Breakdown:
    """Sweep over the device's time from its first kernel to its last."""
    launched = {
        event["args"]["correlation"]: ((event.get("pid"), event.get("tid")), float(event["ts"]))
        for event in complete
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    regions = _Regions(host)
    spans = []
    for event in kernels:
        span = _span(event)
        part = classify(span.name, is_kernel=True)
        region = regions.at(*launched.get(event.get("args", {}).get("correlation"), (None, 0.0)))
        spans.append((span, region if region and part != COMMUNICATION else part))
    found = _swept(spans)
    sent = [(span, part) for span, part in spans if part == COMMUNICATION]
    whole = sum(found.values()) / 1e3 / steps
    parts, names = _summed(found, steps)
    return Breakdown(whole, steps, True, parts, names, sum(_swept(sent, idle=False).values()) / 1e3 / steps)


class _Regions:
    """Which marked region of which thread a moment lies in."""

    def __init__(self, host: Sequence[_Span]):
        self.by_thread: dict[Any, list[_Span]] = defaultdict(list)
        for span in host:
            if span.mark:
                self.by_thread[span.thread].append(span)
        self.starts = {thread: [span.start for span in spans] for thread, spans in self.by_thread.items()}

    def at(self, thread: Any, moment: float) -> str:
        """The innermost region, "" for none. Regions of one thread lie in each other or apart."""
        spans = self.by_thread.get(thread, [])
        for span in reversed(spans[: bisect_right(self.starts.get(thread, []), moment)]):
            if moment <= span.end:
                return span.mark
        return ""


def _swept(spans: Sequence[tuple[_Span, str]], idle: bool = True) -> dict[tuple[str, str], float]:
    """Give each moment to one kernel: the one that began last, but to communication only where nothing else runs."""
    moments = sorted({moment for span, _ in spans for moment in (span.start, span.end)})
    waiting = sorted(spans, key=lambda item: item[0].start, reverse=True)
    running: list[tuple[_Span, str]] = []
    found: dict[tuple[str, str], float] = defaultdict(float)
    for now, after in pairwise(moments):
        while waiting and waiting[-1][0].start <= now:
            running.append(waiting.pop())
        running = [item for item in running if item[0].end > now]
        if running:
            span, part = max(running, key=lambda item: (item[1] != COMMUNICATION, item[0].start))
            found[part, span.name] += after - now
        elif idle:
            found[IDLE, "no kernel runs"] += after - now
    return found

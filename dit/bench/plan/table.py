"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NAMES = {
    "passes": "forward and backward",
    "update": "optimizer and averages",
    "sent": "communication in the way",
    "waiting": "launches or data in the way",
    "saving": "checkpoints",
}


def lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """Write what `planner.as_json` gives; every figure is an estimate, and says so."""
    gib = 2**30
    yield f"ESTIMATE, not a measurement: {plan['gpus']} x {plan['device']}, global batch {plan['global_batch']:,}"
    yield f"model        {plan['parameters']:,} parameters, {plan['training_flops'] / 1e9:.4g} GFLOP a trained image"
    if not plan["fits"]:
        yield f"fits         no: {plan['reason']}"
    else:
        yield (
            f"fits         yes: ZeRO stage {plan['stage']}, {plan['micro_batch']} x {plan['accumulation']} accumulated "
            f"a rank, {plan['memory_bytes'] / gib:.1f} of {plan['device_memory_bytes'] / gib:.1f} GiB"
        )
        yield f"recompute    {plan['recompute']}; FLOPs and MFU without what is done again"
        ms, mfu = plan["step_ms"], plan["mfu"]
        yield f"speed        {plan['images_per_s']:,.4g} images/s, {ms:.4g} ms a step, MFU {mfu:.1%}"
        money = f", cost {plan['cost']:,.6g}" if plan["cost"] is not None else ""
        yield (
            f"run          {plan['samples']:,} samples: {plan['hours']:,.4g} hours, {plan['gpu_hours']:,.5g} device "
            f"hours{money}"
        )
        total = sum(plan["parts_ms"].values())
        for name, ms in plan["parts_ms"].items():
            yield f"  {NAMES[name]:28s} {ms:10.4g} ms {ms / total:7.1%}"
        if plan["note"]:
            yield f"note         {plan['note']}"
    yield "it assumes"
    for name, words in plan["assumptions"].items():
        yield f"  {name}: {words}"


def validation_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Write estimated and measured steps beside each other."""
    yield f"{'step':46s} {'estimated ms':>13s} {'measured ms':>12s} {'error':>7s}  estimated from"
    for row in rows:
        ms = f"{row['estimated_ms']:13.4g} {row['measured_ms']:12.4g}"
        yield f"{row['name']:46s} {ms} {row['error']:+7.0%}  {row['known']}"

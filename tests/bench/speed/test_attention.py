"""The bench of attention's kernels: all that can is measured, and right; what cannot is said."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch

from dit.bench.speed import attention
from dit.bench.speed.attention import KERNELS, AttentionBench, lines, quickest, run, turns
from dit.config import ConfigError
from dit.model.sdpa import Backend

CPU = torch.device("cpu")
TOY: dict[str, Any] = {"width": 24, "head_widths": (8, 12), "tokens": 9, "batch": 2, "calls": 1, "repeats": 2}


def test_what_a_cpu_has_is_measured_and_right() -> None:
    told: list[int] = []
    cfg = AttentionBench(**TOY, dtypes=("fp32", "bf16"))
    found = run(cfg, CPU, lambda: told.append(1))
    json.dumps(found, allow_nan=False)
    assert [(r["dtype"], r["head_width"], r["kernel"]) for r in found["rows"]] == [
        (dtype, width, kernel) for dtype in ("fp32", "bf16") for width in (8, 12) for kernel in KERNELS
    ]
    for row in found["rows"]:
        assert ("ms" in row) == (row["kernel"] in ("auto", "flash", "math"))
        if "ms" in row:
            assert row["ms"]["low"] > 0
            assert row["flops_per_s"] == pytest.approx(found["flops"] / row["ms"]["median"] * 1e3)
            assert row["error"] < (1e-5 if row["dtype"] == "fp32" else 2e-2)
    assert len(told) == 3 * (1 + cfg.repeats) * 4 < turns(cfg)
    assert set(KERNELS) == set(get_args(Backend))


def test_work_is_that_of_six_products() -> None:
    """12 = 6 products of 2 FLOPs a multiply-add; the same for any head width."""
    assert AttentionBench(**TOY).flops == 6 * 2 * 2 * 9 * 9 * 24


def test_a_kernel_that_is_wrong_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend
    monkeypatch.setattr(
        attention,
        "attend",
        lambda q, k, v, backend: attend(q, k, v, backend=backend) * (1 + (backend == "flash")),
    )
    rows = run(AttentionBench(**TOY, dtypes=("fp32",)), CPU)["rows"]
    assert {row["kernel"] for row in rows if row.get("error", 0) > 0.1} == {"flash"}


def test_the_table_says_what_was_quickest_and_what_cannot() -> None:
    def row(kernel: str, ms: float | None) -> dict[str, Any]:
        known = {"dtype": "bf16", "head_width": 64, "kernel": kernel}
        times = dict.fromkeys(("median", "low", "high"), ms)
        return known | (
            {} if ms is None else {"ms": times, "quicker": times, "flops_per_s": 2e9, "error": 1e-3}
        )

    figures = {"rows": [row("auto", 2.0), row("cudnn", 1.0), row("efficient", None)]}
    assert quickest(figures) == {("bf16", 64): "cudnn"}
    told = list(lines(figures))
    assert "| bf16 | 64 | efficient | cannot | | | |" in told
    assert told[-1] == "quickest: cudnn (bf16, 64)"


@pytest.mark.parametrize(
    ("given", "says"),
    [({"head_widths": (7,)}, "do not divide"), ({"calls": 0}, "at least 1"), ({"kernels": ()}, "kernel")],
)
def test_sizes_that_cannot_be_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AttentionBench(**{**TOY, **given})

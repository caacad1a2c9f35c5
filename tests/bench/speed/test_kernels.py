"""The blocks' passes by each of `model.kernels`, at toy size: every way has its row, or the reason why it has none."""

from __future__ import annotations

import json

import pytest
import torch

from dit.bench.speed.kernels import KernelBench, run, table
from dit.config import ConfigError, from_dict
from dit.model.kernels.choice import KERNELS


def test_every_way_has_its_row() -> None:
    torch.compiler.reset()
    cfg = from_dict(
        KernelBench,
        {
            "size": ["nano"],
            "patch": 16,
            "batch": 2,
            "precision": "fp32",
            "steps": 1,
            "repeats": 2,
            "compiler": "aot_eager",
        },
    )
    told: list[int] = []
    figures = run(cfg, torch.device("cpu"), lambda known: told.append(len(known["rows"])))
    ways = [f"{kernels}{more}" for kernels in KERNELS for more in ("", " compiled")]
    assert [(row["block"], row["name"]) for row in figures["rows"]] == [
        (block, way) for block in ("dit", "modern") for way in ways
    ]
    assert told == [len(ways), 2 * len(ways)]
    for row in figures["rows"]:
        if "triton" in row["name"]:
            assert "need a GPU" in row["refused"] or "not installed" in row["refused"]
        else:
            assert row["ms"]["median"] > 0
            assert row["of_base"]["median"] > 0
            assert row["kept_bytes"] > 2 * 4 * 4 * 64  # more than its input, of 2 images, 4 tokens, width 64
    lines = table(figures).splitlines()
    assert len(lines) == 1 + 2 * len(ways)
    json.dumps(figures)


def test_what_cannot_be_measured_is_refused() -> None:
    for fields in ({"kernels": ["triton2"]}, {"size": ["XXL"]}, {"steps": 0}, {"block": ["x"]}):
        with pytest.raises(ConfigError):
            from_dict(KernelBench, fields)

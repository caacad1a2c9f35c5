"""Faults put into runs on purpose as commands: done behind a bar, printed as a table, written to a sheet."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dit.bench.sheet import Sheet
from dit.bench.survival import elastic as elastic_bench
from dit.bench.survival import kills as kills_bench
from dit.config import to_dict
from dit.files import expand
from dit.progress import Bar


def kills(cfg: kills_bench.SurvivalBench, folder: str | None, json_file: str | None) -> None:
    """Kill a run at random moments; UserError where its end is not the undisturbed one's."""
    sheet = Sheet.begin(json_file, **to_dict(cfg))
    with tempfile.TemporaryDirectory() as temporary, Bar[None](total=cfg.kills, unit="kill") as bar:
        found = kills_bench.Bench(Path(expand(folder or temporary)), cfg).run(bar.update)
    print(kills_bench.table(found))
    sheet.conclude(found)


def elastic(cfg: elastic_bench.ElasticBench, folder: str | None, json_file: str | None) -> None:
    """Resume a run on other ranks and stages; UserError where its losses are not the unbroken one's."""
    sheet = Sheet.begin(json_file, **to_dict(cfg))
    with tempfile.TemporaryDirectory() as temporary, Bar[None](total=1 + len(cfg.ranks), unit="start") as bar:
        found = elastic_bench.run(Path(expand(folder or temporary)), cfg, bar.update)
    print(elastic_bench.table(found))
    sheet.conclude(found)

"""What a run tells of its course: rows since the last one, and those that are taken back."""

from __future__ import annotations

import json
from pathlib import Path

from dit.ranks.group import World
from dit.train.records import Records


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_that_are_taken_back_count_no_more(tmp_path: Path, capsys) -> None:
    records = Records(tmp_path, World())
    records.open(5, 5)
    assert records.take_steps(8) == 3
    for step in (8, 9, 10):
        records.log.scalars(step, {"loss": 1.0})
    assert records.take_steps(10) == 2
    records.go_back(good=8, step=12)
    assert steps_in(tmp_path) == [8]
    assert records.take_steps(13) == 1  # 9 to 12 are left out, not trained
    records.log.scalars(13, {"loss": 1.0})
    records.say("once")
    Records(tmp_path, World(1, 2, 1)).say("on rank 0 alone")
    records.close()
    assert steps_in(tmp_path) == [8, 13]
    assert capsys.readouterr().out == "once\n"

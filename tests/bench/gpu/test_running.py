"""Items in processes of their own: one that fails, dies or never ends costs itself alone, and what it told is kept."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dit.bench.gpu.item import Found, Item, Place
from dit.bench.gpu.running import Outcome, Runner
from dit.bench.gpu.telling import gpu
from dit.config import ConfigError
from dit.errors import UserError
from dit.outputs import OutputError


def good(place: Place) -> Found:
    return Found(f"good at {place.pick('full', 'toy')} size", {"pid": os.getpid()})


def bad(place: Place) -> Found:
    place.tell(Found("half", {"half": 1}))
    raise RuntimeError("this one is broken")


def dead(place: Place) -> Found:
    os._exit(3)


def endless(place: Place) -> Found:
    """Tells something, starts a process, and never ends."""
    child = os.fork()
    if not child:
        signal.pause()
    place.tell(Found("so far", {"child": child}))
    while True:
        signal.pause()


ITEMS = [Item(f.__name__, 1.0, f"what {f.__name__} says", f) for f in (good, bad, dead)]


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie, which waits for init."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def outcome(item: Item, out: Path, seconds: float = 100.0) -> tuple[Outcome, list[Outcome]]:
    said: list[Outcome] = []
    Runner(True, out, time.monotonic() + seconds).run(item, lambda item, so_far: said.append(so_far))
    return said[-1], said


def test_an_item_gives_its_figures_from_a_process_of_its_own(tmp_path: Path) -> None:
    found, _ = outcome(ITEMS[0], tmp_path)
    assert (found.status, found.text, found.error) == ("ok", "good at toy size", "")
    assert found.figures["pid"] != os.getpid()


def test_an_error_is_recorded_beside_what_was_known(tmp_path: Path) -> None:
    found, said = outcome(ITEMS[1], tmp_path)
    assert (found.status, found.text, found.figures) == ("failed", "half", {"half": 1})
    assert "RuntimeError: this one is broken" in found.error
    assert said[0].figures == {"half": 1}  # at once


def test_a_process_that_dies_has_failed(tmp_path: Path) -> None:
    found, _ = outcome(ITEMS[2], tmp_path)
    assert found.status == "failed"
    assert "status 3" in found.error


def test_what_never_ends_is_cut_short_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    found, _ = outcome(Item("endless", 0.1, "", endless), tmp_path, seconds=3.0)
    assert (found.status, found.text) == ("cut short", "so far")
    until = time.monotonic() + 60
    while runs(found.figures["child"]):  # killed; a busy machine may take its time
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_does_not_fit_does_not_begin(tmp_path: Path) -> None:
    found, said = outcome(Item("good", 50.0, "", good), tmp_path, seconds=10.0)
    assert (found.status, found.seconds, len(said)) == ("not reached", 0.0, 1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that a fork cannot use is needed")
def test_where_a_fork_has_no_device_a_new_process_is_tried_and_nothing_runs_on_the_cpu(
    tmp_path: Path,
) -> None:
    runner, said = Runner(False, tmp_path, time.monotonic() + 200), list[Outcome]()
    runner.run(ITEMS[0], lambda item, so_far: said.append(so_far))
    assert (runner.start, said[-1].status, said[-1].figures) == ("spawn", "failed", {})
    assert "cuda" in said[-1].error


@pytest.mark.slow
def test_a_new_process_does_the_same(tmp_path: Path) -> None:
    found = Runner(True, tmp_path, time.monotonic() + 200, "spawn").one(ITEMS[0], lambda so_far: None)
    assert (found.status, found.text) == ("ok", "good at toy size")


def figures(out: Path) -> dict[str, dict]:
    return json.loads((out / "gpu.json").read_text())["figures"]


def test_the_command_records_all_and_goes_on_with_what_is_missing(tmp_path: Path, capsys) -> None:
    late = Item("late", 1000.0, "what takes too long", good)
    how = {"out": str(tmp_path), "seconds": 100.0, "only": None, "is_toy": True, "device": "cpu"}
    with pytest.raises(UserError, match=r"failed: bad, dead; .*gpu.json has the errors"):
        gpu(**how, items=[*ITEMS, late])
    first = figures(tmp_path)
    assert {name: row["status"] for name, row in first.items()} == {
        "good": "ok", "bad": "failed", "dead": "failed", "late": "not reached",
    }  # fmt: skip
    table = (tmp_path / "gpu.md").read_text()
    assert "| good | what good says | ok |" in table
    assert "RuntimeError: this one is broken" in table
    assert "toy size" in table
    capsys.readouterr()
    gpu(**how, items=[ITEMS[0]])
    assert "(from before)" in capsys.readouterr().out
    assert figures(tmp_path)["good"] == first["good"]
    gpu(**how | {"only": "good"}, items=[*ITEMS, late])
    again = figures(tmp_path)
    assert again["good"]["figures"] != first["good"]["figures"]  # another process's
    assert again["bad"] == first["bad"]
    gpu(**how | {"only": "good", "seconds": 0.5}, items=[*ITEMS, late])
    assert figures(tmp_path)["good"] == again["good"]  # not reached now, and still there


def test_what_cannot_be_is_refused_first(tmp_path: Path) -> None:
    how = {"out": str(tmp_path), "seconds": 100.0, "only": None, "is_toy": True, "device": "cpu"}
    with pytest.raises(ConfigError, match=r"no item is called 'god'.*good.*there are good, bad, dead"):
        gpu(**how | {"only": "god"}, items=ITEMS)
    gpu(**how, items=[ITEMS[0]])
    (tmp_path / "gpu.json").write_text(
        (tmp_path / "gpu.json").read_text().replace('"toy": true', '"toy": false')
    )
    with pytest.raises(OutputError, match="figures at full size: give another --out"):
        gpu(**how, items=[ITEMS[0]])
    with pytest.raises(UserError, match="no CUDA device here; --toy runs every item"):
        gpu(**how | {"is_toy": False}, items=[ITEMS[0]])

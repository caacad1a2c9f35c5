"""The GPU benchmark as a command: what is known is on the disk at once, as JSON and as a table in Markdown."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dit.bench.gpu.item import Item
from dit.bench.gpu.items import ITEMS
from dit.bench.gpu.running import Outcome, Runner
from dit.bench.sheet import Sheet
from dit.config import ConfigError, did_you_mean
from dit.errors import UserError
from dit.files import expand, write_atomically
from dit.outputs import OutputError, read_record
from dit.progress import say
from dit.version import code_version

FIGURES, TABLE = "gpu.json", "gpu.md"


def gpu(
    out: str,
    seconds: float,
    only: str | None,
    is_toy: bool,
    device: str | None,
    items: Sequence[Item] = ITEMS,
) -> None:
    """Measure what fits into the time, and say what does not.

    Results in OUT stay: an item is measured again where it was not finished or is named in `only`. OutputError for a
    folder of the other size, ConfigError for an item that there is not, UserError where an item failed.
    """
    began = time.monotonic()
    _check_device(device, is_toy)
    folder = Path(expand(out))
    sheet, known = _begun(folder, seconds, is_toy)
    chosen = _chosen(items, only, known)
    for name in (item.name for item in items if item not in chosen and item.name in known):
        say(f"{_line(name, known[name])} (from before)")
    now: dict[str, dict[str, Any]] = {}

    def tell(item: Item, outcome: Outcome) -> None:
        now[item.name] = {"what": item.what, "code": sheet.how["code"], **outcome.as_json}
        if outcome.status != "not reached" or item.name not in known:  # what is there stays
            known[item.name] = now[item.name]
        in_order = {each.name: known[each.name] for each in items if each.name in known}
        sheet.write(in_order)
        write_atomically(folder / TABLE, _markdown(sheet.how, in_order).encode())

    runner = Runner(is_toy, folder, began + seconds)
    for item in chosen:
        runner.run(item, tell)
        say(_line(item.name, now[item.name]))
    say(f"{time.monotonic() - began:.0f} s; {folder / FIGURES}, {folder / TABLE}")
    if failed := [name for name, row in now.items() if row["status"] == "failed"]:
        raise UserError(f"failed: {', '.join(failed)}; {folder / FIGURES} has the errors")


def _check_device(device: str | None, is_toy: bool) -> None:
    """UserError where there is no GPU, and one is needed."""
    # or asking for a device would keep the processes of the items, which are forked from this one, from using it
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if (device == "cuda" or not is_toy) and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; --toy runs every item at toy size on a CPU")


def _begun(folder: Path, seconds: float, is_toy: bool) -> tuple[Sheet, dict[str, Any]]:
    """Where the results go, and those that are there."""
    file, known = folder / FIGURES, {}
    if file.is_file():
        held = read_record(file)
        if held.get("protocol", {}).get("toy") != is_toy:
            size = "full" if is_toy else "toy"
            raise OutputError(f"{file} has figures at {size} size: give another --out")
        known = held["figures"]
    folder.mkdir(parents=True, exist_ok=True)
    how = {"toy": is_toy, "seconds": seconds, "code": code_version(), "torch": torch.__version__}
    return Sheet(how, file), known


def _chosen(items: Sequence[Item], only: str | None, known: dict[str, Any]) -> list[Item]:
    """The items to be measured: those that are named, or all that are not there."""
    if only is None:
        return [item for item in items if known.get(item.name, {}).get("status") != "ok"]
    names = {item.name: item for item in items}
    asked = [name.strip() for name in only.split(",")]
    for name in asked:
        if name not in names:
            there = ", ".join(names)
            raise ConfigError(
                f"--only: no item is called '{name}'{did_you_mean(name, names)}; there are {there}"
            )
    return [names[name] for name in asked]


def _line(name: str, row: dict[str, Any]) -> str:
    """An item's outcome for a screen."""
    error = row["error"].strip().splitlines()[-1:] if row["status"] != "ok" else []
    said = " | ".join(filter(None, [row["text"], *error]))
    return f"{name:12s} {row['status']:11s} {row['seconds']:6.1f} s (estimate {row['estimate']:g})  {said}"


def _markdown(how: dict[str, Any], figures: dict[str, Any]) -> str:
    """All of them, as a page."""
    rows = [
        f"| {name} | {row['what']} | {row['status']} | {row['seconds']:g} of {row['estimate']:g} | "
        + " ".join([row["text"], *row["error"].strip().splitlines()[-1:]]).strip().replace("|", "\\|")
        + " |"
        for name, row in figures.items()
    ]
    head = ["| item | measures | status | seconds, of the estimate | found |", "|---|---|---|---|---|"]
    size = "toy size: it says that the items run, and nothing of speed" if how["toy"] else "full size"
    return "\n".join(
        [f"`tools/bench.py gpu`, {size}; code {how['code']}, torch {how['torch']}.", "", *head, *rows, ""]
    )

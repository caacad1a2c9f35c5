"""The trace as a command: taken, printed as a table, written to a folder and a sheet."""

from __future__ import annotations

from pathlib import Path

from dit.bench.sheet import Sheet
from dit.bench.trace import record, table
from dit.config import to_dict
from dit.files import expand
from dit.outputs import claim


def trace(
    device: str | None,
    options: record.TraceBench,
    out: str | None,
    overwrite: bool,
    json_file: str | None,
) -> None:
    """Trace some steps; OutputError where a trace is there already and is not to be overwritten."""
    sheet = Sheet.begin_on(device, 1, json_file, **to_dict(options))
    folder = Path(expand(out)) if out else None
    claim([folder / record.FILE] if folder else [], overwrite=overwrite)
    found = record.run(options, folder)
    print(*table.lines(found), sep="\n")
    sheet.conclude(found)

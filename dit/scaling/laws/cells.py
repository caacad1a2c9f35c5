"""From the text of a CSV file of runs to its header and its rows; what is no such table is named with its line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from dit.config import did_you_mean
from dit.scaling.laws.law import LawError

NEEDED = ("params", "flops", "loss")
NUMBERS = (*NEEDED, "tokens", "samples", "floor")  # columns whose cells are positive numbers
KNOWN = ("run", *NUMBERS, "seed", "complete", "metric", "protocol")
# with which every table of runs that is made here begins
COLUMNS = ("run", "params", "samples", "tokens", "flops", "loss", "metric", "seed", "complete")

MOST = 10_000  # rows: a law is of runs, of which nobody has more
NUMERAL = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|[+-]?nan", re.ASCII | re.IGNORECASE
)

Row = dict[str, str]


def parsed(text: str, named: str) -> tuple[list[str], list[tuple[int, Row]]]:
    """The header, and (line, cells by column) of each row; blank lines, and those that begin with #, are no rows."""
    reader = csv.reader(io.StringIO(text), strict=True)
    header: list[str] | None = None
    rows = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells) or cells[0].lstrip().startswith("#"):
                continue
            if header is None:
                header = cells
                _check_header(header, named)
            elif len(cells) != len(header):
                raise LawError(
                    f"{named}: line {reader.line_num} has {len(cells)} cells, and the header {len(header)}: "
                    f"{','.join(cells)[:80]}"
                )
            else:
                row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
                rows.append((reader.line_num, row))
                if len(rows) > MOST:
                    break
    except csv.Error as error:
        raise LawError(
            f"{named}: line {reader.line_num} is no CSV ({error}): expected cells with commas between them"
        ) from None
    if header is None:
        raise LawError(f"{named} is empty: expected a header with {', '.join(NEEDED)}, and a line a run")
    if not rows:
        raise LawError(f"{named} has a header and no runs: expected a line a run below it")
    if len(rows) > MOST:
        raise LawError(
            f"{named} has more than {MOST} rows, and a law is fitted to so many at most: expected a line a run, of its "
            "end, and none of the steps before"
        )
    return header, rows


def _check_header(header: Sequence[str], named: str) -> None:
    # without a name are those of commas at the ends of lines, which spreadsheets write: nobody reads them
    twice = [name for name in dict.fromkeys(header) if name.strip() and header.count(name) > 1]
    if twice:
        raise LawError(f"{named}: column '{twice[0]}' is there {header.count(twice[0])} times: keep one")
    near = {name: name.strip().lower() for name in header}
    off = [name for name, plain in near.items() if name != plain and plain in KNOWN]
    if off:
        raise LawError(
            f"{named}: column '{off[0]}' is to be written {near[off[0]]}, without spaces or capitals"
        )
    missing = [name for name in NEEDED if name not in header]
    if not missing:
        return
    told = f"{named}: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing; there are {', '.join(header)}"
    if all(number(name) is not None for name in header):
        raise LawError(f"{named}: the first line is numbers; expected a header with {', '.join(NEEDED)}")
    for mark, what in ((";", "semicolons"), ("\t", "tabs")):
        if any(mark in name for name in header):
            raise LawError(f"{told[:160]}: {what} stand between the cells, where commas are expected")
    if len(header) < len(NEEDED) and not set(header) & set(KNOWN):
        raise LawError(
            f"{named} is no CSV of runs: it begins with {','.join(header)[:60]!r}; expected a header with "
            f"{', '.join(NEEDED)}, as `collect` writes it of an experiment"
        )
    hints = [did_you_mean(name, header) for name in missing]
    raise LawError(f"{told}{next((hint for hint in hints if hint), '')}. Needed are {', '.join(NEEDED)}")


def number(text: str) -> float | None:
    """The number, which may be inf or nan; None for what is none, such as 1_000, which Python alone takes for one."""
    return float(text) if NUMERAL.fullmatch(text.strip()) else None

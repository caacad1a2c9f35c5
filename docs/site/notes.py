"""Take the comment beside or above a field for its description, as `--help` does (dit/commandline/helptext.py)."""

from __future__ import annotations

import io
import tokenize
from typing import Any

import griffe


class FieldNotes(griffe.Extension):
    """Give each attribute of a class that has no docstring the comment of its lines."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Look at the members once the class is read."""
        for member in cls.members.values():
            if member.is_alias or not member.is_attribute or member.has_docstring:
                continue
            if note := comment(member):
                member.docstring = griffe.Docstring(note, parent=member)


def comment(member: Any) -> str:
    """The comments on a member's lines, else those right above it; "" where there are none."""
    lines = member.lines_collection[member.filepath]
    first, last = member.lineno, member.endlineno or member.lineno
    found = [text for line in lines[first - 1 : last] if (text := behind(line))]
    above = first - 2
    while not found and above >= 0 and lines[above].strip().startswith("#"):
        above -= 1
    return " ".join(found or [line.strip().lstrip("# ") for line in lines[above + 1 : first - 1]])


def behind(line: str) -> str:
    """The comment of a line of code; "" where it has none."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except (tokenize.TokenError, IndentationError):  # a line of several: its end is not here
        return line.rpartition("  # ")[2].strip() if "  # " in line else ""
    texts = [token.string.lstrip("# ").strip() for token in tokens if token.type == tokenize.COMMENT]
    return "" if not texts or texts[0].startswith(("noqa", "type:", "fmt:")) else texts[0]

"""The fenced blocks of README.md and docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.commands import ROOT

FENCE = re.compile(r"^(?P<ticks>```+)(?P<language>[\w-]*)(?: title=\"(?P<title>[^\"]*)\")?(?P<rest>.*)$")
MARKS = ("needs ", "takes ")  # how the title of a block begins whose commands no test can run


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is written in, its title, its text, and the line that it begins at."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    @property
    def is_marked(self) -> bool:
        """Whether it says what stands in the way of running it."""
        return self.title.startswith(MARKS)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command: its words, the variables set before it, and its text (a here-document included)."""

    words: list[str]
    text: str
    variables: dict[str, str] = field(default_factory=dict)


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and every page of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order. Raises ValueError where a fence is never closed or is written oddly."""
    opened: tuple[int, re.Match[str]] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        found = FENCE.match(line)
        if opened is None and found:
            if found["rest"].strip():
                raise ValueError(f'{page}:{number}: expected ```LANGUAGE title="...", got {line}')
            opened, lines = (number, found), []
        elif opened is not None and line == opened[1]["ticks"]:
            yield Block(page, opened[0], opened[1]["language"], opened[1]["title"] or "", "\n".join(lines))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]}: this block is never closed")


def commands(text: str) -> Iterator[Command]:
    """The commands of a shell block: lines, joined where they end in a backslash, or up to a here-document's end."""
    lines = iter(text.splitlines())
    for line in lines:
        whole = line
        while whole.endswith("\\"):
            whole = whole[:-1].rstrip() + " " + next(lines).strip()
        if heredoc := re.search(r"<<'(\w+)'$", whole):
            body = [whole]
            while body[-1] != heredoc[1]:
                body.append(next(lines))
            yield Command(shlex.split(whole), "\n".join(body))
            continue
        for part in re.split(r"\s&&\s", whole):
            words = shlex.split(part, comments=True)
            variables = {}
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            if words:
                yield Command(words, part, variables)

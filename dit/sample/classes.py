"""Classes that somebody asks for: by number, or by the name that the data gave them."""

from __future__ import annotations

import contextlib
import csv
import difflib
import operator
import re
import warnings
from collections.abc import Sequence
from typing import Any

from dit.config import ConfigError
from dit.errors import Notice
from dit.ranks import group

SHOWN = 8  # names in a message


def chosen_classes(text: str, names: Sequence[str]) -> list[int]:
    """Class numbers from "all", "0,3" or "golden retriever,tench"; -1 is no class.

    names: of all classes, by number; "all" of none is [-1]. A name with a comma in it stands in double quotes, as in a
    CSV file, unless it is all of the text. A whole number is always a class's number, whatever the names are.
    ConfigError for a number out of range and for a name that no class or more than one has.
    """
    if text == "all":
        return list(range(len(names))) or [-1]
    if text in names and not _is_number(text):
        return [_named(text, names)]
    try:
        words = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise ConfigError(f"classes {text!r}: not a list of names ({error})") from None
    words = [word.strip() for word in words]
    if not all(words) or not words:
        raise ConfigError(f"classes must be 'all', numbers like 0,3 or names; got '{text}'")
    return _numbers(words, names)


def listed_classes(asked: Any, names: Sequence[str]) -> list[int]:
    """Class numbers from what a program asks for: text as `chosen_classes` takes it, one class, or several in a row.

    A class is a whole number (Python's, numpy's or a tensor's) or text: its number or its whole name. -1 is no class.
    names: of all classes, by number. ConfigError for what is none, as there.
    """
    if isinstance(asked, str):
        return chosen_classes(asked, names)
    try:
        items = list(asked)
    except TypeError:  # a number, and a tensor or an array of one
        items = [asked]
    if not items:
        raise ConfigError("classes must be 'all', numbers or names; got none")
    return _numbers([item.strip() if isinstance(item, str) else _whole(item) for item in items], names)


def _whole(item: Any) -> int:
    """A number that is a class's, perhaps; ConfigError for what is no whole number."""
    is_truth = isinstance(item, bool) or "bool" in str(getattr(item, "dtype", ""))
    if not is_truth and not getattr(item, "ndim", 0):
        with contextlib.suppress(TypeError):
            return operator.index(item)
    raise ConfigError(f"classes must be 'all', whole numbers or names; got {item!r}")


def _numbers(words: Sequence[str | int], names: Sequence[str]) -> list[int]:
    """The classes of numbers, and of text that is a number or a name."""
    wrong = [word for word in words if _is_number(word) and not -1 <= int(word) < len(names)]
    if wrong:
        known = f"0..{len(names) - 1} (-1 = no class)" if names else "no classes: give -1"
        called = "".join(
            f"; the class named '{w}' is number {names.index(str(w))}" for w in wrong if str(w) in names
        )
        given = ", ".join(map(str, wrong))
        raise ConfigError(f"classes [{given}] are out of range: this model knows {known}{called}")
    return [word if isinstance(word, int) else _number(word, names) for word in words]


def _is_number(word: str | int) -> bool:
    return isinstance(word, int) or re.fullmatch(r"[+-]?[0-9]+", word) is not None


def _number(word: str, names: Sequence[str]) -> int:
    """The class of text; a Notice where it is a number in range, and the name of another class too."""
    if not _is_number(word):
        return _named(word, names)
    number = int(word)
    if word in names and names.index(word) != number and group.is_main():
        warnings.warn(
            f"--classes: {word} is taken as a number, the class '{names[number]}'; the class named '{word}' is number "
            f"{names.index(word)}",
            Notice,
            stacklevel=5,
        )
    return number


def _named(word: str, names: Sequence[str]) -> int:
    """The class of a name."""
    found = [number for number, name in enumerate(names) if name == word]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"classes {found} are all named '{word}': give the number")
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {', '.join(map(repr, near))}?"
    elif names:
        more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
        hint = f"there are {', '.join(names[:SHOWN])}{more}"
    else:
        hint = "this model knows no classes: leave --classes out, or give -1"
    raise ConfigError(f"classes must be 'all', numbers like 0,3 or names; no class is named '{word}': {hint}")

"""Classes that somebody asks for: by number, or by the name that the data gave them."""

from __future__ import annotations

import csv
import difflib
import re
import warnings
from collections.abc import Sequence

from dit.config import ConfigError
from dit.errors import Notice

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
    wrong = [word for word in words if _is_number(word) and not -1 <= int(word) < len(names)]
    if wrong:
        known = f"0..{len(names) - 1} (-1 = no class)" if names else "no classes: give -1"
        called = "".join(f"; the class named '{w}' is number {names.index(w)}" for w in wrong if w in names)
        raise ConfigError(f"classes [{', '.join(wrong)}] are out of range: this model knows {known}{called}")
    return [_numbered(word, names) if _is_number(word) else _named(word, names) for word in words]


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", word) is not None


def _numbered(word: str, names: Sequence[str]) -> int:
    """The class of a number; a Notice where a number is the name of another class too."""
    number, namesake = int(word), names.index(word) if word in names else None
    if not -1 <= number < len(names):
        known = (
            f"this model knows 0..{len(names) - 1} (-1 = no class)"
            if names
            else "this model knows no classes: -1"
        )
        called = "" if namesake is None else f"; the class named '{word}' is number {namesake}"
        raise ConfigError(f"classes [{number}] are out of range: {known}{called}")
    if namesake is not None and namesake != number:
        warnings.warn(
            f"--classes: {word} is taken as a number, the class '{names[number]}'; the class named '{word}' is number "
            f"{namesake}",
            Notice,
            stacklevel=4,
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

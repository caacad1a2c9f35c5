"""Values as somebody typed them: what a plain word is depends on the key that it is for.

`010` is the number 10 where a number is expected (never octal 8), and the text 010 where text is. Numbers are decimal:
0x10, 1:30 or 1,000 are refused with what to write instead, and so is what a float cannot hold.
"""

from __future__ import annotations

import re
import types
import typing
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, Union

import pydantic

WHOLE = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
FRACTION = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"([-+]?)\.?inf(inity)?|\.?nan", re.IGNORECASE)
TRUTH = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
WORD = re.compile("|".join(f"{w}|{w.capitalize()}|{w.upper()}" for w in TRUTH))  # those of YAML 1.1
NULL = ("~", "null", "Null", "NULL")  # as YAML has it; there nothing at all is null, too
LARGEST = 2**63 - 1  # that seeds, counts and tensors of them hold


class Scalar(str):
    """A plain word of a YAML file or a command line that may mean a number or a truth value, as it was written."""

    def __repr__(self) -> str:
        return str(self)  # in messages without the quotes that it did not have


def is_scalar(text: str) -> bool:
    """Whether a plain word may be something else than text."""
    return any(p.fullmatch(text) for p in (WHOLE, FRACTION, INFINITE, WORD))


def typed(hint: Any) -> Any:
    """The same type hint, which takes what was typed: numbers from words, text from any word, truth values alone.

    True and False are no numbers (pydantic takes them as 1 and 0), and NaN is none.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if reader := _READERS.get(hint if isinstance(hint, type) else None):
        return Annotated[hint, pydantic.BeforeValidator(reader)]
    if hint is Any:
        return Annotated[hint, pydantic.BeforeValidator(resolved)]
    # Literal[0, 1] would take True, because True == 1
    if origin is Literal and any(type(a) is int for a in args):
        return Annotated[hint, pydantic.BeforeValidator(_listed)]
    if origin is Annotated:
        return Annotated[(typed(args[0]), *args[1:])]
    if origin in (Union, types.UnionType):
        if str in args and {int, float} & set(args):  # quoted text is text here, and a plain word what it is
            plain = pydantic.BeforeValidator(_no_truth)
            inner: Any = Union[tuple(Annotated[a, plain] if a in (int, float) else a for a in args)]  # noqa: UP007
            return Annotated[inner, pydantic.BeforeValidator(resolved)]
        return Union[tuple(typed(a) for a in args)]  # noqa: UP007
    if origin in (tuple, list, dict):
        return origin[tuple(a if a is Ellipsis else typed(a) for a in args)]
    return hint


# --- what a word is ----------------------------------------------------------------------------------------


def number(text: str) -> int | float | str:
    """The decimal number that a word is, an int where it is written as a whole one; the word where it is none.

    ValueError, which says what to write, for a number of another base, with separators or in other digits.
    """
    word = text.strip()
    if WHOLE.fullmatch(word) and len(word) < 1000:
        return int(word)
    if FRACTION.fullmatch(word):
        return _fraction(word)
    if INFINITE.fullmatch(word):
        return float(word.replace(".", ""))
    if instead := _instead(word):
        raise ValueError(f"numbers are decimal: write {instead}")
    return text


def _fraction(word: str) -> float:
    nearest = float(word)
    if nearest in (float("inf"), float("-inf")) or (nearest == 0 and Decimal(word.replace("_", "")) != 0):
        raise ValueError("is beyond what a float holds, 1e-323 to 1.8e308")
    return nearest


def _instead(word: str) -> str | None:
    """What was probably meant by a word that only looks like a number; None where it looks like none."""
    plain = unicodedata.normalize("NFKC", word).replace("\u2212", "-").replace("\u2013", "-").strip()
    if plain != word and (FRACTION.fullmatch(plain) or WHOLE.fullmatch(plain)):
        return f"{plain}, in plain digits"
    if re.fullmatch(r"[-+]?0([xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)", plain):
        return _of_base(plain)
    if re.fullmatch(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?", plain):
        return f"one number (hours, minutes and seconds as 3600, 60 and 1: {_sixties(plain)})"
    if re.fullmatch(r"[-+]?[1-9][0-9]{0,2}([,'_ ][0-9]{3})+(\.[0-9]*)?", plain):
        is_open = plain.count(",") == 1 and "." not in plain
        return re.sub(r"[,'_ ]", "", plain) + (
            f", or {plain.replace(',', '.')} for a fraction" if is_open else ""
        )
    if re.fullmatch(r"[-+]?[0-9]*,[0-9]+([eE][-+]?[0-9]+)?", plain):
        return plain.replace(",", ".")
    if re.fullmatch(r"[-+]?[0-9][0-9_]*", plain):
        return plain.replace("_", "")
    return None


def _of_base(word: str) -> str | None:
    try:
        return str(int(word, 0))
    except ValueError:
        return None


def _sixties(word: str) -> str:
    total = 0.0
    for part in word.lstrip("+-").split(":"):
        total = total * 60 + float(part)
    return f"{'-' if word.startswith('-') else ''}{total:g}"


def resolved(value: Any) -> Any:
    """Plain values in which each word is what it is by itself, as no key says it; quoted text stays text."""
    if isinstance(value, Scalar):
        return TRUTH[value.lower()] if WORD.fullmatch(value) else number(value)
    if isinstance(value, dict):
        return {key: resolved(inner) for key, inner in value.items()}
    return [resolved(inner) for inner in value] if isinstance(value, list) else value


# --- what a field takes ------------------------------------------------------------------------------------


def _real(value: Any) -> Any:
    """A number, for floats."""
    if isinstance(value, Scalar) and WORD.fullmatch(value):
        _no_truth(TRUTH[value.lower()])
    _no_truth(value)
    if not isinstance(value, str):
        return value
    found = number(value)
    if found != found:  # in records that a program wrote it may stand, and nobody means it
        raise ValueError("expected a number, and NaN is none")
    return found


def _whole(value: Any) -> Any:
    """A number, for ints: 1e3 and 40.0 are whole."""
    found = _real(value)
    if found in (float("inf"), float("-inf")):
        raise ValueError("expected a whole number, and infinity is none")
    if isinstance(found, int | float) and abs(found) > LARGEST:
        raise ValueError(f"expected a whole number of at most {LARGEST}")
    if isinstance(found, float) and isinstance(value, str):
        exact = Decimal(value.strip().replace("_", ""))
        return int(exact) if exact == exact.to_integral_value() else found
    return found


def _truth(value: Any) -> Any:
    if isinstance(value, Scalar) and WORD.fullmatch(value):
        return TRUTH[value.lower()]
    return number(value) if isinstance(value, Scalar) else value


def _listed(value: Any) -> Any:
    """One of some words and numbers."""
    if isinstance(value, str):
        return number(value) if FRACTION.fullmatch(value.strip()) else str(value)
    return _no_truth(value)


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not a truth value")
    return value


_READERS: dict[Any, Any] = {
    int: _whole,
    float: _real,
    bool: _truth,
}  # pydantic takes a Scalar as the text it is


# --- what is said where it does not take it -----------------------------------------------------------------


_EXPECTED = {  # pydantic's kind of error -> what was expected, with the bounds of its context
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
}


def refusal(error: Mapping[str, Any]) -> str:
    """What to say of one of pydantic's errors, without what came: "expected a whole number"."""
    if expected := _EXPECTED.get(error["type"]):
        return f"expected {expected.format(**error.get('ctx', {}))}"
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"{said[0].lower()}{said[1:]}"

"""Labels in files beside the samples of a tar: KEY.cls, a number or a name as text, and KEY.json, an object."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit.data import DataError
from dit.data.sources.classes import USUAL, Classes, LabelChoice, LabelColumn

MAX_LABEL = 1 << 20  # bytes of a file with a label
KEYS_SHOWN = 12


def cls_value(data: bytes) -> str:
    """What KEY.cls holds, as text. ValueError for bytes that are no text."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{data[:20]!r}, which is not UTF-8, expected a class number or a name") from None


class BareValue(ValueError):
    """JSON that is a number, a text or a truth value alone: meant as a label, very likely, but under no key."""


def json_fields(data: bytes) -> dict[str, Any]:
    """The object in KEY.json. ValueError for what is none, BareValue where it may be a label itself."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:  # that of brackets in brackets
        raise ValueError(f"not JSON: {error}") from None
    if isinstance(fields, bool | int | float | str):
        raise BareValue(
            f'{data[:20].decode(errors="replace")!r} without a key, expected such as {{"label": ...}}'
        )
    if not isinstance(fields, dict):
        raise ValueError(f"JSON of {data[:20]!r}, expected an object with the label under a key")
    return fields


def usual_key(fields: Mapping[str, Any]) -> str | None:
    """The first of the keys that labels usually have."""
    return next((key for key in USUAL if key in fields), None)


def at_key(fields: Mapping[str, Any], key: str) -> Any:
    """What stands under a key; "meta.label" is also "label" in "meta". KeyError where nothing does."""
    if key in fields:
        return fields[key]
    first, dot, rest = key.partition(".")
    if not dot or not isinstance(fields.get(first), dict):
        raise KeyError(key)
    return at_key(fields[first], rest)


def has_key(fields: Mapping[str, Any], key: str) -> bool:
    """Whether something stands under a key."""
    try:
        at_key(fields, key)
    except KeyError:
        return False
    return True


def keys_shown(fields: Mapping[str, Any]) -> str:
    """The keys of an object, for messages."""
    keys = [repr(key)[1:-1] for key in fields]
    return ", ".join(keys[:KEYS_SHOWN]) + (", ..." if len(keys) > KEYS_SHOWN else "") or "none"


class BesideLabels:
    """Takes in what stands beside each sample of a set, in order, and gives their labels when all are there.

    Which key of the JSON it is, is settled by the first sample that has a usual one, unless it was chosen.
    """

    def __init__(self, choice: LabelChoice):
        self.choice = choice
        self.column = LabelColumn(choice.type)
        self.key = choice.key
        self.ending = ""  # of the files that hold labels, as far as they were seen
        self.keys: str | None = None  # of the first JSON

    def ending_of(self, has: Callable[[str], bool]) -> str | None:
        """Which files of a tar may hold labels, of those it has."""
        if self.choice.key == "":
            return None
        wanted = (".cls", ".json") if self.choice.key is None else (".json",)
        found = next((ending for ending in wanted if has(ending)), None)
        if found == ".cls":
            self.ending = found
        return found

    def add(self, ending: str, size: int | None, read: Callable[[], bytes]) -> None:
        """The next sample. size: bytes of the file of this ending beside it (None: it has none); read: gives them."""
        fault = self.column.spoil if ending == ".cls" else self.column.miss
        if size is None:
            self.column.miss(f"has no {ending} beside it, though others have one")
        elif size > MAX_LABEL:
            fault(f"has {size} bytes in its {ending}, expected at most {MAX_LABEL} of a label")
        else:
            try:
                if ending == ".cls":
                    self.column.add(cls_value(read()))
                else:
                    self._add_json(json_fields(read()))
            except BareValue as error:
                self.column.spoil(f"has in its .json {error}")
            except ValueError as error:
                fault(f"has in its {ending} {str(error)[:80]}")
        if not self.ending and self.column.has_labels:
            self.ending = ending

    def _add_json(self, fields: dict[str, Any]) -> None:
        if self.keys is None:
            self.keys = keys_shown(fields)
        if self.key is None:
            self.key = usual_key(fields)
        try:
            self.column.add(at_key(fields, self.key or ""))
        except KeyError:
            self.column.miss("has no label in its .json, though others have one")

    def skip(self, samples: int) -> None:
        """The next samples, of a tar without any such file."""
        for _ in range(samples):
            self.column.miss("has no .cls or .json beside it, though others have one")

    @property
    def has_labels(self) -> bool:
        """Whether any of the samples has a label beside it, or was to have one."""
        return self.column.has_labels or self.ending == ".cls"

    def labels(
        self, head: str, where: Callable[[int], str], faults: Sequence[str]
    ) -> tuple[np.ndarray, Classes]:
        """Label of each sample, (n,) int64, and names of the classes. Arguments and errors: see LabelColumn."""
        if self.choice.replaced:
            return np.full(len(self.column), -1, np.int64), ()
        out = "give other labels with --labels=FILE, or leave these out with --label_key="
        return self.column.numbered(head, where, faults=faults, way_out=out)

    def refuse_chosen(self, head: str) -> None:
        """DataError where a key was chosen, and there is no label under it."""
        if not self.choice.key:
            return
        beside = (
            "there is no JSON beside them" if self.keys is None else f"the JSON beside them has {self.keys}"
        )
        raise DataError(f"{head}: no sample has a label under --label_key={self.choice.key}: {beside}")

    def described(self) -> str:
        """Where the labels come from; or why there are none, where it might be thought that there are."""
        if self.has_labels:
            return (
                f"labels from '{self.key}' in KEY.json" if self.ending == ".json" else "labels from KEY.cls"
            )
        if self.keys is None:
            return ""
        if self.key:
            return f"'{self.key}' is null in every JSON beside them"
        return f"the JSON beside them has the keys {self.keys}; --label_key=KEY takes the labels from one"

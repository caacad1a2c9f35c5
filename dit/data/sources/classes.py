"""What the labels of a set mean: from raw values, whatever they were read from, to numbers and names of classes.

One rule for every source. A whole number (also as text, as 2.0, as true and false) is a label itself, text that is none
is the name of a class, and -1 is no label. A set has numbers or names: where both occur none is guessed at.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from dit.config import ConfigError
from dit.data import DataError
from dit.data.sources.source import listing

Classes = tuple[str, ...]
LabelType = Literal["auto", "number", "name"]
Label = bool | int | str  # a number (-1: none), or the name of a class

MAX_CLASS = 10**6  # above every label; a bigger number is an image's, and would make as many classes
USUAL = (  # what labels are usually called, in JSON, in columns of Parquet and in heads of CSV; the first that is there
    "label",
    "labels",
    "cls",
    "class",
    "class_id",
    "class_index",
    "class_idx",
    "class_label",
    "class_name",
    "label_id",
    "label_name",
    "category",
    "category_id",
    "target",
)
WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|[+-]?inf(inity)?", re.IGNORECASE)
MANY_DIGITS = 18


@dataclass(frozen=True)
class LabelChoice:
    """How to find and take labels, where the set does not say it itself.

    key: of the label in JSON or in the head of a file of labels; None: the first usual one, "": JSON holds none.
    type: "number" and "name" take every label as that; "auto" goes by what they are. replaced: other labels come in
    their place, so those of the set need not be of any use.
    """

    key: str | None = None
    type: LabelType = "auto"
    replaced: bool = False

    def __post_init__(self) -> None:
        known = get_args(LabelType)
        if self.type not in known:
            raise ConfigError(f"label_type is {self.type!r}, expected one of {', '.join(known)}")


# --- one label ---------------------------------------------------------------------------------------------


def read_label(value: Any, kind: LabelType = "auto") -> Label:
    """One raw value as a number from -1 on, or as a name. ValueError for what is neither, or not of this kind."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        raise ValueError("null, which is no label: -1 stands for none")
    if isinstance(value, str):
        return _of_text(value.strip(), kind)
    if isinstance(value, bool):
        return str(value).lower() if kind == "name" else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise ValueError(f"{_shown(value)}, expected a whole number or a name")
    number = _in_range(value)
    return str(number) if kind == "name" and number >= 0 else number


def _of_text(text: str, kind: LabelType) -> Label:
    if not text or re.search(r"[\n\r\0]", text):
        raise ValueError(f"{_shown(text)}, expected a class number (-1: none) or a name on one line")
    if text == "-1":
        return -1
    if kind == "name":
        return text
    if WHOLE.fullmatch(text):
        whole = text.partition(".")[0]
        return _in_range(int(whole) if len(whole) <= MANY_DIGITS else MAX_CLASS, text)
    if kind == "number" or NUMBER.fullmatch(text):
        raise ValueError(f"{_shown(text)}, expected a class number from 0 to {MAX_CLASS - 1}, or -1 for none")
    return text


def _in_range(number: int, text: str | None = None) -> int:
    if not -1 <= number < MAX_CLASS:
        shown = _shown(number if text is None else text)
        raise ValueError(f"{shown}, expected a class number below {MAX_CLASS}, or -1 for none")
    return number


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- the order of names ------------------------------------------------------------------------------------


def in_order(names: Iterable[str]) -> Classes:
    """Each name once, in the order that gives classes their numbers: as numbers (2 before 10) where all are whole
    numbers, else as text (class_10 before class_2)."""
    distinct = sorted(set(names))
    if all(re.fullmatch("[0-9]+", name) for name in distinct):
        distinct.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))
    return tuple(distinct)


# --- the labels of a set -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unusable:
    """In the place of a label that cannot be used: why, as said of its sample. is_none: it says that there is none."""

    why: str
    is_none: bool = False


NULL = _Unusable("has null as its label, where others have one: -1 stands for none", is_none=True)


class LabelColumn:
    """Takes in the labels of a set in order, and knows which number each is once all are there.

    Four bytes a sample, and each different value once.
    """

    def __init__(self, kind: LabelType = "auto"):
        self.kind = kind
        self._codes = array("i")
        self._values: list[Label | _Unusable] = []
        self._places: dict[tuple[type, Label | _Unusable], int] = {}

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, value: Any) -> None:
        """Take in the next sample's label, as it was read."""
        self._codes.append(self._place(self._read(value)))

    def miss(self, why: str) -> None:
        """The next sample has none, which is a fault where others have one."""
        self._codes.append(self._place(_Unusable(why, is_none=True)))

    def spoil(self, why: str) -> None:
        """The next sample has one that cannot be read, which is a fault."""
        self._codes.append(self._place(_Unusable(why)))

    def extend(self, values: Sequence[Any], codes: np.ndarray) -> None:
        """Take in many at once: of each sample the place of its value, (n,) int, -1 for one without a label."""
        places = [self._place(self._read(value)) for value in values]
        none = self._place(-1) if (codes < 0).any() else -1
        self._append(np.array([*places, none], np.int32)[codes])

    def merge(self, other: LabelColumn) -> None:
        """Take in what another column of this kind has."""
        places = [self._place(value) for value in other._values]
        self._append(np.array([*places, -1], np.int32)[other.codes])

    def _append(self, codes: np.ndarray) -> None:
        self._codes.frombytes(np.ascontiguousarray(codes, np.int32).tobytes())

    def _read(self, value: Any) -> Label | _Unusable:
        if value is None:
            return NULL
        try:
            return read_label(value, self.kind)
        except ValueError as error:
            return _Unusable(f"has the label {error}")

    def _place(self, value: Label | _Unusable) -> int:
        key = (type(value), value)
        if key not in self._places:
            if len(self._values) > MAX_CLASS:
                raise DataError(
                    f"more than {MAX_CLASS} different labels, such as {_shown(value)}: are these names of images?"
                )
            self._places[key] = len(self._values)
            self._values.append(value)
        return self._places[key]

    @property
    def codes(self) -> np.ndarray:
        """(n,) int32: which of its values each sample has."""
        return np.frombuffer(self._codes, np.int32) if self._codes else np.empty(0, np.int32)

    @property
    def has_labels(self) -> bool:
        """Whether any sample has what was meant as a label: not null, and not nothing."""
        return not all(isinstance(value, _Unusable) and value.is_none for value in self._values)

    @property
    def is_named(self) -> bool:
        """Whether the labels are names."""
        return any(isinstance(value, str) for value in self._values)

    def numbered(
        self,
        head: str,
        where: Callable[[int], str],
        names: Classes | None = None,
        faults: Sequence[str] = (),
        way_out: str = "",
    ) -> tuple[np.ndarray, Classes]:
        """The label of each sample, (n,) int64, -1 for none, and the names of the classes.

        names: of all classes where they are known: numbers are places in it, names stand in it. head: what the set is;
        where(i): sample i, for messages. faults: that were found before. way_out: what to do about faults.
        Raises DataError with all of them together.
        """
        found, mixed = self._faults(names)
        places = np.flatnonzero(np.isin(self.codes, list(found)))
        if len(places) + len(faults):
            own = [f"{where(i)} {found[int(self.codes[i])]}" for i in places[:6].tolist()]
            count = len(places) + len(faults)
            text = listing(f"{head}: {count} sample(s) that cannot be used", [*faults, *own], total=count)
            raise DataError("\n".join(line for line in (text, mixed or way_out) if line))
        classes = self._classes() if names is None else names
        place = {name: i for i, name in enumerate(classes)}
        table = [
            place[v] if isinstance(v, str) else v for v in self._values if not isinstance(v, _Unusable)
        ]  # all
        return np.array([*table, -1], np.int64)[self.codes], classes

    def _classes(self) -> Classes:
        texts = [value for value in self._values if isinstance(value, str)]
        if texts:
            return in_order(texts)
        most = max((int(v) for v in self._values if isinstance(v, int)), default=-1)
        if any(isinstance(v, bool) for v in self._values):
            most = 1
        return tuple(str(i) for i in range(most + 1))

    def _faults(self, names: Classes | None) -> tuple[dict[int, str], str]:
        """What is wrong with values, by their places; and how to go on where there is more than one kind."""
        found = {i: value.why for i, value in enumerate(self._values) if isinstance(value, _Unusable)}
        known = frozenset(names or ())
        for i, value in enumerate(self._values if names is not None else ()):
            if isinstance(value, str) and value not in known:
                found[i] = f"has the label {_shown(value)}, which is none of the {len(names or ())} classes"
            elif isinstance(value, int) and value >= len(names or ()):
                found[i] = f"has the label {int(value)}, with {len(names or ())} classes"
        counts = np.bincount(self.codes, minlength=len(self._values))
        kinds: dict[type, int] = {}
        for value, count in zip(self._values, counts.tolist(), strict=True):
            if not isinstance(value, _Unusable) and value != -1:
                kinds[type(value)] = kinds.get(type(value), 0) + count
        if len(kinds) < 2:
            return found, ""
        most = max(kinds, key=lambda kind: kinds[kind])
        for i, value in enumerate(self._values):
            if type(value) in kinds and type(value) is not most and value != -1:
                found[i] = f"has the label {_shown(value)}, {WORD[type(value)]}, where most are {WORDS[most]}"
        return found, "mend these, or take all labels as names of classes with --label_type=name"


WORD = {bool: "a truth value", int: "a number", str: "a name"}
WORDS = {bool: "true and false", int: "numbers", str: "names"}


# --- what is odd about them --------------------------------------------------------------------------------


MANY = 20  # classes, of which it is odd that most have a sample each


def empty_classes_note(classes: Sequence[str], counts: np.ndarray) -> str | None:
    """What whoever made labels should know of classes without samples, or with one each; None where nothing is odd.

    counts: samples of each class, (classes,).
    """
    used, total = int(np.count_nonzero(counts)), int(counts.sum())
    most = int(counts.argmax()) if used else 0
    if used > MANY and 2 * used > total:
        return f"{used} classes for {total} samples, such as {_shown(classes[most])}: are these classes?"
    if not used or list(classes) != [str(i) for i in range(len(classes))]:
        return None
    remedy = f"--label_type=name makes {used} class(es) of the numbers that occur, called by them"
    if counts[0] == 0:
        first = int(np.flatnonzero(counts)[0])
        return (
            f"no sample has the label 0: labels go from {first} to {len(classes) - 1}, and class 0 stays empty (of "
            f"{len(classes)}, {len(classes) - used} are). If they are meant to begin at {first}, {remedy}"
        )
    if 2 * used < len(classes):
        return f"only {used} of {len(classes)} classes have samples; if the others are not to come, {remedy}"
    return None

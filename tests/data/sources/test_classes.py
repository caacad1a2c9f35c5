"""The one rule of labels: from raw values to numbers and names of classes, whatever they were read from."""

import re
import tracemalloc

import numpy as np
import pytest

from dit.data import DataError
from dit.data.sources.classes import (
    MAX_CLASS,
    LabelColumn,
    empty_classes_note,
    in_order,
    read_label,
)
from dit.data.sources.folder_classes import of_folders


def column(values, kind="auto"):
    made = LabelColumn(kind)
    for value in values:
        made.add(value)
    return made


def numbered(values, kind="auto", names=None):
    labels, classes = column(values, kind).numbered("set", lambda i: f"sample {i}", names)
    assert labels.dtype == np.int64
    return labels.tolist(), classes


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([2, 0, -1], [2, 0, -1], ("0", "1", "2")),
        (["2", " 0\n", "-1", "002"], [2, 0, -1, 2], ("0", "1", "2")),
        ([2.0, 0.0, "1.0", "1."], [2, 0, 1, 1], ("0", "1", "2")),
        ([np.int64(1), np.float32(0)], [1, 0], ("0", "1")),
        ([True, False, -1], [1, 0, -1], ("0", "1")),
        ([False, False], [0, 0], ("0", "1")),
        (["dog", "cat", "-1", -1, " dog "], [1, 0, -1, -1, 1], ("cat", "dog")),
        (["class_10", "class_2"], [0, 1], ("class_10", "class_2")),
        (["7up", "a b", "ä"], [0, 1, 2], ("7up", "a b", "ä")),
        ([], [], ()),
        ([-1, "-1"], [-1, -1], ()),
    ],
)
def test_numbers_are_labels_and_names_are_classes(values, labels, classes):
    assert numbered(values) == (labels, classes)


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([1, 10, 2, -1], [0, 2, 1, -1], ("1", "2", "10")),
        (["1", "b", 1], [0, 1, 0], ("1", "b")),
        ([3.0, "3"], [0, 0], ("3",)),
        ([True, "true", False], [1, 1, 0], ("false", "true")),
        (["1.5", "nan"], [0, 1], ("1.5", "nan")),
    ],
)
def test_labels_may_be_taken_as_names(values, labels, classes):
    assert numbered(values, "name") == (labels, classes)


@pytest.mark.parametrize(
    "value",
    [
        -2,
        1.5,
        "1.5",
        "1e3",
        "-3",
        "nan",
        float("nan"),
        float("inf"),
        MAX_CLASS,
        "9" * 5000,
        "",
        " ",
        [1],
        {},
        "a\nb",
    ],
)
def test_what_is_no_label_is_named(value):
    with pytest.raises(
        DataError, match=r"^set: 1 sample\(s\) that cannot be used:\n  sample 1 has the label .*expected"
    ):
        numbered([0, value])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            [0, 1, "cat"],
            r"1 sample.*\n  sample 2 has the label 'cat', a name, where most are numbers\n.*label_type=name",
        ),
        (["a", "b", 3], "sample 2 has the label 3, a number, where most are names"),
        ([0, 1, True], "sample 2 has the label True, a truth value, where most are numbers"),
        ([0, None, None], r"2 sample.*\n  sample 1 has null as its label, where others have one: -1 stands"),
    ],
)
def test_two_kinds_of_labels_are_not_guessed_at(values, words):
    with pytest.raises(DataError, match=words):
        numbered(values)
    with pytest.raises(DataError, match="a name"):
        numbered([0, "a"], names=("a", "b"))


def test_numbers_are_asked_for():
    assert numbered(["3", 0], "number")[0] == [3, 0]
    with pytest.raises(DataError, match="sample 1 has the label 'cat', expected a class number"):
        numbered([0, "cat"], "number")


def test_known_classes():
    names = ("b", "a", "b")  # two may be called the same
    assert numbered([2, 0, -1], names=names) == ([2, 0, -1], names)
    assert numbered(["a", "-1"], names=("b", "a")) == ([1, -1], ("b", "a"))
    with pytest.raises(DataError, match="sample 0 has the label 3, with 3 classes"):
        numbered([3], names=names)
    with pytest.raises(DataError, match="sample 0 has the label 'c', which is none of the 2 classes"):
        numbered(["c"], names=("a", "b"))


def test_faults_are_listed_together_after_those_before():
    many = column([0, *[None] * 7])
    with pytest.raises(DataError) as error:
        many.numbered("set", lambda i: f"sample {i}", faults=["first"], way_out="do this")
    lines = str(error.value).splitlines()
    assert lines[:2] == ["set: 8 sample(s) that cannot be used:", "  first"]
    assert lines[-2:] == ["  ... and 3 more", "do this"]


def test_columns_are_taken_in_at_once_and_joined():
    whole = column(["b"])
    whole.extend(["a", "b"], np.array([1, 0, -1, 1]))
    whole.merge(column(["c", "a"]))
    whole.merge(LabelColumn())
    whole.add("-1")
    labels, classes = whole.numbered("set", str)
    assert (labels.tolist(), classes) == ([1, 1, 0, -1, 1, 2, 0, -1], ("a", "b", "c"))
    assert len(whole) == 8


def test_memory_is_four_bytes_a_sample():
    tracemalloc.start()
    made = LabelColumn()
    for i in range(200_000):
        made.add(f"class {i % 100}")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 8 * 200_000


def test_names_of_images_are_no_classes(monkeypatch):
    monkeypatch.setattr("dit.data.sources.classes.MAX_CLASS", 10)
    with pytest.raises(DataError, match=r"more than 10 different labels, such as 'image 11\.jpg'"):
        column([f"image {i}.jpg" for i in range(20)])


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["10", "2", "1", "0", "2"], ("0", "1", "2", "10")),
        (["010", "2", "10"], ("2", "010", "10")),
        (["10", "2", "x"], ("10", "2", "x")),
        (["class_10", "class_2"], ("class_10", "class_2")),
        (["1.5", "-1", "٣"], ("-1", "1.5", "٣")),
        ([], ()),
    ],
)
def test_names_are_sorted_as_numbers_where_all_are(names, ordered):
    assert in_order(names) == ordered


def test_class_folders():
    found = of_folders(["0", "1", "10", "2"], "auto", "set")
    assert (found.labels.tolist(), found.classes) == ([0, 1, 3, 2], ("0", "1", "2", "10"))
    assert found.before == ("0", "1", "10", "2")
    assert of_folders(["b", "a"], "auto", "set").before is None
    assert of_folders(["3", "1"], "number", "set").labels.tolist() == [3, 1]
    with pytest.raises(DataError, match="class folder 'x' has the label 'x', expected a class number"):
        of_folders(["3", "x"], "number", "set")
    with pytest.raises(DataError, match="the folders 3, 03 stand for the same number"):
        of_folders(["3", "03"], "number", "set")


@pytest.mark.parametrize(
    ("classes", "counts", "words"),
    [
        ("0123", [0, 2, 2, 2], "no sample has the label 0: labels go from 1 to 3.*label_type=name makes 3"),
        ("01234567", [1, 0, 0, 0, 0, 0, 0, 1], "only 2 of 8 classes have samples"),
        ("0123", [1, 2, 0, 2], None),
        ("abcd", [0, 2, 2, 2], None),
        ("0123", [0, 0, 0, 0], None),
        ("", [], None),
        (
            [f"caption {i}" for i in range(30)],
            [1] * 29 + [2],
            "30 classes for 31 samples, such as 'caption 29'",
        ),
        ([f"class {i}" for i in range(30)], [2] * 30, None),
    ],
)
def test_empty_classes_are_spoken_of(classes, counts, words):
    note = empty_classes_note(tuple(classes), np.array(counts, int))
    assert note is None if words is None else re.search(words, note)


def test_one_label():
    assert read_label("cat") == "cat"
    assert read_label(2.0) == 2
    with pytest.raises(ValueError, match="null"):
        read_label(None)

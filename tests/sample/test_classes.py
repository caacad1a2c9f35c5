"""Classes by number and by name."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from dit.config import ConfigError
from dit.errors import Notice
from dit.sample.classes import chosen_classes, listed_classes
from tests.rank_processes import Server

NAMES = ("cat", "golden retriever", "tench, Tinca tinca", "tench", "owl")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("0,3", [0, 3]),
        ("3,0,3", [3, 0, 3]),
        ("-1", [-1]),
        ("cat", [0]),
        ("golden retriever,tench", [1, 3]),
        (" golden retriever , tench ", [1, 3]),
        ('"tench, Tinca tinca",cat', [2, 0]),
        ('cat, "tench, Tinca tinca"', [0, 2]),
        ("tench, Tinca tinca", [2]),
        ("owl,1", [4, 1]),
    ],
)
def test_what_is_asked_for(text: str, chosen: list[int]) -> None:
    assert chosen_classes(text, NAMES) == chosen


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("owl,1", [4, 1]),
        (3, [3]),
        ([3, "cat", "1", " owl "], [3, 0, 1, 4]),
        (("tench, Tinca tinca", -1), [2, -1]),
        (np.int64(2), [2]),
        (np.array([0, 3]), [0, 3]),
        (torch.tensor([4, 0]), [4, 0]),
        (torch.tensor(1), [1]),
        (range(2), [0, 1]),
    ],
)
def test_what_a_program_asks_for(asked: Any, chosen: list[int]) -> None:
    found = listed_classes(asked, NAMES)
    assert found == chosen
    assert {type(number) for number in found} == {int}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([0, 5, -2], r"\[5, -2\] are out of range: this model knows 0..4 \(-1 = no class\)"),
        (["caat"], "no class is named 'caat': did you mean 'cat'"),
        ([], "got none"),
        ([1.0], "whole numbers or names; got 1.0"),
        ([True], "got True"),
        (torch.tensor([True, False]), r"got tensor\(True\)"),
        (None, "got None"),
        (torch.tensor([[0]]), "got tensor"),
        (["owl,cat"], "no class is named 'owl,cat'"),
    ],
)
def test_what_a_program_must_not_ask_for(asked: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        listed_classes(asked, NAMES)


def test_a_number_in_a_list_is_a_number_beyond_doubt_and_text_is_not() -> None:
    names = ("1", "10", "2")
    assert listed_classes([1], names) == [1]
    with pytest.warns(Notice, match="1 is taken as a number"):
        assert listed_classes(["1"], names) == [1]


def test_a_model_without_classes() -> None:
    assert chosen_classes("all", ()) == [-1]
    assert chosen_classes("-1", ()) == [-1]
    for text, says in (("0", "knows no classes: give -1"), ("cat", "knows no classes")):
        with pytest.raises(ConfigError, match=says):
            chosen_classes(text, ())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0,10", r"\[10\] are out of range: this model knows 0..4 \(-1 = no class\)"),
        ("-2,3,11", r"\[-2, 11\] are out of range"),
        ("\u0663", "no class is named"),  # a digit elsewhere, and no name here
        ("caat", "no class is named 'caat': did you mean 'cat'"),
        ("golden retreiver", "did you mean 'golden retriever'"),
        ("cat,", "must be 'all'"),
        ("", "must be 'all'"),
        ('"cat', "not a list of names"),
        ("zebra crossing", "there are cat, golden retriever, tench, Tinca tinca, tench, owl"),
        ("1.5", "no class is named '1.5'"),
    ],
)
def test_what_is_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        chosen_classes(text, NAMES)


def test_a_thousand_names_are_not_all_shown() -> None:
    with pytest.raises(ConfigError, match=r"there are name 0, .*, name 7, \.\.\. \(1000 in all\)$"):
        chosen_classes("xyz", [f"name {i}" for i in range(1000)])


def test_names_that_are_numbers_are_numbers_and_said() -> None:
    """Folders 1, 2, 10 sorted as text: class 2 is the folder '2' by luck, and 1 is '10'."""
    names = ("1", "10", "2")
    with pytest.warns(
        Notice, match="1 is taken as a number, the class '10'; the class named '1' is number 0"
    ):
        assert chosen_classes("1", names) == [1]
    assert chosen_classes("2", names) == [2]
    with pytest.raises(ConfigError, match=r"\[10\] are out of range.*; the class named '10' is number 1"):
        chosen_classes("10", names)
    with pytest.raises(ConfigError, match=r"classes \[0, 1\] are all named 'a'"):
        chosen_classes("a", ("a", "a"))


def words_of_ranks() -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert listed_classes("1", ["1", "0"]) == [1]
    return len(caught)


def test_what_all_ranks_see_alike_is_said_by_the_first(ranks: Server) -> None:
    assert ranks.run(2, words_of_ranks) == [1, 0]

"""Config classes, registries and dictionaries: what is taken, what is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from dit.config import (
    ConfigError,
    Registry,
    class_at,
    config,
    did_you_mean,
    flatten,
    from_dict,
    keys_of,
    merge,
    to_dict,
)
from tests.shapes import SHAPES, Round, Shape, Square


@config
class Inner:
    rate: float = 0.1  # a comment
    count: int = 3
    limit: float | None = None
    on: bool = False
    pair: tuple[float, float] = (0.9, 0.999)
    many: tuple[int, ...] = ()
    stage: Literal[0, 1, 2, 3] = 2
    size: Annotated[int, Field(ge=1)] = 1


@config
class Outer:
    name: str = "x"
    where: str | None = None
    from_: str | None = None
    folder: Path = Path("a/b")
    inner: Inner = Inner()
    shape: Annotated[Shape, SHAPES] = Round()
    shapes: tuple[Annotated[Shape, SHAPES], ...] = ()
    free: dict[str, int] = dataclasses.field(default_factory=dict)


@config
class Strict:
    needed: int
    low: int = 0

    def __post_init__(self) -> None:
        if self.low > self.needed:
            raise ConfigError(f"low must not be above needed, got {self.low} and {self.needed}")


@config
class Listing:
    one: Strict
    items: tuple[Strict, ...] = ()


def refusal(cls: type, values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, values)
    return str(caught.value)


# --- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rate", "1e-4", 1e-4),
        ("rate", "1E5", 1e5),
        ("rate", "0.25", 0.25),
        ("rate", 3, 3.0),
        ("rate", "inf", float("inf")),
        ("count", "1e5", 100_000),
        ("count", "12", 12),
        ("count", 2.0, 2),
        ("count", "-3e0", -3),
        ("limit", "1e-3", 1e-3),
        ("limit", None, None),
        ("pair", ["5e-1", "9e-1"], (0.5, 0.9)),
        ("many", ["1e2", 7], (100, 7)),
        ("on", True, True),
        ("on", "true", True),
    ],
)
def test_numbers_may_be_written_as_text(key: str, value: object, expected: object) -> None:
    found = getattr(from_dict(Inner, {key: value}), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("key", ["rate", "count", "limit", "pair", "many", "size", "stage"])
def test_a_truth_value_is_never_a_number(key: str, value: bool) -> None:
    given_ = [value, value] if key in ("pair", "many") else value
    assert key in refusal(Inner, {key: given_})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", 2.5),
        ("count", "1e-4"),
        ("count", "1.5e0"),
        ("count", "many"),
        ("rate", "fast"),
        ("rate", None),
        ("rate", "e"),
        ("count", "1e999"),
        ("pair", [0.1, 0.2, 0.3]),
        ("stage", 4),
        ("size", 0),
        ("on", "perhaps"),
    ],
)
def test_other_values_are_refused_and_shown(key: str, value: object) -> None:
    text = refusal(Inner, {key: value})
    assert text.startswith(key)
    assert "got" in text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"count": "many"}, "count: expected a whole number, got 'many'"),
        ({"count": 1.5}, "count: expected a whole number, got 1.5"),
        ({"rate": "fast"}, "rate: expected a number, got 'fast'"),
        ({"on": "maybe"}, "on: expected true or false, got 'maybe'"),
        ({"stage": 7}, "stage: expected 0, 1, 2 or 3, got 7"),
        ({"size": 0}, "size: expected 1 or more, got 0"),
        ({"cuont": 4}, "cuont: unknown key; did you mean count?"),
    ],
)
def test_a_class_called_by_itself_refuses_in_the_same_words(values: dict[str, object], says: str) -> None:
    for make in (lambda: Inner(**values), lambda: from_dict(Inner, values)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as error:
            make()
        assert str(error.value) == says


def test_a_copy_with_a_wrong_value_and_a_check_across_fields_are_refused_alike() -> None:
    with pytest.raises(ConfigError, match=r"^size: expected 1 or more"):
        dataclasses.replace(Inner(), size=-1)
    with pytest.raises(ConfigError, match=r"^low must not be above needed"):
        Strict(needed=1, low=2)


def test_how_a_section_or_a_list_is_written() -> None:
    assert refusal(Inner, {"many": 3}) == "many: expected a list, [...], got 3"
    assert refusal(Listing, {"one": "x", "items": "y"}).split("\n") == [
        "one: expected {needed: ..., ...}, got 'x'",
        "items: expected a list, [{needed: ..., ...}], got 'y'",
    ]


def test_a_config_is_frozen_hashable_keyword_only_and_equal_by_value() -> None:
    a, b = Inner(rate=0.5), from_dict(Inner, {"rate": 0.5})
    assert a == b
    assert hash(a) == hash(b)
    assert a != Inner(rate=0.6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.rate = 1.0  # type: ignore[misc]
    with pytest.raises(Exception, match="positional"):
        Inner(0.5)  # type: ignore[misc]


# --- keys --------------------------------------------------------------------------------------------------


def test_unknown_keys_are_all_named_with_the_nearest_valid_one() -> None:
    text = refusal(Outer, {"nam": "y", "inner": {"rat": 1}, "shape": {"name": "square", "syde": 2}})
    assert "nam: unknown key; did you mean name?" in text
    assert "inner.rat: unknown key; did you mean inner.rate?" in text
    assert "shape.syde: unknown key; did you mean side?" in text


def test_a_key_of_another_section_is_found() -> None:
    assert "rate: unknown key; did you mean inner.rate?" in refusal(Outer, {"rate": 1})


def test_a_key_like_nothing_gets_the_valid_ones() -> None:
    text = refusal(Inner, {"zzzzzz": 1})
    assert "valid here: rate, count, limit" in text


def test_a_missing_key_is_named() -> None:
    assert refusal(Inner, {"pair": [0.1]}) == "pair.1: is required and was not given"
    assert refusal(Strict, {}) == "needed: is required and was not given"


def test_a_check_across_fields_comes_out_as_it_was_written() -> None:
    assert refusal(Strict, {"needed": 1, "low": 2}) == "low must not be above needed, got 2 and 1"


def test_a_field_named_after_a_keyword_is_spelled_without_the_underscore() -> None:
    assert from_dict(Outer, {"from": "there"}).from_ == "there"
    assert to_dict(Outer(from_="there"))["from"] == "there"


def test_text_that_looks_like_a_number_stays_text() -> None:
    assert from_dict(Outer, {"name": "2024"}).name == "2024"
    assert "name" in refusal(Outer, {"name": 2024})


# --- registries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("square", Square()),
        ({"name": "square", "side": "1e1"}, Square(side=10.0)),
        (Round(radius=2.0), Round(radius=2.0)),
    ],
)
def test_a_member_comes_from_a_name_a_mapping_or_itself(value: object, expected: Shape) -> None:
    assert SHAPES.parse(value) == expected
    assert from_dict(Outer, {"shape": value}).shape == expected
    assert from_dict(Outer, {"shapes": [value]}).shapes == (expected,)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("sqare", "unknown shape 'sqare'; did you mean square?"),
        ({"name": "blob"}, "unknown shape 'blob'; valid here: round, square"),
        ({"side": 2}, "expected the name of a shape"),
        (7, "choices: round, square"),
        (None, "choices: round, square"),
        ({"name": "square", "corners": True}, "shape.corners"),
    ],
)
def test_what_is_no_member_is_refused(value: object, says: str) -> None:
    assert says in refusal(Outer, {"shape": value})


def test_a_registry_refuses_a_second_class_of_a_name_and_keeps_its_order() -> None:
    with pytest.raises(ConfigError, match="registered twice"):
        SHAPES.register("round")(Square)
    assert SHAPES.names() == list(SHAPES) == ["round", "square"]
    assert SHAPES.items() == [("round", Round), ("square", Square)]
    assert SHAPES.name_of(Square()) == "square"


def test_a_default_member_is_what_a_mapping_without_a_name_means() -> None:
    axis: Registry[Shape] = Registry("shape", default="oval")

    @axis.register("oval")
    @config
    class Oval(Shape):
        width: float = 1.0

    assert axis.parse({"width": 3}) == Oval(width=3.0)
    assert axis.parse({"name": "oval"}) == Oval()


# --- dictionaries ------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
shapes = st.one_of(
    st.builds(Round, radius=finite), st.builds(Square, side=finite, corners=st.integers(-99, 99))
)
inners = st.builds(
    Inner,
    rate=finite,
    count=st.integers(-(2**60), 2**60),
    limit=st.none() | finite,
    on=st.booleans(),
    pair=st.tuples(finite, finite),
    many=st.lists(st.integers(-9, 9), max_size=3).map(tuple),
    stage=st.sampled_from([0, 1, 2, 3]),
)
outers = st.builds(
    Outer,
    name=st.text(max_size=5),
    where=st.none() | st.text(max_size=5),
    from_=st.none() | st.text(max_size=5),
    folder=st.sampled_from([Path("a"), Path("/b/c")]),
    inner=inners,
    shape=shapes,
    shapes=st.lists(shapes, max_size=2).map(tuple),
    free=st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=2),
)


@given(outers)
@settings(max_examples=60, deadline=None)
def test_to_dict_and_from_dict_are_inverse(cfg: Outer) -> None:
    assert from_dict(Outer, to_dict(cfg)) == cfg


def test_to_dict_holds_plain_values_alone() -> None:
    found = to_dict(Outer(shapes=(Square(),)))
    assert found["folder"] == "a/b"
    assert found["shape"] == {"name": "round", "radius": 1.0}
    assert found["shapes"] == [{"name": "square", "side": 1.0, "corners": 4}]
    assert found["inner"]["pair"] == [0.9, 0.999]


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_merge_lays_one_on_the_other_key_by_key() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(base, {"a": {"b": 9}}) == {"a": {"b": 9, "c": 2}, "d": 3}
    assert merge(base, {"a": None}) == {"a": None, "d": 3}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


def test_merge_replaces_a_member_whose_name_changes() -> None:
    base = {"shape": {"name": "square", "side": 2}}
    assert merge(base, {"shape": {"name": "round"}}) == {"shape": {"name": "round"}}
    assert merge(base, {"shape": "round"}) == {"shape": "round"}
    assert merge(base, {"shape": {"name": "square", "corners": 5}}) == {
        "shape": {"name": "square", "side": 2, "corners": 5}
    }
    assert merge(base, {"shape": {"corners": 5}}) == {"shape": {"name": "square", "side": 2, "corners": 5}}
    assert merge({"shape": "square"}, {"shape": {"side": 3}}) == {"shape": {"name": "square", "side": 3}}


# --- finding things ----------------------------------------------------------------------------------------


def test_class_at_and_keys_of_walk_the_sections() -> None:
    assert class_at(Outer, ()) is Outer
    assert class_at(Outer, ("inner",)) is Inner
    assert class_at(Outer, ("inner", "rate")) is None
    assert class_at(Outer, ("shape",)) is None
    assert class_at(Outer, ("nowhere",)) is None
    keys = list(keys_of(Outer))
    assert {"name", "from", "inner", "inner.rate", "shape"} <= set(keys)
    assert not any(k.startswith("shape.") for k in keys)


def test_did_you_mean() -> None:
    assert did_you_mean("hune", ["heun", "euler"]) == "; did you mean heun?"
    assert did_you_mean("xyz", ["heun", "euler"]) == "; valid here: euler, heun"
    assert did_you_mean("xyz", []) == ""
    assert did_you_mean("s", ["S", "XL", "nano"]) == "; did you mean S?"  # in another case

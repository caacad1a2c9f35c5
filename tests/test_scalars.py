"""Words as numbers, truth values and text: decimal or refused, and never two meanings for one key."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.config import ConfigError, config, from_dict, to_dict
from dit.configfile import load
from dit.scalars import LARGEST, Scalar, is_scalar, number, resolved


@config
class Kinds:
    count: int = 1
    rate: float = 1.0
    text: str = ""
    note: str | None = None
    flag: bool = False
    limit: float | None = None
    stage: Literal[0, 1, 2, "auto", "on"] = 0
    mode: Literal["on", "off", "1e3"] = "off"
    either: int | str = 0
    layers: tuple[int | str, ...] = ()
    pair: tuple[float, float] = (0.0, 0.0)
    names: tuple[str, ...] = ()
    table: dict[str, Any] = None  # type: ignore[assignment]


def in_file(tmp_path: Path, key: str, text: str) -> Any:
    path = tmp_path / "x.yaml"
    path.write_text(f"{key}: {text}\n", encoding="utf-8")
    return getattr(load(Kinds, path), key)


def inline(tmp_path: Path, key: str, text: str) -> Any:
    path = tmp_path / "x.yaml"
    path.write_text(f"{{{key}: {text}}}\n", encoding="utf-8")
    return getattr(load(Kinds, path), key)


def on_the_command_line(tmp_path: Path, key: str, text: str) -> Any:
    path = tmp_path / "x.yaml"
    path.write_text("", encoding="utf-8")
    return getattr(load(Kinds, path, {key: text}), key)


WAYS = [in_file, inline, on_the_command_line]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("count", "010", 10),
        ("count", "08", 8),
        ("count", "-007", -7),
        ("count", "+5", 5),
        ("count", "1_000", 1000),
        ("count", "1e3", 1000),
        ("count", "1.5e3", 1500),
        ("count", "40.0", 40),
        ("count", "1e18", 10**18),
        ("count", str(LARGEST), LARGEST),
        ("count", "  40  ", 40),
        ("rate", "010", 10.0),
        ("rate", ".5", 0.5),
        ("rate", "1.", 1.0),
        ("rate", "-1e-4", -1e-4),
        ("rate", "1e300", 1e300),
        ("rate", "123456789012345678901234567890", 1.2345678901234568e29),
        ("rate", ".inf", math.inf),
        ("rate", "-inf", -math.inf),
        ("limit", "null", None),
        ("limit", "010", 10.0),
        ("stage", "02", 2),
        ("stage", "auto", "auto"),
        ("stage", "on", "on"),
        ("mode", "on", "on"),
        ("mode", "1e3", "1e3"),
        ("either", "010", 10),
        ("either", "'010'", "010"),
        ("either", "name", "name"),
        ("layers", "[3, a, 1e1]", (3, "a", 10)),
        ("pair", "[010, .5]", (10.0, 0.5)),
        ("flag", "yes", True),
        ("flag", "Off", False),
        ("flag", "1", True),
        ("flag", "true", True),
        ("names", "[010, yes, 2026-11-27, 1:30]", ("010", "yes", "2026-11-27", "1:30")),
    ],
)
def test_a_word_is_what_its_key_expects(
    tmp_path: Path, way: Any, key: str, text: str, expected: object
) -> None:
    found = way(tmp_path, key, text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["text", "note"])
@pytest.mark.parametrize(
    "text",
    [
        "010",
        "10",
        "0x10",
        "1:30",
        "1e3",
        "yes",
        "off",
        "2026-11-27",
        ".5",
        "1_000",
        "nan",
        "2024-01-01T00:00:00",
    ],
)
def test_text_stays_as_it_was_written(tmp_path: Path, way: Any, key: str, text: str) -> None:
    found = way(tmp_path, key, text)
    assert found == text
    assert type(found) is str


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["count", "rate", "limit"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0x10", "write 16"),
        ("0o10", "write 8"),
        ("0b101", "write 5"),
        ("1:30", "90"),
        ("1:00:00", "3600"),
        ("1__000", "write 1000"),
        ("\u22123", "write -3"),
        ("\uff11\uff12", "write 12"),
        ("\u0661\u0662", "got '\u0661\u0662'"),
        ("yes", "not a truth value"),
        (".nan", "NaN is none"),
        ("2026-11-27", "got '2026-11-27'"),
        ("1e999", "beyond what a float holds"),
        ("1e-999", "beyond what a float holds"),
        ("many", "got 'many'"),
    ],
)
def test_what_is_no_decimal_number_is_refused(
    tmp_path: Path, way: Any, key: str, text: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        way(tmp_path, key, text)
    assert str(caught.value).startswith(f"{key}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("count", "1,000", "write 1000"),
        ("count", "1,000,000", "write 1000000"),
        ("rate", "0,5", "write 0.5"),
        ("rate", "0,001", "write 0.001"),
        ("rate", "1,500", "write 1500, or 1.500 for a fraction"),
        ("rate", "1'000", "write 1000"),
        ("stage", "1,2", "got '1,2'"),
        ("count", "1.5", "got 1.5"),
        ("count", "1e-3", "got 0.001"),
        ("count", "inf", "got inf"),
        ("count", "9223372036854775808", "at most 9223372036854775807"),
        ("count", "1e19", "at most 9223372036854775807"),
        ("flag", "2", "got 2"),
        ("flag", "010", "got 10"),
        ("stage", "0x1", "got '0x1'"),
        ("stage", "3", "got 3"),
    ],
)
def test_numbers_in_other_dress_are_refused_on_the_command_line(
    tmp_path: Path, key: str, text: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        on_the_command_line(tmp_path, key, text)
    assert says in str(caught.value)


def test_a_word_that_no_key_is_for_is_what_it_is_by_itself(tmp_path: Path) -> None:
    found = in_file(tmp_path, "table", "{a: 010, b: [yes, x], c: '010', d: 1e-3}")
    assert found == {"a": 10, "b": [True, "x"], "c": "010", "d": 1e-3}


def test_null_is_no_text_and_the_message_knows_the_home_folder(tmp_path: Path) -> None:
    for text in ("~", "null", ""):
        with pytest.raises(ConfigError, match=r"text: expected text, and null .* home folder is ~/"):
            in_file(tmp_path, "text", text)
        assert in_file(tmp_path, "note", text) is None


def test_a_padded_sweep_is_as_many_runs_as_it_has_elements(tmp_path: Path) -> None:
    """`seq -w 1 120`: of 001 to 120 no two are one number, and each is what it says."""
    for key, kind in (("count", int), ("text", str), ("either", int)):
        found = [on_the_command_line(tmp_path, key, f"{n:03d}") for n in range(1, 121)]
        assert found == [kind(f"{n:03d}") for n in range(1, 121)]


@given(st.integers(-LARGEST, LARGEST), st.integers(0, 4))
def test_whole_numbers_are_themselves_with_zeros_before_them(value: int, zeros: int) -> None:
    text = f"{'-' if value < 0 else ''}{'0' * zeros}{abs(value)}"
    assert number(text) == value
    assert from_dict(Kinds, {"count": Scalar(text), "rate": Scalar(text)}).count == value


@given(st.floats(allow_nan=False))
def test_what_python_writes_of_a_float_is_read_as_it(value: float) -> None:
    assert from_dict(Kinds, {"rate": Scalar(repr(value))}).rate == value


@given(st.text(max_size=12))
def test_any_word_is_a_number_or_itself_or_refused(text: str) -> None:
    try:
        found = number(text)
    except ValueError as error:
        assert "write" in str(error) or "beyond" in str(error)  # noqa: PT017
    else:
        assert found == text or isinstance(found, int | float)
        if isinstance(found, int | float) and not math.isnan(found):
            assert float(text.replace("inf", "inf").replace(".i", "i").replace(".I", "I")) == found


def test_words_without_a_key_are_what_they_are_by_themselves() -> None:
    given_ = {"a": Scalar("010"), "b": [Scalar("yes"), "yes"], "c": {"d": Scalar("1e-3")}, "e": None}
    assert resolved(given_) == {"a": 10, "b": [True, "yes"], "c": {"d": 1e-3}, "e": None}
    assert is_scalar("010")
    assert not is_scalar("0x10")


def test_a_resolved_configuration_holds_no_words() -> None:
    plain = to_dict(from_dict(Kinds, {"text": Scalar("010"), "mode": Scalar("on"), "names": [Scalar("1")]}))
    assert [type(plain[key]) for key in ("text", "mode")] == [str, str]
    assert type(plain["names"][0]) is str

"""YAML of configurations: merge keys, keys given once, what no configuration holds, and writing."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dit.scalars import resolved
from dit.yamlfile import YamlError, dump_yaml, parse_yaml


def parsed(text: str) -> Any:
    return resolved(parse_yaml(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", {"b": {"x": 1, "y": 3}}),
        ("a: &a {x: 1}\nb: {x: 5, <<: *a}\n", {"b": {"x": 5}}),
        ("b:\n  <<: {x: 1}\n  y: 2\n", {"b": {"x": 1, "y": 2}}),
        ("a: &a {x: 1}\nc: &c {x: 2, z: 3}\nb: {<<: [*a, *c]}\n", {"b": {"x": 1, "z": 3}}),
        ("a: &a {x: 1}\nc: &c {<<: *a, y: 2}\nb: {<<: *c, y: 3}\n", {"b": {"x": 1, "y": 3}}),
        ("p: {q: &a {<<: {x: 1, y: 1}, y: 2}}\nb: {<<: *a}\n", {"b": {"x": 1, "y": 2}}),
        ("a: &a {s: {t: 1, u: 2}}\nb: {<<: *a, s: {t: 3}}\n", {"b": {"s": {"t": 3}}}),
        ("b: {<<: []}\n", {"b": {}}),
        ("b: {'<<': 1}\n", {"b": {"<<": 1}}),
        ("b: {=: 1}\n", {"b": {"=": 1}}),
        ("a: &a 3\nb: [*a, *a]\n", {"b": [3, 3]}),
        ("b: !!str 010\n", {"b": "010"}),
        ("b: !!int '010'\n", {"b": 10}),
        ("b: |\n  010\n", {"b": "010\n"}),
        ("---\nb: 1\n...\n", {"b": 1}),
        ("", None),
        ("# nothing\n", None),
    ],
)
def test_what_is_read(text: str, expected: Any) -> None:
    found = parsed(text)
    assert found is None if expected is None else found["b"] == expected["b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "'<<' is given twice (line 2); several are merged with"),
        ("a: &a 3\nb:\n  <<: *a\n", "<< merges keys and values"),
        ("b: {<<: [3]}\n", "<< merges keys and values"),
        ("b: {<<: [[{}]]}\n", "<< merges keys and values"),
        ("a: &a {x: *a}\n", "*a stands inside itself (line 1)"),
        ("a: &a\n  <<: *a\n", "*a stands inside itself (line 2)"),
        ("a: &a [1, *a]\n", "*a stands inside itself"),
        ("b: *c\n", "undefined alias 'c'"),
        ("x: {k: 1,\n k: 2}\n", "'k' is given twice (line 2)"),
        ("{k: 1, 'k': 2}\n", "'k' is given twice"),
        ("? [a]\n: 1\n", "expected a key, got a list or a mapping (line 1)"),
        ("~: 1\n", "expected a key, got ~ (line 1)"),
        ("010: 1\n", "expected a key, got 010"),
        ("t:\n\tx: 1\n", "indented with spaces"),
        ("a: 1\n---\na: 2\n", "expected a single document"),
        ("b: !!python/name:os.system\n", "is not known here (line 1)"),
        ("b: !!timestamp 2026-11-27\n", "is not known here"),
        ("b: !!set {x, y}\n", "is not known here"),
        ("b: !mine {x: 1}\n", "is not known here"),
        ("a" + "[" * 5000, "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse_yaml(text if says != "nested too deeply" else text[text.index("[") :])
    assert says in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text()
    | st.sampled_from(["010", "08", "1e5", "1:30", "yes", "~", "null", "<<", "=", "", "0x10", ".inf", "1_0", "# a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
def test_what_is_written_is_read_as_it_was_by_us_and_by_others(value: Any) -> None:
    text = dump_yaml({"value": value})
    assert text.isascii()
    assert parsed(text) == {"value": value}
    assert yaml.safe_load(text) == {"value": value}

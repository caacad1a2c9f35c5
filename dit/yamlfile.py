"""YAML as configurations have it: plain words stay words (scalars.py), keys are text and given once, `<<` merges.

What a word is, the key that it is for decides: YAML 1.1 would read 010 as 8, 1:30 as 90 and 2026-11-27 as a date.
"""

from __future__ import annotations

from typing import Any

import yaml

from dit.errors import UserError
from dit.scalars import NULL, Scalar, is_scalar, resolved

PLAIN = "!plain"  # the tag of a scalar without quotes and without a tag
TAG = "tag:yaml.org,2002:"
MERGE = "<<"


class YamlError(UserError):
    """Text that is no YAML, or YAML that is no configuration. The text says where."""


class _Composer(yaml.SafeLoader):
    """Reads text to nodes; what is plain is told apart from what is quoted."""

    def __init__(self, text: str):
        super().__init__(text)
        self._open: list[Any] = []  # anchors of what is being read, from the outermost in

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self._open:
            mark: Any = event.start_mark
            raise YamlError(f"*{event.anchor} stands inside itself (line {mark.line + 1})")
        self._open.append(event.anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return PLAIN if implicit[0] else f"{TAG}str"
        return f"{TAG}map" if kind is yaml.MappingNode else f"{TAG}seq"


def parse_yaml(text: str) -> Any:
    """Plain values, with a `Scalar` for each word that may be a number or a truth value. YamlError for bad YAML."""
    composer = _Composer(text)
    try:
        node = composer.get_single_node()
        return None if node is None else _value(node)
    except yaml.YAMLError as error:
        hint = " (YAML is indented with spaces)" if "'\\t'" in str(error) else ""
        said = str(error).replace('in "<unicode string>", ', "at ")  # the caller knows the file's name
        raise YamlError(f"{said}{hint}") from None
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    finally:
        composer.dispose()


def dump_yaml(values: Any) -> str:
    """YAML of plain values, which this module and any other reader of YAML read alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    pass


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(f"{TAG}str", text, style="'" if is_scalar(text) else None)


_Dumper.add_representer(str, _quoted)


def _line(node: yaml.Node) -> int:
    mark: Any = node.start_mark
    return int(mark.line) + 1


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _word(node)
    if node.tag not in (f"{TAG}map", f"{TAG}seq"):
        raise _unknown(node)
    return _mapping(node) if isinstance(node, yaml.MappingNode) else [_value(item) for item in node.value]


def _written(node: yaml.Node) -> str:
    return str(node.value or "nothing") if isinstance(node, yaml.ScalarNode) else "a list or a mapping"


def _unknown(node: yaml.Node) -> YamlError:
    return YamlError(f"tag {node.tag} is not known here (line {_line(node)})")


def _word(node: yaml.ScalarNode) -> Any:
    text = str(node.value)
    if node.tag == PLAIN:
        return None if text in ("", *NULL) else Scalar(text) if is_scalar(text) else text
    if node.tag == f"{TAG}str":
        return text
    if node.tag in (f"{TAG}int", f"{TAG}float", f"{TAG}bool"):
        return Scalar(text)
    raise _unknown(node)


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    """A mapping's own keys over those that it merges; of several that are merged the first counts."""
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    seen: set[str] = set()
    for key_node, value_node in node.value:
        is_merge = key_node.tag == PLAIN and key_node.value == MERGE
        key = resolved(_value(key_node))
        if not isinstance(key, str):
            raise YamlError(
                f"expected a key, got {_written(key_node)} (line {_line(key_node)}); quote it if it is meant as text"
            )
        if key in seen:
            more = "; several are merged with <<: [*a, *b]" if is_merge else ""
            raise YamlError(f"key '{key}' is given twice (line {_line(key_node)}){more}")
        seen.add(key)
        if is_merge:
            merged = _merged(value_node)
        else:
            own[key] = _value(value_node)
    return {**merged, **own}


def _merged(node: yaml.Node) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in reversed(node.value) if isinstance(node, yaml.SequenceNode) else (node,):
        if not isinstance(part, yaml.MappingNode):
            raise YamlError(
                f"<< merges keys and values, or a list of such; got {_written(part)} (line {_line(part)})"
            )
        found |= _mapping(part)
    return found

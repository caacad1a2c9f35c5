"""dit/commandline/schema.json says what the tools and classes say, and its stand-ins judge keys as the classes do."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from dit.commandline.argv import Tool
from dit.commandline.helptext import help_text
from dit.commandline.schema import FILE, StandIns, schema_of, stand_ins, text_of
from dit.config import ConfigError, Registry, annotation_at, class_at, from_dict, keys_of, parts_of, to_dict
from dit.configfile import overridden
from tools.schema import tools

TOOLS = tools()
PAIRS = {name: (tool, stand_ins().tool(name)) for name, tool in TOOLS.items()}
CONFIGURED = {name: (live.config, ours.config) for name, (live, ours) in PAIRS.items() if live.config}


def commands(tool: Any) -> dict[str, Any]:
    return {"": tool.commands} if callable(tool.commands) else dict(tool.commands)


def test_the_file_is_what_the_tools_and_classes_say() -> None:
    assert text_of(schema_of(TOOLS)) == FILE.read_text(encoding="utf-8"), (
        "dit/commandline/schema.json is old: run `make schema`"
    )


def test_the_stand_ins_say_the_same_as_what_they_stand_for() -> None:
    ours = {name: ours for name, (_, ours) in PAIRS.items()}
    assert schema_of(ours) == json.loads(FILE.read_text(encoding="utf-8"))
    for live, stand_in in PAIRS.values():
        for topic in ("", "all"):
            said = [
                [help_text(f, "it", tool.config, tool.choices, topic) for f in commands(tool).values()]
                for tool in (live, stand_in)
            ]
            assert said[0] == said[1]


def test_each_flag_says_what_it_means() -> None:
    rows = [
        (name, command, row["name"], row.get("note", ""))
        for name, data in stand_ins()._schema["tools"].items()
        for command, function in ({"": data["command"]} if data["command"] else data["commands"]).items()
        for row in function["parameters"]
        if row["kind"] != "rest"
    ]
    assert len(rows) > 100
    assert [row for row in rows if len(row[3].split()) < 3] == []
    assert [row for row in rows if len(row[3]) > 110] == []


# --- what is refused ---------------------------------------------------------------------------------------


def choices(cls: type) -> Iterator[tuple[tuple[str, ...], Registry[Any]]]:
    for key in keys_of(cls):
        *above, name = key.split(".")
        parent = class_at(cls, tuple(above))
        hint = annotation_at(parent, name) if parent is not None else None
        yield from ((tuple(key.split(".")), part) for part in parts_of(hint) if isinstance(part, Registry))


def unknown(cls: Any, overrides: dict[str, str]) -> list[str]:
    """What a class says of keys and choices that there are not; sizes are the model's own table, and no choice."""
    try:
        from_dict(cls, overridden(cls, {}, overrides)[0])
    except ConfigError as error:
        # "unknown size" is of a value, which is looked at later
        return [line for line in str(error).splitlines() if "unknown " in line and "unknown size" not in line]
    return []


def misspelt(word: str, draws: random.Random) -> str:
    place = draws.randrange(len(word))
    letter = draws.choice("abcxyz_.")
    before, after = word[:place], word[place + 1 :]
    return draws.choice([before + after, before + letter + word[place:], before + letter + after, word])


@pytest.mark.parametrize("name", CONFIGURED)
def test_mistyped_keys_are_refused_in_the_words_of_the_classes(name: str) -> None:
    live, ours = CONFIGURED[name]
    draws = random.Random(7)
    keys = list(keys_of(live))
    for key, registry in choices(live):
        keys += [f"{'.'.join(key)}.{field}" for _, member in registry.items() for field in keys_of(member)]
    typed = [misspelt(key, draws) for key in keys for _ in range(3)]
    refused = 0
    for key in typed:
        said = unknown(live, {key: "1"})
        assert unknown(ours, {key: "1"}) == said, key
        refused += bool(said)
    assert refused > 50
    assert refused < len(typed)
    for key, registry in choices(live):
        for choice in registry.names():
            for word in (choice, misspelt(choice, draws)):
                override = {".".join(key): word}
                assert unknown(ours, override) == unknown(live, override), override


def test_every_choice_with_its_defaults_is_taken() -> None:
    """What the classes write the stand-ins read, of every class that can be built from its defaults."""
    made = 0
    for live, ours in CONFIGURED.values():
        both = zip(choices(live), choices(ours), strict=True)
        pairs = [(m, our[name]) for (_, registry), (_, our) in both for name, m in registry.items()]
        for cls, stand_in in pairs:
            try:
                values = {k: v for k, v in to_dict(cls()).items() if k != "name"}
            except ValueError:
                continue
            made += 1
            assert to_dict(from_dict(stand_in, values)) == to_dict(cls())
    assert made > 60


def test_a_type_that_has_no_word_is_an_error() -> None:
    def work(*, place: complex = 1j) -> None: ...

    with pytest.raises(TypeError, match="no word for the type"):
        schema_of({"it": Tool(work)})


def test_an_unknown_tool_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        StandIns({"tools": {}, "classes": {}, "registries": {}}).tool("train")

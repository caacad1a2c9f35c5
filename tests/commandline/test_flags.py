"""Fields of a config class as flags: types, defaults, help, checks, and parameters of the command's own."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest

from dit.commandline.cli import help_text, parse
from dit.commandline.flags import options_as_flags
from dit.config import ConfigError, config
from tests.commands import call


@config
class Knobs:
    """What can be turned."""

    power: float = 1.0  # watts
    mode: Literal["slow", "fast"] = "slow"  # how it goes
    parts: tuple[str, ...] | None = None  # their names
    rounds: int
    weight: int | None = None  # grams

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}, expected at least 1")


def made() -> tuple[Callable[..., Any], list[Any]]:
    seen: list[Any] = []

    @options_as_flags
    def turn(
        place: str, *, parts: Annotated[str, "a file"] = "none", knobs: Knobs, more: int = 3, **key_keys: str
    ) -> None:
        """Turn it."""
        seen.append((place, replace(knobs, parts=(parts,)), more, key_keys))

    return turn, seen


def test_the_function_gets_the_options_built() -> None:
    turn, seen = made()
    assert call(turn, "here", "--rounds=2", "--mode", "fast", "--power=3", "--key.x=4") == 0
    turn("there", rounds=5, more=4)
    assert seen == [
        ("here", Knobs(power=3.0, mode="fast", parts=("none",), rounds=2), 3, {"key.x": "4"}),
        ("there", Knobs(parts=("none",), rounds=5), 4, {}),
    ]


def test_its_signature_has_the_fields_in_the_place_of_the_class() -> None:
    turn, _ = made()
    parameters = inspect.signature(turn).parameters
    assert list(parameters) == ["place", "parts", "power", "mode", "rounds", "weight", "more", "key_keys"]
    assert (parameters["power"].default, parameters["parts"].default) == (1.0, "none")
    assert parameters["rounds"].default is inspect.Parameter.empty
    text = help_text(turn, "turn")
    assert "--power                float, default 1.0; watts" in text
    assert "--mode                 slow | fast, default 'slow'; how it goes" in text
    assert "--parts                str, default 'none'; a file" in text
    assert "--rounds               int, required\n" in text
    assert "--weight               int | null, default null; grams" in text


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (("here",), 2, "missing --rounds"),
        (("here", "--rounds=2", "--knobs=1"), 2, "unknown flag --knobs"),
        (("here", "--rounds=two"), 2, "--rounds=two: "),
        (("here", "--rounds=2", "--mode=quick"), 2, "--mode=quick: "),
        (("here", "--rounds=0"), 1, "rounds is 0, expected at least 1"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], status: int, complaint: str, capsys: Any) -> None:
    turn, seen = made()
    assert call(turn, *words) == status
    assert complaint in capsys.readouterr().err
    assert not seen


def test_options_of_a_class_of_many_fields_are_all_there() -> None:
    """Each field of it is a flag that is understood, whatever its type."""
    from dit.data.foreign.index import IndexOptions
    from tools.shards import index

    names = {name for name in inspect.signature(IndexOptions).parameters if name != "classes"}
    assert names <= set(inspect.signature(index).parameters)
    given = {"array": "moments", "scale": "0.5", "block": "7", "image_size": "64", "flipped": "flip.npy"}
    words = ["in", "out", "--codec=unknown", *(f"--{name}={text}" for name, text in given.items())]
    parsed = parse(index, words)
    assert given.keys() <= (parsed if isinstance(parsed, dict) else parsed[1]).keys()

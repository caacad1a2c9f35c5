"""What --help says of the keys: each key of each configuration has a meaning, however its line is broken."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import Field

import dit
from dit.commandline.helptext import BASE, describe, help_text
from dit.config import Registry, config
from tests.shapes import SHAPES

# What the program writes by itself and nobody types: formats, whose fields their docstrings and readers explain.
RECORDS = {
    "Block",
    "Done",
    "Foreign",
    "Manifest",
    "Names",
    "Part",
    "Shard",
    "Split",
    "UnknownCodec",
    "Unreadable",
}


def modules() -> Iterator[Any]:
    for module in pkgutil.walk_packages(dit.__path__, "dit."):
        yield importlib.import_module(module.name)
    yield importlib.import_module("tools.likelihood")


def config_classes() -> dict[str, type]:
    """Every @config class of the project that is typed in a file or on a command line, by its full name."""
    found: dict[str, type] = {}
    for module in modules():
        for thing in list(vars(module).values()):
            members = [m for _, m in thing.items()] if isinstance(thing, Registry) else [thing]
            for cls in members:
                is_config = isinstance(cls, type) and "__pydantic_config__" in vars(cls)
                if is_config and dataclasses.is_dataclass(cls) and cls.__name__ not in RECORDS:
                    found[f"{cls.__module__}.{cls.__name__}"] = cls
    return found


CLASSES = config_classes()


def test_the_classes_are_found() -> None:
    names = {name.rsplit(".", 1)[-1] for name in CLASSES}
    assert {"Experiment", "AutoencoderExperiment", "ClassifierExperiment", "EncodeOptions", "Heun"} <= names
    assert len(names) > 100


@pytest.mark.parametrize("name", CLASSES)
def test_each_key_says_what_it_means(name: str) -> None:
    """Three words at least: "steps" alone is a unit of nothing in particular."""
    notes = {f.name: describe(CLASSES[name], f.name) for f in dataclasses.fields(CLASSES[name])}
    assert {key: note for key, note in notes.items() if len(note.split()) < 3} == {}
    assert {key: note for key, note in notes.items() if len(note) > 110 or "noqa" in note} == {}


# --- where a comment may stand -----------------------------------------------------------------------------


@config
class Section:
    """A part of its own."""

    inner: int = 1  # its number of things


@config
class Wrapped:
    """Fields whose comments the formatter may move about."""

    plain: int = 1  # behind the value
    # fmt: off
    bracket: float = (
        1.5  # inside the brackets
    )
    closing: Annotated[
        float, Field(gt=0)
    ] = 2.0  # behind the last bracket
    first: Annotated[  # behind the first bracket
        int, Field(ge=0)
    ] = 0
    inside: int = (
        # in a line of its own
        3
    )
    # fmt: on
    # in the line above,
    # and in two of them
    above: int = 2
    # why it is so, for whoever reads the code
    both: int = 3  # what it means
    text: str = "no # comment"
    sharp: str = "# neither"  # with a # in it: # is kept
    section: Section = Section()
    named: Section = Section()  # which has its own word
    quiet: int = 4  # type: ignore[misc, unused-ignore]

    # Not a field's: a blank line is between.

    silent: int = 5

    def method(self) -> int:
        value: int = 1  # of no field
        return value


@config
class Child(Wrapped):
    plain: int = 2  # said anew


@pytest.mark.parametrize(
    ("field", "note"),
    {
        "plain": "behind the value",
        "bracket": "inside the brackets",
        "closing": "behind the last bracket",
        "first": "behind the first bracket",
        "inside": "in a line of its own",
        "above": "in the line above, and in two of them",
        "both": "what it means",
        "text": "",
        "sharp": "with a # in it: # is kept",
        "section": "A part of its own.",
        "named": "which has its own word",
        "quiet": "",
        "silent": "",
    }.items(),
)
def test_a_comment_is_found_wherever_it_stands(field: str, note: str) -> None:
    assert describe(Wrapped, field) == note


def test_a_field_is_described_where_it_is_defined() -> None:
    assert describe(Child, "plain") == "said anew"
    assert describe(Child, "both") == "what it means"


def test_a_class_without_a_source_has_no_notes_and_no_error() -> None:
    made = config(type("Made", (), {"__annotations__": {"size": int}, "size": 3, "__module__": __name__}))
    assert describe(made, "size") == ""


def test_help_shows_the_words_that_a_key_takes_and_its_meaning() -> None:
    def work(**overrides: str) -> None:
        """Do it."""

    lines = help_text(work, "it", dit_experiment(), {"shape": SHAPES}, "all").splitlines()
    assert set(BASE.splitlines()) <= set(lines)
    rows = {line.split()[0]: " ".join(line.split()) for line in reversed(lines) if line.startswith("  ")}
    assert (
        rows["train.precision"] == "train.precision = fp32 bf16 = fp32 weights and autocast matrix products"
    )
    assert rows["val.every"] == "val.every = 0 steps between held-out losses; 0 = never; needs data.val"
    assert rows["stride"].endswith("ddim = one integer stride from k = 0")
    assert rows["zero.offload"].endswith("all = parameters too (none | optimizer | all)")
    assert rows["latents.norm"].startswith("latents.norm = dataset the data's mean and std")
    assert rows["model.stored_position"].startswith("model.stored_position = false keep the position table")
    assert rows["objective.path"] == "objective.path = linear how data become noise: alpha and sigma of t"
    assert rows["train.micro_batch"].startswith("train.micro_batch = null samples")
    assert rows["optim.betas"].startswith("optim.betas = [0.9, 0.999] decay")
    for row in rows.values():
        assert len(row) < 200
        assert not row.split(" = ")[1:] or row.split(" = ")[1].split()[:1] not in (
            ["None"],
            ["True"],
            ["False"],
        )


def test_help_shows_defaults_and_types_of_flags_as_one_types_them() -> None:
    def work(*, out: str | None = None, flip: bool = True, name: str = "all", rate: float = 0.1) -> None:
        """Do it."""

    lines = [" ".join(line.split()) for line in help_text(work, "it", None, {}, "").splitlines()]
    for row in (
        "--out str | null, default null",
        "--flip bool, default true",
        "--name str, default 'all'",
        "--rate float, default 0.1",
    ):
        assert row in lines


def dit_experiment() -> type:
    return importlib.import_module("dit.experiments.diffusion").Experiment  # type: ignore[no-any-return]

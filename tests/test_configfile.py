"""YAML files with bases and overrides: merging, numbers, text that stays text, and errors that name the file."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Annotated, Literal

import pytest

from dit.config import ConfigError, config, from_dict, to_dict
from dit.configfile import load, overridden, read_yaml, write_yaml
from dit.scalars import resolved
from tests.shapes import SHAPES, Round, Shape, Square


@config
class Train:
    steps: int = 10
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    micro: int | None = None
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    names: tuple[str, ...] = ()


@config
class Run:
    run_dir: str = "runs/x"
    note: str | None = None
    train: Train = Train()
    shape: Annotated[Shape, SHAPES] = Round()


@config
class Limits:
    low: int = 0
    high: int = 1
    even: int = 2

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ConfigError("limits.low must not be above limits.high")
        if self.even % 2:
            raise ConfigError(f"even must be even, got {self.even}")


@config
class Checked:
    odd: int = 1
    limits: Limits = Limits()
    shape: Annotated[Shape, SHAPES] = Round()

    def __post_init__(self) -> None:
        if self.odd % 2 == 0:
            raise ConfigError(f"odd is {self.odd}, and that is even")


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def refusal(path: Path, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Run, path, overrides)
    return str(caught.value)


# --- bases -------------------------------------------------------------------------------------------------


def test_a_file_lies_on_its_base_which_is_found_beside_it(write) -> None:
    write("base/grand.yaml", "train: {steps: 1, lr: 2}\nnote: from afar\n")
    write("base/parent.yaml", "base: grand.yaml\ntrain: {steps: 3}\n")
    child = write("child.yaml", "base: base/parent.yaml\ntrain: {compile: true}\n")
    assert load(Run, child) == Run(note="from afar", train=Train(steps=3, lr=2.0, compile=True))


def test_a_changed_name_replaces_a_member_and_the_same_name_keeps_its_fields(write) -> None:
    write("base.yaml", "shape: {name: square, side: 3, corners: 5}\n")
    same = write("same.yaml", "base: base.yaml\nshape: {corners: 6}\n")
    other = write("other.yaml", "base: base.yaml\nshape: {name: round}\n")
    short = write("short.yaml", "base: base.yaml\nshape: round\n")
    assert load(Run, same).shape == Square(side=3.0, corners=6)
    assert load(Run, other).shape == Round()
    assert load(Run, short).shape == Round()


def test_bases_that_lead_back_are_refused(write) -> None:
    a = write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: a.yaml\n")
    assert "its base files lead back to itself" in refusal(a)


def test_a_missing_file_is_named_with_the_nearest(write, tmp_path: Path) -> None:
    write("digits.yaml", "")
    assert "no such config file; did you mean digits.yaml?" in refusal(tmp_path / "digit.yaml")
    missing = write("x.yaml", "base: nowhere.yaml\n")
    assert str(tmp_path / "nowhere.yaml") in refusal(missing)
    assert "no such config file" in refusal(tmp_path / "no" / "folder.yaml")
    assert f"is a folder, expected a YAML file, such as {tmp_path / 'digits.yaml'}" in refusal(tmp_path)


@pytest.mark.parametrize("value", ["3", "[a.yaml, b.yaml]", "true"])
def test_a_base_that_is_no_file_name_is_refused(write, value: str) -> None:
    assert "base" in refusal(write("x.yaml", f"base: {value}\n"))


# --- YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  steps: 1\n  lr: 2\n  steps: 3\n", "key 'steps' is given twice (line 4)"),
        ("note: a\nnote: b\n", "key 'note' is given twice (line 2)"),
        ("train: [1\n", "not valid YAML"),
        (
            "run_dir: x\ndata: {path: a\nmodel: {size: b}\n",
            "flow mapping\n  at line 2, column 7:",
        ),
        ("- 1\n- 2\n", "expected keys and values, got a list"),
        (
            "params,flops,loss\n" + "1,2,3\n" * 99,
            "got 'params,flops,loss 1,2,3 1,2,3 1,2,3 1,2,3 1,2,3 1,2,3 ...'",
        ),
        ("run_dir: {{folder}}\n", "not valid YAML"),
        ("1: 2\n", "1"),
        ("on: 2\n", "expected a key, got on (line 1)"),
        ("train: {1: 2}\n", "expected a key, got 1 (line 1)"),
        ("train:\n", "train"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_bad_files_are_named_and_the_fault_is_said(write, text: str, says: str) -> None:
    path = write("bad.yaml", text)
    found = refusal(path)
    assert str(path) in found
    assert says in found


def test_an_empty_file_is_all_defaults(write) -> None:
    assert load(Run, write("empty.yaml", "")) == Run()


@pytest.mark.parametrize(("text", "steps"), [("1e5", 100_000), ("1e2", 100), ("'7'", 7), ("1_000", 1000)])
def test_whole_numbers_in_yaml(write, text: str, steps: int) -> None:
    assert load(Run, write("x.yaml", f"train: {{steps: {text}}}\n")).train.steps == steps


@pytest.mark.parametrize(
    ("text", "lr"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("'1E-4'", 1e-4), ("3", 3.0), (".5", 0.5)]
)
def test_fractions_in_yaml(write, text: str, lr: float) -> None:
    assert load(Run, write("x.yaml", f"train: {{lr: {text}}}\n")).train.lr == lr


def test_a_truth_value_is_no_number_in_yaml_and_on_the_command_line(write) -> None:
    assert "expected a number, not a truth value" in refusal(write("x.yaml", "train: {steps: yes}\n"))
    assert "train.steps" in refusal(write("y.yaml", ""), {"train.steps": "true"})


# --- errors name where a key came from ---------------------------------------------------------------------


def test_each_problem_names_its_own_source(write) -> None:
    base = write("base.yaml", "train: {stepz: 1}\n")
    child = write("child.yaml", "base: base.yaml\nnoet: x\n")
    lines = refusal(child, {"train.lr": "fast", "shape.radios": "1"}).splitlines()
    where = {line.split(":")[0]: line for line in lines}
    assert f"did you mean train.steps? (in {base})" in where["train.stepz"]
    assert f"did you mean note? (in {child})" in where["noet"]
    assert where["train.lr"].endswith("got 'fast' (in the command line)")
    assert "(in the command line)" in where["shape"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({}, "limits: limits.low must not be above limits.high (in FILE)"),
        (
            {"limits.low": "9"},
            "limits: limits.low must not be above limits.high (in FILE and the command line)",
        ),
        ({"limits.low": "0", "limits.even": "3"}, "limits: even must be even, got 3 (in the command line)"),
        ({"limits.low": "0", "odd": "2"}, "odd is 2, and that is even (in the command line)"),
        (
            {"limits.low": "0", "shape": "rond"},
            "shape: unknown shape 'rond'; did you mean round? (in the command line)",
        ),
    ],
)
def test_a_problem_of_several_keys_names_where_those_came_from(
    write, overrides: dict[str, str], line: str
) -> None:
    path = write("x.yaml", "limits: {low: 3, high: 1, even: 2}\nodd: 1\nshape: {name: square, side: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load(Checked, path, overrides)
    assert str(caught.value) == line.replace("FILE", str(path))


@pytest.mark.parametrize("source", ["file", "command line"])
@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("run_dir", "null", "run_dir: expected text, and null"),
        ("run_dir", "~", "run_dir: expected text, and null"),
        ("run_dir", "''", "run_dir: is empty, which a shell makes of a variable that is not set ("),
        ("note", "''", "note: is empty, which a shell makes of a variable that is not set; null is none ("),
        ("train.names", "null", "train.names: expected a list, [...], got null"),
    ],
)
def test_no_text_is_refused_wherever_it_comes_from(
    write, source: str, key: str, text: str, says: str
) -> None:
    *above, name = key.split(".")
    content = f"{above[0]}: {{{name}: {text}}}\n" if above else f"{name}: {text}\n"
    given = {} if source == "file" else {key: text.strip("'")}
    assert refusal(write("x.yaml", content if source == "file" else ""), given).startswith(says)


def test_an_overridden_fault_is_no_fault(write) -> None:
    assert load(Run, write("x.yaml", "train: {steps: many}\n"), {"train.steps": "3"}).train.steps == 3


# --- overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("run_dir", "2024", "2024"),
        ("run_dir", "1e-4", "1e-4"),
        ("run_dir", "true", "true"),
        ("run_dir", "a,b", "a,b"),
        ("run_dir", "./null", "./null"),
        ("run_dir", "None", "None"),
        ("note", "2024", "2024"),
        ("note", "null", None),
        ("note", "None", None),
        ("note", "~", None),
        ("note", "~/a", "~/a"),
        ("train.steps", "1e3", 1000),
        ("train.lr", "1e-4", 1e-4),
        ("train.betas", "0.5,0.6", (0.5, 0.6)),
        ("train.betas", "[0.5, 0.6]", (0.5, 0.6)),
        ("train.names", "*.bias", ("*.bias",)),
        ("train.names", "[*.bias, 1e3]", ("*.bias", "1e3")),
        ("train.names", "['a', \"b.*\"]", ("a", "b.*")),
        ("train.names", "[]", ()),
        ("train.micro", "null", None),
        ("train.micro", "8", 8),
        ("train.compile", "true", True),
        ("train.precision", "bf16", "bf16"),
        ("shape", "square", Square()),
        ("shape.radius", "2", Round(radius=2.0)),
        ("shape", "{name: square, side: 2}", Square(side=2.0)),
    ],
)
def test_an_override_has_the_type_of_its_key(write, key: str, text: str, expected: object) -> None:
    cfg = load(Run, write("x.yaml", "shape: round\n"), {key: text})
    value: object = cfg
    for part in key.split(".")[: 1 if key.startswith("shape") else None]:
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_apply_in_turn(write) -> None:
    cfg = load(Run, write("x.yaml", ""), {"shape": "square", "shape.side": "2"})
    assert cfg.shape == Square(side=2.0)


def test_a_choices_name_goes_before_its_fields_in_any_order(write) -> None:
    for overrides in ({"shape": "square", "shape.side": "2"}, {"shape.side": "2", "shape": "square"}):
        assert load(Run, write("x.yaml", "shape: round\n"), overrides).shape == Square(side=2.0)


@config
class Rule:
    name: str = "plain"
    rate: float = 1.0


@config
class Ruled:
    rule: Rule = Rule()
    shape: Annotated[Shape, SHAPES] = Round()


def test_a_name_that_is_no_choice_of_a_class_leaves_the_keys_beside_it(write) -> None:
    """optim.name is one: another optimizer has the same rate. Of a choice the other fields go with its name."""
    write("base.yaml", "rule:\n  rate: 7\nshape: {name: square, side: 3}\n")
    path = write("x.yaml", "base: base.yaml\nrule:\n  name: steep\n")
    assert load(Ruled, path).rule == Rule(name="steep", rate=7.0)
    assert load(Ruled, path, {"rule.name": "odd"}).rule == Rule(name="odd", rate=7.0)
    assert load(Ruled, {"rule": {"rate": 7}}, {"rule.name": "odd"}).rule == Rule(name="odd", rate=7.0)
    assert load(Ruled, path, {"shape.name": "round"}).shape == Round()


def test_overrides_without_a_file() -> None:
    base = {"shape": "square", "train": {"steps": 7}}
    merged, alone = overridden(Run, base, {"shape.side": "1e1", "note": "3"})
    assert from_dict(Run, merged) == Run(shape=Square(side=10.0), train=Train(steps=7), note="3")
    assert alone == {"shape": {"side": "1e1"}, "note": "3"}
    assert base == {"shape": "square", "train": {"steps": 7}}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"train.step": "3"}, "did you mean train.steps?"),
        ({"steps": "3"}, "did you mean train.steps?"),
        ({"train": "3"}, "train"),
        ({"train.steps.more": "3"}, "train.steps"),
        ({"run_dir.sub": "3"}, "run_dir"),
        ({"train.steps": "{a"}, "cannot be read from the command line"),
        ({"train.precision": "fp8"}, "fp32"),
        ({"shape": "sqare"}, "did you mean square?"),
        ({"train.": "3"}, "train."),
    ],
)
def test_wrong_overrides_are_refused(write, overrides: dict[str, str], says: str) -> None:
    found = refusal(write("x.yaml", ""), overrides)
    assert says in found
    assert "command line" in found


# --- writing -----------------------------------------------------------------------------------------------


def test_what_is_written_reads_back_the_same_and_in_full(write, tmp_path: Path) -> None:
    cfg = load(
        Run,
        write("x.yaml", "shape: square\ntrain: {lr: 1e-7, betas: [0.1, 0.2]}\n"),
        {"run_dir": "2024", "note": "no"},
    )
    write_yaml(tmp_path / "out.yaml", cfg)
    assert load(Run, tmp_path / "out.yaml") == cfg
    values, sources = read_yaml(tmp_path / "out.yaml")
    assert resolved(values) == to_dict(cfg)
    assert set(sources.values()) == {str(tmp_path / "out.yaml")}


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_yaml(path, Run())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_yaml(path, Run(run_dir="other"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load(Run, path) == Run()
    write_yaml(path, Run(run_dir="other"))
    assert load(Run, path).run_dir == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_text_stays_text_inside_a_chosen_member(tmp_path: Path) -> None:
    from dit.experiments.diffusion import Experiment

    (tmp_path / "a.yaml").write_text("data: {path: d}\ncodec: {name: vae, path: old}\n")
    for text in ("2024", "a,b", "1e3", "true"):
        cfg = load(Experiment, tmp_path / "a.yaml", {"codec.path": text})
        assert cfg.codec.path == text

"""What tools answer before torch is loaded: help and what is mistyped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dit.commandline.argv import parse
from dit.commandline.quick import answer, check, may_be_new
from dit.commandline.schema import stand_ins
from dit.configfile import read_yaml
from dit.errors import UserError
from tests.commands import ROOT, environment

# Runs a tool's file as a command several times, and tells what of the slow packages it loaded.
RUNS = """
import runpy, sys
for words in sys.stdin.read().splitlines():
    sys.argv = words.split(" ")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    print(f"STATUS {status}", file=sys.stderr, flush=True)
slow = {"torch", "numpy", "deepspeed", "diffusers", "timm", "PIL"} & sys.modules.keys()
assert not slow, slow
"""
MISTYPED = {
    "ablate": ("a --onyl=x", "did you mean only?"),
    "bench": ("loader --sampels=3", "--sampels; did you mean samples?"),
    "convert": ("sit a b --codec.pth=x", "--codec.pth; did you mean codec.path?"),
    "encode": (
        "a b --crop=random_resized --crop.scale_mni=0.5",
        "scale_mni: unknown key; did you mean scale_min?",
    ),
    "evaluate": ("features a b --mind.projectons=3", "did you mean mind.projections?"),
    "likelihood": ("a b --method.num_stesp=3", "did you mean num_steps?"),
    "nfe": ("a --ouut=x", "did you mean out?"),
    "quickstart": ("--nmu_steps=3", "did you mean num_steps?"),
    "sample": ("a --out=x --solver=ddim --solver.etta=1", "did you mean eta?"),
    "scaling": ("coordinates --out=x --widhts=32,64", "did you mean widths?"),
    "schema": ("--x=1", "unknown flag --x"),
    "serve": ("a --max_image=3", "did you mean max_images?"),
    "shards": ("index a b --codec=unknown --codec.chanels=4", "did you mean codec.channels?"),
    "toys": ("--out=x --stesp=3", "did you mean steps?"),
    "train": ("configs/digits.yaml --train.stesp=5", "train.stesp: unknown key; did you mean train.steps?"),
    "train_classifier": ("configs/digits_classifier.yaml --objectve.path=vp", "did you mean objective?"),
    "train_vae": ("configs/digits_vae.yaml --pixel=l3", "unknown pixel loss 'l3'"),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_help_and_what_is_mistyped_load_nothing_slow(name: str) -> None:
    tool, (mistyped, says) = f"tools/{name}.py", MISTYPED[name]
    several = [] if callable(stand_ins().tool(name).commands) else [f"{tool} {mistyped.split(' ')[0]} --help"]
    lines = [f"{tool} --help", *several, f"{tool} {mistyped}"]
    done = subprocess.run(
        [sys.executable, "-c", RUNS],
        input="\n".join(lines), capture_output=True, text=True, timeout=100, check=False, cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: python tools/") == len(lines) - 1
    ended = [line for line in done.stderr.splitlines() if line.startswith("STATUS ")]
    assert ended == ["STATUS 0"] * (len(lines) - 1) + ["STATUS 2"]
    assert says in done.stderr
    assert f"See: python {tool}" in done.stderr


def quick(name: str, *words: str) -> str:
    """What is said of a command line, "" for nothing."""
    tool = stand_ins().tool(name)
    assert callable(tool.commands)
    try:
        check(tool, tool.commands, parse(tool.commands, list(words)))
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


TRAINED = sorted(
    set((ROOT / "configs").rglob("*.yaml"))
    - {file for name in ("scaling", "ablations") for file in (ROOT / "configs" / name).rglob("*.yaml")}
)


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_the_projects_own_configs_are_taken(path: Path) -> None:
    values, _ = read_yaml(path)
    name = {"autoencoder": "train_vae", "classifier": "train_classifier"}
    tool = next((name[key] for key in name if key in values), "train")
    assert quick(tool, str(path)) == ""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_a_files_typo_is_the_files_and_the_command_lines_its_own(write: Callable[[str, str], str]) -> None:
    write("base.yaml", "train: {stesp: 3}\n")
    bad = write("bad.yaml", "base: base.yaml\ndata: {path: x}\n")
    good = write("good.yaml", "data: {path: x}\n")
    said = quick("train", bad)
    assert said.startswith("ConfigError: train.stesp: unknown key; did you mean train.steps? (in ")
    assert "base.yaml" in said
    assert quick("train", bad, "--seed=4", "--sede=1").startswith("ConfigError: train.stesp")
    assert (
        quick("train", good, "--sede=1")
        == "UsageError: sede: unknown key; did you mean seed? (in the command line)"
    )
    assert quick("train", good, "--seed=x").startswith("UsageError: seed: ")
    assert quick("train", good, "--objective.path=vp", "--objective.path.beta_max=3") == ""
    assert "did you mean beta_max" in quick(
        "train", good, "--objective.path.beta_mx=3", "--objective.path=vp"
    )
    assert "no such config file; did you mean good.yaml?" in quick("train", good.replace("good", "god"))


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "train": ["--train.steps=0", "--data.path=nowhere"],  # values are the classes' own to judge
        "sample": [
            "--out=x",
            "--solver=euler_maruyama",
            "--solver.diffusion=linear",
            "--solver.diffusion.norm=2",
        ],
        "encode": ["out", "--codec=vae", "--codec.path=x", "--crop=random_resized", "--crop_scale_min=.5"],
        "likelihood": ["data", "--exact", "--num_steps=3"],
    }.items(),
)
def test_what_may_be_right_is_left_to_the_classes(name: str, words: list[str]) -> None:
    first = "configs/digits.yaml" if name == "train" else "run"
    assert quick(name, str(ROOT / first) if name == "train" else first, *words) == ""


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("sample", ["run", "--out=x", "--num_samples=many"], "--num_samples=many: expected a whole number"),
("likelihood", ["run", "d", "--num_steps=x"], "--num_steps=x: expected a whole number"),
        ("encode", ["a", "b", "--flip=perhaps"], "--flip=perhaps: expected true or false"),
        ("encode", ["a", "b", "--posterior=mean"], "--posterior=mean: expected 'moments' or 'sample'"),
        ("train", ["configs/digits.yaml", "--dry_run=2.5"], "--dry_run=2.5: expected true or false"),
    ],
)  # fmt: skip
def test_a_flag_of_the_wrong_type_is_refused_at_once(name: str, words: list[str], says: str) -> None:
    assert quick(name, *words).startswith(f"UsageError: {says}")


@pytest.mark.parametrize("typed", ["--dryrun", "--dryrun=true"])
def test_a_mistyped_switch_is_told_of_where_any_key_may_be_given(typed: str) -> None:
    assert quick("train", "configs/digits.yaml", typed).endswith("; did you mean dry_run?")


def test_sample_takes_the_keys_of_any_codec() -> None:
    assert (
        quick("sample", "run", "--out=x", "--codec.groups=3", "--codec_dtype=float16", "--guidance=x") == ""
    )
    assert quick("sample", "run", "--codec.grups=3").startswith("UsageError: unknown flag --codec.grups")


def test_what_stands_in_the_source_alone_is_left_to_the_classes(tmp_path: Path) -> None:
    """A schema that is behind its source refuses nothing that is new there."""
    (tmp_path / "dit" / "flow").mkdir(parents=True)
    source = '@PATHS.register("squared")\n@config\nclass Squared(Path):\n    bend_: float = 1.0  # how much\n'
    (tmp_path / "dit" / "flow" / "path.py").write_text(source, encoding="utf-8")
    for said in (
        "objective.path: unknown path 'squared'; did you mean cosine? (in the command line)",
        "objective.path.bend: unknown key; linear has no keys (in x.yaml)",
        "unknown flag --bend; did you mean end?",
    ):
        assert may_be_new(said, tmp_path)
        assert not may_be_new(said)
        assert not may_be_new(said.replace("squared", "sqared").replace("bend", "bent"), tmp_path)


@pytest.mark.parametrize("held", [None, "", "<<<<<<< HEAD\n{}", "[]", "{}"])
def test_without_a_good_schema_the_classes_answer(
    tmp_path: Path, monkeypatch, capsys, held: str | None
) -> None:
    """Such as one in which a merge has left its marks: `make schema` too has to start. Or it would print and exit."""
    if held is not None:
        (tmp_path / "schema.json").write_text(held)
    monkeypatch.setattr("dit.commandline.schema.FILE", tmp_path / "schema.json")
    monkeypatch.setattr("sys.argv", ["tools/train.py", "--help"])
    stand_ins.cache_clear()
    try:
        answer("tools/train.py")
    finally:
        stand_ins.cache_clear()
    assert capsys.readouterr().out == ""


def test_arguments_of_functions_are_no_flags_but_those_of_commands_are(tmp_path: Path) -> None:
    """`--x` would else be looked at by all the classes, whose methods take an x."""
    inside = "class Kernel:\n    def step(\n        self,\n        x: int,\n    ) -> None: ...\n"
    for part in ("dit", "tools"):
        (tmp_path / part).mkdir()
        source = f"{inside}\ndef bent(\n    *,\n    {part}_y: int,\n) -> None: ...\n"
        (tmp_path / part / "new.py").write_text(source, encoding="utf-8")
    refused = {word: f"unknown flag --{word}" for word in ("x", "dit_y", "tools_y")} | {
        "bent": "unknown command 'bent'"
    }
    found = {word for word, said in refused.items() if may_be_new(said, tmp_path)}
    assert found == {"tools_y", "bent"}
    assert not any(
        may_be_new(f"unknown flag --{word}") for word in ("x", "label", "image", "folder", "index")
    )

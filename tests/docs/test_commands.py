"""Every command of the pages: what can be run here is run, at toy size; the flags of all others are checked."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit.configfile import load
from dit.data.codecs.codec import CODECS
from dit.experiments.autoencoder import AutoencoderExperiment
from dit.experiments.classifier import ClassifierExperiment
from dit.experiments.diffusion import Experiment
from tests.commands import ROOT, call, environment
from tests.datasets import Digits
from tests.docs.blocks import Block, Command, blocks, commands, pages

LANGUAGES = {"bash", "json", "python", "text", "yaml"}
PAGES = pages()
SHELL = [block for page in PAGES for block in blocks(page) if block.language == "bash"]
# Programs of others, whose flags are theirs to check.
OTHERS = {".", ".venv/bin/pre-commit", "tensorboard"}
LAUNCHERS = {"launch/local.sh", "launch/multinode.sh"}
# What a reader puts in the place of these words, for configurations that are checked.
STAND_INS = {"CONFIG.yaml": "configs/digits.yaml", "CONFIG": "configs/digits.yaml"}

# --- what a command line means ------------------------------------------------------------------------------------


def bound(function: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    """What a tool's function would be called with; fails as the tool does for a flag that it does not know."""
    seen: dict[str, Any] = {}

    @functools.wraps(function)
    def note(*args: Any, **given: Any) -> None:
        seen.update(inspect.signature(function).bind(*args, **given).arguments)

    status = call(note, *words)
    assert status == 0, f"the command line is refused: {' '.join(words)}"
    return seen


def tool(name: str, words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """A tool's function, or that of its subcommand, and the words for it."""
    module = importlib.import_module(f"tools.{name}")
    if hasattr(module, "main"):
        return module.main, words
    assert words, f"tools/{name}.py needs a command"
    default = module.TOOL.default
    if words[0] not in module.TOOL.commands and default is not None:
        return module.TOOL.commands[default], words
    assert words[0] in module.TOOL.commands, f"tools/{name}.py has no command {words[0]}"
    return module.TOOL.commands[words[0]], words[1:]


def check_config(cls: type, given: dict[str, Any]) -> None:
    config = STAND_INS.get(given["config"], given["config"])
    load(cls, config, given.get("overrides", {}))


def check_sampler(given: dict[str, Any]) -> None:
    from tools.sample import read_spec

    plain = {key: given[key] for key in ("solver", "grid", "num_steps", "cfg_scale", "seed") if key in given}
    keys = given.get("solver_grid_codec_keys", {})
    read_spec(plain, keys, given.get("shift"), given.get("guidance"))


def check_codec(given: dict[str, Any]) -> None:
    """A codec's name with its keys; those of a crop are left to `bound`."""
    keys = {**given.get("codec_crop_keys", {}), **given.get("codec_keys", {})}
    own = {re.sub(r"^codec[._]", "", key): text for key, text in keys.items() if key.startswith("codec")}
    CODECS.parse({"name": given.get("codec", "vae"), **own})


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "train": functools.partial(check_config, Experiment),
    "train_vae": functools.partial(check_config, AutoencoderExperiment),
    "train_classifier": functools.partial(check_config, ClassifierExperiment),
    "bench": lambda given: check_config(Experiment, given) if "config" in given else None,
    "sample": check_sampler,
    "encode": check_codec,
    "convert": check_codec,
}


def of_tool(words: list[str]) -> list[str] | None:
    """The words of a tool, ["tools/train.py", ...], that a command starts, itself or through a launcher; else None."""
    if words[0] == "sbatch":  # its options, then the script's words
        words = words[next(i for i, word in enumerate(words) if word.startswith("launch/")) :]
    if words[0] in LAUNCHERS:
        return words[1:] if words[1].endswith(".py") else ["tools/train.py", *words[1:]]
    return words[1:] if words[0] == "python" and words[1].startswith("tools/") else None


def check(command: Command) -> None:
    """Fail for a command that cannot be what it is meant to be."""
    words = command.words
    started = of_tool(words)
    if started is not None:
        name = Path(started[0]).stem
        given = bound(*tool(name, started[1:]))
        CHECKS.get(name, lambda _: None)(given)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1].partition("=")[0] in targets, f"there is no {' '.join(words)}"
    elif words[0] in ("launch/sweep.sh", ".ci/run"):
        assert os.access(ROOT / words[0], os.X_OK)
    elif words[:2] != ["python", "-"]:
        assert words[0] in OTHERS, f"nobody checks {words[0]}: teach {__name__} how"


# --- where they run -------------------------------------------------------------------------------------------------


def checkout(folder: Path, page: Path) -> Path:
    """A folder in which a page's commands find what a checkout has, and what the page tells to save."""
    for name in ("dit", "tools", "launch"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    for block in blocks(page):
        if block.language == "yaml" and block.title:
            (folder / block.title).write_text(block.text)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: one of {sorted(LANGUAGES)} belongs behind the ```"
        if block.language == "python":
            compile(block.text, str(block), "exec")
        elif block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), str(block)
        elif block.language == "bash":
            assert block.is_marked or not block.title, f"{block}: a mark begins with 'needs' or 'takes'"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_understood(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout(tmp_path, block.page))
    for command in commands(block.text):
        check(command)


@pytest.mark.parametrize(
    "text",
    [
        "python tools/train.py CONFIG.yaml --train.stepz=3",
        "python tools/train.py CONFIG.yaml --train.steps=three",
        "launch/local.sh CONFIG.yaml --objective.path=linaer",
        "sbatch --nodes=2 launch/multinode.sh CONFIG.yaml --run_dri=x",
        "python tools/sample.py RUN --out=x --solver=hun",
        "python tools/sample.py RUN --out=x --solver.chrun=3",
        "python tools/sample.py RUN --out=x --num_step=3",
        "python tools/encode.py IMAGES OUT --codec.pth=x",
        "python tools/encode.py IMAGES OUT --image_sise=x",
        "python tools/convert.py facebook_dit x y --codec.pth=z",
        "python tools/convert.py facebok-dit x y",
        "python tools/bench.py kills --kils=3",
        "make quickstrat",
        "curl x",
    ],
)  # fmt: skip
def test_a_mistyped_command_is_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout(tmp_path, PAGES[0]))
    (command,) = commands(text)
    with pytest.raises((AssertionError, ValueError)):
        check(command)


# --- and run ----------------------------------------------------------------------------------------------------------

TRAIN = {"train.steps": "2", "train.global_batch": "8", "checkpoint.every": "1"}
# The flags of each tool that make it small, in place of the page's own.
TOY: dict[str, dict[str, str]] = {
    "train": {**TRAIN, "engine": "local"},
    "train_vae": {**TRAIN, "engine": "local"},
    "train_classifier": {**TRAIN, "engine": "local"},
    "sample": {"num_samples": "16", "num_steps": "2", "batch_size": "16"},
    "evaluate sweep": {
        "num_samples": "12",
        "nfe": "4",
        "features.components": "4",
        "bootstrap": "20",
        "seeds": "0",
    },
    "evaluate runs/drawn_digits": {"image_size": "16"},  # which the toy run draws
    "likelihood": {"count": "4", "num_steps": "2"},
    "toys": {"steps": "2"},
    "bench trace": {"stage": "null", "steps": "1", "warmup": "1"},
}
MOVED = {"step-00001000": "step-00000001"}  # where a page names a checkpoint that a toy run lacks


def toy(name: str, words: list[str]) -> list[str]:
    """A tool's words at toy size."""
    small = TOY.get(name, {})
    kept = [word for word in words if word.lstrip("-").partition("=")[0] not in small]
    for there, here in MOVED.items():
        kept = [word.replace(there, here) for word in kept]
    return kept + [f"--{key}={value}" for key, value in small.items()]


def execute(command: Command) -> int:
    """Run one command where we are, at toy size: a tool in this process, all else in one of its own."""
    started = of_tool(command.words)
    if started is not None and command.words[0] == "python":
        name = Path(started[0]).stem
        function, words = tool(name, started[1:])
        own = " ".join([name, *started[1:2]])  # of one of its commands alone
        return call(function, *toy(own if own in TOY else name, words))
    variables = {**environment(), **command.variables, "PYTHON": sys.executable}
    variables["PATH"] = f"{Path.cwd() / 'bin'}{os.pathsep}{variables['PATH']}"
    if started is None:
        return subprocess.run(
            ["bash", "-c", command.text], env=variables, check=False, timeout=200
        ).returncode
    small = [word for word in toy(Path(started[0]).stem, command.words) if not word.startswith("--engine")]
    return subprocess.run(small, env=variables, check=False, timeout=200).returncode


@pytest.fixture(scope="module")
def quickstart(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ as the quickstart leaves it: pixels, an autoencoder, latents, and a model of two steps."""
    folder = checkout(tmp_path_factory.mktemp("quickstart"), PAGES[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for split, there in (("train", digits.moments), ("test", digits.moments_val)):
            pixels = ("--codec=pixels", "--image_size=32", "--no-flip")
            encode, words = tool("encode", [f"digits:{split}", f"runs/quickstart/pixels/{split}", *pixels])
            assert call(encode, *words) == 0
            shutil.copytree(there, f"runs/quickstart/latents/{split}")
        shutil.copytree(digits.vae, "runs/quickstart/vae/vae")
        train, words = tool("train", ["configs/digits.yaml"])
        assert call(train, *toy("train", words)) == 0
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(b.page == p and not b.is_marked for b in SHELL)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_pages_run(page: Path, quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks that bear no mark, in order, in one folder."""
    monkeypatch.chdir(checkout(tmp_path, page))
    shutil.copytree(quickstart, tmp_path / "runs")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    for block in blocks(page):
        if block.language == "bash" and not block.is_marked:
            for command in commands(block.text):
                assert execute(command) == 0, f"{block}: {command.text}"

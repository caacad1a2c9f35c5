"""The house rules that a parser can check: who imports whom, what stays out of reach, how long things are.

`check(root)` reads every file in root/dit and root/tools with `ast` and returns one line a violation. Imports
count wherever they stand (in functions, under TYPE_CHECKING, as a string given to import_module): a cycle
hidden in a function is a cycle. The second half plants violations in small trees, so that a checker that has
gone blind fails here too.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 45

# Layer -> the layers that it imports, and no others: a row is as narrow as the house (test_rows_are_as_narrow_...). A
# layer is tools/, or a package, a part of a package or a module in dit/; a file belongs to the longest name that fits.
# In another package's row the name of a package stands for all its parts; in its own parts' rows each is named. `dit`
# is dit/__init__.py, which hands out the names of the top layer, and so is in no row: in the house nobody imports it.
MAY_IMPORT = {
    "dit": "version api",
    "errors": "",
    "files": "errors",
    "version": "",
    "ambient": "errors",
    "commandline": "errors files scalars progress config configfile several ranks",
    "scalars": "",
    "yamlfile": "errors scalars",
    "progress": "",
    "config": "errors scalars",
    "configfile": "errors files scalars yamlfile config",
    "several": "config",
    "compiling": "errors",
    "rng": "compiling",
    "ranks": "errors",
    "flow": "compiling config several rng",
    "model": "compiling config flow",
    "sample": "errors files progress config rng ranks flow outputs unfinished",
    "data": "errors",
    "data.origin": "config",
    "data.storage": "errors files config data",
    "data.shards": "files config data data.origin data.storage",
    "data.codecs": "files config rng data data.storage data.shards",
    "data.sources": "files progress config rng data data.origin",
    "data.foreign": "errors files config data data.origin data.storage data.shards data.codecs data.sources outputs",
    "data.shards.pairs": "files config data data.shards data.codecs outputs unfinished",
    "data.shards.readers": "data.shards data.foreign",
    "data.shards.verify": "files config data data.storage data.shards data.shards.readers",
    "data.loading": "errors config rng data data.storage data.shards data.shards.readers",
    "data.encoding": "errors files config rng ranks data data.shards data.codecs data.sources",
    "evals": "errors files version progress config rng ranks flow sample data outputs unfinished",
    "train.optim": "config",
    "train.posthoc": "",
    "train.faults": "errors files config flow",
    "train.engines": "config ranks model train.optim",
    "train.ema": "errors config train.posthoc train.engines",
    "train.settings": "files config ranks data train.optim train.faults train.engines train.ema",
    "train.task": "rng flow data",
    "train.rows": "files",
    "train.meters": "ranks flow evals train.rows",
    "train.hooks": "errors progress sample train.engines train.ema train.meters",
    "train.held_out": "errors progress config rng ranks data evals train.engines train.ema train.settings train.task"
    " train.hooks train.meters",
    "train.run_dir": "errors files version scalars config configfile ranks train.settings train.checkpoints"
    " outputs",
    "train.branch": "errors files version config ranks evals train.engines train.rows train.run_dir"
    " train.settings train.checkpoints",
    "train.plan": "errors version config ranks model data train.optim train.engines train.settings train.task"
    " train.hooks train.run_dir train.branch train.checkpoints",
    "train.checkpoints": "errors files progress config ranks train.posthoc train.engines train.ema"
    " train.settings train.task outputs",
    "train.preflight": "errors version config ranks data train.settings train.run_dir train.branch train.plan"
    " train.checkpoints",
    "train": "compiling errors progress config rng ranks flow data train.optim train.faults train.engines train.ema"
    " train.settings train.task train.meters train.run_dir train.branch train.plan train.checkpoints"
    " train.preflight",
    # the autoencoder is trained by the same engine and checkpoints
    "stage1": "files progress config rng ranks flow data evals train",
    "experiments": "ambient compiling errors files version progress config rng ranks flow model sample data evals"
    " train stage1 outputs unfinished",
    "scaling": "errors files progress config configfile ranks model data evals train experiments outputs"
    " scaling.laws",
    "scaling.mup": "errors files progress config rng ranks flow model data train experiments outputs scaling",
    "scaling.ablation": "errors files progress config configfile rng ranks flow model sample data evals train"
    " experiments outputs scaling scaling.mup",
    "scaling.floor": "files progress config flow evals sample outputs scaling.laws",
    "reports": "errors files scalars progress config configfile model evals train experiments scaling.laws outputs",
    "scaling.laws": "errors files progress config rng outputs",
    "serving": "errors config flow sample experiments",
    "interop": "errors files version config configfile ranks flow model data evals train experiments outputs",
    "bench.plan": "errors files progress config configfile ranks model data.codecs data.loading data.shards"
    " train.engines train.optim train.plan train.settings experiments bench",
    "bench.parity": "config configfile data.codecs data.encoding data.sources model train experiments scaling",
    "bench": "errors files version progress config rng ranks flow model sample data train outputs bench.parity",
    "api": "ambient errors files progress config configfile rng ranks flow model sample data train experiments",
    "tools": "errors files progress config configfile ranks sample data evals train stage1 experiments"
    " model scaling reports interop bench serving commandline outputs",
    "outputs": "errors files config",
    "unfinished": "errors files ranks outputs",
}
# A third-party package -> the only modules that may name it.
ONLY_IN = {
    "deepspeed": {"dit.train.engines.zero_engine"},
    "torchao": {"dit.model.fp8"},
    "gradio": {"dit.serving.page", "dit.serving.server"},
    "fastapi": {"dit.serving.server"},
    "triton": {f"dit.model.kernels.{part}_triton" for part in ("activation", "heads", "residual")},
    "uvicorn": {"dit.serving.server"},
}
# (from, to): no chain of imports may lead from a module under the first to one under the second.
OUT_OF_REACH = [
    ("dit.config", "torch"),
    ("dit.configfile", "torch"),
    ("dit.commandline.helptext", "torch"),
    ("dit.sample", "deepspeed"),
    ("dit.train.checkpoints.checkpoint", "dit.train.engines.zero_engine"),
    ("dit.train.checkpoints.checkpoint", "deepspeed"),
]
# Who this process is among its peers is read in one place.
RANK_VARIABLE = re.compile(r"RANK|WORLD_SIZE|LOCAL_RANK|SLURM_[A-Z_]+")
RANK_READERS = ("dit.ranks.group", "dit.ranks.world")


@dataclass
class Module:
    """One file: its dotted name, its tree and where it imports what (dotted name -> line)."""

    name: str
    path: Path
    tree: ast.Module
    lines: int
    imports: dict[str, int] = field(default_factory=dict)

    @property
    def layer(self) -> str:
        """The longest name in MAY_IMPORT that it lies under; its package's where there is none."""
        name = self.name.removeprefix("dit.")
        return max((key for key in MAY_IMPORT if under(name, key)), key=len, default=name.split(".")[0])


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def parse(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted([*root.glob("dit/**/*.py"), *root.glob("tools/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        tree, lines = ast.parse(text, str(path)), len(text.splitlines())
        modules[name] = Module(name, path.relative_to(root), tree, lines)
    for module in modules.values():
        for target, line in imported(module):
            module.imports.setdefault(resolve(target, modules), line)
    return modules


def imported(module: Module) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything that the file imports; `from a import b` gives a.b."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def resolve(target: str, modules: Mapping[str, Module]) -> str:
    """The module that holds `target`: dit.flow.path.Linear -> dit.flow.path; torch.nn -> torch."""
    if target.split(".")[0] not in ("dit", "tools"):
        return target.split(".")[0]
    name = target
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or target


def may_import(importer: str, layer: str) -> bool:
    row, package = MAY_IMPORT[importer].split(), layer.split(".")[0]
    return layer in (importer, *row) or (package in row and package != importer.split(".")[0])


def check_layers(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.layer not in MAY_IMPORT:
            yield f"{module.path}: {module.layer!r} has no place in MAY_IMPORT"
            continue
        for target, line in module.imports.items():
            if not under(target, "dit") and not under(target, "tools"):
                if target in ONLY_IN and module.name not in ONLY_IN[target]:
                    yield f"{module.path}:{line}: {target} belongs in {', '.join(ONLY_IN[target])} alone"
                continue
            if target not in modules:
                yield f"{module.path}:{line}: imports {target}, which does not exist"
            elif not may_import(module.layer, layer := modules[target].layer):
                yield f"{module.path}:{line}: {module.layer} must not import {layer} ({target})"


def find_chain(start: str, is_end: Callable[[str], bool], modules: Mapping[str, Module]) -> list[str] | None:
    """A shortest chain of one or more imports from `start` to a name that ends it, or None."""
    came_from: dict[str, str] = {}
    queue = [start]
    for name in queue:
        for found in modules[name].imports if name in modules else ():
            if found in came_from:
                continue
            came_from[found] = name
            queue.append(found)
            if is_end(found):
                chain = [found, name]
                while chain[-1] != start:
                    chain.append(came_from[chain[-1]])
                return chain[::-1]
    return None


def check_reach(modules: Mapping[str, Module]) -> Iterator[str]:
    for source, target in OUT_OF_REACH:
        for start in (name for name in modules if under(name, source)):
            chain = find_chain(start, lambda name, target=target: under(name, target), modules)
            if chain:
                yield f"{modules[start].path}: reaches {target} by {' -> '.join(chain)}"


def check_cycles(modules: Mapping[str, Module]) -> Iterator[str]:
    reported: set[str] = set()
    for start in modules:
        chain = None if start in reported else find_chain(start, start.__eq__, modules)
        if chain:
            reported.update(chain)
            yield f"{modules[start].path}: import cycle {' -> '.join(chain)}"


def check_sizes(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.lines > MAX_FILE_LINES:
            yield f"{module.path}: {module.lines} lines, more than {MAX_FILE_LINES}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    where = f"{module.path}:{node.lineno}: {node.name}"
                    yield f"{where} has {lines} lines, more than {MAX_FUNCTION_LINES}"


def check_rank_variables(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.name in RANK_READERS or not under(module.name, "dit"):
            continue
        for node in ast.walk(module.tree):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and RANK_VARIABLE.fullmatch(value):
                yield f"{module.path}:{node.lineno}: {value} is read in {RANK_READERS[0]} alone"


def check(root: Path) -> list[str]:
    modules = parse(root)
    rules = (check_layers, check_reach, check_cycles, check_sizes, check_rank_variables)
    return [violation for rule in rules for violation in rule(modules)]


# --- this house --------------------------------------------------------------------------------------------


def test_this_house_keeps_its_rules():
    assert {"dit", "dit.config", "dit.ranks.group", "dit.rng"} <= parse(ROOT).keys()
    violations = check(ROOT)
    assert not violations, "\n" + "\n".join(violations)


def test_rows_are_as_narrow_as_the_house():
    """What nobody needs any more is taken out, so that what comes back has to be looked at."""
    modules = parse(ROOT)
    used: dict[str, set[str]] = {layer: set() for layer in MAY_IMPORT}
    for module in modules.values():
        layers = {modules[target].layer for target in module.imports if target in modules}
        used[module.layer] |= layers | {layer.split(".")[0] for layer in layers}
    wide = {layer: sorted(set(row.split()) - used[layer]) for layer, row in MAY_IMPORT.items()}
    assert not {layer: names for layer, names in wide.items() if names}
    assert set(MAY_IMPORT) == {module.layer for module in modules.values()}


# --- the checker -------------------------------------------------------------------------------------------


def plant(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


GOOD = {
    "dit/__init__.py": "from dit.version import __version__\nif TYPE_CHECKING:\n    from dit.api import load\n",
    "dit/version.py": '__version__ = "1"\n',
    "dit/api.py": "from dit.experiments.diffusion import Experiment\n",
    "dit/config.py": "import yaml\n",
    "dit/ranks/group.py": "import os, torch\nRANK = os.environ.get('SLURM_PROCID')\n",
    "dit/rng.py": "import torch\n",
    "dit/flow/__init__.py": "",
    "dit/flow/path.py": "from dit.config import config\n",
    "dit/flow/predict.py": "from .path import Coeffs\nfrom ..rng import Draws\n",
    "dit/model/dit.py": "from dit.flow import path\n",
    "dit/sample/solve.py": "from dit.flow.path import Linear\n",
    "dit/data/__init__.py": "from dit.errors import UserError\n",
    "dit/data/loading/stream.py": "from dit.rng import permutation\nfrom dit.data import DataError\n",
    "dit/data/storage/files.py": "from dit.data import DataError\n",
    "dit/data/shards/blocks.py": "from dit.data.storage import files\n",
    "dit/errors.py": "",
    "dit/train/engines/zero_engine.py": "import deepspeed\nfrom deepspeed.ops import adam\n",
    "dit/train/checkpoints/checkpoint.py": "import safetensors.torch\n",
    "dit/train/loop.py": "from dit.train.checkpoints import checkpoint\nfrom dit.train.engines import zero_engine\n",
    "dit/experiments/diffusion.py": "from dit.train.loop import train\n",
    "dit/interop/convert.py": "from dit.experiments.diffusion import Experiment\n",
    "dit/commandline/cli.py": "from dit.errors import UserError\n",
    "tools/train.py": "from dit.commandline.cli import main\nfrom dit.experiments.diffusion import Experiment\n",
}


def test_a_good_tree_passes(tmp_path):
    assert check(plant(tmp_path, GOOD)) == []


def long_function(lines: int) -> str:
    return "def f(x):\n" + "    x += 1\n" * (lines - 1)


def long_method(lines: int) -> str:
    return "class A:\n" + "".join(f"    {line}\n" for line in long_function(lines).splitlines())


# What is planted -> (files that replace or join GOOD's, a part of the violation it must give).
PLANTED: dict[str, tuple[dict[str, str], str]] = {
    "upward import": (
        {"dit/flow/path.py": "from dit.model.dit import DiT\n"},
        "dit/flow/path.py:1: flow must not import model (dit.model.dit)",
    ),
    "upward import in a function": (
        {"dit/model/dit.py": "def f():\n    import dit.sample.solve\n"},
        "dit/model/dit.py:2: model must not import sample",
    ),
    "upward relative import": (
        {"dit/flow/path.py": "from ..model import dit\n"},
        "flow must not import model (dit.model.dit)",
    ),
    "upward import by name": (
        {"dit/data/loading/stream.py": "import importlib\nimportlib.import_module('dit.flow.path')\n"},
        "dit/data/loading/stream.py:2: data.loading must not import flow",
    ),
    "sideways import": (
        {"dit/data/loading/stream.py": "from dit.flow import path\n"},
        "data.loading must not import flow",
    ),
    "upward import inside a package": (
        {"dit/data/storage/files.py": "def f():\n    from dit.data.shards.blocks import BlockReader\n"},
        "dit/data/storage/files.py:2: data.storage must not import data.shards",
    ),
    "a part of a package imports what is loose in it": (
        {"dit/train/checkpoints/checkpoint.py": "from dit.train.stop import Stop\n", "dit/train/stop.py": ""},
        "train.checkpoints must not import train (dit.train.stop)",
    ),
    "training knows the experiment": (
        {"dit/train/loop.py": "import dit.experiments.diffusion\n"},
        "train must not import experiments",
    ),
    "library imports a tool": (
        {"dit/experiments/diffusion.py": "from tools.train import run\n"},
        "must not import tools",
    ),
    "library imports the command line": (
        {"dit/interop/convert.py": "import dit.commandline.cli\n"},
        "must not import commandline",
    ),
    "the library imports its own front": (
        {"dit/sample/solve.py": "def f():\n    from dit import load\n"},
        "dit/sample/solve.py:2: sample must not import dit (dit)",
    ),
    "the library imports its own front as a whole": (
        {"dit/rng.py": "import torch\nimport dit\n"},
        "dit/rng.py:2: rng must not import dit (dit)",
    ),
    "a tool imports the front": (
        {"tools/train.py": "from dit import fit\n"},
        "tools must not import dit (dit)",
    ),
    "the library imports the top layer": (
        {"dit/interop/convert.py": "from dit.api import load\n"},
        "interop must not import api",
    ),
    "the root imports anything": (
        {"dit/__init__.py": "from dit.config import x\n"},
        "dit must not import config",
    ),
    "a package nobody placed": ({"dit/utils/misc.py": ""}, "'utils' has no place"),
    "an import of nothing": (
        {"tools/train.py": "import tools.nothing\n"},
        "tools.nothing, which does not exist",
    ),
    "deepspeed in the loop": (
        {"dit/train/loop.py": "from deepspeed import comm\n"},
        "dit/train/loop.py:1: deepspeed belongs in dit.train.engines.zero_engine alone",
    ),
    "deepspeed in a tool": (
        {"tools/train.py": "import deepspeed.comm\n"},
        "tools/train.py:1: deepspeed belongs in dit.train.engines.zero_engine alone",
    ),
    "deepspeed in sample": ({"dit/sample/solve.py": "import deepspeed\n"}, "solve.py: reaches deepspeed"),
    "checkpoint imports the engine": (
        {"dit/train/checkpoints/checkpoint.py": "from dit.train.engines import zero_engine\n"},
        "reaches dit.train.engines.zero_engine by dit.train.checkpoints.checkpoint -> dit.train.engines",
    ),
    "checkpoint reaches the engine": (
        {
            "dit/train/checkpoints/checkpoint.py": "from dit.train.ema import Ema\n",
            "dit/train/ema.py": "from dit.train.engines.zero_engine import Engine\n",
        },
        "dit.train.checkpoints.checkpoint -> dit.train.ema -> dit.train.engines",
    ),
    "torch in config": ({"dit/config.py": "import torch.nn as nn\n"}, "dit/config.py: reaches torch"),
    "torch behind config": (
        {"dit/config.py": "def f():\n    from dit.rng import Draws\n"},
        "reaches torch by dit.config -> dit.rng -> torch",
    ),
    "a cycle": (
        {"dit/flow/path.py": "from dit.flow.predict import Row\n"},
        "import cycle dit.flow.path -> dit.flow.predict -> dit.flow.path",
    ),
    "a cycle through a package": (
        {"dit/flow/__init__.py": "from .path import Linear\n", "dit/flow/path.py": "from . import Linear\n"},
        "import cycle dit.flow -> dit.flow.path -> dit.flow",
    ),
    "a cycle in a function": (
        {
            "dit/train/engines/zero_engine.py": "import deepspeed\ndef f():\n    from dit.train.loop import train\n"
        },
        "import cycle dit.train.engines.zero_engine -> dit.train.loop -> dit.train.engines.zero_engine",
    ),
    "a long file": ({"dit/rng.py": "x = 1\n" * (MAX_FILE_LINES + 1)}, "dit/rng.py: 321 lines"),
    "a long function": (
        {"tools/train.py": long_function(MAX_FUNCTION_LINES + 1)},
        "tools/train.py:1: f has 46 lines",
    ),
    "a long method": ({"dit/rng.py": long_method(MAX_FUNCTION_LINES + 1)}, "dit/rng.py:2: f has 46 lines"),
    "the rank read elsewhere": (
        {"dit/train/loop.py": "import os\nrank = int(os.environ['RANK'])\n"},
        "dit/train/loop.py:2: RANK is read in dit.ranks.group alone",
    ),
}


@pytest.mark.parametrize(("files", "expected"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(tmp_path, files, expected):
    violations = check(plant(tmp_path, GOOD | files))
    assert any(expected in violation for violation in violations), violations


ALLOWED = {
    "a package that gathers its modules": {
        "dit/flow/__init__.py": "from dit.flow.path import Linear\nfrom dit.flow.predict import Row\n"
    },
    "a file just short enough": {"dit/rng.py": "x = 1\n" * MAX_FILE_LINES},
    "a function just short enough": {"tools/train.py": long_function(MAX_FUNCTION_LINES)},
    "words that only look like rank variables": {"dit/rng.py": "x = 'the RANK of a matrix'\n"},
}


@pytest.mark.parametrize("files", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_allowed_is_not_reported(tmp_path, files):
    assert check(plant(tmp_path, GOOD | files)) == []

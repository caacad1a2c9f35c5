"""tools/likelihood.py: a figure that is known, what it depends on and what not, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tools.likelihood
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.experiments.trained import Trained
from dit.rng import Draws
from tests.commands import call, execute
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import at_step, go, rewrite_tensors, values

BASE = ("--count=5", "--num_steps=2", "--batch_size=3", "--seed=4")


def train(digits: Digits, folder: Path, scale: float) -> Path:
    """A run whose EMA weights are normal numbers of this std; its others are 0."""
    go(values(digits, folder, engine="local", train={"steps": 1}, checkpoint={"every": 1}))

    def stir(tensors: dict) -> None:
        generator = torch.Generator().manual_seed(len(tensors))
        for name in sorted(tensors):
            if name.startswith(("model/", "ema/")):
                size = scale if name.startswith("ema/") else 0.0
                tensors[name] = size * torch.randn(tensors[name].shape, generator=generator)

    rewrite_tensors(at_step(folder, 1), stir)
    return folder


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(digits, tmp_path_factory.mktemp("run"), 0.1)


def figures(out: Path, *words: object) -> dict[str, Any]:
    """What a call that must succeed has written."""
    assert call(tools.likelihood.main, *words, f"--out={out}") == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def base(run: Path, digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return figures(tmp_path_factory.mktemp("base") / "new" / "ode.json", run, digits.moments_val, *BASE)


def latents(run: Path, data: Path, count: int) -> torch.Tensor:
    """The first normalised latents of the data, in the view as it is, drawn with seed 4."""
    trained, reader = Trained.load(str(run), "ema", torch.device("cpu")), BlockReader(Manifest.load(data))
    arrays = [reader.read(i)["moments"] for i in range(len(reader.manifest.blocks))]
    moments = torch.from_numpy(np.concatenate(arrays)[:count, 0])
    return trained.norm.draw(moments, Draws(4, 0, torch.arange(count), 1)).double()


@pytest.mark.parametrize("way", ["--exact", "--probes=2"])
def test_a_network_that_says_0_leaves_the_data_normal(
    digits: Digits, run: Path, tmp_path: Path, capsys, way: str
) -> None:
    """No velocity: the density is the prior's, and the figure that of a standard normal."""
    words = ("--weights=model", "--num_steps=1", "--count=4", "--seed=4", way)
    got = figures(tmp_path / "out.json", run, digits.moments_val, *words)
    x = latents(run, digits.moments_val, 4).flatten(1)
    bits = (0.5 * x.square() + 0.5 * math.log(2 * math.pi)).mean(1) / math.log(2)
    assert got["bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-6)
    assert got["standard_error"] == pytest.approx(float(bits.std()) / math.sqrt(4), rel=1e-5)
    assert got["nats"] == pytest.approx(-got["bits_per_dim"] * 256 * math.log(2))
    assert (got["samples"], got["dimensions"]) == (4, 256)
    std = Manifest.load(digits.moments).std  # those the model was trained with
    stored = got["bits_per_dim"] + float(np.log2(std).mean())
    assert got["bits_per_dim_stored"] == pytest.approx(stored, rel=1e-6)
    said = capsys.readouterr().out
    assert f"{got['bits_per_dim']:.4f} +- {got['standard_error']:.4f} bits/dim of normalised latents" in said
    assert got["protocol_hash"] in said


def test_a_figure_carries_its_protocol(run: Path, digits: Digits, base: dict[str, Any]) -> None:
    training = Manifest.load(digits.moments)
    assert base["protocol"] == {
        "method": {
            "name": "ode",
            "num_steps": 2,
            "power": 2.0,
            "divergence": {"name": "hutchinson", "probes": 1},
        },
        "count": 5,
        "seed": 4,
        "unconditional": False,
        "data": Manifest.load(digits.moments_val).digest,
        "precision": "fp32",
        "norm": {"mean": list(training.mean), "std": list(training.std)},
    }
    assert (base["checkpoint"], base["step"], base["weights"]) == (str(at_step(run, 1)), 1, "ema")
    assert {"device", "code"} <= base.keys()


def test_batches_and_ranks_change_nothing(
    run: Path, digits: Digits, base: dict[str, Any], ranks: Server, tmp_path: Path
) -> None:
    """Blocks of the data end within batches, and batches within blocks."""
    words = [w for w in BASE if not w.startswith(("--batch", "--count"))]
    whole = figures(tmp_path / "a.json", run, digits.moments_val, *words, "--count=5")
    assert whole["bits_per_dim"] == pytest.approx(base["bits_per_dim"], rel=1e-5)
    out = tmp_path / "ranks.json"
    told = (run, digits.moments_val, *BASE, f"--out={out}")
    assert ranks.run(2, call, tools.likelihood.main, *told) == [0, 0]
    assert json.loads(out.read_text())["bits_per_dim"] == pytest.approx(base["bits_per_dim"], rel=1e-6)
    several = [
        figures(
            tmp_path / f"{size}.json", run, digits.moments_val, *words, "--count=0", f"--batch_size={size}"
        )
        for size in (11, 48)
    ]
    assert several[0]["samples"] == several[0]["protocol"]["count"] == 48
    assert several[0]["bits_per_dim"] == pytest.approx(several[1]["bits_per_dim"], rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        ["--seed=5"],
        ["--num_steps=3"],
        ["--count=4"],
        ["--exact", "--num_steps=1", "--count=2"],
        ["--probes=3"],
        ["--method.power=1"],
        ["--method_divergence.probes=2"],
        ["--unconditional"],
        ["--method=bound"],
        ["--method=bound", "--method.grid=quadratic"],
        ["--precision=bf16"],
    ],
    ids=" ".join,
)
def test_every_choice_matters(
    run: Path, digits: Digits, base: dict[str, Any], tmp_path: Path, change: list[str]
) -> None:
    names = {w.split("=")[0] for w in change}
    kept = [w for w in BASE if w.split("=")[0] not in names]
    other = figures(tmp_path / "out.json", run, digits.moments_val, *kept, *change)
    assert other["bits_per_dim"] != base["bits_per_dim"]
    assert other["protocol_hash"] != base["protocol_hash"]


def test_levels_are_of_pixels_as_they_are(digits: Digits, run: Path, tmp_path: Path, capsys) -> None:
    """Of latents, and of pixels that were normalised, there is no grid of 256 levels from -1 to 1."""
    folder, sections = tmp_path / "run", {"data": {"path": str(digits.pixels)}, "codec": None}
    go(values(digits, folder, engine="local", train={"steps": 1}, checkpoint={"every": 1}, **sections))
    words = ("--method=bound", "--method.decoder=discretised", "--count=4", "--method.num_steps=2")
    mean, std = Manifest.load(digits.pixels).mean[0], Manifest.load(digits.pixels).std[0]
    for trained, data, sees in (
        (folder, digits.pixels_val, f"sees pixels less a mean of ({mean:.3g}, "),
        (folder, digits.pixels_val, f"over a std of ({std:.3g}, "),
        (run, digits.moments_val, "sees latents of the codec 'vae'"),
    ):
        out = tmp_path / "out.json"
        assert call(tools.likelihood.main, trained, data, *words, f"--out={out}") == 1
        said = capsys.readouterr().err
        assert "method.decoder = discretised is of pixels in 256 levels from -1 to 1" in said
        assert sees in said
        assert "take --method.decoder=density" in said
        assert not out.exists()


def test_pixels_have_likelihoods_too(digits: Digits, tmp_path: Path) -> None:
    """A path of discrete steps with a learned variance, all of its steps, and levels of pixels."""
    folder = tmp_path / "run"
    sections: dict[str, Any] = {
        "data": {"path": str(digits.pixels)},
        "codec": None,
        "model": {"learn_sigma": True},
        "latents": {"norm": "codec"},
        "objective": {
            "path": {"name": "ddpm", "num_steps": 4, "beta_end": 0.99},
            "prediction": "eps",
            "times": "uniform",
            "auxiliary": "learned_range",
        },
    }
    go(values(digits, folder, engine="local", train={"steps": 1}, checkpoint={"every": 1}, **sections))
    words = ("--method=bound", "--method.variance=learned", "--method.decoder=discretised", "--count=4")
    got = figures(tmp_path / "out.json", folder, digits.pixels_val, *words)
    assert got["bits_per_dim"] > 0
    assert got["bits_per_dim_stored"] == got["bits_per_dim"]
    assert got["dimensions"] == 3 * 8 * 8


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--count=1"], 1, "count 1 must be 0 or at least 2"),
        (["--batch_size=0"], 1, "batch_size 0 at least 1"),
        (["--num_steps=0"], 1, "num_steps"),
        (["--method=odd"], 1, "did you mean ode?"),
        (["--method=bound", "--probes=2"], 1, "divergence"),
        (["--method=bound", "--exact"], 1, "divergence"),
        (["--exact", "--probes=2"], 1, "probes"),
        (["--method.num_steps=3"], 1, "--method.num_steps is given twice"),
        (["--method=bound", "--method.variance=learned"], 1, "learn_sigma"),
        (["--weights=emma"], 1, "holds the weights model, ema; got 'emma'"),
        (["--countt=3"], 2, "did you mean count?"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    run: Path, digits: Digits, tmp_path: Path, capsys, words: list[str], code: int, says: str
) -> None:
    kept = [w for w in BASE if w.split("=")[0] not in {x.split("=")[0] for x in words}]
    out = tmp_path / "out.json"
    assert call(tools.likelihood.main, run, digits.moments_val, *kept, *words, f"--out={out}") == code
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not out.exists()


def test_other_data_are_refused(run: Path, digits: Digits, tmp_path: Path, capsys) -> None:
    assert call(tools.likelihood.main, run, digits.pixels_val, *BASE, f"--out={tmp_path / 'x'}") == 1
    assert "come from different codecs" in capsys.readouterr().err
    assert call(tools.likelihood.main, run, tmp_path, *BASE, f"--out={tmp_path / 'x'}") == 1
    assert "no manifest.json" in capsys.readouterr().err


def test_by_default_it_is_written_under_the_run_and_measured_once(
    run: Path, digits: Digits, base: dict[str, Any], tmp_path: Path, capsys
) -> None:
    done = execute("likelihood.py", run, digits.moments_val, *BASE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    (file,) = (run / "likelihood").iterdir()
    assert file.name == f"moments_val-step-00000001-ema-{base['protocol_hash']}.json"
    assert json.loads(file.read_text())["bits_per_dim"] == base["bits_per_dim"]
    assert str(file) in done.stdout
    assert "weights: ema (decay 0.9, warmed up; 18% of the first weights left) of step 1" in done.stdout
    assert f"after 1 updates, from {at_step(run, 1)}" in done.stdout
    before = file.stat().st_mtime_ns
    assert call(tools.likelihood.main, run, digits.moments_val, *BASE) == 0
    assert "measured already" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before
    assert call(tools.likelihood.main, run, digits.moments_val, *BASE, "--overwrite") == 0
    assert file.stat().st_mtime_ns > before


def test_other_figures_are_not_replaced_in_silence(
    run: Path, digits: Digits, base: dict[str, Any], tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out.json"
    figures(out, run, digits.moments_val, *BASE)
    other = (*BASE[:-1], "--seed=5", f"--out={out}")
    assert call(tools.likelihood.main, run, digits.moments_val, *other) == 1
    assert "protocol.seed: 4 there, 5 now" in capsys.readouterr().err
    assert call(tools.likelihood.main, run, digits.moments_val, *BASE, "--weights=model", f"--out={out}") == 1
    assert "weights: 'ema' there, 'model' now" in capsys.readouterr().err
    assert json.loads(out.read_text())["bits_per_dim"] == base["bits_per_dim"]
    assert call(tools.likelihood.main, run, digits.moments_val, *other, "--overwrite") == 0
    assert json.loads(out.read_text())["bits_per_dim"] != base["bits_per_dim"]


def test_a_likelihood_that_is_not_finite_is_no_figure(digits: Digits, tmp_path: Path, capsys) -> None:
    folder = train(digits, tmp_path / "run", float("inf"))
    out = tmp_path / "out.json"
    assert call(tools.likelihood.main, folder, digits.moments_val, *BASE, f"--out={out}") == 1
    assert "sample 0 of" in (said := capsys.readouterr().err)
    assert "its log-likelihood is nan" in said
    assert not out.exists()


def test_two_runs_are_compared_sample_by_sample(
    run: Path, digits: Digits, tmp_path: Path, base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is that of the pairs, which share the data, the draws and the probes."""
    other = train(digits, tmp_path / "other", 0.02)
    out = tmp_path / "one.json"
    assert (
        call(tools.likelihood.main, run, digits.moments_val, *BASE, f"--out={out}", f"--against={other}") == 0
    )
    said = capsys.readouterr().out.splitlines()[-1]
    one = json.loads(out.read_text())
    (file,) = (other / "likelihood").iterdir()
    two = json.loads(file.read_text())
    assert one["bits_per_dim"] == base["bits_per_dim"]
    pairs = (np.array(two["nats_of_samples"]) - one["nats_of_samples"]) / math.log(2) / 256
    assert said.startswith(f"{pairs.mean():+.4f} +- {pairs.std(ddof=1) / math.sqrt(5):.4f} bits/dim")
    assert float(said.split()[0]) == pytest.approx(one["bits_per_dim"] - two["bits_per_dim"], abs=1e-4)
    held = {key: value for key, value in one.items() if key != "nats_of_samples"}
    out.write_text(json.dumps(held))  # as it was before they were kept: it is measured anew
    assert call(tools.likelihood.main, run, digits.moments_val, *BASE, f"--out={out}") == 0
    assert "nats_of_samples" not in json.loads(out.read_text())
    assert (
        call(tools.likelihood.main, run, digits.moments_val, *BASE, f"--out={out}", f"--against={other}") == 0
    )
    assert json.loads(out.read_text())["nats_of_samples"] == one["nats_of_samples"]

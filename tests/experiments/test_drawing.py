"""Drawing into folders: noise and latents that belong together, on any ranks, and a reflow trained on them."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch._dynamo.utils import counters

import tools.sample
import tools.shards
import tools.train
from dit.config import from_dict
from dit.data.loading.stream import Stream
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.experiments.diffusion import Experiment, SampleConfig
from dit.experiments.drawing import settings_line, spec_flags
from dit.experiments.trained import Trained
from dit.rng import Draws, Purpose
from dit.sample.denoise import Denoiser
from dit.sample.generate import SamplerSpec, to_uint8
from dit.sample.grid import GRIDS, UniformGrid
from dit.sample.guide import cfg
from dit.sample.solve import SOLVERS, Heun
from tests.commands import call
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import at_step, column, go, rewrite_tensors, values

CPU = torch.device("cpu")
COUNT = 40
BASE = (f"--num_samples={COUNT}", "--cfg_scale=1.5", "--num_steps=4", "--batch_size=16", "--seed=3")
OBJECTIVES = {
    "rectified_flow": {"path": "linear", "prediction": "velocity"},
    "edm": {"path": "ve", "prediction": "edm", "times": "edm"},  # starts from noise of std 80
}


def stirred(digits: Digits, folder: Path, **sections) -> Path:
    """A run whose weights are random everywhere."""
    go(values(digits, folder, engine="local", train={"steps": 1}, checkpoint={"every": 1}, **sections))

    def stir(tensors: dict) -> None:
        generator = torch.Generator().manual_seed(len(tensors))
        for name in sorted(tensors):
            if name.startswith(("model/", "ema/")):
                tensors[name] = 0.1 * torch.randn(tensors[name].shape, generator=generator)

    rewrite_tensors(at_step(folder, 1), stir)
    return folder


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stirred(digits, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pairs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "set"
    assert call(tools.sample.main, run, *BASE, f"--save_pairs={out}") == 0
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    manifest = Manifest.load(folder)
    blocks = [BlockReader(manifest).read(i) for i in range(len(manifest.blocks))]
    return {n: torch.from_numpy(np.concatenate([b[n] for b in blocks]).astype(float)) for n in blocks[0]}


def test_a_data_set_like_any_other(digits: Digits, pairs: Path, capsys) -> None:
    manifest, theirs = Manifest.load(pairs), Manifest.load(digits.moments)
    assert (manifest.samples, manifest.shape, manifest.eps) == (COUNT, (1, 4, 8, 8), True)
    for name in ("mean", "std", "codec", "classes", "image_size"):
        assert getattr(manifest, name) == getattr(theirs, name), name
    assert manifest.class_counts == (4,) * 10
    assert call(tools.shards.verify, pairs) == 0
    assert f"{COUNT} samples in 1 blocks are whole" in capsys.readouterr().out
    assert call(tools.shards.info, pairs) == 0
    assert "with the noise" in capsys.readouterr().out
    held = stored(pairs)
    assert held["label"].tolist() == [i % 10 for i in range(COUNT)]
    noise = Draws(3, 0, torch.arange(COUNT), 1).normal(Purpose.PRIOR, (4, 8, 8))
    torch.testing.assert_close(held["eps"][:, 0].float(), noise)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_ode_takes_each_noise_to_its_latents(digits: Digits, tmp_path: Path, name: str) -> None:
    """Integrated here once more, from what is stored: the same; and nothing like it from another's noise."""
    folder = stirred(digits, tmp_path / "run", objective=OBJECTIVES[name])
    assert call(tools.sample.main, folder, *BASE, f"--save_pairs={tmp_path / 'set'}") == 0
    held, trained = stored(tmp_path / "set"), Trained.load(str(folder), "ema", CPU)
    objective = trained.experiment.objective
    denoise = cfg(1.5)(Denoiser(trained.model, objective.path, objective.prediction))
    times = UniformGrid()(4, objective.path, objective.prediction)

    def made_of(eps: torch.Tensor) -> torch.Tensor:
        start, cond = objective.path.prior(eps.float()), {"label": held["label"].long()}
        with torch.no_grad():
            return trained.norm.invert(Heun()(denoise, start, times, objective.path, cond=cond))

    latents, eps = held["latents"][:, 0].float(), held["eps"][:, 0]
    torch.testing.assert_close(made_of(eps), latents, rtol=1e-4, atol=1e-4)
    assert float((made_of(eps.roll(1, 0)) - latents).abs().mean()) > 0.1 * float(latents.std())


def test_pictures_beside_them_show_the_same(run: Path, pairs: Path, tmp_path: Path) -> None:
    words = (*BASE, f"--save_pairs={tmp_path / 'set'}", f"--out={tmp_path / 'out'}")
    assert call(tools.sample.main, run, *words) == 0
    assert shards(tmp_path / "set") == shards(pairs)
    with np.load(tmp_path / "out" / "samples.npz") as drawn:
        images, labels = drawn["arr_0"], drawn["arr_1"]
    held, trained = stored(pairs), Trained.load(str(run), "ema", CPU)
    assert labels.tolist() == held["label"].tolist()
    decoded = to_uint8(trained.experiment.codec.build().decode(held["latents"][:, 0].float()))
    assert np.abs(decoded.astype(int) - images).max() <= 1


def test_the_same_spec_is_complete_and_says_so(run: Path, pairs: Path, tmp_path: Path, capsys) -> None:
    """Pictures are then drawn without drawing the pairs anew, and --overwrite makes a data set of another spec."""
    before = {p.name: p.stat().st_mtime_ns for p in pairs.iterdir()}
    assert call(tools.sample.main, run, *BASE, f"--save_pairs={pairs}", f"--out={tmp_path / 'out'}") == 0
    assert f"40 pairs in {pairs}: train on them" in (said := capsys.readouterr().out)
    assert "drawn already by the same spec" in said
    assert {p.name: p.stat().st_mtime_ns for p in pairs.iterdir()} == before
    copy = Path(shutil.copytree(pairs, tmp_path / "copy"))
    assert call(tools.sample.main, run, *BASE[:-1], "--seed=4", f"--save_pairs={copy}", "--overwrite") == 0
    assert stored(copy)["eps"].shape == stored(pairs)["eps"].shape
    assert not torch.equal(stored(copy)["eps"], stored(pairs)["eps"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "out"]


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "spec.json"}


def test_ranks_and_the_codec_change_nothing(
    run: Path, pairs: Path, ranks: Server, tmp_path: Path, monkeypatch
) -> None:
    assert ranks.run(2, call, tools.sample.main, run, *BASE, f"--save_pairs={tmp_path / 'two'}") == [0, 0]
    assert shards(tmp_path / "two") == shards(pairs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two"]
    monkeypatch.setattr("dit.experiments.trained.open_codec", lambda *args: pytest.fail("no codec is needed"))
    assert call(tools.sample.main, run, *BASE, f"--save_pairs={tmp_path / 'one'}") == 0


def test_records_from_before_there_was_compiling_or_sharing_are_of_none(
    run: Path, pairs: Path, tmp_path: Path, capsys
) -> None:
    copy = Path(shutil.copytree(pairs, tmp_path / "copy"))
    record = json.loads((copy / "spec.json").read_text())
    assert (record.pop("compile"), record.pop("share_encoder")) == (False, 1)
    (copy / "spec.json").write_text(json.dumps(record))
    assert call(tools.sample.main, run, *BASE, f"--save_pairs={copy}") == 0
    assert "drawn already by the same spec" in capsys.readouterr().out
    assert call(tools.sample.main, run, *BASE, "--compile", f"--save_pairs={copy}") == 1
    assert "compile" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_to_rounding(run: Path, tmp_path: Path) -> None:
    """At most one graph for a batch's rows, and one for the pairs of branches inside of guidance's interval."""
    torch.compiler.reset()
    counters.clear()
    guided = (*BASE[:1], *BASE[2:], "--guidance={name: cfg, scale: 2, interval: [0.3, 0.7]}")
    for out, flags in (("eager", ()), ("compiled", ("--compile",))):
        assert call(tools.sample.main, run, *guided, *flags, f"--save_pairs={tmp_path / out}") == 0
    ours, theirs = (stored(tmp_path / out)["latents"] for out in ("compiled", "eager"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_an_encoder_is_shared_where_there_is_one_and_the_record_says_so(
    digits: Digits, run: Path, tmp_path: Path, capsys
) -> None:
    shared = (*BASE, "--share_encoder=2")
    assert call(tools.sample.main, run, *shared, f"--save_pairs={tmp_path / 'none'}") == 1
    assert "this model has no encoder to share (model.name: ddt has one)" in capsys.readouterr().err
    size = {"width": 32, "depth": 2, "heads": 2, "patch": 4, "decoder_depth": 1}
    folder = stirred(digits, tmp_path / "ddt", model={"name": "ddt", **size})
    for out, flags in (("one", BASE), ("two", shared)):
        assert call(tools.sample.main, folder, *flags, f"--save_pairs={tmp_path / out}") == 0
    assert "was left out of 50.0% of the evaluations" in capsys.readouterr().out
    assert json.loads((tmp_path / "two" / "spec.json").read_text())["share_encoder"] == 2
    one, two = (stored(tmp_path / out)["latents"] for out in ("one", "two"))
    assert 0 < float((two - one).norm() / one.norm()) < 0.5
    assert call(tools.sample.main, folder, *BASE, f"--save_pairs={tmp_path / 'two'}") == 1
    assert "share_encoder" in capsys.readouterr().err


@pytest.fixture
def config(digits: Digits, pairs: Path, tmp_path: Path) -> Path:
    """A reflow's config as a user would write it."""
    given = values(digits, tmp_path / "run", engine="local", objective={"coupling": "reflow"})
    given |= {"data": {"path": str(pairs)}, "train": {"steps": 2, "global_batch": 32, "log_every": 1}}
    path = tmp_path / "reflow.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def test_a_reflow_trains_on_them(pairs: Path, config: Path, tmp_path: Path) -> None:
    """A new network says 0, so its first loss is the mean square of the velocities eps - data that are stored."""
    assert call(tools.train.main, config, "--train.micro_batch=8", config=Experiment) == 0
    cfg_used = from_dict(Experiment, yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    manifest = Manifest.load(pairs)
    stream = Stream(manifest, cfg_used.seed, 32)
    batch = stream.batch(0)
    stream.close()
    draws = Draws(cfg_used.seed, 0, batch.slots, 32)
    data = cfg_used.norm(manifest).draw(batch.moments, draws)
    expected = float((batch.eps - data).square().mean())
    losses = column(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[0] != pytest.approx(float((batch.eps.roll(1, 0) - data).square().mean()), rel=1e-3)
    apart = (data.square().mean() + batch.eps.square().mean()) / expected
    drop = column(tmp_path / "run", "pairing_cost_drop")[0]
    assert 1 / (1 - drop) == pytest.approx(float(apart), rel=0.02)  # the mean of micro-batches' drops


def test_a_reflow_on_ranks_is_the_same(config: Path, ranks: Server, tmp_path: Path) -> None:
    """The noise follows its sample to whichever rank takes it."""
    words = ("--train.micro_batch=8", "--train.steps=2")
    assert call(tools.train.main, config, *words, config=Experiment) == 0
    more = ("--engine=deepspeed", f"--run_dir={tmp_path / 'two'}")
    assert ranks.run(2, train_there, str(config), *words, *more) == [0, 0]
    one, two = tmp_path / "run", tmp_path / "two"
    assert column(one, "batch_hash") == column(two, "batch_hash")
    assert column(one, "loss") == pytest.approx(column(two, "loss"), rel=1e-5)


def train_there(*words: str) -> int:
    return call(tools.train.main, *words, config=Experiment)


def test_held_out_pairs(config: Path, pairs: Path, tmp_path: Path) -> None:
    words = (f"--data.val={pairs}", "--val.every=2", "--val.batches=1")
    assert call(tools.train.main, config, *words, config=Experiment) == 0
    assert (tmp_path / "run" / "held_out.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data.path={moments}"], "and set data.path=DIR"),
        (["--data.val={moments}", "--val.every=1"], "and set data.val=DIR (or null)"),
    ],
)
def test_a_reflow_needs_stored_noise(
    digits: Digits, config: Path, tmp_path: Path, capsys, words: list[str], says: str
) -> None:
    words = [w.format(moments=digits.moments) for w in words]
    for dry in ([], ["--dry_run"]):
        assert call(tools.train.main, config, *words, *dry, config=Experiment) == 1
        said = capsys.readouterr().err
        assert (
            f"objective.coupling reflow takes the noise that is stored with each sample, and {digits.moments}"
            in said
        )
        assert says in said
        assert not (tmp_path / "run").exists()


def test_pairs_may_be_trained_on_without_their_noise(config: Path, tmp_path: Path) -> None:
    assert call(tools.train.main, config, "--objective.coupling=independent", config=Experiment) == 0
    assert len(column(tmp_path / "run", "loss")) == 2


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--solver=euler_maruyama", "--save_pairs={new}"], 1, "adds noise on the way"),
        (["--solver=ddim", "--solver.eta=1", "--save_pairs={new}"], 1, "take an ODE solver, such as heun"),
        (["--save_pairs={old}", "--seed=4"], 1, "  sampler.seed: 3 there, 4 now"),
        (["--save_pairs={old}", "--out={new}", "--num_samples=20"], 1, "  num_samples: 40 there, 20 now"),
        (["--save_pairs={new}", "--out={new}"], 1, "give each a folder of its own"),
        ([], 2, "missing --out (a folder for pictures) or --save_pairs"),
        (["--save_pairs={new}", "--classes=11"], 1, "out of range"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    run: Path, pairs: Path, tmp_path: Path, capsys, words: list[str], code: int, says: str
) -> None:
    before = shards(pairs)
    given = [w.format(new=tmp_path / "new", old=pairs) for w in words]
    kept = [w for w in BASE if w.split("=")[0] not in {x.split("=")[0] for x in words}]
    assert call(tools.sample.main, run, *kept, *given) == code
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert shards(pairs) == before


SPECS = [
    *({"solver": {"name": name}} for name in SOLVERS.names()),
    *({"grid": {"name": name}} for name in GRIDS.names()),
    {"grid": {"name": "uniform", "shift": 2.0}},
    {"solver": {"name": "ddim", "eta": 0.25}, "grid": {"name": "karras", "rho": 5.0}, "num_steps": 9},
    {"cfg_scale": 1.5, "guidance": [{"name": "threshold", "quantile": 0.9, "floor": 3.0}]},
]


@pytest.mark.parametrize("values", SPECS, ids=str)
def test_the_flags_of_a_spec_make_it_again(values: dict) -> None:
    """And of what differs from a run's own pictures, what was asked for is left out."""
    spec = from_dict(SamplerSpec, values)
    flags = shlex.split(" ".join(spec_flags(spec).values()))
    keys = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    again, _, _ = tools.sample.read_spec({}, keys, None, keys.pop("guidance", None))
    assert again == spec
    own = from_dict(SampleConfig, {"every": 5, "num_steps": 77})
    assert "; the run's own pictures: " in (said := settings_line(spec, (), own))
    assert "--num_steps=77" in said
    assert "--num_steps=77" not in settings_line(spec, {"num_steps"}, own)
    assert "own" not in settings_line(spec, {"solver", "num_steps", "grid", "guidance"}, own)
    assert "own" not in settings_line(spec, (), SampleConfig())  # draws none, and sets nothing for them

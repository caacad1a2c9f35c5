"""tools/sample.py: the ADM suite's format, the same images on any ranks and batches (I7), and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import tools.sample
from dit.commandline.cli import run as run_command
from dit.config import from_dict, to_dict
from dit.data.codecs.autoencoders import Vae
from dit.data.encoding.encode import EncodeOptions, encode
from dit.data.sources.images import open_source
from dit.experiments.autoencoder import AutoencoderExperiment
from dit.experiments.loaded import load
from dit.experiments.trained import Trained
from dit.sample.formats import format_of
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.grid import GRIDS
from dit.sample.guide import GUIDANCES
from dit.sample.intact import BLOCKS, FILES
from dit.sample.solve import SOLVERS
from dit.stage1.autoencoder import Kl
from dit.train.start import train
from dit.unfinished import unfinished
from tests.commands import Forked, call, execute
from tests.datasets import Digits, first
from tests.rank_processes import Server
from tests.train.runs import at_step, flip_bit, go, random_run, rewrite_tensors, sign, values

CPU = torch.device("cpu")
BASE = ("--num_samples=7", "--classes=0,3", "--cfg_scale=2", "--num_steps=2", "--batch_size=4", "--seed=5")


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights are random everywhere, so that nothing in a picture is 0."""
    return random_run(digits, tmp_path_factory.mktemp("run"))


def draw(out: Path, *words: object) -> np.ndarray:
    """The images of a call that must succeed."""
    assert call(tools.sample.main, *words, f"--out={out}") == 0
    return arrays(out)[0].astype(int)


def arrays(out: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(out / "samples.npz") as held:
        assert held.files == ["arr_0", "arr_1"]
        return held["arr_0"], held["arr_1"]


@pytest.fixture(scope="module")
def base(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    draw(out, run, *BASE)
    return out


def test_the_files_are_what_they_should_be(run: Path, base: Path) -> None:
    images, labels = arrays(base)
    assert (images.shape, images.dtype) == ((7, 16, 16, 3), np.uint8)
    assert (labels.tolist(), labels.dtype) == ([0, 3, 0, 3, 0, 3, 0], np.int64)
    assert images.std() > 1
    assert len({i.tobytes() for i in images}) == 7
    grid = np.asarray(Image.open(base / "grid.png"))
    assert (grid[2:18, 2:18] == images[0]).all()  # two columns, one a class
    assert (grid[20:36, 20:36] == images[3]).all()
    spec = json.loads((base / "spec.json").read_text())
    assert spec["checkpoint"] == str(at_step(run, 2))
    assert (spec["step"], spec["weights"], spec["classes"]) == (2, "ema", [0, 3])
    assert (spec["num_samples"], spec["batch_size"]) == (7, 4)
    assert (spec["nfe"], spec["network_evaluations"]) == (
        4,
        8,
    )  # Heun calls four times, guidance has two branches
    assert spec["sampler"]["solver"] == {"name": "heun"}
    assert (spec["sampler"]["num_steps"], spec["sampler"]["cfg_scale"], spec["sampler"]["seed"]) == (
        2,
        2.0,
        5,
    )
    assert sorted(p.name for p in base.iterdir()) == ["grid.png", "samples.npz", "spec.json"]


def test_image_i_is_the_same_whatever_is_drawn_with_it(run: Path, base: Path, tmp_path: Path) -> None:
    images = arrays(base)[0].astype(int)
    assert (draw(tmp_path / "again", run, *BASE) == images).all()
    for batch in (1, 3, 64):
        other = draw(tmp_path / str(batch), run, *BASE[:-2], BASE[-1], f"--batch_size={batch}")
        assert np.abs(other - images).max() <= 1, batch
    more = draw(tmp_path / "more", run, "--num_samples=9", *BASE[1:])
    assert (more[:7] == images).all()  # whole batches of four in both: bit for bit


def test_what_fills_the_last_block_up_is_counted_and_not_looked_at(run: Path, tmp_path: Path) -> None:
    """As many images as are wanted, and as many calls an image, whatever the last block lacks."""
    for count in (4, 5):
        draw(tmp_path / str(count), run, f"--num_samples={count}", *BASE[1:])
    four, five = (json.loads((tmp_path / n / "spec.json").read_text()) for n in "45")
    assert (five["nfe"], five["network_evaluations"]) == (four["nfe"], four["network_evaluations"]) == (4, 8)


def test_the_batch_is_as_large_as_needed_and_then_stays(run: Path, tmp_path: Path, capsys) -> None:
    """Eight images are not drawn as 64; and what was begun with a size goes on with it, killed or finished."""
    out, rest = tmp_path / "out", BASE[1:4] + BASE[5:]
    draw(out, run, "--num_samples=3", *rest)
    assert json.loads((out / "spec.json").read_text())["batch_size"] == 3
    capsys.readouterr()
    found = draw(out, run, "--num_samples=8", *rest)
    assert f"3 images at a time, as in {out / 'spec.json'}; --batch_size says otherwise" in (
        said := capsys.readouterr().out
    )
    assert "3 of 8 images are drawn already" in said
    assert (found == draw(tmp_path / "fresh", run, "--num_samples=8", *rest, "--batch_size=3")).all()
    assert call(tools.sample.main, run, "--num_samples=8", *rest, "--batch_size=8", f"--out={out}") == 1
    assert "batch_size: 3 there, 8 now" in capsys.readouterr().err
    with unfinished(
        tmp_path / "killed", record := json.loads((out / "spec.json").read_text()), record, (8, 3)
    ):
        (tmp_path / "killed.partial" / "block-00000000.npz").touch()
        shutil.copytree(tmp_path / "killed.partial", tmp_path / "again.partial")
    draw(tmp_path / "again", run, "--num_samples=8", *rest, "--overwrite")
    assert json.loads((tmp_path / "again" / "spec.json").read_text())["batch_size"] == 8


def test_ranks_change_nothing_and_old_parts_are_not_taken_in(
    run: Path, base: Path, ranks: Server, tmp_path: Path
) -> None:
    """What a larger job that was killed has left in the folder is no part of this one."""
    tmp_path.joinpath(".part-00007.npz").touch()
    np.savez(tmp_path / ".part-00002.npz", **{"0": np.zeros((4, 16, 16, 3), np.uint8)})
    assert ranks.run(2, call, tools.sample.main, run, *BASE, f"--out={tmp_path}") == [0, 0]
    for ours, theirs in zip(arrays(tmp_path), arrays(base), strict=True):
        assert (ours == theirs).all()
    left = (".part-00002.npz", ".part-00007.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == [*left, "grid.png", "samples.npz", "spec.json"]


# --- going on, and what lies there -------------------------------------------------------------------------


def blocks(out: Path) -> list[str]:
    return sorted(p.name for p in out.with_name(f"{out.name}.partial").glob("block-*"))


def killed(out: Path, words: Sequence[object], done: int) -> None:
    """A process that is killed with SIGKILL as soon as it has drawn so many blocks."""
    process = Forked("sample.py", *words, f"--out={out}")
    end = time.monotonic() + 120
    while len(blocks(out)) < done and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "spec.json").exists(), "it ended before it could be killed"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_rank_stops_all_of_them_and_the_same_command_goes_on(
    run: Path, ranks: Server, tmp_path: Path, capsys, sent: signal.Signals
) -> None:
    """In the middle of a block, with status 75, by which launch/ queues the job again."""
    out, words = tmp_path / "out", ("--num_samples=40", "--batch_size=2", "--num_steps=25", "--seed=5")
    with ranks.start(2, call, tools.sample.main, run, *words, f"--out={out}") as job:
        end = time.monotonic() + 60
        while len(blocks(out)) < 3 and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(job.processes[1].pid, sent)
        assert job.wait() == [75, 75]
        assert not out.exists()
        done = 2 * len(blocks(out))
        assert f"stopped: {done} of 40 images are drawn and kept; the same command goes on" in job.output()
        assert "error" not in job.output() + job.output(1)
    draw(out, run, *words)
    assert f"{done} of 40 images are drawn already; going on with the others" in capsys.readouterr().out


def test_on_a_full_disk_it_says_where_and_goes_on_when_there_is_room(
    run: Path, base: Path, tmp_path: Path, capsys
) -> None:
    """Full while a block is written, and then while the files are put together."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        for size in ("16k", "24k"):
            assert call(tools.sample.main, run, *BASE, f"--out={disk / 'out'}") == 1
            said = capsys.readouterr().err
            assert "No space left on device: " in said
            assert f"{disk / 'out.partial'}" in said
            assert "start the same command again" in said
            assert not (disk / "out").exists()
            subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert (draw(disk / "out", run, *BASE) == arrays(base)[0]).all()
        assert "7 of 7 images are drawn already" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_killed_it_goes_on_with_any_ranks_and_the_arrays_are_the_same(
    run: Path, ranks: Server, tmp_path: Path, capsys
) -> None:
    words = ("--num_samples=40", "--batch_size=2", "--cfg_scale=2", "--num_steps=25", "--seed=5")
    killed(tmp_path / "out", (run, *words), done=3)
    kept = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in blocks(tmp_path / "out")}
    assert 3 <= len(kept) < 20
    (tmp_path / "out.partial" / "block-00000001.npz").write_bytes(b"spoilt")
    del kept["block-00000001.npz"]
    shutil.copytree(tmp_path / "out.partial", tmp_path / "two.partial")
    draw(tmp_path / "whole", run, *words)
    capsys.readouterr()
    assert (draw(tmp_path / "out", run, *words) == arrays(tmp_path / "whole")[0]).all()
    said = capsys.readouterr()
    assert f"{2 * len(kept)} of 40 images are drawn already; going on with the others" in said.out
    assert "block-00000001.npz is damaged" in said.err
    assert ranks.run(2, call, tools.sample.main, run, *words, f"--out={tmp_path / 'two'}") == [0, 0]
    for ours, theirs in zip(arrays(tmp_path / "two"), arrays(tmp_path / "whole"), strict=True):
        assert (ours == theirs).all()
    spec, other = (json.loads((tmp_path / n / "spec.json").read_text()) for n in ("two", "whole"))
    assert spec == other  # the evaluations of both starts are counted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "two", "whole"]


@pytest.mark.slow
def test_killed_five_times_on_one_two_and_four_ranks_the_arrays_are_the_same(
    run: Path, ranks: Server, tmp_path: Path
) -> None:
    """SIGKILL to all ranks, each time after some more blocks, and each time on another number of ranks."""
    words = ("--num_samples=82", "--batch_size=2", "--cfg_scale=2", "--num_steps=20", "--label_order=random")
    words = (run, *words, "--formats=npz,png")
    out = tmp_path / "out"
    for kill, size in enumerate((1, 2, 4, 2, 1), 1):
        with ranks.start(size, call, tools.sample.main, *words, f"--out={out}") as job:
            end = time.monotonic() + 120
            while len(blocks(out)) < 4 * kill and time.monotonic() < end:
                time.sleep(0.002)
            job.kill()
        assert 4 * kill <= len(blocks(out)) < 41, "it ended before it could be killed"
        assert not out.exists()
    assert ranks.run(4, call, tools.sample.main, *words, f"--out={out}") == [0] * 4
    for size in (1, 2, 4):
        other = tmp_path / f"whole{size}"
        assert ranks.run(size, call, tools.sample.main, *words, f"--out={other}") == [0] * size
        for ours, theirs in zip(arrays(out), arrays(other), strict=True):
            assert (ours == theirs).all()
        assert (forms(other, "png")[0] == arrays(out)[0]).all()
        assert (other / "spec.json").read_bytes() == (out / "spec.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole1", "whole2", "whole4"]


def test_the_same_command_finds_it_complete(run: Path, base: Path, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in base.iterdir()}
    draw(base, run, *BASE)
    assert "drawn already by the same spec" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in base.iterdir()} == before


def test_more_images_are_drawn_to_those_that_are_there(run: Path, base: Path, tmp_path: Path, capsys) -> None:
    out = Path(shutil.copytree(base, tmp_path / "out"))
    words = ("--num_samples=18", *BASE[1:])
    found = draw(out, run, *words)
    assert "4 of 18 images are drawn already" in capsys.readouterr().out  # whole blocks of four
    assert (found == draw(tmp_path / "fresh", run, *words)).all()
    specs = [json.loads((f / "spec.json").read_text()) for f in (out, tmp_path / "fresh")]
    assert specs[0] == specs[1]
    assert call(tools.sample.main, run, *BASE, f"--out={out}") == 1
    assert "  num_samples: 18 there, 7 now" in capsys.readouterr().err
    assert (arrays(out)[0] == found).all()


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ("--seed=6", "sampler.seed: 5 there, 6 now"),
        ("--weights=model", "weights: 'ema' there, 'model' now"),
        ("--classes=1,2", "classes: [0, 3] there, [1, 2] now"),
        ("--batch_size=3", "batch_size: 4 there, 3 now"),
        ("--solver=euler", "sampler.solver.name: 'heun' there, 'euler' now"),
        ("--codec_dtype=bfloat16", "codec.codec_dtype: null there, 'bfloat16' now"),
    ],
)
def test_another_spec_is_refused_and_can_be_told_to_replace(
    run: Path, base: Path, tmp_path: Path, capsys, change: str, row: str
) -> None:
    out = Path(shutil.copytree(base, tmp_path / "out"))
    words = [*(w for w in BASE if w.split("=")[0] != change.split("=")[0]), change]
    assert call(tools.sample.main, run, *words, f"--out={out}") == 1
    assert row in capsys.readouterr().err
    assert (arrays(out)[0] == arrays(base)[0]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    replaced = draw(out, run, *words, "--overwrite")
    assert (replaced == draw(tmp_path / "fresh", run, *words)).all()


def test_random_labels_are_recorded_and_older_records_mean_balanced(
    run: Path, base: Path, tmp_path: Path, capsys
) -> None:
    """Random labels are the same in a larger drawing, on other ranks, and in Python."""
    out = Path(shutil.copytree(base, tmp_path / "out"))
    record = json.loads((out / "spec.json").read_text())
    assert record.pop("label_order") == "balanced"
    (out / "spec.json").write_text(json.dumps(record))
    assert (draw(out, run, *BASE) == arrays(base)[0]).all()
    assert call(tools.sample.main, run, *BASE, "--label_order=random", f"--out={out}") == 1
    assert "label_order: 'balanced' there, 'random' now" in capsys.readouterr().err
    few = draw(tmp_path / "few", run, *BASE, "--label_order=random")
    many = draw(tmp_path / "many", run, "--num_samples=12", *BASE[1:], "--label_order=random")
    labels = arrays(tmp_path / "many")[1]
    assert (many[:7] == few).all()
    assert (labels[:7] == arrays(tmp_path / "few")[1]).all()
    assert labels.tolist() != [0, 3] * 6
    how = {"num_steps": 2, "batch_size": 4, "seed": 5, "cfg_scale": 2.0}
    assert (load(run).sample(7, [0, 3], label_order="random", progress=False, **how) == few).all()


# --- forms of result ---------------------------------------------------------------------------------------


def forms(out: Path, *names: str) -> list[np.ndarray]:
    """The images that a folder holds, once for each of its forms."""
    return [np.stack(list(format_of(name).read(out))) for name in names]


def nobody_draws(monkeypatch) -> None:
    monkeypatch.setattr(Sampler, "latents", lambda *args: pytest.fail("it is there already"))


def test_all_forms_hold_the_same_images(run: Path, base: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """At once, or each made of one that is there, without drawing; and more images are added to all of them."""
    out, names = tmp_path / "out", ("npz", "png", "webdataset")
    assert call(tools.sample.main, run, *BASE, "--formats=png,webdataset,npz", f"--out={out}") == 0
    for images in forms(out, *names):
        assert (images == arrays(base)[0]).all()
    assert sorted(p.name for p in out.iterdir()) == [
        "grid.png", "images", "labels.csv", "samples.npz", "shards", "spec.json",
    ]  # fmt: skip
    last = tmp_path / "last"
    for before, name in (("png", "png"), ("png", "webdataset"), ("webdataset", "npz")):
        with monkeypatch.context() as patch:
            if name != before:
                nobody_draws(patch)
            assert call(tools.sample.main, run, *BASE, f"--formats={name}", f"--out={last}") == 0
    assert "7 of 7 images are drawn already; only their files are to be made" in capsys.readouterr().out
    assert json.loads((last / "spec.json").read_text())["formats"] == ["png", "webdataset", "npz"]
    assert arrays(last)[1].tolist() == arrays(base)[1].tolist()
    specs = [json.loads((f / "spec.json").read_text()) | {"formats": 0, "files": 0} for f in (last, base)]
    assert specs[0] == specs[1]
    for images in forms(last, *names):
        assert (images == arrays(base)[0]).all()
    capsys.readouterr()
    assert call(tools.sample.main, run, "--num_samples=9", *BASE[1:], "--formats=png", f"--out={last}") == 0
    assert "4 of 9 images are drawn already" in capsys.readouterr().out
    assert [len(images) for images in forms(last, *names)] == [9, 9, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "out"]


def test_latents_are_what_the_images_are_decoded_from(
    run: Path, base: Path, tmp_path: Path, monkeypatch
) -> None:
    """They cannot be made of images, so they are drawn; images and latents together are then extended."""
    out = Path(shutil.copytree(base, tmp_path / "out"))
    assert (draw(out, run, *BASE, "--save_latents") == arrays(base)[0]).all()
    with np.load(out / "latents.npz") as held:
        latents, labels = held["arr_0"], held["arr_1"]
    assert (latents.shape, latents.dtype, labels.tolist()) == (
        (7, 4, 8, 8),
        np.float32,
        [0, 3, 0, 3, 0, 3, 0],
    )
    assert (load(run).decode(latents, batch_size=4, progress=False) == arrays(base)[0]).all()
    assert draw(out, run, "--num_samples=8", *BASE[1:]).shape[0] == 8
    assert [len(x) for x in forms(out, "latents", "npz")] == [8, 8]
    with monkeypatch.context() as patch:
        nobody_draws(patch)
        draw(out, run, "--num_samples=8", *BASE[1:], "--save_latents", "--formats=npz")


def test_a_preview_opens_no_codec(run: Path, base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("dit.experiments.trained.open_codec", lambda *args: pytest.fail("no codec is needed"))
        assert call(tools.sample.main, run, *BASE, "--preview", f"--out={out}") == 0
    assert "7 latents in" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "latents.npz", "spec.json"]
    with np.load(out / "latents.npz") as held:
        latents = held["arr_0"]
    drawn = load(run).sample_latents(
        7, [0, 3], batch_size=4, num_steps=2, seed=5, cfg_scale=2.0, progress=False
    )
    assert (drawn.numpy() == latents).all()
    assert np.asarray(Image.open(out / "grid.png")).std() > 20
    assert call(tools.sample.main, run, *BASE, f"--out={out}") == 1
    assert "preview: true there, false now" in capsys.readouterr().err
    assert call(tools.sample.main, run, *BASE, "--preview", "--formats=png", f"--out={out}") == 2


def test_pictures_of_the_way_and_of_what_lies_between(
    run: Path, base: Path, ranks: Server, tmp_path: Path, capsys, monkeypatch
) -> None:
    """They come to a finished drawing, once; their ends are images of it, to rounding in a batch of another size."""
    out = Path(shutil.copytree(base, tmp_path / "out"))
    words = (run, *BASE, "--trajectory", "--interpolate=classes:0,3", f"--out={out}")
    assert ranks.run(2, call, tools.sample.main, *words) == [0, 0]
    assert (arrays(out)[0] == arrays(base)[0]).all()
    grid = np.asarray(Image.open(out / "interpolation.png")).astype(int)
    for row, column in ((0, 0), (1, 8)):  # image 0 is of class 0, image 1 of class 3
        place = np.s_[2 + 18 * row : 18 + 18 * row, 2 + 18 * column : 18 + 18 * column]
        assert np.abs(grid[place] - arrays(base)[0][row]).max() <= 1
    with Image.open(out / "trajectory.webp") as animation:
        assert animation.n_frames == 3
        animation.seek(2)
        last = np.asarray(animation.convert("RGB")).astype(int)[2:18, 2:18]
    assert np.abs(last - arrays(base)[0][0]).max() <= 1
    records = [json.loads((out / name).read_text()) for name in ("trajectory.json", "interpolation.json")]
    assert records[1]["interpolate"] == {"classes": [0, 3]}
    assert records[0]["num_samples"] == 7
    with monkeypatch.context() as patch:
        nobody_draws(patch)
        assert call(tools.sample.main, *words) == 0
    said = capsys.readouterr().out
    assert f"{out / 'trajectory.webp'}, drawn already by the same spec" in said
    other = [word if "interpolate" not in str(word) else "--interpolate=seeds:0,1" for word in words]
    assert call(tools.sample.main, *other) == 1
    assert "interpolate.seeds: null there, [0, 1] now" in capsys.readouterr().err
    assert (
        call(tools.sample.main, run, *BASE, "--trajectory", "--solver=dopri5", f"--out={tmp_path / 'b'}") == 1
    )
    assert "each image has its own times" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert call(tools.sample.main, run, *BASE, "--trajectory", "--preview", f"--out={tmp_path / 'b'}") == 2


def lost(file: Path) -> None:
    file.unlink()


def broken_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_its_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.rfind(b"IDAT") + 10 if b"IDAT" in data else 400] ^= 4
    file.write_bytes(data)


FILES_OF = {"npz": "samples.npz", "png": "images/00000004.png", "webdataset": "shards/000000.tar"}
HURT = [  # and how many of the images are kept, in blocks of 4; by a record of an older version
    ("npz", "samples.npz", lost, 0, 0),
    ("npz", "samples.npz", broken_off, 0, 0),
    ("npz", "samples.npz", without_its_end, 7, 0),
    ("npz", "samples.npz", flipped, 3, 0),
    ("npz", "grid.png", lost, 7, 7),
    ("npz", "grid.png", flipped, 7, None),
    ("png", "images/00000004.png", lost, 4, 4),
    ("png", "images/00000004.png", broken_off, 4, 4),
    ("png", "images/00000004.png", flipped, 4, 4),
    ("png", "labels.csv", broken_off, 7, None),
    ("webdataset", "shards/000000.tar", lost, 0, 0),
    ("webdataset", "shards/000000.tar", broken_off, 4, 4),
    ("webdataset", "shards/000000.tar", flipped, 4, 4),
]
CASES = [
    pytest.param(form, file, how, kept, is_old, id=f"{file}-{how.__name__}{'-old' * is_old}")
    for form, file, how, *both in HURT
    for is_old, kept in enumerate(both)
    if kept is not None
]


@pytest.mark.parametrize(("form", "file", "how", "kept", "is_old"), CASES)
def test_what_is_damaged_is_named_and_drawn_again(
    run: Path,
    tmp_path: Path,
    capsys,
    form: str,
    file: str,
    how: Callable[[Path], None],
    kept: int,
    is_old: bool,
) -> None:
    """And nothing else: `kept` images are there already. A record of an older version has no checksums."""
    out = tmp_path / "out"
    words = (run, *BASE, f"--formats={form}", f"--out={out}")
    assert call(tools.sample.main, *words) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    if is_old:
        spec = json.loads((out / "spec.json").read_text())
        (out / "spec.json").write_text(
            json.dumps({k: v for k, v in spec.items() if k not in (FILES, BLOCKS)})
        )
    how(out / file)
    capsys.readouterr()
    assert call(tools.sample.main, *words) == 0
    said = capsys.readouterr()
    assert f"warning: {out / file.split('/')[0]} " in said.err
    assert "what is damaged is made anew" in said.err
    assert f"{kept} of 7 images are drawn already" in said.out or not kept
    now = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert sorted(now) == sorted(before)
    assert now == before
    assert call(tools.sample.main, *words) == 0
    assert "drawn already by the same spec" in capsys.readouterr().out


@pytest.mark.parametrize("form", FILES_OF)
def test_another_form_is_made_of_what_is_whole(run: Path, tmp_path: Path, capsys, form: str) -> None:
    """Of the blocks of a damaged one that are as they were, or of another form beside it."""
    out, other = tmp_path / "out", "png" if form == "npz" else "npz"
    assert call(tools.sample.main, run, *BASE, f"--formats={form}", f"--out={out}") == 0
    (whole,) = forms(out, form)
    flipped(out / FILES_OF[form])
    assert call(tools.sample.main, run, *BASE, f"--formats={other}", f"--out={out}") == 0
    for images in forms(out, form, other):
        assert (images == whole).all()
    lost(out / FILES_OF[form])
    capsys.readouterr()
    assert call(tools.sample.main, run, *BASE, f"--formats={form}", f"--out={out}") == 0
    assert "7 of 7 images are drawn already; only their files are to be made" in capsys.readouterr().out
    assert (forms(out, form)[0] == whole).all()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_images_of_somebody_else_is_never_replaced(
    run: Path, base: Path, tmp_path: Path, capsys, overwrite: list[str]
) -> None:
    out = Path(shutil.copytree(base, tmp_path / "out"))
    (out / "images").mkdir()
    (out / "images" / "holiday.png").touch()
    assert call(tools.sample.main, run, *BASE, "--formats=png", *overwrite, f"--out={out}") == 1
    assert f"{out / 'images'} is there already, and nothing says" in capsys.readouterr().err
    assert (out / "images" / "holiday.png").exists()
    assert call(tools.sample.main, run, *BASE, "--formats=jpg", f"--out={out}") == 1
    assert "there is no 'jpg'" in capsys.readouterr().err


@pytest.mark.parametrize("place", range(5))
def test_stopped_while_files_take_their_places_it_goes_on(
    run: Path, base: Path, tmp_path: Path, monkeypatch, place: int
) -> None:
    """Between any two of the moves of an extension, neither old nor new is whole: the same command makes it so."""
    out = Path(shutil.copytree(base, tmp_path / "out"))
    words, moves = (run, "--num_samples=9", *BASE[1:], "--formats=npz,png", f"--out={out}"), [0]
    replace = Path.replace

    def stop(path: Path, target: Path) -> Path:
        if path.parent == out.with_name("out.partial") and Path(target).parent == out:
            moves[0] += 1
        if moves[0] > place:
            raise OSError("stopped here")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        assert call(tools.sample.main, *words) == (1 if place < 4 else 0)
    assert call(tools.sample.main, *words) == 0
    fresh = draw(tmp_path / "fresh", run, "--num_samples=9", *BASE[1:])
    for images in forms(out, "npz", "png"):
        assert (images == fresh).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]


def test_another_checkpoint_of_the_same_name_is_another_spec(
    run: Path, base: Path, tmp_path: Path, capsys
) -> None:
    """The run was moved away, and another trained in its place: same path, same step."""
    out = Path(shutil.copytree(base, tmp_path / "out"))
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    draw(out, moved, *BASE)
    assert "drawn already by the same spec" in capsys.readouterr().out  # wherever it lies
    rewrite_tensors(at_step(moved, 2), lambda tensors: [t.mul_(1.1) for t in tensors.values()])
    assert call(tools.sample.main, moved, *BASE, f"--out={out}") == 1
    assert "  digest: " in capsys.readouterr().err


def test_what_it_draws_with_is_said_where_nobody_asked(run: Path, tmp_path: Path, capsys) -> None:
    """The run's own pictures were drawn otherwise: what was asked for is no news, and what was not is said."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    own = {"every": 1, "cfg_scale": 3.0, "num_steps": 7, "solver": {"name": "ddim", "eta": 0.5}}
    sign(at_step(copy, 2), lambda meta: meta["config"]["sample"].update(own))
    small = ("--num_samples=2", "--classes=0,3")
    for number, (words, drawn, note) in enumerate(
        [
            (
                ["--num_steps=2"],
                "--solver=heun --num_steps=2 --grid=uniform --cfg_scale=1",
                "--solver=ddim --solver.eta=0.5 --cfg_scale=3",
            ),
            (
                ["--num_steps=2", "--solver=euler", "--cfg_scale=2", "--shift=3"],
                "--solver=euler --num_steps=2 --grid=uniform --grid.shift=3.0 --cfg_scale=2",
                None,
            ),
            (
                ["--num_steps=2", "--solver=ddim", "--solver.eta=0.5", "--guidance={name: cfg, scale: 3}"],
                "--solver=ddim --solver.eta=0.5 --num_steps=2 --grid=uniform --cfg_scale=1 --guidance='[{",
                None,
            ),
        ]
    ):
        draw(tmp_path / str(number), copy, *small, *words)
        (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith("drawing with "))
        assert line.startswith(f"drawing with {drawn}")
        assert line.partition("; the run's own pictures: ")[2] == (note or "")
    draw(tmp_path / "plain", run, *small, "--num_steps=2")  # a run that draws none and sets nothing for them
    assert "the run's own" not in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_folders_of_something_else_are_refused(
    digits: Digits, run: Path, base: Path, tmp_path: Path, capsys, overwrite: tuple[str, ...]
) -> None:
    before = {path: path.stat().st_mtime_ns for top in (digits.pixels, run, base) for path in top.rglob("*")}
    kinds = {
        digits.pixels: "a data set",
        run: "a run directory",
        run / "checkpoints": "a folder of checkpoints",
        at_step(run, 2): "a folder of checkpoints",
    }
    for folder, kind in kinds.items():
        assert call(tools.sample.main, run, *BASE, f"--out={folder}", *overwrite) == 1
        assert f"{folder} is {kind}, and a folder of drawn images is to be written" in capsys.readouterr().err
    for folder, kind in {**kinds, base: "a folder of drawn images"}.items():
        if folder != digits.pixels:
            assert call(tools.sample.main, run, *BASE, f"--save_pairs={folder}", *overwrite) == 1
            assert f"{folder} is {kind}, and a data set is to be written" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for top in (digits.pixels, run, base) for p in top.rglob("*")}


def test_a_record_from_before_there_was_a_digest_is_refused_in_plain_words(
    run: Path, base: Path, tmp_path: Path, capsys
) -> None:
    out = Path(shutil.copytree(base, tmp_path / "out"))
    held = json.loads((out / "spec.json").read_text())
    del held["digest"]
    (out / "spec.json").write_text(json.dumps(held))
    assert call(tools.sample.main, run, *BASE, f"--out={out}") == 1
    said = capsys.readouterr().err
    assert f"{out}/spec.json does not say whether it is of the same result:" in said
    assert "  digest: not recorded there, as it was made by an older version" in said
    assert "Give --overwrite to replace it, or another place to write to." in said


def test_images_of_which_nothing_is_known_are_not_replaced(
    run: Path, base: Path, tmp_path: Path, capsys
) -> None:
    out = Path(shutil.copytree(base, tmp_path / "out"))
    (out / "spec.json").unlink()
    assert call(tools.sample.main, run, *BASE, f"--out={out}") == 1
    assert "samples.npz is there already, and nothing says how it was made" in capsys.readouterr().err
    assert (arrays(out)[0] == arrays(base)[0]).all()


# --- what is not finite ------------------------------------------------------------------------------------


def overflowing(digits: Digits, folder: Path) -> Path:
    """A run whose VAE's decoder is beyond float16, and well in float32."""
    vae = AutoencoderKL.from_pretrained(digits.vae)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(3e6)
    vae.save_pretrained(folder / "vae")
    images = first(open_source("digits:train"), 64)
    options = EncodeOptions(image_size=16, block=16, workers=1)
    encode(images, Vae(path=str(folder / "vae")).build(), folder / "latents", options)
    sections = {"data": {"path": str(folder / "latents")}, "codec": {"path": str(folder / "vae")}}
    go(
        values(
            digits, folder / "run", engine="local", train={"steps": 1}, checkpoint={"every": 1}, **sections
        )
    )
    return folder / "run"


def test_a_decoder_that_overflows_makes_no_pictures(digits: Digits, tmp_path: Path, capsys) -> None:
    folder, out = overflowing(digits, tmp_path), tmp_path / "out"
    words = ("--num_samples=4", "--num_steps=2", "--classes=3", f"--out={out}")
    assert call(tools.sample.main, folder, *words, "--codec.dtype=float16") == 1
    said = capsys.readouterr().err
    assert "image 0 (class 3): " in said
    assert "its pixels, decoded from latents" in said
    assert "set codec.dtype to float32 (it is float16)" in said
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()  # so that the advice can be followed with the same --out
    assert draw(out, folder, *words[:-1], "--codec.dtype=float32").std() > 1


def test_pictures_that_are_clipped_everywhere_are_said(run: Path, tmp_path: Path, capsys) -> None:
    words = ("--num_samples=2", "--num_steps=1", "--solver=euler", f"--out={tmp_path / 'out'}")
    assert call(tools.sample.main, run, *words, "--cfg_scale=1e6") == 0
    assert "the pictures are clipped, and show little; lower cfg_scale" in capsys.readouterr().err


def test_guidance_that_overflows_makes_no_pictures(run: Path, tmp_path: Path, capsys) -> None:
    for place in (f"--out={tmp_path / 'out'}", f"--save_pairs={tmp_path / 'pairs'}"):
        assert call(tools.sample.main, run, *BASE[:2], "--cfg_scale=1e38", place) == 1
        said = capsys.readouterr().err
        assert "image 0 (class 0): 100% of its latents are not finite; lower cfg_scale (it is 1e+38)" in said
        assert not list(tmp_path.iterdir())


def test_more_ranks_than_batches(run: Path, base: Path, ranks: Server, tmp_path: Path) -> None:
    words = (*BASE[:-2], BASE[-1], "--batch_size=7", f"--out={tmp_path}")
    assert ranks.run(2, call, tools.sample.main, run, *words) == [0, 0]
    assert np.abs(arrays(tmp_path)[0].astype(int) - arrays(base)[0]).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        "--seed=6",
        "--cfg_scale=1",
        "--num_steps=3",
        "--solver=euler",
        "--weights=model",
        "--shift=3",
        "--classes=1,2",
        "--grid=quadratic",
        "--guidance={name: threshold, quantile: 0.5, floor: 1}",
    ],
)
def test_every_choice_matters(run: Path, base: Path, tmp_path: Path, change: str) -> None:
    name = change.split("=")[0]
    kept = [w for w in BASE if not w.startswith(name + "=")]
    assert (draw(tmp_path, run, *kept, change) != arrays(base)[0]).any()


def test_any_key_of_the_spec_can_be_given(run: Path, tmp_path: Path) -> None:
    """In any order: a field before the name of what it belongs to as well."""
    words = (
        "--solver.eta=0.5",
        "--solver=ddim",
        "--grid=karras",
        "--grid_rho=5",
        "--shift=2",
        "--cfg_scale=2",
    )
    guidance = "{name: threshold, quantile: 0.9, floor: 3}, {name: threshold, quantile: null, floor: 1}"
    draw(tmp_path / "a", run, *words, f"--guidance={guidance}", "--num_samples=2", "--num_steps=3")
    spec = json.loads((tmp_path / "a" / "spec.json").read_text())["sampler"]
    assert spec["solver"] == {"name": "ddim", "eta": 0.5}
    assert (spec["grid"]["name"], spec["grid"]["rho"], spec["grid"]["shift"]) == ("karras", 5, 2)
    assert [(g["name"], g["quantile"], g["floor"]) for g in spec["guidance"]] == [
        ("threshold", 0.9, 3),
        ("threshold", None, 1),
    ]
    again = from_dict(SamplerSpec, spec)  # what it says is what can be asked for
    assert to_dict(again) == spec


def test_a_shift_may_be_given_in_either_way(run: Path, tmp_path: Path) -> None:
    small = ("--num_samples=2", "--num_steps=2", "--cfg_scale=1")
    one = draw(tmp_path / "a", run, *small, "--shift=3")
    assert (draw(tmp_path / "b", run, *small, "--grid.shift=3") == one).all()


def test_a_weaker_checkpoint_guides_and_is_counted(
    run: Path, base: Path, tmp_path: Path, ranks: Server
) -> None:
    guidance = f"--guidance={{name: autoguidance, checkpoint: {at_step(run, 1)}, scale: 2}}"
    found = draw(tmp_path / "a", run, *BASE, guidance)
    assert (found != arrays(base)[0]).any()
    assert ranks.run(2, call, tools.sample.main, run, *BASE, guidance, f"--out={tmp_path / 'b'}") == [0, 0]
    assert (arrays(tmp_path / "b")[0] == found).all()
    for folder in ("a", "b"):
        spec = json.loads((tmp_path / folder / "spec.json").read_text())
        assert (spec["nfe"], spec["network_evaluations"]) == (4, 12)
        (held,) = spec["guidance_checkpoints"].items()
        assert held[0] == held[1].pop("checkpoint") == str(at_step(run, 1))
        assert held[1] == {"step": 1, "digest": Trained.load(held[0], "ema", CPU).digest}


def test_what_an_adaptive_solver_took_is_the_mean_over_all_ranks(
    run: Path, tmp_path: Path, ranks: Server
) -> None:
    words = (*BASE[:-2], "--batch_size=1", "--seed=5", "--solver=dopri5", "--solver.rtol=1e-3")
    draw(tmp_path / "one", run, *words)
    assert ranks.run(2, call, tools.sample.main, run, *words, f"--out={tmp_path / 'two'}") == [0, 0]
    one, two = (json.loads((tmp_path / n / "spec.json").read_text()) for n in ("one", "two"))
    assert one["nfe"] == two["nfe"] > 7
    assert one["network_evaluations"] == pytest.approx(2 * one["nfe"])


def test_help_lists_solvers_grids_and_guidances_with_their_fields(capsys) -> None:
    run_command(tools.sample.main, argv=["--help=all"], choices=tools.sample.CHOICES)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = [words[0] for words in said if words]
    for registry in (SOLVERS, GRIDS, GUIDANCES):
        for name, member in registry.items():
            at = first.index(name)
            fields = [f.name for f in dataclasses.fields(member)]
            assert first[at + 1 : at + 1 + len(fields)] == fields


def test_a_checkpoint_may_be_named_and_a_broken_one_is_passed_over(
    run: Path, base: Path, tmp_path: Path, capsys
) -> None:
    first = draw(tmp_path / "first", at_step(run, 1), *BASE)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    flip_bit(at_step(copy, 2) / "rank-00000.safetensors")
    assert (draw(tmp_path / "passed", copy, *BASE) == first).all()
    assert "passing over a broken checkpoint" in capsys.readouterr().out
    assert call(tools.sample.main, at_step(copy, 2), *BASE, f"--out={tmp_path / 'x'}") == 1
    assert "its content does not match its checksum" in capsys.readouterr().err


def test_all_classes_and_no_class(run: Path, tmp_path: Path) -> None:
    words = ("--num_samples=12", "--num_steps=1", "--solver=euler")
    draw(tmp_path / "all", run, *words)
    assert arrays(tmp_path / "all")[1].tolist() == [*range(10), 0, 1]
    draw(tmp_path / "none", run, *words, "--classes=-1")
    assert arrays(tmp_path / "none")[1].tolist() == [-1] * 12


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--classes=0,10"], 1, "classes [10] are out of range: this model knows 0..9"),
        (["--classes=zero"], 1, "no class is named 'zero'"),
        (["--num_samples=0"], 1, "num_samples: expected 1 or more, got 0"),
        (["--batch_size=0"], 1, "batch_size: expected 1 or more, got 0"),
        (["--batch_size=100000000000000"], 1, "batch_size: expected 1048576 or fewer, got 100000000000000"),
        (["--num_samples=9999999999"], 1, "num_samples: expected 100000000 or fewer, got 9999999999"),
        (["--interpolate=seeds:1,99999999999999999999"], 1, "expected seeds between -2^63 and 2^63"),
        (["--interpolate=classes:3,3"], 1, "expected two different classes"),
        (["--interpolate=classes:3"], 1, "expected two different classes"),
        (["--num_steps=0"], 1, "num_steps"),
        (["--cfg_scale=-1"], 1, "cfg_scale"),
        (["--solver=hune"], 1, "did you mean heun?"),
        (["--weights=emma"], 1, "holds the weights model, ema; got 'emma'"),
        (["--numsamples=3"], 2, "did you mean num_samples?"),
        (["--codec_path=./nowhere"], 1, "nowhere/config.json is missing"),
        (["--solver.etta=1", "--solver=ddim"], 1, "solver.etta: unknown key; did you mean eta?"),
        (["--solver.eta=1"], 1, "solver.eta: unknown key"),
        (["--grid.rho=x", "--grid=karras"], 1, "grid.rho"),
        (["--grid=karas"], 1, "did you mean karras?"),
        (["--sollver.eta=1"], 2, "unknown flag --sollver.eta"),
        (["--shift=2", "--grid.shift=2"], 1, "--grid.shift is given twice"),
        (["--grid.shift=2", "--grid_shift=2"], 1, "--grid.shift is given twice"),
        (["--guidance=treshold"], 1, "did you mean threshold?"),
        (["--guidance={name: threshold, quantil: 0.5}"], 1, "guidance.0.quantil: unknown key"),
        (["--guidance={name: cfg, scale: 3}"], 1, "set cfg_scale to 1, or take cfg out of guidance"),
        (["--guidance={name: cfg, scale: 2}, {name: cfg, scale: 2}"], 1, "guide twice"),
        (
            ["--guidance={name: autoguidance, checkpoint: ./nowhere}"],
            1,
            "scale: is required and was not given",
        ),
        (["--solver=ddpm", "--solver.variance=learned"], 1, "takes the learned variance of the network"),
        (
            ["--guidance={name: cfg, scale: 2, channels: 9}", "--cfg_scale=1"],
            1,
            "channels = 9, but there are 4",
        ),
        (["--classes=-1"], 1, "no effect on --classes=-1"),
        (["--solver.eta=1", "--solver=heun"], 1, "solver.eta: unknown key; heun has no keys"),
        (["--guidance={name: cfg"], 1, "guidance: cannot be read from the command line"),
        (
            ["--guidance={name: autoguidance, scale: 2, checkpoint: ./nowhere}"],
            1,
            "nowhere is missing",
        ),
        (
            ["--guidance={name: classifier, scale: 2, checkpoint: ./nowhere}"],
            1,
            "nowhere is missing",
        ),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys, words: list[str], code: int, says: str
) -> None:
    kept = [w for w in BASE if w.split("=")[0] not in {x.split("=")[0] for x in words}]
    assert call(tools.sample.main, run, *kept, *words, f"--out={tmp_path / 'out'}") == code
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_and_a_call_without_a_folder(run: Path, tmp_path: Path, capsys) -> None:
    assert call(tools.sample.main, tmp_path, f"--out={tmp_path / 'out'}") == 1
    assert "no checkpoint here; expected RUN/checkpoints" in capsys.readouterr().err
    young = tmp_path / "young"
    (young / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", young)
    assert call(tools.sample.main, young, f"--out={tmp_path / 'out'}") == 1
    assert "no checkpoint here yet: a run saves every checkpoint.every steps" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    assert call(tools.sample.main, tmp_path / "data", f"--out={tmp_path / 'out'}") == 1
    assert "no checkpoint here: it is a data set" in capsys.readouterr().err
    assert call(tools.sample.main, run) == 2
    assert "missing --out" in capsys.readouterr().err


def test_classes_by_name(run: Path, base: Path, tmp_path: Path, capsys) -> None:
    """The digits' classes are named by their numbers: give them other names."""
    named = Path(shutil.copytree(run, tmp_path / "run"))
    names = ["cat", "golden retriever", "tench, Tinca tinca", *(f"thing {i}" for i in range(3, 10))]
    sign(at_step(named, 2), lambda meta: meta["contract"].update(classes=names))
    rest = [w for w in BASE if not w.startswith("--classes")]
    found = draw(tmp_path / "out", named, *rest, "--classes=cat,thing 3")
    assert (found == arrays(base)[0]).all()
    draw(tmp_path / "two", named, *rest, '--classes="tench, Tinca tinca",golden retriever')
    assert arrays(tmp_path / "two")[1].tolist() == [2, 1, 2, 1, 2, 1, 2]
    assert call(tools.sample.main, named, *rest, "--classes=golden retreiver", f"--out={tmp_path / 'x'}") == 1
    assert "did you mean 'golden retriever'?" in capsys.readouterr().err


def test_a_folder_above_runs_and_runs_of_another_kind(
    digits: Digits, run: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(run, tmp_path / "quick" / "dit")
    given = {
        "data": {"path": str(digits.pixels)},
        "run_dir": str(tmp_path / "quick" / "vae"),
        "engine": "local",
    }
    given |= {"train": {"steps": 1, "global_batch": 8}, "autoencoder": {"widths": [8, 8], "groups": 4}}
    train(from_dict(AutoencoderExperiment, given), AutoencoderExperiment.make_parts)
    assert call(tools.sample.main, tmp_path / "quick", f"--out={tmp_path / 'x'}") == 1
    said = capsys.readouterr().err
    assert "quick: no checkpoint here" in said
    assert f"  {tmp_path / 'quick' / 'dit'} (a model to draw from, step 2)" in said
    assert f"  {tmp_path / 'quick' / 'vae'} (an autoencoder, for --codec.path=RUN/vae, step 1)" in said
    assert call(tools.sample.main, tmp_path / "quick" / "vae", f"--out={tmp_path / 'x'}") == 1
    said = capsys.readouterr().err
    assert "holds no model to draw from (an autoencoder, for --codec.path=RUN/vae)" in said
    assert f"  {tmp_path / 'quick' / 'dit'} (a model to draw from, step 2)" in said


def test_the_vae_may_have_moved_but_not_changed(
    digits: Digits, run: Path, base: Path, tmp_path: Path, capsys
) -> None:
    moved = shutil.copytree(digits.vae, tmp_path / "moved")
    assert (draw(tmp_path / "out", run, *BASE, f"--codec_path={moved}") == arrays(base)[0]).all()
    torch.manual_seed(5)
    Kl(widths=(8, 8), groups=4).build().vae.save_pretrained(tmp_path / "other")
    assert (
        call(tools.sample.main, run, *BASE, f"--codec_path={tmp_path / 'other'}", f"--out={tmp_path / 'x'}")
        == 1
    )
    assert "come from different codecs" in capsys.readouterr().err


def test_as_a_command(run: Path, base: Path, tmp_path: Path) -> None:
    done = execute("sample.py", run, *BASE, "--out=2024", cwd=tmp_path, afresh=True)
    assert done.returncode == 0, done.stderr
    assert "7 images in 2024/samples.npz" in done.stdout
    assert (arrays(tmp_path / "2024")[0] == arrays(base)[0]).all()

"""tools/encode.py, called as a function and once as a user calls it."""

import contextlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.autoencoders import VaeCodec
from dit.data.shards.manifest import Manifest
from dit.data.sources.crops import RandomResized
from dit.errors import Notice, Stopped
from dit.experiments.encoding import _Progress
from tests.commands import Forked, environment, execute
from tests.data.helpers import endless, tiny_vae
from tests.surroundings import signals_kept
from tools.encode import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("flag", ["codec.path", "codec_path"])
def test_digits_to_vae_latents(tmp_path, capsys, flag):
    tiny_vae().save_pretrained(tmp_path / "vae")
    path = {flag: str(tmp_path / "vae")}
    main(
        "digits:test", str(tmp_path / "out"), image_size=16, flip=False, batch_size=100, device="cpu", **path
    )
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.shape == (1, 2, 3, 8, 8)
    assert manifest.samples == 500
    assert manifest.codec == VaeCodec(tiny_vae()).identity()
    out = capsys.readouterr().out
    assert "digits:test: 500 images in 10 classes" in out
    assert "images/s" in out
    assert "decoding" in out
    assert "codec" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"codec": "pixel"}, "unknown codec 'pixel'; did you mean pixels"),
        ({"codec.pth": "x"}, "pth: unknown key; did you mean path"),
        ({"codec": "pixels", "codec.path": "x"}, "path: unknown key"),
        ({"codec": "vae"}, "the vae codec needs a path"),
        ({"codec": "pixels", "block": 0}, "block: .* got 0"),
        ({"codec": "pixels", "crop": "center"}, "unknown crop 'center'; did you mean centre"),
        ({"codec": "pixels", "crop.scale_min": "0.5"}, "scale_min: unknown key"),
        ({"codec": "pixels", "crop": "random_resized", "crop.scale_min": "2"}, "scale_min: .* got"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, arguments, words):
    with pytest.raises(ConfigError, match=words):
        main("digits:test", str(tmp_path / "out"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_crop_and_a_dtype(tmp_path):
    chosen = {"crop": "random_resized", "crop_scale_min": "0.5", "dtype": "float32"}
    main("digits:test", str(tmp_path / "out"), codec="pixels", image_size=8, **chosen)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.dtype == "float32"
    assert manifest.transform.endswith(f"; {RandomResized(scale_min=0.5).text}")


def test_labels_from_a_file(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "labels.csv").write_text("0.png,b\n1.png,a\n2.png,b\n")
    images, labels = str(tmp_path / "images"), str(tmp_path / "labels.csv")
    main(images, str(tmp_path / "out"), codec="pixels", image_size=8, labels=labels)
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.classes, manifest.class_counts) == (("a", "b"), (1, 2))


FLAGS = ("digits:test", "--codec=pixels", "--image_size=8", "--block=32")


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_ranks_that_were_started_by_hand(tmp_path):
    main("digits:test", str(tmp_path / "whole"), codec="pixels", image_size=8, block=32)
    ranks = []
    for rank in ("0", "1"):
        env = environment() | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        ranks.append(Forked("encode.py", FLAGS[0], tmp_path / "out", *FLAGS[1:], env=env))
    (out, bar), (other, nothing) = (process.communicate(timeout=120) for process in ranks)
    assert [process.returncode for process in ranks] == [0, 0], (bar, nothing)
    assert "digits:test: 500 images in 10 classes" in out
    assert "500/500" in bar
    assert "digits:test" not in other
    assert nothing == ""
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_rank_says_whom_it_waits_for_where_there_are_no_locks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dit.data.encoding.parts.try_lock", lambda descriptor: None)
    monkeypatch.setattr("dit.experiments.encoding.PATIENCE", 0)
    call = ("digits:test", str(tmp_path / "out"))
    how = {"codec": "pixels", "image_size": 8, "block": 250, "device": "cpu"}
    with ThreadPoolExecutor(1) as pool:
        for rank in ("1", "0"):
            for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
                monkeypatch.setenv(name, value)
            if rank == "0":
                main(*call, **how)
                continue
            waits = pool.submit(main, *call, **how)
            said, until = "", time.monotonic() + 60
            while "rank 1 waits: no locks on this file system: part 1 of 2 is left to rank 0" not in said:
                assert not waits.done()
                assert time.monotonic() < until, said
                said += capsys.readouterr().err
                time.sleep(0.01)
        waits.result()
    assert said.count("rank 1 waits") == 1
    assert Manifest.load(tmp_path / "out").samples == 500


@pytest.mark.slow
def test_ranks_under_launch(tmp_path):
    main("digits:test", str(tmp_path / "whole"), codec="pixels", image_size=8, block=32)
    words = [ROOT / "launch" / "local.sh", "tools/encode.py", FLAGS[0], tmp_path / "out", *FLAGS[1:]]
    env = environment() | {"PYTHON": sys.executable, "NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "500 images in 2 view(s) -> " in done.stdout
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_killed_command_goes_on(tmp_path, capsys):
    with endless(tmp_path / "out"):
        killed = Forked("encode.py", FLAGS[0], tmp_path / "out", *FLAGS[1:], "--batch_size=1")
        while not list(tmp_path.glob("out.partial/parts/*.json")):
            assert killed.poll() is None
            time.sleep(0.001)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
    again = {"codec": "pixels", "image_size": 8, "block": 32}
    with pytest.raises(DataError, match=r"of another command \(batch_size: 1 there, 2 here"):
        main("digits:test", str(tmp_path / "out"), **again, batch_size=2)
    for said in (" images were done before", "all was there already"):
        main("digits:test", str(tmp_path / "out"), **again, batch_size=1)
        assert said in capsys.readouterr().out
    assert Manifest.load(tmp_path / "out").samples == 500


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_it_with_what_is_done(tmp_path, number):
    with endless(tmp_path / "out"):
        asked = Forked("encode.py", FLAGS[0], tmp_path / "out", *FLAGS[1:], "--batch_size=1")
        while not list(tmp_path.glob("out.partial/parts/*.json")):
            assert asked.poll() is None
            time.sleep(0.001)
        asked.send_signal(number)
        _, said = asked.communicate(timeout=60)
    assert asked.returncode == (130 if number == signal.SIGINT else 75)
    assert "images are done and kept; start the same command again to go on" in said
    assert "Traceback" not in said
    main("digits:test", str(tmp_path / "out"), codec="pixels", image_size=8, block=32, batch_size=1)
    assert Manifest.load(tmp_path / "out").samples == 500


def test_a_signal_that_nothing_came_of_is_heard_at_the_next_image(tmp_path, monkeypatch, capsys):
    """As one that is handled in a finaliser, from which no exception gets out."""
    progress = _Progress.progress

    def lost(self, count):
        progress(self, count)
        asked = self.again.__self__
        if asked.number is None:
            with contextlib.suppress(Stopped):
                asked(signal.SIGTERM, None)

    monkeypatch.setattr(_Progress, "progress", lost)
    with signals_kept(), pytest.raises(SystemExit) as ended:
        main("digits:test", str(tmp_path / "out"), codec="pixels", image_size=8, batch_size=1)
    assert ended.value.code == 75
    said = capsys.readouterr().err
    assert "1/500 img" in said
    assert "interrupted: " in said


def test_it_says_at_its_start_what_it_will_do_to_images(tmp_path, capsys):
    how = {"codec": "pixels", "image_size": 8, "exif": "ignore", "background": "black"}
    main("digits:test", str(tmp_path / "out"), **how)
    said = capsys.readouterr().out
    assert (
        "each image: EXIF orientation ignored; ICC profiles to sRGB; transparency on black; box-halve" in said
    )
    assert "give --no-flip where left and right matter, as in digits and text" in said
    assert Manifest.load(tmp_path / "out").transform.startswith("EXIF orientation ignored; ")


def test_bad_images_and_no_flip_on_the_command_line(tmp_path):
    (tmp_path / "set" / "c").mkdir(parents=True)
    Image.new("1", (100, 100)).save(tmp_path / "set" / "c" / "big.png")
    (tmp_path / "set" / "c" / "gone.jpg").symlink_to("nowhere")
    words = (tmp_path / "set", tmp_path / "out", "--codec=pixels", "--image_size=8", "--no-flip")
    done = execute("encode.py", *words, "--max_pixels=9999")
    assert done.returncode == 1
    assert "2 image(s) cannot be read, 0 allowed" in done.stderr
    assert (
        "c/big.png: 100 x 100 = 10,000 pixels, expected at most 9,999; --max_pixels=10000 takes it"
        in done.stderr
    )
    assert (
        "c/gone.jpg: leads nowhere (a link to nowhere)" in (tmp_path / "out.partial" / "bad.txt").read_text()
    )
    assert "Warning" not in done.stderr
    done = execute("encode.py", *words, "--max_bad=1")
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.samples, manifest.bad, manifest.views) == (1, ("c/gone.jpg",), ("original",))


def test_help_names_codecs_and_crops():
    done = execute("encode.py", "--help=all")
    assert done.returncode == 0
    for word in (
        "--crop",
        "random_resized",
        "scale_min",
        "--labels",
        "--classes",
        "launch/local.sh",
        "pixels",
    ):
        assert word in done.stdout


def test_the_command(tmp_path):
    done = execute(
        "encode.py", "digits:test", tmp_path / "out", "--codec=pixels", "--image_size=8", "--flip=false",
        afresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "500 images in 1 view(s)" in done.stdout
    assert Manifest.load(tmp_path / "out").views == ("original",)


def test_a_share_may_be_held_out(tmp_path, capsys):
    how = {"codec": "pixels", "image_size": 8, "block": 32, "holdout": 0.1}
    main("digits:test", str(tmp_path / "out"), **how)
    train, held = (Manifest.load(tmp_path / name) for name in ("out", "out-val"))
    assert (train.samples, held.samples) == (450, 50)
    assert train.classes == held.classes
    assert set(train.read_names()).isdisjoint(held.read_names())
    assert all(0.05 < a / (a + b) < 0.15 for a, b in zip(held.class_counts, train.class_counts, strict=True))
    assert (train.split.part, held.split.part) == ("train", "held out")
    assert (held.split.share, held.split.seed, held.split.images) == (0.1, 0, 500)
    main("digits:test", str(tmp_path / "out"), **how)
    assert capsys.readouterr().out.count("all was there already") == 2
    for other, words in ((0.2, "holdout: 0.1 there, 0.2 here"), (0.0, "holdout: 0.1 there, 0.0 here")):
        with pytest.raises(DataError, match=words):
            main("digits:test", str(tmp_path / "out"), **how | {"holdout": other})
    with pytest.raises(ConfigError, match="holdout is 10"):
        main("digits:test", str(tmp_path / "new"), **how | {"holdout": 10})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-val"]


@pytest.mark.slow
def test_a_share_is_the_same_on_ranks_that_are_killed(tmp_path):
    main("digits:test", str(tmp_path / "whole"), codec="pixels", image_size=8, block=32, holdout=0.3)
    words = (FLAGS[0], tmp_path / "out", *FLAGS[1:], "--holdout=0.3")
    for part in ("out-val", "out"):
        ranks = [
            Forked(
                "encode.py",
                *words,
                env=environment() | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank},
            )
            for rank in ("0", "1")
        ]
        while not list(tmp_path.glob(f"{part}.partial/parts/*.json")) and not (tmp_path / part).exists():
            time.sleep(0.001)
        for process in ranks:
            process.kill()
            process.wait()
    main("digits:test", str(tmp_path / "out"), codec="pixels", image_size=8, block=32, holdout=0.3)
    for part in ("", "-val"):
        assert files(tmp_path / f"out{part}") == files(tmp_path / f"whole{part}")


def test_unreadable_images_count_in_both_parts(tmp_path):
    for i in range(20):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    how = {"codec": "pixels", "image_size": 8, "holdout": 0.5}
    images = str(tmp_path / "images")
    main(images, str(tmp_path / "whole"), **how)
    for part in ("whole", "whole-val"):
        (tmp_path / "images" / Manifest.load(tmp_path / part).read_names()[0]).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 image\(s\) cannot be read, 0 allowed"):
        main(images, str(tmp_path / "out"), **how, max_bad=1)
    main(images, str(tmp_path / "out"), **how, max_bad=2)
    assert [len(Manifest.load(tmp_path / part).bad) for part in ("out", "out-val")] == [1, 1]


def test_labels_from_one_are_spoken_of(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "labels.csv").write_text("0.png,1\n1.png,3\n2.png,2\n")
    images, how = str(tmp_path / "images"), {"codec": "pixels", "image_size": 8}
    how["labels"] = str(tmp_path / "labels.csv")
    with pytest.warns(Notice, match="no sample has the label 0: labels go from 1 to 3"):
        main(images, str(tmp_path / "out"), **how)
    assert Manifest.load(tmp_path / "out").class_counts == (0, 1, 1, 1)
    main(images, str(tmp_path / "named"), **how, label_type="name")
    named = Manifest.load(tmp_path / "named")
    assert (named.classes, named.class_counts) == (("1", "2", "3"), (1, 1, 1))

"""tools/encode.py, called as a function and once as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit.config import ConfigError
from dit.data.codec import VaeCodec
from dit.data.manifest import Manifest
from tests.data.helpers import tiny_vae
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
        ({"codec": "pixels", "block": 0}, "block is 0"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, arguments, words):
    with pytest.raises(ConfigError, match=words):
        main("digits:test", str(tmp_path / "out"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path):
    command = [sys.executable, "tools/encode.py", "digits:test", str(tmp_path / "out"), "--codec=pixels"]
    done = subprocess.run(
        [*command, "--image_size=8", "--flip=false"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "500 images in 1 view(s)" in done.stdout
    assert Manifest.load(tmp_path / "out").views == ("original",)

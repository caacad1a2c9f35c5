"""What is refused before an image is looked at: OUT that cannot be written, or is of something else."""

import json
import os

import pytest

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.autoencoders import VaeCodec
from dit.data.codecs.codec import PixelCodec
from dit.data.encoding.checks import check_early, check_out
from dit.data.encoding.encode import EncodeOptions, encode
from dit.data.encoding.job import planned
from dit.data.shards.write import PLAN
from dit.data.sources.images import open_source
from dit.data.sources.split import split
from tests.data.helpers import tiny_vae

OPTIONS = EncodeOptions(image_size=8, workers=1)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "out"
    encode(open_source("digits:test"), PixelCodec(), out, OPTIONS)
    return out


def test_nothing_stands_in_the_way(tmp_path, done):
    for out in (tmp_path / "new", tmp_path / "new" / "deep", done):
        check_early(out, PixelCodec(), OPTIONS)
    (tmp_path / "empty").mkdir()
    check_early(tmp_path / "empty", PixelCodec(), OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]  # and nothing was made


def test_another_data_set(done):
    with pytest.raises(DataError, match=r"is something else \(flip: true there, false here\)"):
        check_early(done, PixelCodec(), EncodeOptions(image_size=8, flip=False))
    with pytest.raises(DataError, match=r"another codec: 'pixels' there, 'vae' here"):
        check_early(done, VaeCodec(tiny_vae()), OPTIONS)


def test_another_share_that_is_held_out(done, tmp_path):
    with pytest.raises(DataError, match=r"is something else \(holdout: 0.0 there, 0.1 here\)"):
        check_early(done, PixelCodec(), OPTIONS, 0.1)
    train, _ = split(open_source("digits:test"), 0.1, 0)
    encode(train, PixelCodec(), tmp_path / "out", OPTIONS)
    check_early(tmp_path / "out", PixelCodec(), OPTIONS, 0.1)
    for share in (0.0, 0.2):
        with pytest.raises(DataError, match=rf"is something else \(holdout: 0.1 there, {share} here\)"):
            check_early(tmp_path / "out", PixelCodec(), OPTIONS, share)


def test_another_command_that_was_begun(tmp_path):
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / PLAN).write_text(json.dumps(planned(PixelCodec(), OPTIONS)))
    check_early(tmp_path / "out", PixelCodec(), OPTIONS)
    with pytest.raises(DataError, match=r"out.partial is of another command \(seed: 0 there, 1 here\)"):
        check_early(tmp_path / "out", PixelCodec(), EncodeOptions(image_size=8, seed=1))
    with pytest.raises(DataError, match=r"of another command \(holdout: 0.0 there, 0.1 here\)"):
        check_early(tmp_path / "out", PixelCodec(), OPTIONS, 0.1)
    (folder / PLAN).write_text("[]")
    with pytest.raises(DataError, match=r"out.partial is of another command"):
        check_early(tmp_path / "out", PixelCodec(), OPTIONS)


def test_an_image_size_that_the_codec_cannot_halve(tmp_path):
    with pytest.raises(ConfigError, match="image_size 9 is not a multiple of the codec's factor 2"):
        check_early(tmp_path / "out", VaeCodec(tiny_vae()), EncodeOptions(image_size=9))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="no right to write in"):
        check_out(tmp_path / "out")

"""Folders of images and the digits: order, labels, and what is said of folders that cannot be used."""

import numpy as np
import pytest

from dit.data import DataError
from dit.data.sources.crops import Centre
from dit.data.sources.images import open_source
from tests.data.sources.pictures import encoded, picture


@pytest.fixture
def folder(tmp_path):
    """cat/: b.png, a.JPEG, notes.txt. ant/: z.jpg. And lone.png in no class."""
    root = tmp_path / "images"
    for name, seed in {"cat/b.png": 1, "cat/a.JPEG": 2, "ant/z.jpg": 3, "lone.png": 4}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)
    (root / "cat" / "notes.txt").write_text("not an image")
    return root


def test_a_folder_of_class_folders(folder):
    source = open_source(folder)
    assert source.names == ("lone.png", "ant/z.jpg", "cat/a.JPEG", "cat/b.png")
    assert source.labels.tolist() == [-1, 0, 1, 1]
    assert source.classes == ("ant", "cat")
    assert source.ignored == 1
    assert np.array_equal(source.load(3, 16), Centre()(picture(1), 16))


def test_what_is_hidden_is_left_alone(folder):
    (folder / ".cache" / "deep").mkdir(parents=True)
    (folder / "cat" / ".thumbnails").mkdir()
    (folder / "cat" / "._a.png").write_bytes(b"")
    assert open_source(folder).names == ("lone.png", "ant/z.jpg", "cat/a.JPEG", "cat/b.png")


def test_class_folders_at_fault_are_listed_together(folder):
    for name in [f"dog{i}" for i in range(7)]:
        (folder / name).mkdir()
    with pytest.raises(DataError) as error:
        open_source(folder)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{folder}: 7 class folder(s) that cannot be used:"
    assert lines[1] == f"  class folder 'dog0' in {folder} has no images: fill it or remove it"
    assert len(lines) == 7
    assert lines[6] == "  ... and 2 more"


def test_a_folder_above_the_classes_is_recognised(folder):
    (folder.parent / "up").mkdir()
    folder.rename(folder.parent / "up" / "images")
    with pytest.raises(DataError, match=r"class folder 'up' .*it holds folders \('images'\): did you mean"):
        open_source(folder.parent)


@pytest.mark.parametrize("name", ["train-00.tar", "train-00.parquet"])
def test_a_folder_above_packed_files_is_recognised(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"it holds '{name}': did you mean {tmp_path}/data\?"):
        open_source(tmp_path)


def test_images_deeper_than_their_class_are_not_lost_silently(folder):
    (folder / "cat" / "wild").mkdir()
    (folder / "cat" / "wild" / "c.png").write_bytes(encoded(5))
    with pytest.raises(DataError, match=r"class folder 'cat' .* has images and folders \('wild'\)"):
        open_source(folder)


def test_latents_are_not_images(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="holds encoded latents"):
        open_source(tmp_path)


def test_digits():
    train, test = open_source("digits:train"), open_source("digits:test")
    assert (len(train), len(test)) == (1297, 500)
    assert len({*train.names, *test.names}) == 1797
    assert set(test.labels) == set(range(10))
    assert train.classes == tuple("0123456789")
    image = train.load(5, 32)
    assert image.shape == (32, 32, 3)
    assert image.min() == 0
    assert image.max() > 200
    assert (image[..., 0] == image[..., 2]).all()
    assert train.names[:3] == (
        "digits/0000",
        "digits/0002",
        "digits/0003",
    )  # the split is part of every result
    assert test.names[:3] == ("digits/0001", "digits/0004", "digits/0008")
    with pytest.raises(DataError, match="expected digits:train or digits:test"):
        open_source("digits:all")

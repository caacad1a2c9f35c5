"""Folders of images and the digits: order, labels, and what is said of folders that cannot be used."""

import os
import socket
import tempfile

import numpy as np
import pytest

from dit.data import DataError
from dit.data.sources.crops import Centre
from dit.data.sources.images import BadImage, open_source
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


# --- what is no plain file ---------------------------------------------------------------------------------


@pytest.fixture
def cats(tmp_path):
    """cat/: 0.png, 1.png, 2.png. dog/: 0.png."""
    for name in ("cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(int(name[4])))
    return tmp_path


def a_link(path):
    path.symlink_to(path.parent / "gone" / path.name)


def a_loop(path):
    path.symlink_to(path)


def a_link_to_a_link(path):
    between = path.with_name(f".{path.name}.between")
    a_link(between)
    path.symlink_to(between)


def a_socket(path):
    here = tempfile.mkdtemp(dir="/tmp")  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{here}/s")
    os.rename(f"{here}/s", path)
    os.rmdir(here)


NO_FILES = [a_link, a_loop, a_link_to_a_link, os.mkfifo, a_socket]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["1.png", "1", "1.txt", "1.xyz"])
@pytest.mark.parametrize("make", NO_FILES, ids=lambda f: f.__name__)
def test_what_is_neither_file_nor_folder_is_a_bad_image(cats, make, name):
    """In its place among the names: nothing vanishes, no label and no id shifts."""
    (cats / "cat" / "1.png").unlink()
    make(cats / "cat" / name)
    source = open_source(cats)
    assert source.names == (*sorted(["cat/0.png", f"cat/{name}", "cat/2.png"]), "dog/0.png")
    assert source.labels.tolist() == [0, 0, 0, 1]
    assert source.ignored == 0
    with pytest.raises(
        BadImage,
        match=rf"^cat/{name}: (leads nowhere \(a link to |\w+Error: .*(Too many levels|neither|No such device))",
    ):
        source.load(source.names.index(f"cat/{name}"), 8)


@pytest.mark.parametrize("make", [a_link, a_loop, a_link_to_a_link], ids=lambda f: f.__name__)
def test_a_class_link_that_leads_nowhere_is_refused(cats, make):
    make(cats / "cow")
    make(cats / "emu.birds")
    with pytest.raises(DataError) as error:
        open_source(cats)
    assert "2 class folder(s) that cannot be used" in str(error.value)
    assert f"link 'cow' in {cats} leads nowhere (to " in str(error.value)
    assert "mend it or remove it" in str(error.value)


def test_a_loose_image_link_that_leads_nowhere_is_a_bad_image(cats):
    a_link(cats / "lone.jpg")
    source = open_source(cats)
    assert (source.names[0], source.labels[0]) == ("lone.jpg", -1)
    with pytest.raises(BadImage, match=r"lone\.jpg: leads nowhere \(a link to .*gone"):
        source.load(0, 8)


def test_class_links_and_file_links_that_lead_somewhere_are_followed(cats, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(cats / "cat")
    (tmp_path / "set" / "b").mkdir()
    (tmp_path / "set" / "b" / "x.png").symlink_to(cats / "dog" / "0.png")
    source = open_source(tmp_path / "set")
    assert source.names == ("a/0.png", "a/1.png", "a/2.png", "b/x.png")
    assert np.array_equal(source.load(3, 16), Centre()(picture(0), 16))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look anywhere")
def test_where_nobody_may_look(cats):
    (cats / "dog" / "0.png").chmod(0)
    source = open_source(cats)
    with pytest.raises(BadImage, match="PermissionError"):
        source.load(3, 8)
    (cats / "dog").chmod(0)
    with pytest.raises(DataError, match=r"folder 'dog' .* cannot be listed: Permission denied"):
        open_source(cats)


def test_shards_that_are_links_to_nowhere_are_refused(tmp_path):
    for name in ("a.tar", "b.tar"):
        a_link(tmp_path / name)
    with pytest.raises(
        DataError, match=r"2 of 2 are no files: mend or remove:\n  .*a.tar \(a link to .*gone/a.tar"
    ):
        open_source(tmp_path)


# --- which files are images --------------------------------------------------------------------------------

KINDS = {
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".gif": "GIF",
    ".jp2": "JPEG2000",
    ".pgm": "PPM",
    ".qoi": "QOI",
    "": "PNG",
}


def test_all_formats_and_files_without_an_ending(tmp_path):
    (tmp_path / "c").mkdir()
    for ending, kind in KINDS.items():
        (tmp_path / "c" / f"x{ending}").write_bytes(encoded(1, kind))
    (tmp_path / "c" / "x.jpg_large").write_bytes(encoded(1, "JPEG"))
    for name in ("a.txt", "b.txt", "c.json", "README", "d.xyz", "e.heic"):
        (tmp_path / "c" / name).write_bytes(b"no picture")
    for name in (".DS_Store", "Thumbs.db", "._x.gif", ".hidden"):
        (tmp_path / "c" / name).write_bytes(encoded(1, "GIF"))
    source = open_source(tmp_path)
    assert source.names == tuple(sorted(f"c/x{ending}" for ending in [*KINDS, ".jpg_large"]))
    for i in range(len(source)):
        assert source.load(i, 8).shape == (8, 8, 3)
    assert str(source).endswith("6 other files: 2 .txt, 1 without an ending, 1 .heic, 1 .json, 1 .xyz")


def test_files_whose_ending_says_what_they_are_are_not_opened(tmp_path, monkeypatch):
    for name in ("0.png", "1.txt", "2.xyz", "3"):
        (tmp_path / name).write_bytes(encoded(1))
    opened = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *how: opened.append(os.path.basename(path)) or real(path, *how)
    )
    assert open_source(tmp_path).names == ("0.png", "2.xyz", "3")
    assert opened == ["2.xyz", "3"]


def test_a_set_of_other_images_is_no_empty_one(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.gif").write_bytes(encoded(1, "GIF"))
    assert open_source(tmp_path).names == ("c/0.gif",)


def test_what_archives_of_macos_leave_is_no_class(cats):
    (cats / "__MACOSX" / "cat").mkdir(parents=True)
    (cats / "__MACOSX" / "cat" / "._0.png").write_bytes(b"")
    assert open_source(cats).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "how"), [("a.zip", "unzip -q a.zip -d FOLDER"), ("a.tar.gz", "tar -xf a.tar.gz -C")]
)
def test_how_to_go_on_with_an_archive(tmp_path, name, how):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"neither a folder nor a .tar or .parquet; unpack it .*{how}"):
        open_source(tmp_path / name)


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

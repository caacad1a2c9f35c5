"""Image sets of every kind, the crop, and what is said of broken ones."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dit.data import DataError
from dit.data.images import BadImage, centre_crop, open_source


def picture(seed, width=20, height=16, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(seed, kind="PNG"):
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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
    assert np.array_equal(source.load(3, 16), centre_crop(picture(1), 16))


def test_an_empty_class_is_named(folder):
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folder 'dog' in .*images has no images"):
        open_source(folder)


def test_a_folder_above_the_classes_is_recognised(folder):
    (folder.parent / "up").mkdir()
    folder.rename(folder.parent / "up" / "images")
    with pytest.raises(DataError, match=r"class folder 'up' .*it holds folders \('images'\): did you mean"):
        open_source(folder.parent)


@pytest.mark.parametrize(
    "name", ["nothing", "nothing.tar", "nothing-{000..002}.tar", "*.tar", "file.txt", "empty"]
)
def test_nothing_to_read(tmp_path, name):
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"no such folder|neither a folder|no images in it|3 of 3 shards are missing"
    ):
        open_source(tmp_path / name)


def test_latents_are_not_images(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="holds encoded latents"):
        open_source(tmp_path)


def test_a_damaged_image_is_named(folder):
    data = (folder / "cat" / "b.png").read_bytes()
    (folder / "cat" / "b.png").write_bytes(data[: len(data) // 2])
    (folder / "cat" / "a.JPEG").write_bytes(b"no picture")
    source = open_source(folder)
    with pytest.raises(BadImage, match=r"^cat/b.png: ") as error:
        source.load(3, 16)
    assert error.value.name == "cat/b.png"
    with pytest.raises(BadImage, match=r"cat/a.JPEG: UnidentifiedImageError"):
        source.load(2, 16)


@pytest.mark.parametrize("above", ["", "./", "set/train/"])
def test_a_tar_of_class_folders(tmp_path, above):
    files = {"cat/b.png": encoded(1), "ant/z.png": encoded(2), "cat/._b.png": b"", "cat/x.txt": b""}
    source = open_source(write_tar(tmp_path / "set.tar", {above + n: d for n, d in files.items()}))
    assert [n.removeprefix(above) for n in source.names] == ["ant/z.png", "cat/b.png"]
    assert source.labels.tolist() == [0, 1]
    assert source.classes == ("ant", "cat")
    assert source.ignored == 1
    assert np.array_equal(source.load(1, 16), centre_crop(picture(1), 16))


def test_a_tar_without_folders_has_no_labels(tmp_path):
    source = open_source(write_tar(tmp_path / "set.tar", {"b.png": encoded(1), "a.png": encoded(2)}))
    assert (source.names, source.labels.tolist(), source.classes) == (("a.png", "b.png"), [-1, -1], ())


def test_one_class_in_two_places_of_a_tar_is_refused(tmp_path):
    tar = write_tar(tmp_path / "set.tar", {"train/cat/a.png": encoded(1), "test/cat/a.png": encoded(2)})
    with pytest.raises(DataError, match="two folders give class 'cat': test/cat, train/cat"):
        open_source(tar)


def test_a_tar_that_cannot_be_read(tmp_path):
    tar = write_tar(tmp_path / "set.tar", {"cat/b.png": encoded(1)})
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:700])
    with pytest.raises(DataError, match=r"cut.tar: not a whole, uncompressed tar"):
        open_source(tmp_path / "cut.tar")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as zipped:
        zipped.add(tar, "cat/b.png")
    with pytest.raises(DataError, match=r"zipped.tar: not a whole, uncompressed tar"):
        open_source(tmp_path / "zipped.tar")
    with tarfile.open(tmp_path / "links.tar", "w") as links:
        info = tarfile.TarInfo("cat/a.png")
        info.type, info.linkname = tarfile.LNKTYPE, "cat/b.png"
        links.addfile(info)
    with pytest.raises(DataError, match=r"'cat/a.png' is a link"):
        open_source(tmp_path / "links.tar")


def webdataset_files(first, labels):
    files = {}
    for i, label in enumerate(labels, first):
        files[f"{i:04d}.jpg"] = encoded(i, "JPEG")
        files[f"{i:04d}.cls"] = str(label).encode()
        files[f"{i:04d}.json"] = b"{}"
    return files


@pytest.mark.parametrize("how", ["", "set-{00..01}.tar", "set-*.tar"])
def test_webdataset_shards(tmp_path, how):
    write_tar(tmp_path / "set-00.tar", webdataset_files(0, [3, 0]))
    write_tar(tmp_path / "set-01.tar", webdataset_files(2, [1, -1]))
    source = open_source(tmp_path / how)
    assert source.names == (
        "set-00.tar:0000.jpg",
        "set-00.tar:0001.jpg",
        "set-01.tar:0002.jpg",
        "set-01.tar:0003.jpg",
    )
    assert source.labels.tolist() == [3, 0, 1, -1]
    assert source.classes == ("0", "1", "2", "3")
    with Image.open(io.BytesIO(encoded(2, "JPEG"))) as third:
        assert np.array_equal(source.load(2, 16), centre_crop(third, 16))


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    write_tar(tmp_path / "set-00.tar", webdataset_files(0, [3]))
    with pytest.raises(DataError, match=r"1 of 2 shards are missing, first .*set-01.tar"):
        open_source(tmp_path / "set-{00..01}.tar")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.jpg": encoded(1), "a.cls": b"cat"}, "'a.cls' holds b'cat', expected a class number"),
        ({"a.jpg": encoded(1), "a.cls": b"1", "b.jpg": encoded(2)}, "'b.jpg' has no .cls beside it"),
        ({"a.jpg": encoded(1), "a.png": encoded(2), "a.cls": b"1"}, "'a.jpg' and 'a.png' belong to the same"),
    ],
)
def test_webdataset_records_that_make_no_sample(tmp_path, files, words):
    with pytest.raises(DataError, match=words):
        open_source(write_tar(tmp_path / "set.tar", files))


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


# --- the crop ----------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_left_alone():
    image = picture(0, 32, 32)
    assert np.array_equal(centre_crop(image, 32), np.asarray(image))


def test_the_middle_is_kept():
    wide, high = picture(0, 32, 16), picture(0, 16, 33)
    assert np.array_equal(centre_crop(wide, 16), np.asarray(wide)[:, 8:24])
    assert np.array_equal(centre_crop(high, 16), np.asarray(high)[8:24])


def test_halving_is_a_mean_of_four():
    image = picture(0, 64, 64)
    mean = np.asarray(image).reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(centre_crop(image, 32) - mean).max() <= 1  # two passes, each rounded


@pytest.mark.parametrize("size", [(500, 333), (64, 63), (97, 301), (5, 9)])
def test_any_size_becomes_square(size):
    flat = Image.new("RGB", size, (10, 200, 30))
    crop = centre_crop(flat, 32)
    assert crop.shape == (32, 32, 3)
    assert crop.dtype == np.uint8
    assert (crop == (10, 200, 30)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_mode_becomes_rgb(mode):
    assert centre_crop(picture(0, 32, 32, mode), 32).shape == (32, 32, 3)


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as image:
        assert np.array_equal(centre_crop(image, 32)[..., 0], values >> 8)

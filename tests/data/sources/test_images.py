"""Sets of images whatever they come from, and what is said of images and names that cannot be used."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dit.data import DataError
from dit.data.sources.crops import Centre, RandomResized
from dit.data.sources.images import SOURCES, BadImage, ImageSource, open_source
from tests.data.sources.pictures import encoded, picture, tar_bytes, write_parquet, write_tar

CLASSES = ("n01440764", "n01443537", "n01484850")
PICTURES = {f"{CLASSES[i % 3]}/{i}.png": encoded(i) for i in range(7)}


def in_folder(root):
    for name, data in PICTURES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def in_tar(root):
    return write_tar(root / "set.tar", PICTURES)


def by_class():
    flat = {c: {n.split("/")[1]: d for n, d in PICTURES.items() if n.startswith(c)} for c in CLASSES}
    return {f"{c}.tar": tar_bytes(files) for c, files in flat.items()}


def in_class_tars(root):
    for name, data in by_class().items():
        (root / name).write_bytes(data)
    return root


def in_tar_of_class_tars(root):
    return write_tar(root / "ILSVRC2012_img_train.tar", by_class())


def in_webdataset(root):
    files = {}
    for name in sorted(PICTURES):
        key = name.split("/")[1].split(".")[0]
        files |= {f"{key}.png": PICTURES[name], f"{key}.cls": b"%d" % CLASSES.index(name.split("/")[0])}
    return write_tar(root / "set.tar", files)


def in_parquet(root):
    names = sorted(PICTURES)
    labels = [CLASSES.index(name.split("/")[0]) for name in names]
    paths = [name.split("/")[1] for name in names]
    return write_parquet(root / "set.parquet", [PICTURES[n] for n in names], labels, CLASSES, paths=paths)


LAYOUTS = [in_folder, in_tar, in_class_tars, in_tar_of_class_tars, in_webdataset, in_parquet]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_set(tmp_path, layout):
    source = open_source(layout(tmp_path))
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert source.labels.dtype == np.int64
    assert source.classes == (("0", "1", "2") if layout is in_webdataset else CLASSES)
    assert [int(name.split("/")[-1].removesuffix(".png")) for name in source.names] == [0, 3, 6, 1, 4, 2, 5]
    for place, seed in enumerate([0, 3, 6, 1, 4, 2, 5]):
        assert np.array_equal(source.load(place, 16), Centre()(picture(seed), 16))
    if layout not in (in_webdataset, in_parquet):
        assert source.names == tuple(sorted(PICTURES))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_standard_classes(tmp_path, layout):
    source = open_source(layout(tmp_path), classes="imagenet1k")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert source.classes[:3] == CLASSES
    assert len(source.classes) == 1000


def test_each_source_says_whether_a_spec_is_its_own(tmp_path):
    specs = ["digits:test", in_tar(tmp_path), in_parquet(tmp_path), tmp_path / "nothing.txt"]
    for opener, spec in zip(SOURCES[:-1], specs, strict=False):
        found = [source(str(s)) is not None for s in specs for source in [opener]]
        assert found == [s is spec for s in specs]


@pytest.mark.parametrize(
    "name", ["nothing", "nothing.tar", "nothing-{000..002}.tar", "*.tar", "*.parquet", "file.txt", "empty"]
)
def test_nothing_to_read(tmp_path, name):
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"no such folder|neither a folder|no images in it|3 of 3 shards are missing"
    ):
        open_source(tmp_path / name)


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_parts_of_a_set_are_not_mixed(tmp_path, ending):
    for part in ("train-00", "train-01", "validation-00"):
        (tmp_path / f"set-{part}.{ending}").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds several parts \(train, validation\); name one: .*/\*train\*"):
        open_source(tmp_path)


def test_crops_are_those_of_the_image_and_its_id(tmp_path):
    source, crop = open_source(in_folder(tmp_path)), RandomResized()
    forward = [source.load(i, 8, crop, seed=3) for i in range(7)]
    backward = [source.load(i, 8, crop, seed=3) for i in reversed(range(7))][::-1]
    assert np.array_equal(forward, backward)
    assert not any(np.array_equal(source.load(i, 8, crop, seed=4), forward[i]) for i in range(7))
    assert np.array_equal(source.load(0, 8), source.load(0, 8, Centre(), seed=4))


def test_copies_of_an_image_are_cropped_each_in_its_own_way(tmp_path):
    source = open_source(write_tar(tmp_path / "set.tar", {f"{i}.png": encoded(0) for i in range(5)}))
    assert len({source.load(i, 8, RandomResized()).tobytes() for i in range(5)}) == 5


# --- images that cannot be used ----------------------------------------------------------------------------


def png(width, height):
    """A PNG that says it is this large, and is not."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def thin(path):
    Image.new("L", (1, 60_000)).save(path)
    return path.read_bytes()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no picture", r"not an image that is read \(JPEG, .*\): it begins with b'no picture'"),
        (b"", "the file is empty"),
        (encoded(1)[:600], "OSError: .*truncated"),
        (encoded(1, "JPEG")[:400], "OSError: .*[Tt]runcated"),
        (encoded(1, "TIFF")[:8], "begins as TIFF, and is damaged or of a kind that is not read"),
        (
            png(60_000, 60_000),
            r"60000 x 60000 = 3,600,000,000 pixels, expected at most 178,956,970; --max_pixels=3600000000",
        ),
        ("thin", "ValueError: 1 x 60000 pixels is too long"),
        (POSTSCRIPT, "not an image that is read"),  # Pillow would have another program run it
    ],
    ids=["text", "empty", "half", "half JPEG", "start of a TIFF", "bomb", "thin", "program"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_that_cannot_be_read_is_named(tmp_path, data, words, packed):
    data = thin(tmp_path / "thin.png") if data == "thin" else data
    files = {"cat/a.png": encoded(1), "cat/b.png": data}
    (tmp_path / "cat").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "thin.png").unlink(missing_ok=True)
    source = open_source(write_tar(tmp_path.parent / f"{tmp_path.name}.tar", files) if packed else tmp_path)
    with pytest.raises(BadImage, match=rf"^cat/b.png: ({words})") as error:
        source.load(1, 256)
    assert error.value.name == "cat/b.png"
    assert source.load(0, 256).shape == (256, 256, 3)


def test_a_file_that_is_gone_is_named(tmp_path):
    source = open_source(in_folder(tmp_path))
    (tmp_path / source.names[2]).unlink()
    with pytest.raises(BadImage, match=rf"^{source.names[2]}: FileNotFoundError"):
        source.load(2, 8)


def test_a_tar_that_was_cut_since_is_named(tmp_path):
    tar = in_tar(tmp_path)
    source = open_source(tar)
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(BadImage, match=rf"^{source.names[6]}: OSError: .*set.tar ends \d+ bytes before"):
        source.load(6, 8)


@pytest.mark.parametrize("name", ["a\nb.png", "a\udcff.png", "a\rb.png", "a\0b.png"])
def test_names_that_are_no_line_of_text_are_listed(name):
    with pytest.raises(
        DataError, match=r"^1 name\(s\) with a line break or .*UTF-8: rename the files:\n  'a\\"
    ):
        ImageSource(("fine.png", name), np.zeros(2, np.int64), ("c",), Image.open)


@pytest.mark.parametrize("name", ["naïve.png", "a b.png", "猫/1.png", "tab\there.png"])
def test_other_names_work(name):
    assert ImageSource((name,), np.zeros(1, np.int64), ("c",), Image.open).names == (name,)


def test_a_folder_with_a_name_that_is_not_utf8(tmp_path):
    folder = tmp_path / "cat"
    folder.mkdir()
    (folder / b"a\xff.png".decode("utf-8", "surrogateescape")).write_bytes(encoded(1))
    with pytest.raises(DataError, match=r"'cat/a\\udcff.png'"):
        open_source(tmp_path)

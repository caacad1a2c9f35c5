"""Labels from a file and the standard order of ImageNet's classes."""

import numpy as np
import pytest

from dit.data import DataError
from dit.data.sources.images import open_source
from dit.data.sources.labels import CLASS_LISTS, imagenet1k
from tests.data.sources.pictures import encoded, write_tar

VAL = ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00000003.JPEG"]


@pytest.fixture
def val(tmp_path):
    """A flat tar, as ImageNet's validation set."""
    return write_tar(tmp_path / "val.tar", {name: encoded(i, "JPEG") for i, name in enumerate(VAL)})


def labels_file(tmp_path, text):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    return path


def test_the_standard_list():
    """Sorted, and where everybody's class numbers say: 0 tench, 207 golden retriever, 999 toilet tissue."""
    classes = imagenet1k()
    assert list(classes) == sorted(set(classes))
    assert (len(classes), classes[0], classes[207], classes[999]) == (
        1000,
        "n01440764",
        "n02099601",
        "n15075141",
    )


def class_folders(root, names):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes(encoded(i))
    return root


@pytest.mark.parametrize("names", [["n02099601", "n15075141"], ["207", "999"]])
def test_some_of_the_classes_get_their_standard_labels(tmp_path, names):
    (tmp_path / "lone.png").write_bytes(encoded(9))
    source = open_source(class_folders(tmp_path, names), classes="imagenet1k")
    assert source.labels.tolist() == [-1, 207, 999]
    assert source.classes == imagenet1k()


def test_classes_that_are_not_in_the_list_are_listed(tmp_path):
    folder = class_folders(tmp_path, ["n02099601", "1000", *(f"class{i}" for i in range(6))])
    with pytest.raises(DataError, match="7 of 8 classes are not of imagenet1k") as error:
        open_source(folder, classes="imagenet1k")
    assert "\n  '1000'\n  'class0'\n" in str(error.value)
    assert str(error.value).endswith("\n  ... and 2 more")


def test_a_set_without_classes_needs_a_file_of_them(val):
    with pytest.raises(DataError, match="the images have no classes"):
        open_source(val, classes="imagenet1k")


def test_an_unknown_list_is_named(val):
    with pytest.raises(DataError, match="no list of classes 'imagenet'; did you mean imagenet1k"):
        open_source(val, classes="imagenet")
    assert list(CLASS_LISTS) == ["imagenet1k"]


KAGGLE = (
    "ImageId,PredictionString\n"
    "ILSVRC2012_val_00000002,n02099601 1 2 3 4 n02099601 5 6 7 8 \n"
    "ILSVRC2012_val_00000001,n15075141 1 2 3 4\n"
    "ILSVRC2012_val_00000003,n01440764 1 2 3 4 \n"
)
SPACES = f"{VAL[0]} n15075141\n{VAL[1]}   n02099601\n\n{VAL[2]} n01440764\n"
TABS = "\n".join(f"val/{n}\t{c}" for n, c in zip(VAL, ["b c", "a", "b c"], strict=True))


@pytest.mark.parametrize(
    "text", [KAGGLE, SPACES, SPACES.replace(" n", ",n"), "\ufeff" + KAGGLE, "name wnid\n" + SPACES]
)
def test_the_validation_set(tmp_path, val, text):
    source = open_source(val, classes="imagenet1k", labels=labels_file(tmp_path, text))
    assert source.names == tuple(VAL)
    assert source.labels.tolist() == [999, 207, 0]
    assert source.labels.dtype == np.int64
    own = open_source(val, labels=labels_file(tmp_path, text))
    assert (own.labels.tolist(), own.classes) == ([2, 1, 0], ("n01440764", "n02099601", "n15075141"))


def test_names_with_folders_and_classes_with_spaces(tmp_path):
    tar = write_tar(tmp_path / "val.tar", {f"val/{name}": encoded(1, "JPEG") for name in VAL})
    source = open_source(tar, labels=labels_file(tmp_path, TABS))
    assert (source.labels.tolist(), source.classes) == ([1, 0, 1], ("a", "b c"))


def test_names_in_one_of_several_tars(tmp_path):
    for i, name in enumerate(VAL):
        write_tar(tmp_path / f"{i}.tar", {name: encoded(1, "JPEG")})
    source = open_source(tmp_path, labels=labels_file(tmp_path, SPACES))
    assert source.labels.tolist() == [2, 1, 0]


def test_numbers_are_labels(tmp_path, val):
    text = "".join(f"{name} {label}\n" for name, label in zip(VAL, [4, -1, 0], strict=True))
    source = open_source(val, labels=labels_file(tmp_path, text))
    assert (source.labels.tolist(), source.classes) == ([4, -1, 0], tuple("01234"))
    standard = open_source(val, classes="imagenet1k", labels=labels_file(tmp_path, text))
    assert standard.labels.tolist() == [4, -1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SPACES.splitlines()[0], "2 fault.*\n  no label for 'ILSVRC2012_val_00000002.JPEG'\n  no label for"),
        (SPACES + "other.JPEG n01440764", "1 fault.*\n  no image is called 'other.JPEG'"),
        (SPACES + f"{VAL[0]} n01440764", f"'{VAL[0]}' stands for more than one image, or is there twice"),
        ("490\n361\n171\n", "line 1 is '490', expected a name and its class"),
        (SPACES.replace(" n", ",n").replace("4\n", "4,1\n"), "line 2 is .*, expected a name and its class"),
        ("", "3 fault"),
    ],
    ids=["short", "unknown", "twice", "numbers alone", "columns", "empty"],
)
def test_files_that_do_not_fit_the_images(tmp_path, val, text, words):
    if "line 2" in words:
        words = words.replace("line 2", r"line \d")
    with pytest.raises(DataError, match=words):
        open_source(val, labels=labels_file(tmp_path, text))


def test_names_that_stand_for_two_images(tmp_path):
    tar = write_tar(tmp_path / "val.tar", {"a/1.png": encoded(1), "b/1.png": encoded(2)})
    with pytest.raises(DataError, match="'1' stands for more than one image"):
        open_source(tar, labels=labels_file(tmp_path, "1 cat\na/1 dog\n"))
    assert open_source(tar, labels=labels_file(tmp_path, "b/1.png cat\na/1.png dog\n")).labels.tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_file_that_cannot_be_read(tmp_path, val, content):
    path = tmp_path / "labels.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as a file of labels: .*labels\.bin") as error:
        open_source(val, labels=path)
    assert str(error.value).count("labels.bin") == 1

"""Files of labels as people write them: columns, quotes, headers, spaces, encodings."""

import numpy as np
import pytest
from PIL import Image

from dit.data import DataError
from dit.data.sources.classes import LabelChoice
from dit.data.sources.labels import relabel
from dit.data.sources.source import ImageSource
from dit.data.sources.table import TWICE, UNKNOWN, Finder

NAMES = ("img 0.jpg", "img 1.jpg", "img 2.jpg")


def labelled(tmp_path, text, names=NAMES, choice=LabelChoice(), encoding="utf-8"):  # noqa: B008
    file = tmp_path / "labels.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    source = ImageSource(tuple(names), np.full(len(names), -1), (), Image.open)
    return relabel(source, None, str(file), choice)


def file_of(separator="\t", head="", quote="", labels=("cat", "tree frog", "cat"), more="", names=NAMES):
    rows = zip(names, labels, strict=True)
    lines = (f"{quote}{name}{quote}{separator}{quote}{label}{quote}{more}\n" for name, label in rows)
    return head + "".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        file_of("\t"),
        file_of(","),
        file_of(", "),
        file_of(";"),
        file_of(" "),
        file_of("   "),
        file_of(",", quote='"'),
        file_of(" ", quote='"'),
        file_of(",", head="filename,label\n"),
        file_of(";", head="Name;Klasse\n"),
        file_of("\t", head="\nimage\tclass\n\n"),
        file_of(",", head="filename,label,split\n", more=",train"),
        file_of(",", head="file,class,x,y\r\n", more=",1,2\r").replace("\r\n", "\n").replace("\n", "\r\n"),
        "label,id,filename\n"
        + "".join(f"{c},9,{n}\n" for n, c in zip(NAMES, ["cat", "tree frog", "cat"], strict=True)),
        "".join(f"{c},{n}\n" for n, c in zip(NAMES, ["cat", "tree frog", "cat"], strict=True)),
        file_of(",", names=("img 0", "img 1", "img 2")),
        file_of("\t", names=[f"some/where/{n}" for n in NAMES]).replace("some/where/", ""),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_names_and_classes(tmp_path, text, encoding):
    source = labelled(tmp_path, text, encoding=encoding)
    assert (source.labels.tolist(), source.classes) == ([0, 1, 0], ("cat", "tree frog"))


@pytest.mark.parametrize(
    ("separator", "labels"),
    [(";", ["black, white", "red", "red, blue"]), (",", ["a;b", "a;b", "c;d"]), ("\t", ["a, b", "c;d", "e"])],
)
def test_separators_in_names_of_classes(tmp_path, separator, labels):
    source = labelled(tmp_path, file_of(separator, labels=labels))
    assert [source.classes[i] for i in source.labels] == labels


def test_separators_and_quotes_in_quotes(tmp_path):
    text = '"img 0.jpg","black, ""white"""\n"img 1.jpg",red\nimg 2.jpg,"red"\n'
    assert labelled(tmp_path, text).classes == ('black, "white"', "red")
    odd = '"img 0.jpg,a\nimg 1.jpg,b\nimg 2.jpg,a\n'  # a quote that is part of a name
    assert labelled(tmp_path, odd, ('"img 0.jpg', *NAMES[1:])).labels.tolist() == [0, 1, 0]


def test_a_column_may_be_chosen(tmp_path):
    text = "filename,label,colour\n" + "".join(f"{n},{i},c{i % 2}\n" for i, n in enumerate(NAMES))
    assert labelled(tmp_path, text).labels.tolist() == [0, 1, 2]
    source = labelled(tmp_path, text, choice=LabelChoice("colour"))
    assert (source.labels.tolist(), source.classes) == ([0, 1, 0], ("c0", "c1"))
    assert source.labelled_by == "labels from column 'colour' of labels.csv"
    with pytest.raises(
        DataError, match=r"no column 'color' \(--label_key=color\) .* filename, label, colour"
    ):
        labelled(tmp_path, text, choice=LabelChoice("color"))


def test_numbers_as_names(tmp_path):
    text = file_of(labels=["10", "2", "-1"])
    assert labelled(tmp_path, text).labels.tolist() == [10, 2, -1]
    source = labelled(tmp_path, text, choice=LabelChoice(type="name"))
    assert (source.labels.tolist(), source.classes) == ([1, 0, -1], ("2", "10"))


def test_spaces_where_one_name_begins_another(tmp_path):
    names = ("img.jpg", "img 2.jpg", "a b.jpg")
    source = labelled(tmp_path, "img.jpg cat\nimg 2.jpg cat\na b.jpg tree frog\n", names)
    assert source.labels.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match=r"line 3 is 'a b c', where 'a' and 'a b' are both images: part"):
        labelled(tmp_path, "img.jpg cat\nimg 2.jpg cat\na b c\n", (*names, "a.jpg"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "img 0.jpg,K\xe4tzchen\n".encode("latin-1"),
            r"line 1 is not UTF-8 \(byte 0xe4, number 11 .*iconv -f CP1252",
        ),
        (b"a,b\nimg 0.jpg,\xff\n", "line 2 is not UTF-8"),
        (file_of(",").encode("utf-16-le"), "has a zero byte: a binary file, or UTF-16 without its mark"),
        (file_of(",", more=",train"), r"3 columns, and no first line that says which holds the labels"),
        (
            file_of(",") + "img 3.jpg,a,b\n",
            "line 4 is 'img 3.jpg,a,b', expected a name and its class in 2 columns",
        ),
        (file_of(",", labels=["a", "", "b"]), "line 2 is 'img 1.jpg,', expected a name and its class"),
        (
            file_of(labels=["1", "x", "2"]),
            r"'img 1.jpg' has the label 'x', a name, where most are numbers\n.*=name",
        ),
        (file_of(labels=["1", "1.5", "2"]), "'img 1.jpg' has the label '1.5', expected a class number"),
        ("", "3 fault"),
        (
            file_of(",", head="filename,Label,label\n", more=",9"),
            "several columns 'label': rename all but that of the labels",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        labelled(tmp_path, text)


def test_images_are_found_by_what_is_unique_of_their_names():
    finder = Finder(["a.tar:x/1.png", "b.tar:x/2.png", "y/1.png", "z.png"])
    assert finder.find(["a.tar:x/1.png", "x/1.png", "1.png", "2", "2.png", "z", "w"]) == [
        0,
        0,
        TWICE,
        1,
        1,
        3,
        UNKNOWN,
    ]
    assert finder.is_whole("x/2.png")
    assert not finder.is_whole("2")

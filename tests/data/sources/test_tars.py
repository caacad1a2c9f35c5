"""Tars of images in each layout, and what is said of those that make no set."""

import io
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dit.data import DataError
from dit.data.sources.classes import LabelChoice
from dit.data.sources.crops import Centre
from dit.data.sources.images import BadImage, open_source, unlabelled_note
from tests.data.sources.pictures import encoded, picture, tar_bytes, write_tar

centre = Centre()


@pytest.mark.parametrize("above", ["", "./", "set/train/"])
def test_a_tar_of_class_folders(tmp_path, above):
    files = {"cat/b.png": encoded(1), "ant/z.png": encoded(2), "cat/._b.png": b"", "cat/x.txt": b""}
    source = open_source(write_tar(tmp_path / "set.tar", {above + n: d for n, d in files.items()}))
    assert [n.removeprefix(above) for n in source.names] == ["ant/z.png", "cat/b.png"]
    assert source.labels.tolist() == [0, 1]
    assert source.classes == ("ant", "cat")
    assert source.ignored == 1
    assert np.array_equal(source.load(1, 16), centre(picture(1), 16))


def test_a_tar_of_all_kinds_of_images(tmp_path):
    files = {
        "c/1.gif": encoded(1, "GIF"),
        "c/2": encoded(2),
        "c/3.jpg_large": encoded(3, "JPEG"),
        "c/4.txt": encoded(4),
    }
    junk = {"__MACOSX/c/._1.gif": b"", "c/Thumbs.db": encoded(5), "__MACOSX/c/9.png": encoded(5)}
    source = open_source(write_tar(tmp_path / "set.tar", files | {"c/README": b"text"} | junk))
    assert source.names == ("c/1.gif", "c/2", "c/3.jpg_large")
    assert (source.classes, source.others) == (("c",), {".txt": 1, "": 1})
    assert np.array_equal(source.load(1, 16), centre(picture(2), 16))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("name", ["cat/a.png", "dog"])
def test_links_in_a_tar_are_refused_wherever_they_lead(tmp_path, kind, name):
    tar = write_tar(tmp_path / "set.tar", {"cat/b.png": encoded(1)})
    with tarfile.open(tar, "a") as links:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "gone"
        links.addfile(info)
    with pytest.raises(
        DataError, match=rf"member '{name}': is a link; write the tar anew with `tar --dereference"
    ):
        open_source(tar)


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
    with pytest.raises(
        DataError, match=r"cut.tar: byte 0, member 'cat/b.png': its 1\d+ bytes go past the end"
    ):
        open_source(tmp_path / "cut.tar")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as zipped:
        zipped.add(tar, "cat/b.png")
    with pytest.raises(DataError, match=r"zipped.tar: byte 0: not a whole, uncompressed tar"):
        open_source(tmp_path / "zipped.tar")
    with tarfile.open(tmp_path / "links.tar", "w") as links:
        info = tarfile.TarInfo("cat/a.png")
        info.type, info.linkname = tarfile.LNKTYPE, "cat/b.png"
        links.addfile(info)
    with pytest.raises(DataError, match=r"links.tar: byte 0, member 'cat/a.png': is a link"):
        open_source(tmp_path / "links.tar")


def test_nothing_is_written_anywhere(tmp_path):
    folder = tmp_path / "only"
    folder.mkdir()
    source = open_source(write_tar(folder / "set.tar", {f"cat/{i}.png": encoded(i) for i in range(3)}))
    source.load(0, 8)
    assert [p.name for p in folder.iterdir()] == ["set.tar"]


def test_threads_read_in_any_order(tmp_path):
    source = open_source(write_tar(tmp_path / "set.tar", {f"cat/{i:02d}.png": encoded(i) for i in range(30)}))
    together = threading.Barrier(4)

    def all_of_them(seed):
        together.wait()
        order = np.random.default_rng(seed).permutation(30)
        return all(np.array_equal(source.load(i, 16), centre(picture(i), 16)) for i in order.tolist())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(all_of_them, range(4)))


# --- WebDataset --------------------------------------------------------------------------------------------


def webdataset_files(first, labels, kind="jpg"):
    files = {}
    for i, label in enumerate(labels, first):
        files[f"{i:04d}.{kind}"] = encoded(i, "JPEG" if kind == "jpg" else kind)
        files[f"{i:04d}.cls"] = str(label).encode()
        files[f"{i:04d}.json"] = b"{}"
    return files


@pytest.mark.parametrize("how", ["", "set-{00..01}.tar", "set-*.tar", "set-*"])
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
    assert source.ignored == 4
    with Image.open(io.BytesIO(encoded(2, "JPEG"))) as third:
        assert np.array_equal(source.load(2, 16), centre(third, 16))


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_webdataset_of_other_images(tmp_path, kind):
    source = open_source(write_tar(tmp_path / "set.tar", webdataset_files(0, [1, 0], kind)))
    assert source.labels.tolist() == [1, 0]
    assert source.load(1, 16).shape == (16, 16, 3)


def test_of_a_webdataset_sample_the_image_is_the_one_that_is_called_so(tmp_path):
    """The usual endings first, then the others, then first bytes: masks and depths beside a photo are not it."""
    files = {"0.jpg": encoded(0, "JPEG"), "0.gif": encoded(9, "GIF"), "0.depth": encoded(9), "0.cls": b"0"}
    files |= {"1.gif": encoded(1, "GIF"), "1.depth": encoded(9), "1.cls": b"1"}
    files |= {"2.image": encoded(2), "2.cls": b"2", "2.txt": b"text"}
    source = open_source(write_tar(tmp_path / "set.tar", files))
    assert (source.names, source.labels.tolist()) == (("0.jpg", "1.gif", "2.image"), [0, 1, 2])
    assert source.others == {".gif": 1, ".depth": 2, ".txt": 1}
    assert np.array_equal(source.load(2, 16), centre(picture(2), 16))


def test_the_webdataset_library_gives_the_same_samples(tmp_path):
    import webdataset

    tar = write_tar(tmp_path / "set.tar", webdataset_files(0, [3, 0, 7]))
    source = open_source(tar)
    theirs = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [s["__key__"] + ".jpg" for s in theirs] == list(source.names)
    assert [int(s["cls"]) for s in theirs] == source.labels.tolist()


@pytest.mark.parametrize("key", ["label", "cls"])
def test_labels_in_json(tmp_path, key):
    files = {}
    for i, label in enumerate([2, -1, 0]):
        files |= {
            f"x/{i}.jpg": encoded(i, "JPEG"),
            f"x/{i}.json": b'{"%s": %d, "text": ""}' % (key.encode(), label),
        }
    source = open_source(write_tar(tmp_path / "set.tar", files))
    assert (source.labels.tolist(), source.classes, source.ignored) == ([2, -1, 0], ("0", "1", "2"), 0)


def test_json_without_labels_is_another_file(tmp_path):
    files = {"cat/0.jpg": encoded(0, "JPEG"), "cat/0.json": b'{"caption": "a cat"}'}
    source = open_source(write_tar(tmp_path / "set.tar", files))
    assert (source.labels.tolist(), source.classes, source.ignored) == ([0], ("cat",), 1)


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    write_tar(tmp_path / "set-00.tar", webdataset_files(0, [3]))
    with pytest.raises(DataError, match=r"1 of 2 shards are missing, first .*set-01.tar"):
        open_source(tmp_path / "set-{00..01}.tar")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.jpg": encoded(1), "a.cls": b"\xff"}, r"'a.jpg' has in its .cls b'\\xff', which is not UTF-8"),
        ({"a.jpg": encoded(1), "a.cls": b"-2"}, "'a.jpg' has the label '-2', expected a class number"),
        ({"a.jpg": encoded(1), "a.cls": b"1.5"}, "'a.jpg' has the label '1.5', expected a class number"),
        ({"a.jpg": encoded(1), "a.cls": b""}, "'a.jpg' has the label '', expected a class number"),
        ({"a.jpg": encoded(1), "b.cls": b"1"}, "'a.jpg' has no .cls beside it"),
        ({"a.jpg": encoded(1), "a.cls": b"1", "b.jpg": encoded(2)}, "'b.jpg' has no .cls beside it"),
        ({"a.jpg": encoded(1), "a.cls": b"1", "b.cls": b"2"}, "'b.cls' has no image beside it"),
        ({"a.jpg": encoded(1), "a.png": encoded(2), "a.cls": b"1"}, "'a.jpg' and 'a.png' belong to the same"),
        (
            {
                "a.jpg": encoded(1),
                "a.json": b'{"label": 1}',
                "b.jpg": encoded(1),
                "b.json": b'{"label": true}',
            },
            "'b.jpg' has the label True, a truth value, where most are numbers",
        ),
        (
            {"a.jpg": encoded(1), "a.json": b'{"label": 1}', "b.jpg": encoded(1), "b.json": b'{"label": '},
            "'b.jpg' has in its .json not JSON",
        ),
    ],
)
def test_webdataset_records_that_make_no_sample(tmp_path, files, words):
    with pytest.raises(DataError, match=words):
        open_source(write_tar(tmp_path / "set.tar", files))


def test_json_of_brackets_in_brackets_is_no_label(tmp_path):
    deep = b"[" * 200_000
    first = {"cat/0.jpg": encoded(0, "JPEG"), "cat/0.json": deep}
    assert open_source(write_tar(tmp_path / "set.tar", first)).classes == ("cat",)
    files = {"a.jpg": b"", "a.json": b'{"label": 1}', "b.jpg": b"", "b.json": b'{"label": ' + deep}
    with pytest.raises(DataError, match=r"other.tar: 'b.jpg' has in its .json not JSON: maximum"):
        open_source(write_tar(tmp_path / "other.tar", files))


@pytest.mark.parametrize("name", ["a.cls", "a.json", "b.json"])
def test_a_label_of_a_megabyte_is_not_read(tmp_path, name):
    files = {"a.jpg": b"", "a.json": b'{"label": 1}', "b.jpg": b"", "b.json": b'{"label": 1}'}
    if name == "a.cls":
        files = {"a.jpg": b""}
    content = b"1" if name == "a.cls" else b'{"label": 1}'
    open_source(write_tar(tmp_path / "fits.tar", files | {name: content.ljust(1 << 20)}))
    with pytest.raises(
        DataError,
        match=rf"set.tar: '{name[0]}.jpg' has 1048577 bytes in its {name[1:]}, expected at most 1048576",
    ):
        open_source(write_tar(tmp_path / "set.tar", files | {name: content.ljust(1048577)}))


def sparse_tar(path, name, size):
    """A tar of one file of zeros, which take no room on disk."""
    info = tarfile.TarInfo(name)
    info.size = size
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + -(-size // 512) * 512 + 1024)
    return path


def test_an_image_that_is_no_image_by_its_size_is_not_read(tmp_path):
    source = open_source(sparse_tar(tmp_path / "set.tar", "cat/huge.png", (1 << 30) + 1))
    with pytest.raises(
        BadImage, match=r"cat/huge.png: .*set.tar, byte 512: 1073741825 bytes, expected at most"
    ):
        source.load(0, 8)


def test_samples_at_fault_are_listed_together(tmp_path):
    write_tar(
        tmp_path / "set-0.tar",
        {"a.jpg": encoded(1), "a.cls": b"1", "b.jpg": b"", "c.jpg": b"", "c.cls": b"-7"},
    )
    write_tar(tmp_path / "set-1.tar", {f"{i}.jpg": b"" for i in range(6)})
    with pytest.raises(DataError) as error:
        open_source(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path}: 8 sample(s) that cannot be used:"
    assert lines[1] == f"  {tmp_path}/set-0.tar: 'b.jpg' has no .cls beside it, though others have one"
    assert (
        lines[2]
        == f"  {tmp_path}/set-0.tar: 'c.jpg' has the label '-7', expected a class number below 1000000, or "
        "-1 for none"
    )
    assert (
        lines[3] == f"  {tmp_path}/set-1.tar: '0.jpg' has no .cls or .json beside it, though others have one"
    )
    assert lines[6] == "  ... and 3 more"
    assert lines[7:] == ["give other labels with --labels=FILE, or leave these out with --label_key="]


# --- a tar a class -----------------------------------------------------------------------------------------


def imagenet(classes=3, images=2):
    """Class tars as ImageNet has them: flat, classes in no order."""
    return {
        f"n{90000000 - c}.tar": {
            f"n{90000000 - c}_{i}.JPEG": encoded(10 * c + i, "JPEG") for i in range(images)
        }
        for c in range(classes)
    }


def in_one(path, tars):
    return write_tar(path, {name: tar_bytes(files) for name, files in tars.items()})


def in_folder(folder, tars):
    folder.mkdir()
    for name, files in tars.items():
        write_tar(folder / name, files)
    return folder


@pytest.mark.parametrize("pack", [in_one, in_folder])
def test_imagenet_as_it_is_downloaded_is_the_folder_it_would_be_unpacked_to(tmp_path, pack):
    tars, unpacked = imagenet(), tmp_path / "unpacked"
    for tar, files in tars.items():
        (unpacked / tar.removesuffix(".tar")).mkdir(parents=True)
        for name, data in files.items():
            (unpacked / tar.removesuffix(".tar") / name).write_bytes(data)
    packed, plain = open_source(pack(tmp_path / "train.tar", tars)), open_source(unpacked)
    assert (packed.names, packed.classes) == (plain.names, plain.classes)
    assert packed.labels.tolist() == plain.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for i in range(6):
        assert np.array_equal(packed.load(i, 16), plain.load(i, 16))


@pytest.mark.parametrize("pack", [in_one, in_folder])
def test_empty_class_tars_are_listed_together(tmp_path, pack):
    tars = imagenet() | {f"n0000000{i}.tar": {"readme.txt": b""} for i in range(7)}
    with pytest.raises(DataError, match=r"7 class tar\(s\) that cannot be used") as error:
        open_source(pack(tmp_path / "train.tar", tars))
    assert str(error.value).count(": no images in it") == 5
    assert "n00000004.tar: no images in it\n  ... and 2 more" in str(error.value)


def test_a_class_that_is_there_twice_is_refused(tmp_path):
    files = {"a.JPEG": encoded(1, "JPEG")}
    tar = in_one(tmp_path / "train.tar", {"a/n00000001.tar": files, "b/n00000001.tar": files})
    with pytest.raises(
        DataError, match=r"'n00000001' is there twice: .*train.tar:a/n00000001.tar and .*:b/n0"
    ):
        open_source(tar)


def test_class_tars_beside_other_tars_are_refused(tmp_path):
    folder = in_folder(tmp_path / "both", imagenet() | {"more.tar": {"a.png": encoded(1)}})
    with pytest.raises(DataError, match="tars that are classes beside tars of images"):
        open_source(folder)
    mixed = write_tar(tmp_path / "mixed.tar", {"n00000001.tar": tar_bytes({}), "a.png": encoded(1)})
    with pytest.raises(DataError, match="tars that are classes beside tars of images"):
        open_source(mixed)


def test_a_fault_in_a_class_tar_is_named_with_both_tars(tmp_path):
    inner = tar_bytes({"a.JPEG": encoded(1, "JPEG")})
    tar = write_tar(tmp_path / "train.tar", {"n00000001.tar": inner, "n00000002.tar": inner[:700]})
    with pytest.raises(
        DataError, match=r"train.tar:n00000002.tar: byte \d+, member 'a.JPEG': its \d+ bytes go past"
    ):
        open_source(tar)


# --- labels of every kind ----------------------------------------------------------------------------------


def labelled_tar(path, ending, contents):
    files = {}
    for i, content in enumerate(contents):
        files[f"{i}.jpg"] = b""
        if content is not None:
            files[f"{i}.{ending}"] = content
    return write_tar(path, files)


@pytest.mark.parametrize(
    ("ending", "contents", "labels", "classes"),
    [
        ("cls", [b"dog\n", b"cat", b"\xef\xbb\xbfdog"], [1, 0, 1], ("cat", "dog")),
        ("cls", [b"2.0", b"0", b"-1"], [2, 0, -1], ("0", "1", "2")),
        ("json", [b'{"label": "1"}', b'{"label": "0"}'], [1, 0], ("0", "1")),
        ("json", [b'{"label": "dog"}', b'{"label": "cat"}'], [1, 0], ("cat", "dog")),
        ("json", [b'{"label": true}', b'{"label": false}'], [1, 0], ("0", "1")),
        ("json", [b'{"class": 1, "x": 0}', b'{"x": 1, "class": 0}'], [1, 0], ("0", "1")),
        ("json", [b'{"category": "b"}', b'{"category": "a"}'], [1, 0], ("a", "b")),
        ("json", [b'{"label": null}', b'{"label": null}'], [-1, -1], ()),
        ("JSON", [b'{"label": 1}', b'{"label": 0}'], [1, 0], ("0", "1")),
    ],
)
def test_labels_as_people_write_them(tmp_path, ending, contents, labels, classes):
    source = open_source(labelled_tar(tmp_path / "set.tar", ending, contents))
    assert (source.labels.tolist(), source.classes) == (labels, classes)


def test_a_key_may_be_chosen(tmp_path):
    contents = [b'{"label": 0, "meta": {"kind": "b"}}', b'{"label": 1, "meta": {"kind": "a"}}']
    tar = labelled_tar(tmp_path / "set.tar", "json", contents)
    assert open_source(tar).labelled_by == "labels from 'label' in KEY.json"
    assert open_source(tar, choice=LabelChoice("meta.kind")).labels.tolist() == [1, 0]
    none = open_source(tar, choice=LabelChoice(""))
    assert (none.labels.tolist(), none.ignored) == ([-1, -1], 2)
    with pytest.raises(DataError, match="under --label_key=kind: the JSON beside them has label, meta"):
        open_source(tar, choice=LabelChoice("kind"))
    flat = write_tar(tmp_path / "flat.tar", {"a.jpg": b""})
    with pytest.raises(DataError, match="under --label_key=kind: there is no JSON beside them"):
        open_source(flat, choice=LabelChoice("kind"))
    folder = in_folder(tmp_path / "folder", imagenet())
    with pytest.raises(DataError, match="--label_key=kind: there is no JSON"):
        open_source(folder, choice=LabelChoice("kind"))


def test_json_without_a_usual_key_is_spoken_of(tmp_path):
    tar = labelled_tar(tmp_path / "set.tar", "json", [b'{"species": 1, "url": ""}'] * 2)
    source = open_source(tar)
    assert source.labels.tolist() == [-1, -1]
    note = unlabelled_note(str(tar), source)
    assert "2 images have no label (the JSON beside them has the keys species, url; --label_key=KEY" in note


@pytest.mark.parametrize("value", [b"3", b'"cat"', b"true", b"1.0"])
def test_json_that_is_a_value_alone_is_refused(tmp_path, value):
    tar = labelled_tar(tmp_path / "set.tar", "json", [value] * 2)
    with pytest.raises(
        DataError, match=r"2 sample.*\n  .*without a key, expected such as {\"label\": ...}"
    ) as error:
        open_source(tar)
    assert "--label_key=" in str(error.value)
    assert open_source(tar, choice=LabelChoice("")).labels.tolist() == [-1, -1]


@pytest.mark.parametrize("first", [b'{"label": null}', b'{"caption": "x"}', b"{", None])
@pytest.mark.parametrize("at", [0, 2])
def test_one_sample_without_a_label_among_others(tmp_path, first, at):
    contents = [b'{"label": 1}', b'{"label": 0}', b'{"label": 1}']
    contents[at] = first
    tar = labelled_tar(tmp_path / "set.tar", "json", contents)
    with pytest.raises(
        DataError, match=rf"1 sample.*\n  .*: '{at}.jpg' has .*\ngive other labels with --labels=FILE"
    ):
        open_source(tar)
    (tmp_path / "labels.csv").write_text("0,a\n1,b\n2,a\n")
    assert open_source(tar, labels=tmp_path / "labels.csv").labels.tolist() == [0, 1, 0]


def test_keys_with_dots(tmp_path):
    files = {f"22.{i:02d}.{e}": b"%d" % (i % 2) for i in range(4) for e in ("jpg", "cls")}
    source = open_source(write_tar(tmp_path / "set.tar", files))
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert source.names[:2] == ("22.00.jpg", "22.01.jpg")


def test_two_images_of_a_key_are_no_fault_without_labels(tmp_path):
    files = {"a.jpg": b"", "a.png": b"", "a.json": b'{"caption": "x"}'}
    assert open_source(write_tar(tmp_path / "set.tar", files)).names == ("a.jpg", "a.png")


def test_pictures_beside_an_image_are_images_where_no_sample_has_a_label(tmp_path):
    files = {"a.jpg": b"", "a.mask.gif": b"", "a.txt": b""}
    alone = open_source(write_tar(tmp_path / "alone.tar", files | {"a.json": b'{"caption": "x"}'}))
    assert (alone.names, alone.others) == (("a.jpg", "a.mask.gif"), {".txt": 1, ".json": 1})
    labelled = open_source(write_tar(tmp_path / "labelled.tar", files | {"a.json": b'{"label": 0}'}))
    assert (labelled.names, labelled.others) == (("a.jpg",), {".txt": 1, ".gif": 1})


def test_class_tars_called_by_numbers_are_sorted_as_those(tmp_path):
    source = open_source(in_one(tmp_path / "train.tar", {f"{c}.tar": {"a.JPEG": b""} for c in (10, 2, 1)}))
    assert (source.classes, source.classes_before) == (("1", "2", "10"), ("1", "10", "2"))
    assert [source.classes[i] for i in source.labels] == [name.split("/")[0] for name in source.names]

"""Parquet files of images: layouts, order, memory, and what is said of files that cannot be used."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit.data import DataError
from dit.data.sources.crops import Centre
from dit.data.sources.images import BadImage, open_source
from dit.data.sources.parquet import Columns
from tests.data.sources.pictures import encoded, picture, write_parquet

N = 10
IMAGES = [encoded(i) for i in range(N)]
LABELS = [i % 3 for i in range(N)]
CLASSES = ("ant", "bee", "cat")
centre = Centre()


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """The folder for temporary files; nothing may be left in it."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def write(path, images=IMAGES, labels=LABELS, classes=CLASSES, **options):
    return write_parquet(path, images, labels, classes, **options)


def write_table(path, features=None, **columns):
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": features})
    pq.write_table(table, path)
    return path


def test_the_layout_of_hugging_face(tmp_path):
    source = open_source(write(tmp_path / "set.parquet"))
    assert source.names == tuple(f"{i}.png" for i in range(N))
    assert source.labels.tolist() == LABELS
    assert source.labels.dtype == np.int64
    assert source.classes == CLASSES
    for i in np.random.default_rng(0).permutation(N).tolist():
        assert np.array_equal(source.load(i, 16), centre(picture(i), 16))


@pytest.mark.parametrize("spec", ["", "train-*.parquet", "train-{00000..00001}-of-00002.parquet"])
def test_several_files_are_one_set_in_the_order_of_their_names(tmp_path, spec):
    write(tmp_path / "train-00001-of-00002.parquet", IMAGES[6:], LABELS[6:], paths=[None] * 4)
    write(tmp_path / "train-00000-of-00002.parquet", IMAGES[:6], LABELS[:6])
    (tmp_path / "README.md").write_text("about")
    source = open_source(tmp_path / spec)
    assert source.labels.tolist() == LABELS
    assert source.names[5:7] == ("train-00000-of-00002.parquet:5", "train-00001-of-00002.parquet:0")
    for i in reversed(range(N)):
        assert np.array_equal(source.load(i, 16), centre(picture(i), 16))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("group", [1, 4, 100])
def test_any_row_groups_and_compression(tmp_path, group, compression):
    source = open_source(write(tmp_path / "set.parquet", group=group, compression=compression))
    assert all(np.array_equal(source.load(i, 16), centre(picture(i), 16)) for i in (9, 0, 4))


@pytest.mark.parametrize("column", ["image", "img", "photo"])
def test_the_image_column_is_the_one_said_to_be(tmp_path, column):
    assert open_source(write(tmp_path / "set.parquet", column=column)).load(2, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_plain_column_of_bytes(tmp_path, kind):
    path = write_table(
        tmp_path / "set.parquet", image=pa.array(IMAGES, kind), label=pa.array(LABELS, pa.int8())
    )
    source = open_source(path)
    assert source.names[3] == "set.parquet:3"
    assert (source.labels.tolist(), source.classes) == (LABELS, ("0", "1", "2"))
    assert np.array_equal(source.load(3, 16), centre(picture(3), 16))


def test_labels_may_be_missing(tmp_path):
    source = open_source(write(tmp_path / "none.parquet", labels=None))
    assert (source.labels.tolist(), source.classes) == ([-1] * N, ())
    source = open_source(write(tmp_path / "some.parquet", labels=[None, -1, *LABELS[2:]]))
    assert source.labels.tolist() == [-1, -1, *LABELS[2:]]
    assert source.classes == CLASSES


@pytest.mark.parametrize("paths", [["same.png"] * N, [None, *(f"{i}.png" for i in range(1, N))]])
def test_names_that_name_no_one_image_are_made(tmp_path, paths):
    source = open_source(write(tmp_path / "set.parquet", paths=paths))
    assert source.names == tuple(f"set.parquet:{i}" for i in range(N))


# --- reading once, in bounded memory -----------------------------------------------------------------------


def test_the_files_are_read_once(tmp_path):
    """After the first image nothing is read from them any more, whatever the order."""
    path = write(tmp_path / "set.parquet", group=5)
    source = open_source(path)
    source.load(7, 16)
    path.unlink()
    assert all(np.array_equal(source.load(i, 16), centre(picture(i), 16)) for i in (2, 9, 0))


def test_nothing_is_written_before_the_first_image_nor_left_after_the_last(tmp_path, temporary):
    source = open_source(write(tmp_path / "set.parquet"))
    assert list(temporary.rglob("*")) == []
    source.load(0, 16)
    size = sum(p.stat().st_size for p in temporary.rglob("*.bin"))
    assert size == sum(len(image) for image in IMAGES) + 8 * (N + 1)
    del source
    assert list(temporary.rglob("*.bin")) == []


def test_threads_share_what_one_of_them_wrote(tmp_path, temporary):
    source = open_source(write(tmp_path / "set.parquet"))
    with ThreadPoolExecutor(4) as pool:
        crops = list(pool.map(lambda i: source.load(i, 16), range(N)))
    assert all(np.array_equal(crop, centre(picture(i), 16)) for i, crop in enumerate(crops))
    assert len(list(temporary.rglob("*.bin"))) == 1


MEASURE = """
import sys, pyarrow as pa, tempfile
from dit.data.sources.images import open_source
source = open_source(sys.argv[1])
source.load(0, 16)
print(pa.default_memory_pool().max_memory())
"""


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    """48 images of 1 MB, a page each, in one row group; what follows the end of a PNG is not looked at."""
    rng = np.random.default_rng(0)
    images = [image + rng.bytes(1 << 20) for image in [IMAGES[0]] * 48]
    path = write(tmp_path / "set.parquet", images, [0] * 48, group=48, write_batch_size=1)
    command = [sys.executable, "-c", MEASURE, str(path)]
    env = {"PYTHONPATH": str(Path(__file__).parents[3]), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    peak = int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    assert peak < 48 << 20


# --- what cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_without_bytes_are_listed_together(tmp_path, statistics):
    write(tmp_path / "a.parquet", write_statistics=statistics)
    images = [IMAGES[0], None, *IMAGES[2:4], None, None, None, None, None, IMAGES[9]]
    write(tmp_path / "b.parquet", images, write_statistics=statistics)
    with pytest.raises(DataError) as error:
        open_source(tmp_path)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: 6 of 20 rows hold no bytes; write the images themselves, not their paths:",
        *(f"  b.parquet:{i} ({i}.png)" for i in (1, 4, 5, 6, 7)),
        "  ... and 1 more",
    ]


def features(**columns):
    return json.dumps({"info": {"features": columns}})


IMAGE, LABEL = {"_type": "Image"}, {"_type": "ClassLabel", "names": ["a", "b"]}
BYTES = pa.array([b"x", b"y"], pa.binary())
NUMBERS = pa.array([0, 1])


@pytest.mark.parametrize(
    ("metadata", "columns", "words"),
    [
        (None, {"picture": BYTES}, "no column of images; expected 'image', found picture"),
        (None, {"image": pa.array(["a.png", "b.png"])}, "column 'image' is string, expected bytes"),
        (
            None,
            {"image": pa.array([{"path": "a"}, {"path": "b"}])},
            "is struct<path: string>, expected bytes",
        ),
        (None, {"image": BYTES, "label": pa.array([[0], [1]])}, "column 'label' is list<.*>, expected whole"),
        (None, {"image": BYTES, "label": pa.array([0.5, 1.0])}, "set.parquet:0 has the label 0.5, expected"),
        (
            None,
            {"image": BYTES, "label": pa.array([0, -2])},
            "1 sample.* cannot be used:\n  set.parquet:1 has the label -2, expected a class number below 1000000",
        ),
        (
            None,
            {"image": BYTES, "label": pa.array([0, 10**12])},
            "has the label 1000000000000, expected .* below 1000000",
        ),
        (
            None,
            {"image": BYTES, "label": pa.array([0, 2**63], pa.uint64())},
            ":1 has the label 9223372036854775808, expected",
        ),
        ("{", {"image": BYTES}, "damaged metadata 'huggingface'"),
        ("[]", {"image": BYTES}, "damaged metadata 'huggingface'"),
        ("[" * 200_000, {"image": BYTES}, "set.parquet: damaged metadata 'huggingface'"),
        (features(a=IMAGE, b=IMAGE), {"a": BYTES, "b": BYTES}, "several columns of Image: a, b"),
        (
            features(label=LABEL),
            {"image": BYTES, "label": pa.array([0, 2])},
            "set.parquet:1 has the label 2, with 2 classes",
        ),
        (
            features(fine=LABEL, coarse=LABEL),
            {"image": BYTES, "fine": NUMBERS, "coarse": NUMBERS},
            "several columns of ClassLabel: fine, coarse; choose one with --label_column",
        ),
    ],
)
def test_columns_that_do_not_fit(tmp_path, metadata, columns, words):
    with pytest.raises(DataError, match=words):
        open_source(write_table(tmp_path / "set.parquet", metadata, **columns))


def test_files_that_differ_are_named(tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", classes=("ant", "cat", "bee"))
    with pytest.raises(
        DataError, match=r"1 file\(s\) have other columns or classes than .*a.parquet .*\n  b.parquet"
    ):
        open_source(tmp_path)


def test_an_image_that_is_no_image_by_its_size_is_not_read(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "set.parquet"))
    monkeypatch.setattr("dit.data.sources.source.MAX_IMAGE", min(map(len, IMAGES)) - 1)
    with pytest.raises(BadImage, match=r"3.png: row 3: \d+ bytes, expected at most \d+ of an image"):
        source.load(3, 8)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    source = open_source(write(tmp_path / "set.parquet", [*IMAGES[:4], b"no picture", *IMAGES[5:]]))
    assert source.load(3, 16).shape == (16, 16, 3)
    with pytest.raises(BadImage, match=r"^4.png: not an image that is read"):
        source.load(4, 16)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all" * 100])
def test_a_file_that_is_no_parquet_is_named(tmp_path, content):
    (tmp_path / "set.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"set.parquet: not a whole Parquet file"):
        open_source(tmp_path / "set.parquet")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_gives_a_data_error_or_the_same_images_or_bad_ones(tmp_path, choose):
    """Whatever is altered or cut: no other error. What is altered in an image, only a checksum could tell."""
    data = bytearray(write(tmp_path / "whole.parquet").read_bytes())
    if choose.draw(st.booleans()):
        del data[choose.draw(st.integers(0, len(data) - 1)) :]
    else:
        place = choose.draw(st.integers(0, len(data) - 1) | st.integers(len(data) - 2000, len(data) - 1))
        data[place] ^= choose.draw(st.integers(1, 255))
    path = tmp_path / "set.parquet"
    path.write_bytes(data)
    try:
        source = open_source(path)
        for i in range(len(source)):
            try:
                assert source.load(i, 16).shape == (16, 16, 3)
            except BadImage as bad:
                assert bad.name == source.names[i]  # noqa: PT017
    except DataError as error:
        assert "set.parquet" in str(error) or "rename the files" in str(error)  # noqa: PT017


# --- labels of every type ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (pa.array(["b", "a", None]), [1, 0, -1], ("a", "b")),
        (pa.array(["b", "a", "b"], pa.large_string()), [1, 0, 1], ("a", "b")),
        (pa.array(["b", "a", None]).dictionary_encode(), [1, 0, -1], ("a", "b")),
        (pa.DictionaryArray.from_arrays([0, 1, 0], ["z", "a"]), [1, 0, 1], ("a", "z")),
        (pa.array([True, False, None]), [1, 0, -1], ("0", "1")),
        (pa.array([2.0, float("nan"), 0.0]), [2, -1, 0], ("0", "1", "2")),
        (pa.array([None, 1, 0], pa.int8()), [-1, 1, 0], ("0", "1")),
        (pa.array(["10", "2", "0"]), [10, 2, 0], tuple(map(str, range(11)))),
        (pa.array([None, None, None]), [-1, -1, -1], ()),
    ],
)
@pytest.mark.parametrize("column", ["label", "class", "category_id"])
def test_labels_of_every_type(tmp_path, labels, numbers, classes, column):
    for i in range(2):  # whose dictionaries may differ
        part = labels if i == 0 else labels.take(pa.array([2, 1, 0]))
        write_table(tmp_path / f"{i}.parquet", image=pa.array(IMAGES[:3], pa.binary()), **{column: part})
    source = open_source(tmp_path)
    assert (source.labels.tolist(), source.classes) == ([*numbers, *numbers[::-1]], classes)


def test_names_of_classes_that_two_share(tmp_path):
    names = ("crane", "ant", "crane")
    source = open_source(write(tmp_path / "set.parquet", IMAGES[:3], [2, 1, 0], names))
    assert (source.labels.tolist(), source.classes) == ([2, 1, 0], names)


def test_columns_that_may_hold_labels_are_named(tmp_path):
    text = pa.array(["x", "y"])
    path = write_table(tmp_path / "set.parquet", image=BYTES, species=text, target=pa.array([[1], [2]]))
    source = open_source(path)
    assert source.labels.tolist() == [-1, -1]
    assert source.labelled_by == "of the other columns, species, --label_column=NAME takes one"
    assert open_source(path, columns=Columns(label="species")).classes == ("x", "y")

"""Places for results, claimed before work begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit.data.shards.manifest import FILE
from dit.data.shards.write import PLAN
from dit.outputs import (
    KINDS,
    RECORD,
    OutputError,
    claim,
    claim_file,
    differences,
    replace_folder,
    write_record,
)
from dit.sample.formats import FORMATS
from dit.sample.pictures import Pictures
from dit.train.run_dir import CONFIG

SPEC = {"seed": 1, "sampler": {"name": "heun", "steps": (1, 2)}, "num_samples": 10}


def with_record(folder: Path, **changes: Any) -> list[Path]:
    """The files of a result that is there, the record last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").write_text("data")
    write_record(folder / RECORD, {**SPEC, "code": "1", **changes})
    return [folder / "data", folder / RECORD]


# --- claiming ----------------------------------------------------------------------------------------------


def test_nothing_is_in_the_way(tmp_path: Path) -> None:
    assert claim([tmp_path / "a", tmp_path / "b"], SPEC, record=tmp_path / "b") is None
    (tmp_path / "other").touch()
    assert claim([tmp_path / "a"], SPEC) is None


def test_the_same_result_is_given_back(tmp_path: Path) -> None:
    files = with_record(tmp_path)
    held = claim(files, SPEC, record=files[-1])
    assert held is not None
    assert held["code"] == "1"  # not in the spec: it is not compared
    assert held["sampler"]["steps"] == [1, 2]


@pytest.mark.parametrize(
    ("now", "rows"),
    [
        ({"seed": 2}, ["  seed: 1 there, 2 now"]),
        ({"sampler": {"name": "euler", "steps": [1, 2]}}, ["  sampler.name: 'heun' there, 'euler' now"]),
        ({"digest": "x"}, ["  digest: not recorded there, as it was made by an older version"]),
        (
            {"seed": 2, "digest": "x"},
            ["  seed: 1 there, 2 now", "  digest: not recorded there, as it was made by an older version"],
        ),
        ({"num_samples": 9}, ["  num_samples: 10 there, 9 now"]),
        ({"num_samples": 11}, ["  num_samples: 10 there, 11 now"]),
    ],
)
def test_another_result_is_refused_unless_told(tmp_path: Path, now: dict[str, Any], rows: list[str]) -> None:
    files = with_record(tmp_path)
    with pytest.raises(OutputError) as error:
        claim(files, {**SPEC, **now}, record=files[-1])
    assert str(error.value).splitlines()[1:-1] == rows
    assert ("is of another result:" in str(error.value)) == any(" now" in row for row in rows)
    assert "--overwrite" in str(error.value).splitlines()[-1]
    assert claim(files, {**SPEC, **now}, record=files[-1], overwrite=True) is None
    assert files[0].read_text() == "data"  # claiming removes nothing


def test_a_number_may_grow_and_not_shrink(tmp_path: Path) -> None:
    files = with_record(tmp_path)
    more, fewer = {**SPEC, "num_samples": 11}, {**SPEC, "num_samples": 9}
    held = claim(files, more, record=files[-1], growing="num_samples")
    assert held is not None
    assert held["num_samples"] == 10
    with pytest.raises(OutputError, match="num_samples: 10 there, 9 now"):
        claim(files, fewer, record=files[-1], growing="num_samples")
    assert differences({"num_samples": None}, SPEC, "num_samples")[0] == "  num_samples: null there, 10 now"
    assert differences({}, {"num_samples": 10}, "num_samples") == [
        "  num_samples: not recorded there, as it was made by an older version"
    ]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_record_that_is_none(tmp_path: Path, content: bytes) -> None:
    files = with_record(tmp_path)
    files[-1].write_bytes(content)
    with pytest.raises(OutputError, match=r"is not JSON|is not the record of a result"):
        claim(files, SPEC, record=files[-1])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_where_a_folder_is_to_be_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/deeper", "link"):
        out = tmp_path / name
        for files in ([out / "data", out / RECORD], []):
            with pytest.raises(OutputError, match="is there and is no folder"):
                claim(files, SPEC, record=out / RECORD, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_where_a_file_is_to_be_is_refused(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(OutputError, match="is a folder, and a file is to be written"):
        claim([tmp_path], SPEC, record=tmp_path, overwrite=overwrite)


# What each kind of folder has in it, by the names that those who write it have for that.
FOLDERS = {
    "data set": [[FILE], [PLAN]],
    "run directory": [[CONFIG, "checkpoints/"], [CONFIG, "history.jsonl"]],
    "folder of checkpoints": [["step-00000003/COMPLETE"], ["meta.json", "COMPLETE"]],
    "folder of drawn images": [[p.name for p in Pictures.files(Path(), forms)] for forms in (FORMATS, [])],
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_belongs_to_something_else_is_refused(
    tmp_path: Path, kind: str, overwrite: bool
) -> None:
    for number, (other, names) in enumerate((o, n) for o, ways in FOLDERS.items() for n in ways):
        folder = tmp_path / str(number)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).mkdir() if name.endswith("/") else write_record(folder / name, SPEC)
        files = [folder / "data", folder / RECORD]
        if kind == other:
            claim(files, SPEC, record=files[-1], overwrite=overwrite, kind=kind)
            continue
        with pytest.raises(OutputError, match=f"{folder} is a {other}, and a {kind} is to be written"):
            claim(files, SPEC, record=files[-1], overwrite=overwrite, kind=kind)
    (tmp_path / CONFIG).touch()  # somebody's own
    claim([tmp_path / RECORD], SPEC, record=tmp_path / RECORD, kind=kind)
    with_record(tmp_path / "1")
    (tmp_path / "1" / "samples.npz").touch()  # drawn into a data set by versions before
    if kind == "folder of drawn images":
        claim([tmp_path / "1" / RECORD], SPEC, record=tmp_path / "1" / RECORD, kind=kind)


def test_a_file_that_has_no_record_is_compared(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert not claim_file(file, lambda: pytest.fail("there is nothing to compare"))
    file.touch()
    assert claim_file(file, lambda: True)
    assert not claim_file(file, lambda: pytest.fail("it is replaced"), overwrite=True)
    with pytest.raises(OutputError, match="is there already, and holds something else: give --overwrite"):
        claim_file(file, lambda: False)


def test_what_says_nothing_of_itself_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    for record in (None, tmp_path / RECORD):
        with pytest.raises(OutputError, match="data is there already, and nothing says how it was made"):
            claim([tmp_path / "data", tmp_path / RECORD], SPEC, record=record)


def test_a_folder_takes_the_place_of_an_earlier_result_and_of_nothing_else(tmp_path: Path) -> None:
    with_record(tmp_path / "out", seed=2)
    with_record(tmp_path / "new")
    replace_folder(tmp_path / "new", tmp_path / "out")
    assert json.loads((tmp_path / "out" / RECORD).read_text())["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with_record(tmp_path / "new")
    (tmp_path / "out" / RECORD).unlink()
    with pytest.raises(OutputError, match="holds something else"):
        replace_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "data").exists()


def test_what_older_records_lack_means_what_it_meant(tmp_path: Path) -> None:
    """A key that came later is compared by what it was before there was a choice."""
    record = tmp_path / RECORD
    write_record(record, {"seed": 1})
    spec, older = {"seed": 1, "order": "balanced"}, {"order": "balanced"}
    assert claim([record], spec, record=record, older=older) == spec
    with pytest.raises(OutputError, match="order: not recorded there"):
        claim([record], spec, record=record)
    with pytest.raises(OutputError, match="order: 'balanced' there, 'random' now"):
        claim([record], spec | {"order": "random"}, record=record, older=older)

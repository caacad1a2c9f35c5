"""Blocks of unfinished work, which are checked and gone on with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit.errors import Notice
from dit.outputs import (
    RECORD,
    OutputError,
    write_record,
)
from dit.ranks import group
from dit.unfinished import Blocks, unfinished
from tests.rank_processes import Server

SPEC = {"seed": 1, "sampler": {"name": "heun", "steps": (1, 2)}, "num_samples": 10}


def work(
    out: Path,
    count: int = 10,
    size: int = 4,
    until: int | None = None,
    spec: Mapping[str, Any] = SPEC,
    overwrite: bool = False,
) -> list[int]:
    """Do this rank's share of the missing blocks, and give up after `until` of them; those that were done."""
    world, done = group.World.from_env(), []
    given = {**spec, "num_samples": count}
    with unfinished(out, {**given, "code": "1"}, given, (count, size), overwrite) as blocks:
        for number in blocks.missing()[world.rank :: world.size][:until]:
            done.append(number)
            blocks.add(number, {"square": np.array(blocks.samples(number)) ** 2})
        if until is not None:
            raise KeyboardInterrupt
        group.barrier()
        group.on_main(lambda: finish(out, blocks))
    return done


def finish(out: Path, blocks: Blocks) -> None:
    whole = np.concatenate([blocks.read(number)["square"] for number in range(blocks.number)])
    assert whole.tolist() == [i * i for i in range(blocks.count)]
    out.write_text("done")


def stopped(out: Path, until: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(out, until=until, **options)


def test_work_that_was_killed_goes_on_and_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(out, 2)
    assert sorted(p.name for p in (tmp_path / "out.partial").iterdir()) == [
        "block-00000000.npz",
        "block-00000001.npz",
        RECORD,
    ]
    assert work(out) == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_work_that_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    stopped(tmp_path / "out", 0)
    assert not list(tmp_path.iterdir())


def test_other_ranks_go_on_with_it(tmp_path: Path, ranks: Server) -> None:
    stopped(tmp_path / "out", 1, count=30)
    done = ranks.run(3, work, tmp_path / "out", 30)
    assert done == [[1, 4, 7], [2, 5], [3, 6]]
    assert (tmp_path / "out").read_text() == "done"


def test_more_may_be_wanted_and_the_last_block_is_made_anew(tmp_path: Path, recwarn) -> None:
    stopped(tmp_path / "out", 2, count=7)  # of 4 and of 3 samples
    with pytest.raises(OutputError, match="num_samples: 7 there, 6 now"):
        work(tmp_path / "out", count=6)
    assert work(tmp_path / "out", count=13) == [1, 2, 3]
    assert not recwarn.list


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "name"])
def test_a_damaged_block_is_said_and_made_anew(tmp_path: Path, damage: str) -> None:
    stopped(tmp_path / "out", 2)
    path = tmp_path / "out.partial" / "block-00000001.npz"
    data = path.read_bytes()
    middle = data.index(np.array([4, 5, 6, 7]).tobytes())
    changed = {
        "cut": data[: len(data) // 2],
        "bit": data[:middle] + b"\x01" + data[middle + 1 :],
        "text": b"nothing of the kind",
        "name": data.replace(b"id.npy", b"ib.npy"),
    }
    path.write_bytes(changed[damage])
    with pytest.warns(Notice, match=r"block-00000001.npz is damaged .*; it is made anew"):
        assert work(tmp_path / "out") == [1, 2]


def test_work_of_another_spec_is_kept_unless_told(tmp_path: Path) -> None:
    stopped(tmp_path / "out", 2)
    other = {**SPEC, "seed": 5}
    with pytest.raises(OutputError, match=r"(?s)unfinished work of another spec:\n  seed: 1 there, 5 now"):
        work(tmp_path / "out", spec=other)
    assert work(tmp_path / "out", spec=other, overwrite=True) == [0, 1, 2]


def test_overwriting_goes_on_with_its_own(tmp_path: Path) -> None:
    stopped(tmp_path / "out", 2, overwrite=True)
    assert work(tmp_path / "out", overwrite=True) == [2]


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds something else"):
            work(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out.partial" / "thesis.tex").exists()


def test_two_jobs_are_kept_apart(tmp_path: Path) -> None:
    with unfinished(tmp_path / "out", SPEC, SPEC, (10, 4)) as blocks:
        blocks.add(0, {})
        with pytest.raises(OutputError, match="is being written by another process"):
            work(tmp_path / "out")
        assert blocks.missing() == [1, 2]
    assert not list(tmp_path.iterdir())


def test_where_a_folder_has_no_lock_two_jobs_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS, which locks only what is open for writing."""
    flock = fcntl.flock

    def of_files(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr("dit.files.fcntl.flock", of_files)
    test_two_jobs_are_kept_apart(tmp_path)


def test_a_job_of_older_code_is_kept_apart_too(tmp_path: Path) -> None:
    """It held the folder itself."""
    stopped(tmp_path / "out", 1)
    descriptor = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="is being written by another process"):
        work(tmp_path / "out")
    os.close(descriptor)
    assert work(tmp_path / "out") == [1, 2]


def test_where_there_are_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without them, as Lustre without its option, is not another process."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("dit.files.fcntl.flock", refuse)
    with pytest.warns(Notice, match="no locks on this file system"):
        assert work(tmp_path / "out") == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_other_code_goes_on_and_is_said(tmp_path: Path) -> None:
    stopped(tmp_path / "out", 1)
    record = json.loads((tmp_path / "out.partial" / RECORD).read_text())
    write_record(tmp_path / "out.partial" / RECORD, {**record, "code": "0"})
    with pytest.warns(Notice, match="was begun with code 0, and goes on with 1"):
        assert work(tmp_path / "out") == [1, 2]

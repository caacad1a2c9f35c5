"""Records in a local file: written once for all processes, whole or not at all, gone with the last reader."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit.data import DataError
from dit.data.sources.spill import Spill

RECORDS = [b"", b"one", b"x" * 5000, b"\0", b""]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def open_spill(key="key", records=lambda: RECORDS):
    return Spill(key, len(RECORDS), 100, records)


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_records_come_back_in_any_order(temporary):
    spill = open_spill()
    assert [spill.read(i) for i in (4, 2, 0, 3, 1)] == [RECORDS[i] for i in (4, 2, 0, 3, 1)]
    assert [spill.size(i) for i in range(5)] == [len(record) for record in RECORDS]
    assert files(temporary) == ["key.bin"]
    spill.close()
    assert files(temporary) == []


def test_the_last_reader_removes_the_file(temporary):
    def never():
        raise AssertionError("written twice")

    first = open_spill()
    second = open_spill(records=never)
    first.close()
    assert files(temporary) == ["key.bin"]
    assert second.read(1) == b"one"
    second.close()
    assert files(temporary) == []


def test_another_key_is_another_file(temporary):
    one, two = open_spill("one"), open_spill("two", lambda: [b"2"] * 5)
    assert (one.read(1), two.read(1)) == (b"one", b"2")


def test_a_source_that_fails_leaves_nothing(temporary):
    def broken():
        yield b"first"
        raise DataError("the source is broken")

    with pytest.raises(DataError, match="the source is broken"):
        open_spill(records=broken)
    assert files(temporary) == []
    assert open_spill().read(1) == b"one"


def test_too_little_room_is_said_before_anything_is_written(temporary):
    with pytest.raises(DataError, match=r"needs about 1000000000.0 GB in .*TMPDIR"):
        Spill("key", 1, 10**18, lambda: pytest.fail("asked for records"))
    assert files(temporary) == []


def test_a_folder_without_locks_is_said(temporary, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("dit.data.sources.spill.fcntl.flock", refuse)
    with pytest.raises(DataError, match=r"cannot be locked here.*No locks available.*set TMPDIR"):
        open_spill()


def test_a_folder_of_somebody_else_is_not_used(temporary):
    folder = next(temporary.iterdir()) if open_spill() and any(temporary.iterdir()) else None
    assert folder is not None
    moved = folder.rename(temporary / "elsewhere")
    folder.symlink_to(moved)
    with pytest.raises(DataError, match="belongs to somebody else: set TMPDIR"):
        open_spill()


# argv: key, a file that says who wrote, seconds a record takes, seconds to go on reading
PROCESS = """
import os, sys, time
from dit.data.sources.spill import Spill
key, log, slow, stay = sys.argv[1:]
def records():
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    for i in range(5):
        time.sleep(float(slow))
        yield b"%d" % i
spill = Spill(key, 5, 100, records)
print(b"".join(spill.read(i) for i in range(5)).decode(), flush=True)
time.sleep(float(stay))
"""


def start(folder, slow=0.1, stay=0.0):
    command = [sys.executable, "-c", PROCESS, "key", str(folder / "log.lock"), str(slow), str(stay)]
    env = {"PYTHONPATH": str(Path(__file__).parents[3]), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def wrote(folder):
    log = folder / "log.lock"
    return log.read_text().split() if log.exists() else []


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_share_what_one_of_them_wrote(temporary):
    both = [start(temporary, stay=1.0), start(temporary, stay=1.0)]
    assert [p.communicate()[0] for p in both] == ["01234\n"] * 2
    assert [p.returncode for p in both] == [0, 0]
    assert len(wrote(temporary)) == 1
    assert files(temporary) == []


def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_whole(temporary):
    killed = start(temporary, slow=30)
    wait_for(lambda: wrote(temporary))
    waiting = start(temporary)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert waiting.communicate()[0] == "01234\n"
    assert len(wrote(temporary)) == 2
    assert files(temporary) == []


def test_what_a_killed_reader_leaves_is_used_by_the_next(temporary):
    killed = start(temporary, stay=60)
    assert killed.stdout.readline() == "01234\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert files(temporary) == ["key.bin"]
    assert start(temporary).communicate()[0] == "01234\n"
    assert len(wrote(temporary)) == 1
    assert files(temporary) == []

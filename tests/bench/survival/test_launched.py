"""Starts by launch/local.sh of small programs: their ranks are found, killed, and all that is left is ended."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from dit.bench.survival import launched
from dit.bench.survival.launched import (
    Ended,
    Launched,
    Process,
    claim,
    last_logged,
    launch_to_end,
    read_lines,
)
from dit.errors import UserError


@pytest.fixture
def program(tmp_path):
    """A program for ranks from its lines; its file."""

    def write(*lines):
        file = tmp_path / "program.py"
        file.write_text("\n".join(["import os, signal, sys, time", *lines]))
        return str(file)

    return write


def test_the_ranks_are_found_and_one_killed_ends_the_other(program, tmp_path):
    file = "os.path.join(sys.argv[1], os.environ['RANK'])"
    write = f"open({file} + '.new', 'w').write(str(os.getpid())); os.rename({file} + '.new', {file})"
    words = [program(write, "time.sleep(100)"), str(tmp_path)]
    with Launched(words, 2, tmp_path / "log") as job:
        job.wait_for_ranks()
        files = [tmp_path / "0", tmp_path / "1"]
        told = job.until(
            lambda: [f.read_text() for f in files] if all(map(Path.is_file, files)) else None, "both"
        )
        assert [process.pid for process in job.ranks] == [int(pid) for pid in told]
        assert all(process.lives() for process in job.ranks)
        job.kill([1])
        assert job.end() == 1
        assert not any(process.lives() for process in job.ranks)
        assert "rank 1 was killed by SIGKILL" in job.tail()
        with pytest.raises(Ended, match="rank 0 ended before its kill"):
            job.kill([0])


def test_leaving_kills_what_is_left(program, tmp_path):
    """Also ranks that nobody has waited for, and that ignore signals that can be ignored."""
    words = [
        program("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print('on', flush=True)", "time.sleep(100)")
    ]
    with contextlib.suppress(ZeroDivisionError), Launched(words, 2, tmp_path / "log") as job:
        job.until(lambda: job.log.read_text().count("on") == 2 or None, "both")
        ranks = job._children()
        raise ZeroDivisionError
    assert len(ranks) == 2
    assert not any(rank.lives() for rank in ranks)
    assert job.launcher.returncode == -signal.SIGKILL


def test_what_fails_is_shown(program, tmp_path):
    with pytest.raises(UserError, match=r"(?s)exit status 1.*no such luck"):
        launch_to_end([program("sys.exit('no such luck')")], 1, tmp_path / "log")


def test_what_stands_still_is_given_up(program, tmp_path, monkeypatch):
    monkeypatch.setattr(launched, "PATIENCE", 1.0)
    words = [program("time.sleep(100)")]
    with (
        Launched(words, 1, tmp_path / "log") as job,
        pytest.raises(UserError, match="nothing happened for 1 s before ever"),
    ):
        job.until(lambda: None, "ever")


def test_an_id_that_is_used_again_is_another_process():
    found = launched._stat(os.getpid())
    assert found is not None
    assert found[1] == os.getppid()
    assert Process(os.getpid(), found[2]).lives()
    assert not Process(os.getpid(), found[2] - 1).lives()


def test_last_logged(tmp_path):
    assert last_logged(tmp_path) == (0, 0)
    file = tmp_path / "metrics.jsonl"
    file.touch()
    assert last_logged(tmp_path) == (file.stat().st_ino, 0)
    file.write_text("".join(json.dumps({"step": s, "x": "y" * 300}) + "\n" for s in range(1, 100)))
    assert last_logged(tmp_path)[1] == 99
    with file.open("a") as more:
        more.write('{"step": 100')
    assert last_logged(tmp_path)[1] == 99


def test_lines_that_are_cut_off(tmp_path):
    file = tmp_path / "history.jsonl"
    assert read_lines(file) == []
    file.write_text('{"a": 1}\n{"a": 2')
    with pytest.raises(UserError, match=r"history.jsonl: line 2 is not a JSON object"):
        read_lines(file)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").touch()  # as if the digits were encoded
    claim(tmp_path, {"kills": 3})
    claim(tmp_path, {"kills": 3})
    with pytest.raises(UserError, match=r'\{"kills": 3\} there, \{"kills": 4\} now'):
        claim(tmp_path, {"kills": 4})

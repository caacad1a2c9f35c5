"""Parts and the folder that ranks share while they encode."""

import errno
import fcntl
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.data import DataError
from dit.data.encoding.parts import MANY, Books, Done, Part, Unreadable, cut
from dit.data.shards.manifest import Shard
from dit.data.shards.write import PLAN

PLANS = {"options": {"image_size": 8, "flip": True}, "images": {"count": 3, "names": "aa"}}


@given(
    images=st.integers(0, 5000),
    block=st.integers(1, 40),
    record=st.integers(1, 1000),
    shard=st.integers(1, 20_000),
)
def test_parts_hold_everything_once_in_whole_blocks(images, block, record, shard):
    parts = cut(images, block, record, shard)
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(images))
    assert [p.number for p in parts] == list(range(len(parts)))
    assert all(len(p) % block == 0 for p in parts[:-1])
    assert all(len(p) for p in parts)
    blocks = -(-images // block)
    for p in parts:
        own = -(-len(p) // block)
        assert own == 1 or own * record <= shard
    if blocks >= MANY:
        assert len(parts) >= MANY  # enough to share out
        # and no more than it takes
        assert len(parts) < 2 * MANY or len(parts) == -(-blocks // max(1, shard // record))
    else:
        assert len(parts) == blocks


def books(tmp_path, plan=PLANS):
    made = Books(tmp_path / "out", plan)
    made.open()
    return made


def done(part, **fields):
    values = {
        "shard": None,
        "blocks": (),
        "stats": {"count": 0, "mean": [], "spread": [], "noise": []},
        "label_counts": (1, 2),
        "unlabelled": 0,
        "bad": (),
        "images": len(part),
        "seconds": {"whole": 1.5},
        "rank": 0,
        "ended": 17.25,
    }
    return Done(**{**values, **fields})


PART = Part(number=12, start=24, stop=26)


def test_a_part_comes_back_as_it_was_recorded(tmp_path):
    one, other = books(tmp_path), books(tmp_path)
    (one.folder / PART.shard).write_bytes(b"12345")
    shard = Shard(name=PART.shard, bytes=5, sha256="ab")
    recorded = done(PART, shard=shard, bad=(Unreadable(id=3, why="torn"),), seconds={"whole": 0.1 + 0.2})
    assert other.read(PART) is None
    one.record(PART, recorded)
    assert other.read(PART) == recorded
    one.forget(PART)
    assert other.read(PART) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"shard": 1}', b"\xff"])
def test_a_damaged_record_is_none(tmp_path, content):
    made = books(tmp_path)
    made.record(PART, done(PART))
    assert made.read(PART) == done(PART)
    (made.folder / "parts" / "000012.json").write_bytes(content)
    assert made.read(PART) is None


def test_a_part_whose_shard_is_gone_or_cut_is_not_done(tmp_path):
    made = books(tmp_path)
    made.record(PART, done(PART, shard=Shard(name=PART.shard, bytes=5, sha256="ab")))
    assert made.read(PART) is None
    (made.folder / PART.shard).write_bytes(b"1234")
    assert made.read(PART) is None
    (made.folder / PART.shard).write_bytes(b"12345")
    assert made.read(PART) is not None


def test_a_part_that_becomes_empty_takes_its_old_shard_with_it(tmp_path):
    made = books(tmp_path)
    (made.folder / PART.shard).write_bytes(b"12345")
    made.record(PART, done(PART))
    assert not (made.folder / PART.shard).exists()


@pytest.mark.parametrize("part", [PART, None])
def test_one_holds_a_claim_at_a_time(tmp_path, part):
    one, other = books(tmp_path), books(tmp_path)
    with one.claim(part, unlocked=False) as first:
        with other.claim(part, unlocked=True) as second:
            assert (first, second) == (True, False)
        with other.claim(Part(number=1, start=0, stop=2), unlocked=False) as elsewhere:
            assert elsewhere
    with other.claim(part, unlocked=False) as later:
        assert later


@pytest.mark.parametrize("unlocked", [True, False])
def test_without_locks_everybody_keeps_to_his_own(tmp_path, monkeypatch, unlocked):
    made = books(tmp_path)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)  # what some network file systems do
    assert made.locks
    with made.claim(PART, unlocked) as held:
        assert held is unlocked
    assert not made.locks
    with made.run() as began:
        assert began > 1.7e9


def test_another_command_is_refused_with_what_differs(tmp_path):
    books(tmp_path)
    books(tmp_path)
    other = {"options": {"image_size": 16, "flip": True}, "images": {"count": 3, "names": "aa"}}
    with pytest.raises(DataError, match=r"of another command \(image_size: 8 there, 16 here\)") as error:
        books(tmp_path, other)
    assert "flip" not in str(error.value)
    assert f"{tmp_path}/out.partial" in str(error.value)


def test_other_images_are_refused_with_what_to_do(tmp_path):
    books(tmp_path)
    other = {**PLANS, "images": {"count": 4, "names": "bb"}}
    with pytest.raises(
        DataError, match=r"begun with other images: 3 there, 4 here; .*remove it to begin anew"
    ):
        books(tmp_path, other)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"out.partial holds other things \(notes.txt\)"):
        books(tmp_path)
    (tmp_path / "out.partial" / "notes.txt").rename(tmp_path / "out.partial" / ".shard.tar.1.partial")
    books(tmp_path)  # what a killed rank may leave
    (tmp_path / "out.partial" / PLAN).write_text("{")
    with pytest.raises(DataError, match=r"plan.json: not JSON"):
        books(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_no_traceback(tmp_path):
    (tmp_path / "out.partial").touch()
    with pytest.raises(DataError, match=r"out.partial is a file: remove it or choose another OUT"):
        books(tmp_path)


def test_two_commands_at_once_find_each_other(tmp_path):
    """Whoever writes the plan second takes the first one's, which differs."""
    one, other = Books(tmp_path / "out", PLANS), Books(tmp_path / "out", {**PLANS, "codec": {"name": "b"}})
    one.folder.mkdir()
    one._write_plan(one.folder / PLAN)
    other._write_plan(one.folder / PLAN)
    assert json.loads((one.folder / PLAN).read_text()) == one.plan
    assert [p.name for p in one.folder.iterdir()] == [PLAN]
    one.open()
    with pytest.raises(DataError, match=r"another codec: null there, 'b' here"):
        other.open()


def test_an_empty_folder_is_abandoned_and_a_full_one_is_not(tmp_path):
    made = books(tmp_path)
    made.abandon()
    assert list(tmp_path.iterdir()) == []
    made = books(tmp_path)
    made.record(PART, done(PART))
    made.abandon()
    assert made.read(PART) is not None


def test_a_run_lasts_while_a_rank_is_at_it(tmp_path):
    with books(tmp_path).run() as first:
        with books(tmp_path).run() as second:
            assert second == first
        with books(tmp_path).run() as third:
            assert third == first
    with books(tmp_path).run() as later:
        assert later > first


def test_locks_of_others_do_not_stop_the_last_step(tmp_path):
    made = books(tmp_path)
    (made.folder / "manifest.json").touch()
    (made.folder / ".shard-000001.tar.gone.partial").touch()
    (made.folder / "bad.txt").touch()
    with books(tmp_path).claim(PART, unlocked=False), made.run():
        made.finish(None, b"")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.json"]
    shutil.rmtree(tmp_path / "out")

"""Who is to blame, given where each rank is and when it was last heard of."""

from __future__ import annotations

from typing import Any

from dit.ranks.verdict import PHASES, Judge, Peer, failed

JUDGE = Judge(silence=60, stall=300, slack=10)
NOW = 1000.0


def peer(rank: int, place: str, *, since: float = 500, heard: float = NOW, **more: Any) -> Peer:
    """place: such as "12 data". since: when it came there; 500 is longer ago than the limit."""
    step, phase = place.split()
    return Peer(rank, f"n{rank // 2}", 100 + rank, 0, heard, int(step), phase, since, **more)


def named(*peers: Peer) -> tuple[int, ...]:
    verdict = JUDGE.verdict(peers, NOW)
    return () if verdict is None else verdict.ranks


def test_whoever_is_furthest_behind_holds_the_others_up() -> None:
    assert named(peer(0, "12 step"), peer(1, "12 data"), peer(2, "12 step")) == (1,)
    assert named(peer(0, "13 data"), peer(1, "12 step"), peer(2, "13 step")) == (1,)
    assert named(peer(0, "12 step"), peer(1, "12 data"), peer(2, "12 data")) == (1, 2)
    assert named(peer(0, "12 step"), peer(1, "12 step")) == (0, 1)
    assert named(peer(0, "12 data")) == (0,)


def test_not_before_the_limit_and_not_where_one_has_just_moved() -> None:
    late = peer(0, "12 step")
    assert named(late, peer(1, "12 data", since=NOW - 299)) == ()
    assert named(late, peer(1, "12 step", since=NOW - 10)) == ()  # it came at last
    assert named(late, peer(1, "12 data", since=NOW - 301)) == (1,)


def test_what_may_take_long_is_nobodys_fault() -> None:
    for phase in (name for name, phase in PHASES.items() if not phase.is_limited):
        assert named(peer(0, f"12 {phase}"), peer(1, "12 step")) == ()  # rank 0 draws pictures
        assert named(peer(0, f"12 {phase}"), peer(1, f"12 {phase}")) == ()
    assert named(peer(0, "12 save"), peer(1, "11 step")) == (1,)  # but a rank that does not get there
    assert named(peer(0, "0 step"), peer(1, "0 data")) == ()  # the first step compiles
    assert named(peer(0, "12 data"), peer(1, "12 save", left=True)) == (0,)


def test_silence_and_ends_count_before_stalls() -> None:
    silent = peer(1, "12 step", heard=NOW - 61)
    assert named(peer(0, "12 data"), silent) == (1,)
    neighbours = [silent, peer(2, "12 step", heard=NOW - 55), peer(3, "12 step", heard=NOW - 30)]
    assert named(peer(0, "12 step"), *neighbours) == (1, 2)  # of one node that went down
    assert named(silent, peer(4, "12 step", gone=True)) == (4,)
    assert named(peer(0, "12 step", since=NOW), peer(1, "12 save", left=True, gone=True)) == ()
    assert named(peer(0, "12 step", since=NOW), peer(1, "12 step", heard=NOW - 59, since=NOW)) == ()


def test_texts() -> None:
    one = JUDGE.verdict([peer(0, "12 step"), peer(1, "12 data", since=600), peer(2, "12 step")], NOW)
    assert one is not None
    assert one.text == (
        "rank 1 on n0 (process 101) has been waiting for data after step 12 for 400 s, and 2 others cannot go on "
        "without (train.hang_timeout = 300)"
    )
    everyone = JUDGE.verdict([peer(0, "12 step"), peer(1, "12 step")], NOW)
    assert everyone is not None
    assert everyone.text.startswith(
        "all 2 ranks have been in the training step after step 12 for 500 s: the net"
    )
    many = JUDGE.verdict([peer(0, "12 step"), *(peer(r, "12 data") for r in range(1, 11))], NOW)
    assert many is not None
    assert "rank 8 on n4 (process 108) and 2 more have been" in many.text
    assert "rank 9 " not in many.text
    mine = failed(peer(3, "7 data"), "DataError: no")
    assert (mine.text, mine.ranks, mine.breaks) == (
        "rank 3 on n1 (process 103) failed waiting for data after step 7: DataError: no",
        (3,),
        True,
    )

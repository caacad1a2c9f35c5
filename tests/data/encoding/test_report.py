"""What an encode says while it waits; of what it says at its end: test_encode.py."""

import pytest

from dit.data.encoding.report import Waiting


@pytest.mark.parametrize(
    ("parts", "ranks", "text"),
    [
        ((), (), "waiting for other ranks (the last step)"),
        ((7, 3), (), "waiting for other ranks (part 4, 8 of 12)"),
        ((9, 8, 7, 6, 5), (), "waiting for other ranks (part 6, 7, 8, 9, ... of 12)"),
        (
            (7, 3),
            (1,),
            "no locks on this file system: part 4, 8 of 12 is left to rank 1; if it was stopped, start it again",
        ),
        (
            (),
            (0,),
            "no locks on this file system: the last step is left to rank 0; if it was stopped, start it again",
        ),
    ],
)
def test_what_a_rank_waits_for(parts, ranks, text):
    assert str(Waiting(parts, ranks, 1.0, 12)) == text

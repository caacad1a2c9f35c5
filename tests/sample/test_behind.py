"""Work one behind the caller: in turn, in one thread, and no error of it is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from dit.sample.behind import Behind

CPU = torch.device("cpu")


def test_work_goes_on_while_the_next_is_made_and_in_turn() -> None:
    """The first piece ends only after the caller has gone on; nothing then runs at the same time as another."""
    gone_on, done = threading.Event(), []

    def work(number: int) -> None:
        assert number or gone_on.wait(60)
        done.append((number, threading.get_ident()))

    with Behind(CPU) as behind:
        behind.do(work, 0)
        assert not done
        gone_on.set()
        for number in range(1, 4):
            behind.do(work, number)
    assert [number for number, _ in done] == [0, 1, 2, 3]
    assert len({thread for _, thread in done} - {threading.get_ident()}) == 1


def fail(text: str) -> None:
    raise ValueError(text)


def test_what_the_work_raises_is_raised_by_the_next_or_at_the_end() -> None:
    done: list[int] = []
    with Behind(CPU) as behind:
        behind.do(fail, "of one")
        with pytest.raises(ValueError, match="of one"):
            behind.do(done.append, 1)
    assert not done
    with pytest.raises(ValueError, match="at the end"), Behind(CPU) as behind:
        behind.do(fail, "at the end")


def both(work: Callable[..., None], given: object) -> None:
    """A caller that fails after it has handed out some work."""
    with Behind(CPU) as behind:
        behind.do(work, given)
        raise KeyError("of the caller")


def test_when_the_caller_fails_too_the_work_was_first_and_what_it_did_is_done() -> None:
    with pytest.raises(ValueError, match="of the work") as caught:
        both(fail, "of the work")
    assert isinstance(caught.value.__context__, KeyError)
    done: list[int] = []
    with pytest.raises(KeyError):
        both(done.append, 1)
    assert done == [1]

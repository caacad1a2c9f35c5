"""Contenders in turns: order, warm-up, figures and ratios."""

import time

import pytest

from dit.bench.speed.turns import Contender, MedianRange, protocol, ratio, take_turns


def test_contenders_alternate_and_warm_up_does_not_count():
    calls, ticks = [], []

    def contender(name, items):
        return Contender(name, lambda turn: calls.append((turn, name)) or items)

    found = take_turns(
        [contender("a", 3), contender("b", 5)], repeats=3, warmup=1, progress=lambda: ticks.append(1)
    )
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (3, "a")]
    assert len(ticks) == 8
    assert all(len(f.rate) == len(f.cpu) == 3 for f in found.values())


def test_rates_are_items_a_second():
    begun = time.perf_counter()
    found = take_turns([Contender("sleeper", lambda turn: time.sleep(0.05) or 10)], repeats=2, warmup=0)
    seconds = [10 / rate for rate in found["sleeper"].rate]
    assert min(seconds) >= 0.05
    assert sum(seconds) <= time.perf_counter() - begun
    assert all(cpu < 2000 for cpu in found["sleeper"].cpu)  # microseconds: sleeping takes none


def test_cpu_counts_all_threads():
    def spin(turn):
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass
        return 1

    assert take_turns([Contender("spinner", spin)], repeats=1, warmup=0)["spinner"].cpu[0] >= 30_000


def test_spread_and_ratio():
    spread = ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert (spread.median, spread.low, spread.high) == (2, 1, 3)
    assert str(MedianRange.of([1.0, 2.0, 3.0])) == "2 (1 to 3)"


def test_the_protocol_says_what_and_where():
    found = protocol(batch=3)
    assert found["batch"] == 3
    assert {"code", "python", "torch", "numpy", "cores", "load_at_start"} <= found.keys()


def test_contenders_that_fail_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        take_turns([Contender("broken", lambda turn: 1 // 0)])

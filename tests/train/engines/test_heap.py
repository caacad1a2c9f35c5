"""What glibc is told of its heap, also where it is an older one."""

from __future__ import annotations

import pytest

from dit.train.engines.heap import KEPT, KEPT_BEFORE, MMAP_THRESHOLD, TRIM_THRESHOLD, keep_with


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (KEPT, {MMAP_THRESHOLD: KEPT, TRIM_THRESHOLD: KEPT}),
        (32 << 20, {MMAP_THRESHOLD: KEPT_BEFORE, TRIM_THRESHOLD: KEPT}),  # glibc before 2.35, on 64 bits
        (512 << 10, {}),  # on 32 bits: it goes on adapting by itself, which any call that it takes would end
    ],
)
def test_large_blocks_come_first_and_as_large_as_glibc_takes(most: int, expected: dict[int, int]) -> None:
    said: dict[int, int] = {}

    def mallopt(parameter: int, size: int) -> int:
        if parameter == MMAP_THRESHOLD and size > most:
            return 0
        said[parameter] = size
        return 1

    assert keep_with(mallopt) is bool(expected)
    assert said == expected

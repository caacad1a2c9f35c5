"""Memory for batches: given out once at a time, and used again only when nobody can see it any more."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dit.data.loading.memory import CHUNK, Memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tensors_do_not_share_memory(dtype):
    memory = Memory()
    held = [memory.empty((3, 2, 5), dtype) for _ in range(20)]
    for i, tensor in enumerate(held):
        tensor.fill_(i)
    assert all(t.shape == (3, 2, 5) and t.dtype == dtype and t.is_contiguous() for t in held)
    assert [float(t.mean()) for t in held] == list(range(20))
    assert len({t.data_ptr() for t in held}) == 20


def test_what_is_let_go_of_is_used_again():
    memory = Memory()
    for _ in range(100):
        memory.empty((256, 8192), torch.float16).fill_(1)
    assert memory.bytes == max(CHUNK, 256 * 8192 * 2)


@pytest.mark.parametrize(
    "keep", [lambda t: t, lambda t: t[1:2], lambda t: t.view(-1), lambda t: t.numpy(), lambda t: t.detach()]
)
def test_memory_that_a_view_shows_is_not_used_again(keep):
    memory = Memory()
    kept = []
    for i in range(50):
        kept.append(keep(memory.empty((4, 16), torch.float32).fill_(i)))
    gc.collect()
    assert [float(view.reshape(-1)[0]) for view in kept] == list(range(50))
    held = memory.bytes
    kept.clear()
    again = [memory.empty((4, 16), torch.float32) for _ in range(50)]
    assert memory.bytes == held
    del again


def test_more_than_a_chunk():
    memory = Memory()
    held = [memory.empty((CHUNK // 4 + 1,), torch.float32) for _ in range(3)]
    for i, tensor in enumerate(held):
        tensor[[0, -1]] = float(i)
    assert [float(t[-1]) for t in held] == [0, 1, 2]


def test_nothing():
    assert Memory().empty((0, 3), torch.float16).shape == (0, 3)


def test_threads_share_one():
    memory = Memory()

    def use(number):
        for _ in range(200):
            tensor = memory.empty((64,), torch.float32).fill_(number)
            if not bool((tensor == number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(4)))

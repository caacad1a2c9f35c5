"""The stateless draws: Philox against its published vectors, distributions against their laws, subsets, pins."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dit import rng
from dit.compiling import compile_for_one_size
from dit.rng import Draws, Purpose, keyed, permutation, philox

MANY = 20_000


def draws(seed: int = 3, step: int = 5, slots: int | list[int] = 8, batch: int = 64) -> Draws:
    where = torch.arange(slots) if isinstance(slots, int) else torch.tensor(slots)
    return Draws(seed, step, where, batch)


# --- Philox ------------------------------------------------------------------------------------------------

KNOWN = [  # counter, key, output: the vectors that come with Random123 (Salmon et al., SC 2011)
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


WORD = st.integers(0, 2**32 - 1)


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=9), st.tuples(WORD, WORD))
def test_the_host_gives_the_words_of_the_device(
    counters: list[tuple[int, ...]], key: tuple[int, int]
) -> None:
    """One in numpy, the other in torch: with words that are tensors, that broadcast and that are one number."""
    c0, c1, c2, c3 = (torch.tensor(column) for column in zip(*counters, strict=True))
    for counter in ((c0, c1, c2, c3), (c0, c1, c2[:, None], int(c3[0])), (c0[0], 5, c2[0], 2**31)):
        for found, expected in zip(rng._rounds_on_host(counter, key), rng._rounds(counter, key), strict=True):
            assert torch.equal(found, expected)


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_the_published_vectors(counter: str, key: str, output: str) -> None:
    c = [torch.tensor(w) for w in words(counter)]
    first, second = words(key)
    assert [int(w) for w in philox((c[0], c[1], c[2], c[3]), (first, second))] == words(output)


def test_philox_broadcasts_plain_numbers_and_tensors_alike() -> None:
    c0, c2 = torch.tensor([1, 2**32 - 1]), torch.tensor([[7], [8], [9]])
    together = philox((c0, 3, c2, 4), (5, 6))
    assert all(w.shape == (3, 2) for w in together)
    for i, j in np.ndindex(3, 2):
        alone = philox((c0[j], torch.tensor(3), c2[i, 0], torch.tensor(4)), (5, 6))
        assert [int(w[i, j]) for w in together] == [int(w) for w in alone]


# --- what a number depends on ------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 63), min_size=1, max_size=12), st.integers(0, 2**63), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_draws_of_a_subset_are_the_subset_of_the_draws(slots: list[int], seed: int, step: int) -> None:
    whole, part = draws(seed, step, 64), draws(seed, step, slots)
    index = torch.tensor(slots)
    assert torch.equal(part.bits(Purpose.EPS, 7), whole.bits(Purpose.EPS, 7)[index])
    assert torch.equal(part.normal(Purpose.EPS, (3, 5)), whole.normal(Purpose.EPS, (3, 5))[index])
    assert torch.equal(part.uniform(Purpose.TIME), whole.uniform(Purpose.TIME)[index])
    assert torch.equal(part.integers(Purpose.VIEW, 10), whole.integers(Purpose.VIEW, 10)[index])
    chosen = whole.select(index)
    assert torch.equal(chosen.slots, index)
    assert torch.equal(chosen.normal(Purpose.EPS, (3, 5)), part.normal(Purpose.EPS, (3, 5)))
    assert torch.equal(whole.select(slice(5, 9)).uniform(Purpose.DROP), whole.uniform(Purpose.DROP)[5:9])


@pytest.mark.parametrize("threads", [1, 3])
def test_normals_do_not_depend_on_threads_and_batch(threads: int) -> None:
    """Bitwise: 3 threads cut 37 · 7 · 501 numbers where no vector register ends."""
    before, shape = torch.get_num_threads(), (7, 501)
    parts = torch.cat([draws(slots=[i]).normal(Purpose.PRIOR, shape) for i in range(37)])
    torch.set_num_threads(threads)
    try:
        assert torch.equal(draws(slots=37).normal(Purpose.PRIOR, shape), parts)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("step", [0, 7, 2**32 - 1, 2**32, 2**40 + 3])
def test_a_step_that_is_a_tensor_gives_the_numbers_of_one_that_is_not(step: int) -> None:
    """So a CUDA graph, or a compiled function, can be given a new step."""
    slots = torch.arange(5)
    number, tensor = Draws(3, step, slots, 8), Draws(3, torch.tensor(step), slots, 8)
    for one, other in ((number, tensor), (number.select(slice(1, 3)), tensor.select(slice(1, 3)))):
        assert torch.equal(one.bits(Purpose.TIME, 7), other.bits(Purpose.TIME, 7))
        assert torch.equal(one.normal(Purpose.EPS, (3, 2)), other.normal(Purpose.EPS, (3, 2)))
        assert torch.equal(one.integers(Purpose.VIEW, 9), other.integers(Purpose.VIEW, 9))


def test_the_global_batch_size_changes_no_number() -> None:
    assert torch.equal(
        draws(batch=64).bits(Purpose.EPS, 4),
        draws(batch=8).bits(Purpose.EPS, 4),
    )


def test_every_key_gives_other_numbers() -> None:
    # Also the high words: a step or seed beyond 2^32 must not repeat one below it.
    variants = [
        draws(seed=s, step=k).bits(p, 4)
        for s in (0, 1, 2**32, 2**32 + 1, 2**40)
        for k in (0, 1, 2**32, 2**32 + 1)
        for p in Purpose
    ]
    flat = torch.stack(variants).flatten(0, 1)  # (variants * slots, 4)
    assert len({tuple(row) for row in flat.tolist()}) == len(flat)


def test_numbers_are_pinned() -> None:
    """They are part of every run's identity: a change here makes every run irreproducible."""
    d = draws(seed=1234, step=77, slots=[0, 9])
    assert d.bits(Purpose.EPS, 3).tolist() == PINNED_BITS
    assert d.integers(Purpose.VIEW, 1000).tolist() == PINNED_INTEGERS
    assert d.uniform(Purpose.TIME).tolist() == PINNED_UNIFORM
    np.testing.assert_allclose(d.normal(Purpose.PRIOR, (5,)), PINNED_NORMAL, rtol=1e-6)
    assert d.fingerprint(*identities(2)).tolist() == PINNED_FINGERPRINTS
    assert [int(p) for p in Purpose] == [n for n in range(1, 24) if n != 16]  # 16 is used no more
    assert Purpose.EPS == 4
    assert Purpose.KEY == 15


# --- distributions -----------------------------------------------------------------------------------------


def test_normals_are_normal() -> None:
    x = draws(slots=MANY // 100).normal(Purpose.EPS, (4, 5, 5)).double().flatten().numpy()
    assert abs(x.mean()) < 5 / math.sqrt(MANY)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / MANY)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / MANY)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / MANY)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert np.abs(x).max() < 6.67


def test_uniforms_are_uniform_and_never_0_or_1() -> None:
    u = draws(slots=MANY).uniform(Purpose.TIME)
    assert u.dtype == torch.float32
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert stats.kstest(u.double().numpy(), "uniform").pvalue > 1e-3
    odd = u.double() * 2**24  # the middles of 2^23 cells: exact, and symmetric about 1/2
    assert torch.equal(odd, odd.round())
    assert bool((odd.long() % 2 == 1).all())


class Extreme(Draws):
    """Words that are all 0 or all 2^32 - 1: too rare to wait for."""

    def _words(self, purpose: Purpose, count: int) -> torch.Tensor:
        ends = torch.tensor([[0, 0], [0, 2**32 - 1], [2**32 - 1, 0], [2**32 - 1, 2**32 - 1]])  # (4, 2)
        return ends[:, [0, 0, 1, 1], None].expand(4, 4, -(-count // 4))


def test_the_rarest_words_give_finite_numbers_in_range() -> None:
    d = Extreme(0, 0, torch.arange(4), 4)
    u = d.uniform(Purpose.TIME)
    assert 0 < float(u.min()) < 2**-23
    assert 1 - 2**-23 < float(u.max()) < 1
    assert set(d.integers(Purpose.VIEW, 10).tolist()) == {0, 9}
    x = d.normal(Purpose.EPS, (8,))
    assert 6.6 < float(x.abs().max()) < 6.67
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("high", [2, 3, 10, 1000])
def test_integers_are_uniform(high: int) -> None:
    found = draws(slots=MANY).integers(Purpose.VIEW, high)
    assert found.dtype == torch.int64
    counts = torch.bincount(found, minlength=high)
    assert len(counts) == high
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_neighbours_in_every_direction_are_uncorrelated() -> None:
    base = draws(slots=200).normal(Purpose.EPS, (100,)).flatten()
    others = {
        "purpose": draws(slots=200).normal(Purpose.POSTERIOR, (100,)).flatten(),
        "step": draws(step=6, slots=200).normal(Purpose.EPS, (100,)).flatten(),
        "seed": draws(seed=4, slots=200).normal(Purpose.EPS, (100,)).flatten(),
        "slot": base.view(200, 100).roll(1, 0).flatten(),
        "element": base.view(200, 100).roll(1, 1).flatten(),
        "radius and angle": base.view(200, 2, 50).flip(1).flatten(),
    }
    for name, other in others.items():
        correlation = float(torch.corrcoef(torch.stack([base, other]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(len(base)), name


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 8, 8), (2, 0)])
def test_normal_has_the_shape_asked_for(shape: tuple[int, ...]) -> None:
    found = draws(slots=2).normal(Purpose.EPS, shape)
    assert found.shape == (2, *shape)
    assert found.dtype == torch.float32


# --- fingerprints ------------------------------------------------------------------------------------------


def identities(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.arange(n) * 7 + 2**33, torch.arange(n) % 2, torch.arange(n) % 3 == 0


def test_a_fingerprint_changes_with_every_argument() -> None:
    d, (ids, views, drops) = draws(), identities(8)
    base = d.fingerprint(ids, views, drops)
    assert base.dtype == torch.int64
    assert bool((base >= 0).all())
    changed = {
        "seed": draws(seed=4).fingerprint(ids, views, drops),
        "high seed": draws(seed=3 + 2**32).fingerprint(ids, views, drops),
        "step": draws(step=6).fingerprint(ids, views, drops),
        "high step": draws(step=5 + 2**32).fingerprint(ids, views, drops),
        "slot": draws(slots=list(range(8, 16))).fingerprint(ids, views, drops),
        "id": d.fingerprint(ids + 1, views, drops),
        "high id": d.fingerprint(ids + 2**32, views, drops),
        "view": d.fingerprint(ids, 1 - views, drops),
        "drop": d.fingerprint(ids, views, ~drops),
    }
    for name, other in changed.items():
        assert bool((other != base).all()), name
    everything = torch.cat([base, *changed.values()]).tolist()
    assert len(set(everything)) == len(everything)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_their_sum_does_not_depend_on_how_slots_are_shared_out(sizes: list[int], random: object) -> None:
    n = sum(sizes)
    slots = list(range(n))
    random.shuffle(slots)  # type: ignore[attr-defined]
    ids, views, drops = identities(n)
    whole = int(draws(slots=n).fingerprint(ids, views, drops).sum()) % 2**63
    total, start = 0, 0
    for size in sizes:
        part = torch.tensor(slots[start : start + size])
        d = Draws(3, 5, part, 64)
        total += int(d.fingerprint(ids[part], views[part], drops[part]).sum()) % 2**63
        start += size
    assert total % 2**63 == whole


# --- permutations ------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(0, 2**63), st.integers(0, 2**40), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_a_permutation_is_one(n: int, seed: int, step: int, lane: int) -> None:
    found = permutation(seed, Purpose.BLOCKS, step, n, lane)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(n))


def test_permutations_are_pinned_and_differ_by_every_key() -> None:
    assert permutation(0, Purpose.BLOCKS, 0, 10).tolist() == PINNED_PERMUTATION
    assert permutation(7, Purpose.SAMPLES, 3, 10, lane=2).tolist() == PINNED_PERMUTATION_2
    keys = [
        (0, Purpose.BLOCKS, 0, 0),
        (1, Purpose.BLOCKS, 0, 0),
        (0, Purpose.SAMPLES, 0, 0),
        (0, Purpose.BLOCKS, 1, 0),
        (0, Purpose.BLOCKS, 0, 1),
    ]
    found = [tuple(permutation(s, p, k, 30, lane).tolist()) for s, p, k, lane in keys]
    assert len(set(found)) == len(keys)


def test_every_place_is_equally_likely() -> None:
    landed = np.stack([permutation(s, Purpose.BLOCKS, 0, 6) for s in range(3000)])
    for place in range(6):
        assert stats.chisquare(np.bincount(landed[:, place], minlength=6)).pvalue > 1e-4
    rises = np.mean([sum(a < b for a, b in pairwise(row)) for row in landed.tolist()])
    assert abs(rises - 2.5) < 0.1


@pytest.mark.gpu
def test_a_gpu_draws_the_same_integers_and_nearly_the_same_normals() -> None:
    here = draws(slots=64)
    there = Draws(here.seed, here.step, here.slots.cuda(), here.batch)
    assert torch.equal(there.bits(Purpose.EPS, 9).cpu(), here.bits(Purpose.EPS, 9))
    assert torch.equal(there.uniform(Purpose.TIME).cpu(), here.uniform(Purpose.TIME))
    torch.testing.assert_close(
        there.normal(Purpose.EPS, (64,)).cpu(), here.normal(Purpose.EPS, (64,)), rtol=0, atol=2e-6
    )


# --- compiled ----------------------------------------------------------------------------------------------

STEPS = (0, 1, 5, 2**31, 2**40 + 3)


def all_kinds(d: Draws) -> list[Tensor]:
    """Every kind of number, in sizes that fill no vector register."""
    normals = [d.normal(purpose, (3, 7)) for purpose in (Purpose.EPS, Purpose.POSTERIOR)]
    return [*normals, d.uniform(Purpose.TIME), d.integers(Purpose.VIEW, 3), d.bits(Purpose.STRATA, 2)]


def same_compiled(device: str) -> None:
    for step in STEPS:
        plain = Draws(9, step, torch.tensor([0, 1, 4, 77, 2**33], device=device), 5)
        compiled = Draws(9, step, plain.slots, 5, keyed(9, step).to(device))
        for found, expected in zip(all_kinds(compiled), all_kinds(plain), strict=True):
            assert torch.equal(found, expected)


def test_one_graph_of_each_size_serves_all_steps_and_purposes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    counter, made = CompileCounterWithBackend("eager"), {}

    def compiled(function: Any) -> Any:
        made[function] = made.get(function) or compile_for_one_size(function, backend=counter, fullgraph=True)
        return made[function]

    monkeypatch.setattr(rng, "_compiled", compiled)
    same_compiled("cpu")
    assert counter.frame_count == 2  # of both normals, and of all that takes one group of four words


@pytest.mark.slow
def test_compiled_draws_are_the_same_to_the_bit() -> None:
    torch.compiler.reset()
    same_compiled("cpu")


@pytest.mark.gpu
def test_compiled_draws_of_a_gpu_are_the_same_to_the_bit() -> None:
    torch.compiler.reset()
    same_compiled("cuda")


def test_the_same_draws_of_other_slots_keep_the_table() -> None:
    d = Draws(1, 2, torch.arange(4), 4, keyed(1, 2))
    assert d.select(slice(2)).table is d.table
    assert torch.equal(d.select(slice(1, 3)).slots, torch.tensor([1, 2]))


# recorded when the first run was made
PINNED_BITS = [[1132215894, 515685959, 2666139298], [3646486603, 1624032096, 1692067386]]
PINNED_INTEGERS = [706, 389]
PINNED_UNIFORM = [0.3829103112220764, 0.473361074924469]
PINNED_NORMAL = [
    [0.0238678939640522, -0.5677950978279114, 1.431708574295044, -1.6149742603302002, -0.43098676204681396],
    [
        -0.13608747720718384,
        1.3921750783920288,
        -0.16855482757091522,
        -0.07165910303592682,
        -1.3269591331481934,
    ],
]
PINNED_FINGERPRINTS = [3711847444239007485, 7819321968954942042]
PINNED_PERMUTATION = [7, 1, 5, 9, 3, 0, 4, 6, 2, 8]
PINNED_PERMUTATION_2 = [1, 4, 6, 2, 5, 7, 9, 3, 0, 8]

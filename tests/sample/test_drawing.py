"""Drawing on several ranks: what one of them cannot draw ends all of them, with its words."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.flow.path import Linear
from dit.flow.predict import Cond, Velocity
from dit.ranks import group
from dit.sample.drawing import draw
from dit.sample.finite import NotFiniteError
from dit.sample.generate import Sampler, SamplerSpec, labels_for
from dit.sample.pictures import Pictures
from dit.unfinished import Blocks, unfinished
from tests.rank_processes import RanksFailed, Server

COUNT, BATCH = 4, 2


def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """A network that knows class 0, and overflows for class 1."""
    known = (cond["label"] != 1).float().view(-1, 1, 1, 1)
    return x / known


def drawn(out: Path, second: int) -> None:
    """Draw two images of class 0 on rank 0, and two of class `second` on rank 1."""
    spec = SamplerSpec(num_steps=1)
    sampler = Sampler(network, Linear(), Velocity(), lambda x: x, (3, 4, 4), spec, torch.device("cpu"))
    labels = partial(labels_for, classes=[0, 0, second, second])
    with unfinished(out, {}, {}, (COUNT, BATCH)) as blocks:
        draw(sampler, labels, [Pictures(out, blocks, sampler)], group.World.from_env())


def test_an_image_that_one_rank_cannot_draw_ends_all_with_its_name(ranks: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, drawn, out, 1)
    errors = failed.value.errors
    assert errors[1][0] == NotFiniteError.__name__
    assert errors[0][0] == group.PeerError.__name__
    assert errors[0][1].endswith(errors[1][1]), "whoever reads rank 0 alone knows which image it is"
    assert "image 2" in errors[1][1]
    kept = Blocks(tmp_path / "out.partial", COUNT, BATCH)
    assert [kept.path(number).exists() for number in range(2)] == [True, False]
    assert ranks.run(2, drawn, out, 0) == [None, None]


class Overflowing(Sampler):
    """Its codec cannot decode image 3, and says so while the next block is drawn."""

    def pictures(
        self, latents: Tensor, index: Tensor, label: Tensor, wanted: int | None = None
    ) -> np.ndarray:
        assert threading.current_thread() is not threading.main_thread()
        return super().pictures(
            torch.where(index.view(-1, 1, 1, 1) == 3, torch.nan, latents), index, label, wanted
        )


def test_what_cannot_be_decoded_ends_the_drawing_and_blocks_before_it_are_kept(
    tmp_path: Path, capsys
) -> None:
    sampler = Overflowing(
        network, Linear(), Velocity(), lambda x: x, (3, 4, 4), SamplerSpec(num_steps=1), torch.device("cpu")
    )
    out, world = tmp_path / "out", group.World.from_env()
    with (
        pytest.raises(NotFiniteError, match=r"image 3 .*its pixels"),
        unfinished(out, {}, {}, (8, 2)) as blocks,
    ):
        draw(sampler, partial(labels_for, classes=[0]), [Pictures(out, blocks, sampler)], world)
    assert Blocks(tmp_path / "out.partial", 8, 2).there() == {0}
    assert sampler.tally.images <= 6, "at most the block after it was drawn in vain"
    assert "sampling: 2/8 image" in capsys.readouterr().err


def progress(out: Path) -> str:
    """What rank 0 says while both draw."""
    sampler = Sampler(
        network, Linear(), Velocity(), lambda x: x, (3, 4, 4), SamplerSpec(num_steps=1), torch.device("cpu")
    )
    said = io.StringIO()
    with contextlib.redirect_stderr(said), unfinished(out, {}, {}, (7, 2)) as blocks:
        draw(
            sampler,
            partial(labels_for, classes=[0]),
            [Pictures(out, blocks, sampler)],
            group.World.from_env(),
        )
    return said.getvalue()


def test_progress_is_of_all_ranks(ranks: Server, tmp_path: Path) -> None:
    first, second = ranks.run(2, progress, tmp_path / "out")
    assert "sampling: 7/7 image (100%)" in first
    assert not second


def far(out: Path) -> list[str]:
    """What a rank warns of where the latents of the other one alone reach far, and then those of both."""
    told = []
    for second in (5, 0):
        network = Far(second)
        sampler = Sampler(
            network,
            Linear(),
            Velocity(),
            lambda x: x,
            (3, 4, 4),
            SamplerSpec(num_steps=1),
            torch.device("cpu"),
        )
        labels = partial(labels_for, classes=[0, 0, 5, 5])
        with (
            warnings.catch_warnings(record=True) as caught,
            unfinished(out / str(second), {}, {}, (4, 2)) as blocks,
        ):
            warnings.simplefilter("always")
            draw(sampler, labels, [Pictures(out / str(second), blocks, sampler)], group.World.from_env())
        told.append(sum("latents reach" in str(one.message) for one in caught))
    return told


class Far:
    """A network whose images of classes from `least` on lie far out."""

    def __init__(self, least: int):
        self.least = least

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return x - 1000.0 * (cond["label"] >= self.least).float().view(-1, 1, 1, 1)


def test_latents_that_reach_far_are_said_once_for_all_ranks(ranks: Server, tmp_path: Path) -> None:
    assert ranks.run(2, far, tmp_path) == [[1, 1], [0, 0]]

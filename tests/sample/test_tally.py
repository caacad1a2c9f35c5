"""Counting evaluations: samples, not calls, whatever the batches and the ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit.flow.predict import Cond, Endpoints
from dit.sample.denoise import DenoiseFn
from dit.sample.guide import LogitsFn
from dit.sample.tally import CountedOpener, Tally


def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
    return Endpoints(x + 1, x - 1)


class Opener:
    def denoiser(self, checkpoint: str) -> DenoiseFn:
        assert checkpoint == "weak"
        return denoise

    def classifier(self, checkpoint: str) -> LogitsFn:
        assert checkpoint == "classes"
        return lambda x, t: x.flatten(1)


def test_what_is_counted_is_passed_on() -> None:
    tally, x, t = Tally(), torch.ones(3, 2), torch.ones(3)
    opener = CountedOpener(Opener(), tally)
    for counted in (tally.of_calls(denoise), tally.of_evaluations(denoise), opener.denoiser("weak")):
        assert torch.equal(counted(x, t, {}).data, x + 1)
    assert torch.equal(opener.classifier("classes")(x, t), x)
    assert (tally.calls, tally.evaluations) == (3, 9)


def test_means_an_image_are_whole_where_they_can_be() -> None:
    assert Tally(images=4, calls=8, evaluations=14).per_image() == {"nfe": 2, "network_evaluations": 3.5}
    assert type(Tally(images=4, calls=8).per_image()["nfe"]) is int
    with pytest.raises(ValueError, match="nothing was drawn"):
        Tally().per_image()


def test_ranks_add_up() -> None:
    assert Tally.sum([Tally(1, 2, 3), Tally(10, 20, 30), Tally()]) == Tally(11, 22, 33)

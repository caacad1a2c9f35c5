"""Settings of a run: which are impossible, and how a batch is shared out."""

from __future__ import annotations

import pytest

from dit.config import ConfigError, from_dict
from dit.ranks.group import World
from dit.train.settings import RunConfig, TrainConfig


@pytest.mark.parametrize(
    ("batch", "micro", "size", "share", "found"),
    [
        (32, None, 1, 32, 32),
        (32, 8, 1, 32, 8),
        (32, 8, 2, 16, 8),
        (32, 64, 2, 16, 16),  # at most the share
        (32, 8, 32, 1, 1),
        (30, 5, 3, 10, 5),
    ],
)
def test_a_batch_is_shared_evenly(batch: int, micro: int | None, size: int, share: int, found: int) -> None:
    train = TrainConfig(global_batch=batch, micro_batch=micro)
    assert train.local_batch(World(0, size)) == share
    assert train.micro(World(0, size)) == found


def test_ranks_that_do_not_divide_it_are_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"= 12 cannot be shared by 5 ranks; .*\[1, 2, 3, 4, 6, 12\] ranks"):
        TrainConfig(global_batch=12).micro(World(0, 5))


def test_a_micro_batch_that_does_not_divide_the_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.micro_batch = 5 does not divide a rank's share of 16"):
        TrainConfig(global_batch=32, micro_batch=5).micro(World(0, 2))


@pytest.mark.parametrize(
    "bad",
    [
        {"train": {"steps": 0}},
        {"train": {"global_batch": 0}},
        {"train": {"micro_batch": 0}},
        {"train": {"micro_batch": -1}},
        {"train": {"log_every": 0}},
        {"train": {"max_skipped": 0}},
        {"train": {"threads": 0}},
        {"train": {"hang_timeout": 0}},
        {"train": {"hang_timeout": "inf"}},
        {"train": {"hang_timeout": "nan"}},
        {"train": {"precision": "fp16"}},
        {"checkpoint": {"every": 0}},
        {"checkpoint": {"keep": -1}},
        {"checkpoint": {"keep_every": -1}},
        {"checkpoint": {"every": 10, "keep_every": 15}},
        {"checkpoint": {"at": [0]}},
        {"checkpoint": {"at": [1001]}},  # beyond train.steps
        {"optim": {"warmup": 801, "schedule": "wsd"}},  # its decay begins after 800 of 1000 updates
        {"data": {"lanes": 0}},
        {"data": {"window": 0}},
        {"data": {"prefetch": 0}},
        {"val": {"every": -1}},
        {"val": {"batches": 0}},
        {"val": {"every": 5}},  # without data.val
        {"zero": {"stage": 4}},
        {"zero": {"stage": True}},
        {"engine": "horovod"},
        {"train": {"graphs": True}},  # on DeepSpeed
        {"engine": "plain", "zero": {"stage": 1}},
        {"engine": "plain", "zero": {"stage": 3, "hpz": 2}},
        {"engine": "plain", "zero": {"offload": "optimizer"}},
        {"engine": "plain", "zero": {"communication": "bf16"}},
    ],
)
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        from_dict(RunConfig, {"data": {"path": "x", **bad.pop("data", {})}, **bad})


def test_the_plain_engine_says_what_it_does_not_do() -> None:
    def made(**sections: object) -> RunConfig:
        return from_dict(RunConfig, {"data": {"path": "x"}, "engine": "plain", **sections})

    with pytest.raises(ConfigError, match=r"zero.stage = 2 is DeepSpeed's: engine: plain shards nothing"):
        made(zero={"stage": 2})
    with pytest.raises(ConfigError, match=r"zero.communication = bf16 is DeepSpeed's"):
        made(zero={"communication": "bf16"})
    with pytest.raises(ConfigError, match=r"zero.offload and zero.hpz are DeepSpeed's"):
        made(zero={"stage": 1, "offload": "optimizer"})
    for zero in ({}, {"stage": 0}, {"stage": "auto", "communication": "fp32"}):
        assert made(zero=zero).is_plain
    with pytest.raises(ConfigError, match=r"train.graphs needs engine: plain"):
        made(engine="deepspeed", train={"graphs": True})


def test_the_data_path_is_required() -> None:
    with pytest.raises(ConfigError, match="data: is required and was not given"):
        from_dict(RunConfig, {})
    with pytest.raises(ConfigError, match=r"data needs a path, or a mix"):
        from_dict(RunConfig, {"data": {}})

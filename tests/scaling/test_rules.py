"""Rules of batch and rate, against what their papers say in words."""

from __future__ import annotations

import pytest

from dit.config import ConfigError
from dit.scaling.rules import BATCHES, RATES


def test_a_power_rule_goes_through_its_point_with_its_exponent() -> None:
    batch = BATCHES.parse({"name": "power", "at": 64, "params": 1e6, "exponent": 2 / 3})
    rate = RATES.parse({"name": "power", "at": 4e-3, "params": 1e6, "exponent": -1 / 3})
    assert batch.value(1_000_000) == 64
    assert batch.value(8_000_000) == pytest.approx(
        4 * 64
    )  # 8 times the size: 4 times the batch, half the rate
    assert rate.value(8_000_000) == pytest.approx(2e-3)


@pytest.mark.parametrize("registry", [BATCHES, RATES])
def test_every_rule_gives_positive_numbers(registry: object) -> None:
    values = {"fixed": {"value": 32}, "power": {"at": 32, "params": 1e6, "exponent": 0.5}}
    values["mup"] = {"at": 1e-3, "base_width": 64}
    for name, _ in registry.items():  # type: ignore[attr-defined]
        rule = registry.parse({"name": name, **values[name]})  # type: ignore[attr-defined]
        assert all(rule.value(n) > 0 for n in (1_000, 10**9))


def test_maximal_updates_keep_the_rate_and_turn_the_parametrization_on() -> None:
    rule = RATES.parse({"name": "mup", "at": 1e-3, "base_width": 64})
    assert rule.value(1_000) == rule.value(10**9) == 1e-3
    assert rule.overrides() == {"model.parametrization": {"name": "mup", "base_width": 64}}
    with pytest.raises(ConfigError, match="unknown rule of batch 'mup'"):
        BATCHES.parse({"name": "mup", "at": 1e-3, "base_width": 64})


def test_a_number_beyond_all_numbers_is_named() -> None:
    rule = BATCHES.parse({"name": "power", "at": 32, "params": 1e-5, "exponent": 500})
    with pytest.raises(ConfigError, match="beyond all numbers at N = 1000000: an exponent is usually"):
        rule.value(1_000_000)


@pytest.mark.parametrize(
    "values", [{"name": "fixed", "value": 0}, {"name": "power", "at": -1, "params": 1, "exponent": 1}]
)
def test_no_rule_gives_nothing_or_less(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected more than 0"):
        RATES.parse(values)

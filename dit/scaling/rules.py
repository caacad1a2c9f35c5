"""How batch and learning rate follow the size: rules of the number of parameters, N, without embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from dit.config import ConfigError, Registry, config

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Rule(ABC):
    """Gives a number for each size."""

    @abstractmethod
    def value(self, params: int) -> float:
        """Give the number at N = `params` parameters without embeddings."""

    def overrides(self) -> Mapping[str, Any]:
        """Give the configuration keys of a run that go with the rule, by their dotted names."""
        return {}


BATCHES: Registry[Rule] = Registry("rule of batch")
RATES: Registry[Rule] = Registry("rule of rate")


@BATCHES.register("fixed")
@RATES.register("fixed")
@config
class FixedRule(Rule):
    """The same at every size."""

    value_: Positive  # the same number at every size

    def value(self, params: int) -> float:
        """Give the number."""
        return self.value_


@BATCHES.register("power")
@RATES.register("power")
@config
class PowerRule(Rule):
    """at · (N / params)^exponent; OLMo's ladder (arXiv 2412.04403) has 2/3 for the batch and -1/3 for the rate."""

    at: Positive  # the number at `params` parameters
    params: Positive  # parameters without embeddings at which it is `at`
    exponent: Annotated[
        float, Field(allow_inf_nan=False)
    ]  # of N: 0.6667 for batches, -0.3333 for learning rates

    def value(self, params: int) -> float:
        """Give the number at N. ConfigError where that is none."""
        try:
            return float(self.at * (params / self.params) ** self.exponent)
        except OverflowError:
            raise ConfigError(
                f"a rule of {self.at:g} · (N / {self.params:g})^{self.exponent:g} is beyond all numbers at "
                f"N = {params}: an exponent is usually from -1 to 1"
            ) from None


@RATES.register("mup")
@config
class MaximalUpdates(Rule):
    """One rate at every width, with the network parametrised by maximal updates (arXiv 2203.03466, 2505.15270)."""

    at: Positive  # the rate, best at `base_width`
    base_width: Annotated[int, Field(ge=4)]  # width at which it was found: model.parametrization.base_width

    def value(self, params: int) -> float:
        """Give the rate."""
        return self.at

    def overrides(self) -> Mapping[str, Any]:
        """Turn the parametrization on."""
        return {"model.parametrization": {"name": "mup", "base_width": self.base_width}}

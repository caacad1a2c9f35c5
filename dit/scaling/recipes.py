"""How a spec would train a model of any size: its batch and its learning rate."""

from __future__ import annotations

import dataclasses

from dit.config import ConfigError
from dit.scaling.laws.predicting import Prediction, Recipe
from dit.scaling.spec import ScalingSpec, shared_config

MOST = 2.0**53  # samples of a step or a run: beyond, numbers are not whole any more


def batch_at(spec: ScalingSpec, params: float, unruled: int) -> int:
    """Samples a step at N = params. unruled: of the training config, for a spec without a rule."""
    if spec.batch is None:
        return unruled
    wanted = spec.batch.value(round(params))
    if wanted > MOST:
        raise ConfigError(f"batch: the rule gives {wanted:.3g} samples at N = {params:.4g}: mend its numbers")
    return max(1, round(wanted / spec.batch_multiple)) * spec.batch_multiple


def lr_at(spec: ScalingSpec, params: float, unruled: float) -> float:
    """The learning rate at N = params, to 4 digits: what is in a table is what is trained with. unruled: as above."""
    return unruled if spec.lr is None else float(f"{spec.lr.value(round(params)):.4g}")


def with_recipe(prediction: Prediction, spec: ScalingSpec) -> Prediction:
    """The prediction with batch and learning rate by the spec's rules."""
    base = shared_config(spec)
    batch = batch_at(spec, prediction.params, base.train.global_batch)
    rate = lr_at(spec, prediction.params, base.optim.lr)
    return dataclasses.replace(prediction, recipe=Recipe(batch, rate))

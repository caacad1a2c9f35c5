"""What an ablation is: one YAML file of named changes over a training config, checked before anything is planned.

A change is keys laid over the config, or a list of other changes that are made together:

    changes:
      plain: {}
      rms: {model: {block: {norm: rms}}}
      swiglu: {model: {block: {mlp: swiglu}}}
      all: [rms, swiglu]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dit.config import ConfigError, config, did_you_mean, flatten, to_dict
from dit.configfile import load, merge_as
from dit.errors import shown
from dit.experiments.diffusion import Experiment
from dit.scaling.rules import Positive
from dit.scaling.spec import RunsSpec, read_spec
from dit.scaling.study import as_run

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*")
# Keys that no change may set, and where they are said instead: of all changes alike, or the ablation's own to choose.
SHARED: Mapping[str, str] = {
    "run_dir": "the ablation names each run's",
    "seed": "say it in `seeds`",
    "train.steps": "they follow from `budgets`",
    "optim.lr": "say rates in `lrs`: each change has the same grid",
    "data": "say it in `training`: figures of unlike data are not compared",
    "latents": "say it in `training`: figures of unlike data are not compared",
    "codec": "say it in `training`: figures of unlike data are not compared",
    "val": "say it in `training`: all are measured alike",
    "evaluate": "say it in `training`: all are measured alike",
}
LIKE = (
    "changes",
    "the spec of an ablation, which names one as `training: {{base: {}}}` and has `changes` and `budgets` "
    "(docs/recipes.md, configs/ablations)",
)


@config
class AblationSpec(RunsSpec):
    """Named changes of one training config, each trained to the same FLOPs with a learning rate of its own."""

    # name: {keys over the training config}, or a list of names of other changes that are made together
    changes: dict[str, dict[str, Any] | tuple[str, ...]]
    baselines: tuple[str, ...]  # names of changes that all others are compared with, such as one without keys
    budgets: tuple[Positive, ...]  # training FLOPs of a run, auxiliary forward passes included
    lrs: tuple[Positive, ...]  # peak learning rates; each change gets the best of them on tune_seed
    tune_seed: Annotated[int, Field(ge=0)] = 0  # on which rates are chosen, by the change's own held-out loss
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (1, 2, 3)  # that are reported; none is tune_seed

    def __post_init__(self) -> None:
        for name in ("changes", "baselines", "budgets", "lrs", "seeds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be there, each once, got {values}")
        if self.is_tuned and self.tune_seed in self.seeds:
            raise ConfigError(
                f"tune_seed = {self.tune_seed} is in `seeds`: the seed on which a rate was the best flatters it; "
                "leave it out of `seeds`"
            )
        for name in self.changes:
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"changes: {shown(name)} is no name of a run: letters, digits, _ . + are ('all_but_rope')"
                )
        for name in self.baselines:
            self._need(name, "baselines")
        if len(self.changes) < 2:
            raise ConfigError("changes: a baseline and one other at least, got " + ", ".join(self.changes))
        for name in self.changes:
            self.keys_of(name)

    @property
    def is_tuned(self) -> bool:
        """Whether there is a rate to choose."""
        return len(self.lrs) > 1

    def _need(self, name: str, where: str) -> None:
        if name not in self.changes:
            raise ConfigError(
                f"{where}: there is no change {shown(name)}{did_you_mean(name, self.changes)}; changes are "
                f"{', '.join(self.changes)}"
            )

    def keys_of(self, name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
        """Give the keys of a change, those of the changes that it is made of laid over each other in turn.

        ConfigError for changes that lead back to themselves, of which one undoes another, or with keys in SHARED.
        """
        if name in above:
            raise ConfigError(f"changes: {' → '.join([*above, name])} leads back to itself")
        change = self.changes[name]
        if isinstance(change, Mapping):
            _refuse_shared(name, change)
            return dict(change)
        if not change:
            raise ConfigError(f"changes.{name}: an empty list; a change without keys is written {{}}")
        for other in change:
            self._need(other, f"changes.{name}")
        parts = {other: self.keys_of(other, (*above, name)) for other in change}
        merged: dict[str, Any] = {}
        for part in parts.values():
            merged = merge_as(Experiment, merged, part)
        _refuse_undone(name, parts, merged)
        return merged

    def config(self, name: str) -> Experiment:
        """Give the training config of a change. ConfigError where it is none."""
        return load(Experiment, self.training, self.keys_of(name), said=f"changes.{name}")


def _refuse_shared(name: str, change: Mapping[str, Any]) -> None:
    for key in flatten(change):
        for shared, why in SHARED.items():
            if f"{key}.".startswith(f"{shared}."):
                raise ConfigError(f"changes.{name} sets {key}, which no change does: {why}")


def _refuse_undone(name: str, parts: Mapping[str, Mapping[str, Any]], merged: Mapping[str, Any]) -> None:
    """Refuse parts of which one undoes what another sets: the change would be called what it is not."""
    there = flatten(merged)
    for part, keys in parts.items():
        for key, value in flatten(keys).items():
            if value not in (there.get(key), there.get(f"{key}.name")) and value != {}:
                raise ConfigError(
                    f"changes.{name}: what {part} sets as {key} = {shown(value)} is undone by another of "
                    f"{', '.join(parts)}: write one change that has both"
                )


def load_ablation(path: str | Path, out: str | None = None) -> AblationSpec:
    """Read and check a spec's YAML file, and the config of every change. Takes as `read_spec`.

    ConfigError for whatever is wrong: changes that come to the same config, and no held-out data among it.
    """
    spec = read_spec(AblationSpec, path, out, LIKE)
    seen: dict[str, str] = {}
    for name in spec.changes:
        cfg = spec.config(name)
        if cfg.data.val is None:
            raise ConfigError(
                "training.data.val is not set: rates are chosen by the held-out loss; name a folder of held-out shards"
            )
        as_run(cfg, spec.folder, name, seed=0, lr=spec.lrs[0], figures=cfg.evaluate.reference is not None)
        same = seen.setdefault(repr(to_dict(cfg)), name)
        if same != name:
            raise ConfigError(
                f"changes: {name} and {same} come to the same config: leave one out, or mend its keys"
            )
    return spec

"""What a scaling experiment is: one YAML file, checked before anything is planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from dit.config import ConfigError, config
from dit.configfile import load, read_yaml
from dit.errors import shown
from dit.experiments.diffusion import Experiment
from dit.files import expand
from dit.model.cost import PEAK_FLOPS, peak_flops
from dit.scaling.ladder import LADDERS, Ladder, Whole, rungs
from dit.scaling.rules import BATCHES, RATES, Positive, Rule


@config
class MoreSeeds:
    """Seeds beyond those of the whole experiment, at some of its points."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...]  # of weights, order and draws
    sizes: tuple[str, ...] = ()  # names of sizes, such as w64d4; none = all
    budgets: tuple[Positive, ...] = ()  # of `budgets` or `samples_per_param`; none = all

    def are_at(self, size: str, budget: float) -> bool:
        """Whether these seeds are run at a size and a budget."""
        return (not self.sizes or size in self.sizes) and (not self.budgets or budget in self.budgets)


@config
class DeviceConfig:
    """What the runs are planned for: hours and memory in the plan rest on it, and nothing of a run."""

    name: str = (
        "H100"  # as torch calls it; an entry of PEAK_FLOPS in dit/model/cost.py where `flops` is not set
    )
    flops: Positive | None = (
        None  # FLOP/s that training reaches on one, measured; null = mfu x the peak of `name`
    )
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4  # share of the peak that training reaches
    memory: Positive | None = None  # GiB that a run may take of one; null = not looked at

    def __post_init__(self) -> None:
        if self.flops is None and peak_flops(self.name) is None:
            raise ConfigError(
                f"device.name: the peak of {shown(self.name)} is not known; set device.flops to the FLOP/s that "
                f"training reaches on it (tools/train.py --dry_run measures), or name one of {', '.join(PEAK_FLOPS)}"
            )

    @property
    def speed(self) -> float:
        """FLOP/s that training is taken to reach on one device."""
        return self.flops if self.flops is not None else self.mfu * (peak_flops(self.name) or 0.0)

    def __str__(self) -> str:
        how = "measured" if self.flops is not None else f"{self.mfu:.0%} of the peak"
        return f"{self.name} at {self.speed:.3g} FLOP/s ({how})"


@config
class DataShape:
    """What the data are, for a plan that is made before they are there."""

    input_size: Whole  # latent pixels a side
    channels: Whole  # of the latents
    classes: Annotated[int, Field(ge=0)] = 0  # of labels; 0 = no labels
    samples: Whole  # in an epoch


@config
class RunsSpec:
    """What every spec of many runs has."""

    out: str  # folder of the experiment: its plan, runs, logs and table
    training: dict[str, Any]  # what all runs share: a training config, `base: FILE` and keys over it

    @property
    def folder(self) -> Path:
        """The experiment's folder, ~ and variables filled in."""
        return Path(expand(self.out))


S = TypeVar("S", bound=RunsSpec)


@config
class ScalingSpec(RunsSpec):
    """A ladder of sizes, each trained to several budgets, with what all runs share."""

    ladder: Annotated[Ladder, LADDERS]  # the sizes of the network that are trained
    budgets: tuple[Positive, ...] = ()  # training FLOPs of a run, each at every size: isoFLOP
    samples_per_param: tuple[Positive, ...] = ()  # or samples over N at every size
    batch: Annotated[Rule, BATCHES] | None = None  # train.global_batch by size; null = as `training` says
    batch_multiple: Whole = 8  # batches of a rule are rounded to a multiple of it
    lr: Annotated[Rule, RATES] | None = None  # optim.lr by size; null = as `training` says
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)  # at every point
    more_seeds: tuple[MoreSeeds, ...] = ()  # at some points: [{seeds: [1], sizes: [w64d4], budgets: [1e12]}]
    # share of the steps, at the end, in which the rate decays (wsd); null = as `training` says
    decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    branching: bool = (
        True  # one stable run of each size and seed, from which shorter ones branch off to decay
    )
    window: tuple[float, float] | None = None  # samples over N that are run, from and to; null = all
    min_steps: Whole = 100  # a run of fewer is left out
    # passes over the data; a run of more is left out; null = no limit
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    ranks: Whole = 1  # processes of each run, one a GPU
    device: DeviceConfig = DeviceConfig()
    data: DataShape | None = None  # null = as training.data says, which has to be there

    def __post_init__(self) -> None:
        if bool(self.budgets) == bool(self.samples_per_param):
            raise ConfigError("give `budgets` (FLOPs) or `samples_per_param`, one of the two")
        if self.branching and self.decay is None:
            raise ConfigError(
                "branching needs `decay`, the share of steps in which a branch decays: 0.2 is usual"
            )
        if self.window is not None and not 0 <= self.window[0] < self.window[1]:
            raise ConfigError(f"window: expected [LOW, HIGH] with 0 <= LOW < HIGH, got {list(self.window)}")
        for name in ("budgets", "samples_per_param", "seeds"):
            values = getattr(self, name)
            if twice := [value for value in values if values.count(value) > 1]:
                raise ConfigError(f"{name} has {twice[0]:g} twice")
        names = [f"{point:.6g}" for point in self.points]
        if alike := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                f"two points are {alike[0]} to six digits, by which runs are named: leave one out"
            )
        if not self.seeds:
            raise ConfigError("seeds: give one or more, such as [0]")
        self._check_more_seeds()

    def _check_more_seeds(self) -> None:
        """Refuse points that the experiment does not have, and seeds that it has there anyhow."""
        names, points = [rung.name for rung in rungs(self.ladder)], self.points
        for more in self.more_seeds:
            for what, given, there in (("sizes", more.sizes, names), ("budgets", more.budgets, points)):
                other: list[Any] = [value for value in given if value not in there]
                if other:
                    listed = ", ".join(value if isinstance(value, str) else f"{value:g}" for value in there)
                    raise ConfigError(f"more_seeds.{what}: {other[0]} is not among them: {listed}")
            if again := set(more.seeds) & set(self.seeds):
                raise ConfigError(
                    f"more_seeds: seed {min(again)} is in `seeds`, and so at every point already"
                )

    @property
    def points(self) -> tuple[float, ...]:
        """Budgets or samples over N, whichever are given."""
        return self.budgets or self.samples_per_param

    def seeds_at(self, size: str, budget: float) -> list[int]:
        """Give the seeds of a point, each once."""
        more = [seed for m in self.more_seeds if m.are_at(size, budget) for seed in m.seeds]
        return list(dict.fromkeys([*self.seeds, *more]))


# What tells a spec of some kind from a training config: its own key, and what is said of it.
LIKE = (
    "ladder",
    "the spec of a scaling experiment, which names one as `training: {{base: {}}}` and has a `ladder` and `budgets` "
    "(docs/scaling.md, configs/scaling)",
)


def _refuse_training_config(cls: type, file: Path, like: tuple[str, str]) -> None:
    """Say once what each of its keys would: that a training config was given in place of a spec."""
    there = set(read_yaml(file)[0])
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (Experiment, cls)}
    if there & (names[Experiment] - names[cls]) and not there & {"training", like[0]}:
        raise ConfigError(f"{file} is a training config; expected {like[1].format(file.name)}")


def read_spec(cls: type[S], path: str | Path, out: str | None, like: tuple[str, str]) -> S:
    """Read a spec's YAML file; training.base is relative to it, as every base is.

    out: in place of the file's. like: a key that only such specs have, and what was expected of a training config.
    ConfigError for whatever is wrong, naming the key and its file.
    """
    file = Path(expand(str(path)))
    _refuse_training_config(cls, file, like)
    spec = load(cls, file, {} if out is None else {"out": out})
    training = dict(spec.training)
    base = training.get("base")
    if isinstance(base, str) and not Path(expand(base)).is_absolute():
        training["base"] = str(file.parent / expand(base))
    return dataclasses.replace(spec, training=training)


def load_spec(path: str | Path, out: str | None = None) -> ScalingSpec:
    """Read and check a spec's YAML file, and the training config that it names; raises and takes as `read_spec`."""
    spec = read_spec(ScalingSpec, path, out, LIKE)
    shared_config(spec)
    return spec


def shared_config(spec: ScalingSpec, overrides: dict[str, Any] | None = None) -> Experiment:
    """The training config that all runs share, with a run's own keys over it. ConfigError where it is wrong."""
    return load(Experiment, spec.training, overrides, said="the plan of the scaling experiment")

"""Moving averages of the weights, sharded as the engine shards them, in fp32."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.config import ConfigError, config, from_dict
from dit.errors import Notice
from dit.train.engines.base import Engine
from dit.train.engines.one_pass import OnePassAdamW
from dit.train.posthoc import WIDEST, power_of, power_share

MAIN = "ema"  # the average that is sampled from while training and unless another is asked for
LIVE = "model"  # the weights themselves
MUCH = 0.01  # share of the first weights in an average above which it is warned of


@config
class EmaConfig:
    """Averaging follows updates: a skipped update leaves every average as it is."""

    decay: float = 0.9999  # of the average, per update, from 0 to less than 1
    # At update n the decays are (1 + n) / (10 + n) at most, so that the weights of the beginning are soon forgotten.
    warmup: bool | None = None  # null = true in a new run, and as it was in one that goes on (false of old)
    # updates from one averaging to the next, which has the decay of them all: decay^every; at least 1
    every: int = 1
    also: tuple[float, ...] = ()  # more decays: each is an average more, "ema_0.999" for 0.999
    power: tuple[float, ...] = ()  # widths (sigma_rel) of power-function averages; EDM2 takes 0.05, 0.1
    snapshot_every: int = 0  # steps; keep the power-function averages in RUN/snapshots for good; 0 = never

    def __post_init__(self) -> None:
        for decay in (self.decay, *self.also):
            if not 0 <= decay < 1:
                raise ConfigError(f"ema.decay and ema.also must be in [0, 1), got {decay}")
        for width in self.power:
            if not 0 < width < WIDEST:
                raise ConfigError(f"ema.power: a width is above 0 and below {WIDEST:.3f}, got {width}")
        if self.decay in self.also:
            raise ConfigError(f"ema.also has {self.decay}, which is ema.decay: that average is there already")
        for name in ("also", "power"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ConfigError(f"ema.{name} has a value twice: {getattr(self, name)}")
        if self.every < 1:
            raise ConfigError(f"ema.every must be at least 1 (update), got {self.every}")
        if self.snapshot_every < 0:
            raise ConfigError(f"ema.snapshot_every must be at least 0, got {self.snapshot_every}")
        if self.snapshot_every and len(self.power) < 2:
            raise ConfigError(
                "ema.snapshot_every keeps power-function averages for post-hoc reconstruction, which needs at least "
                "two widths: set ema.power: [0.05, 0.1]"
            )

    @property
    def count(self) -> int:
        """Averages that are kept up, each 4 bytes a parameter."""
        return 1 + len(self.also) + len(self.power)

    @property
    def decays(self) -> dict[str, float]:
        """The decay of each average that has one, by its name."""
        return {MAIN: self.decay, **{f"ema_{decay}": decay for decay in self.also}}

    @property
    def powers(self) -> dict[str, float]:
        """The width of each power-function average, by its name."""
        return {f"power_{width}": width for width in self.power}

    def check_name(self, name: str) -> None:
        """ConfigError for a name that is neither LIVE nor one of the averages, before hours go by for it."""
        there = (LIVE, *self.decays, *self.powers)
        if name not in there:
            raise ConfigError(f"there are no weights '{name}'; this run has {', '.join(there)}")

    def averaged(self, updates: int) -> int:
        """Count the updates, of so many, up to the one whose weights went into the averages last."""
        return updates - updates % self.every

    def shares(self, updates: int) -> dict[str, float]:
        """The share of the newest weights that update number `updates`, at least 1, brings into each average.

        It is a multiple of `every`. The newest weights stand for those of all updates since the last averaging: of
        weights that do not change in between, the averages are those of every = 1.
        """
        shares = {name: self._share(decay, updates) for name, decay in self.decays.items()}
        return shares | {
            name: power_share(power_of(width), updates, self.every) for name, width in self.powers.items()
        }

    def _share(self, decay: float, updates: int) -> float:
        """1 - the product of the decays of the `every` updates up to this one."""

        def one(update: int) -> float:
            return max(1 - decay, 9 / (10 + update) if self.warmup else 0.0)  # 1 - (1 + n) / (10 + n)

        if self.every == 1:
            return one(updates)
        return 1 - math.prod(1 - one(updates - i) for i in range(self.every))

    def start_share(self, name: str, updates: int) -> float:
        """The share in [0, 1] of the weights before the first update that an average still holds after so many.

        The product of all decays. Warmed up to update m, from where on the decay itself is smaller, that is
        prod (1 + k) / (10 + k) = 10! / ((m + 2) ... (m + 10)), times decay^(n - m). Of a power-function average the
        first update replaces all. KeyError for a name that is no average of these.
        """
        updates = self.averaged(updates)
        if name in self.powers:
            return 0.0 if updates else 1.0
        decay, warm = self.decays[name], 0
        if self.warmup:  # while (1 + k) / (10 + k) < decay
            warm = min(updates, max(0, math.ceil((10 * decay - 1) / (1 - decay)) - 1))
        telescoped = math.lgamma(11) + math.lgamma(warm + 2) - math.lgamma(warm + 11)
        if not decay:
            return math.exp(telescoped) if updates == warm else 0.0
        return math.exp(telescoped + (updates - warm) * math.log(decay))


@dataclass(frozen=True)
class Average:
    """Which weights are used, and how much of the first ones is still in them.

    start_share: in [0, 1]; None where nothing is known of it, as of weights from elsewhere. how: what kind of average.
    """

    name: str
    start_share: float | None = None
    how: str = ""

    @classmethod
    def of(cls, cfg: EmaConfig, name: str, updates: int) -> Average:
        """One of a run's averages after so many updates; LIVE is the weights themselves."""
        every = f", every {cfg.every} updates" if cfg.every > 1 else ""
        if name in cfg.powers:
            return cls(name, cfg.start_share(name, updates), f"width {cfg.powers[name]:g}{every}")
        if name not in cfg.decays:
            return cls(name)
        how = f"decay {cfg.decays[name]:g}{', warmed up' if cfg.warmup else ''}{every}"
        return cls(name, cfg.start_share(name, updates), how)

    @classmethod
    def of_checkpoint(cls, meta: Mapping[str, Any], name: str) -> Average:
        """One of the sets of weights in a checkpoint, or in a file that was exported from one, from its meta data."""
        if not meta["updates"]:  # nothing was averaged here: converted from elsewhere
            return cls(name)
        if "width" in meta:
            return cls(name, 0.0, f"width {meta['width']:g}, made afterwards")
        return cls.of(ema_of(meta["config"]), name, meta["updates"])

    @property
    def row(self) -> dict[str, Any]:
        """What a line of figures says of the weights that they are of."""
        return {"weights": self.name, "start_share": self.start_share}

    def __str__(self) -> str:
        """As "ema (decay 0.998, warmed up; 0.1% of the first weights left)"."""
        if self.start_share is None:
            return f"{self.name} weights"
        return f"{self.name} ({self.how}; {percent(self.start_share)} of the first weights left)"

    @property
    def complaint(self) -> str | None:
        """What to warn of where it still holds more than MUCH of the first weights, or None."""
        if self.start_share is None or self.start_share <= MUCH:
            return None
        return (
            f"the average {self} is not of trained weights alone: it was not updated often enough for its decay. Take "
            "--weights=model, train longer, or train with ema.warmup: true or a smaller ema.decay"
        )

    def warn(self) -> None:
        """Give the complaint as a Notice, if there is one."""
        if self.complaint is not None:
            warnings.warn(self.complaint, Notice, stacklevel=2)


def ema_of(values: Mapping[str, Any]) -> EmaConfig:
    """The averages' configuration in a run configuration's plain values, whichever version wrote it."""
    return from_dict(EmaConfig, values.get("ema", {}))


def percent(share: float) -> str:
    """A share in few digits, and never 0% for what is not 0."""
    if share == 0:
        return "0%"
    if share < 1e-3:
        return "under 0.1%"
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"  # 99.5 in two digits is 1e+02


class Ema:
    """Averages over an engine's fragments: 4 bytes per parameter each, over the number of ranks that share it.

    averages: name -> a tensor beside each fragment.
    """

    def __init__(self, engine: Engine, cfg: EmaConfig):
        self.engine, self.cfg = engine, cfg
        self._live, self._has_warned = [f.weight for f in engine.fragments()], False
        names = (*cfg.decays, *cfg.powers)
        self.averages: dict[str, list[Tensor]]
        self._along: dict[
            Tensor, dict[str, Tensor]
        ] = {}  # those that the optimizer takes along, by its tensors
        self._planned: tuple[int, dict[str, float]] = (0, {})  # an update, and its shares
        self._rest = list(range(len(self._live)))  # of the fragments, those whose averages are updated here
        if isinstance(engine.optimizer, OnePassAdamW):
            self.averages = self._taken_along(names, engine.optimizer)
        else:
            self.averages = {n: [w.clone() for w in self._live] for n in names}

    @property
    def pieces(self) -> list[Tensor]:
        """Give the main average's tensors."""
        return self.averages[MAIN]

    @property
    def powers(self) -> dict[str, list[Tensor]]:
        """The power-function averages."""
        return {name: self.averages[name] for name in self.cfg.powers}

    @property
    def main(self) -> Average:
        """What the main average is now."""
        return Average.of(self.cfg, MAIN, self.engine.updates)

    def for_use(self) -> Average:
        """What the main average is now; the first time that it holds much of the start, rank 0 warns of it."""
        found = self.main
        if found.complaint is not None and not self._has_warned and self.engine.world.is_main:
            found.warn()
            self._has_warned = True
        return found

    @torch.no_grad()
    def update(self) -> None:
        """average <- average + share * (weights - average), where it is due. Call it after each applied update."""
        for name, share in self._due(self.engine.updates).items():
            pieces, live = ([some[i] for i in self._rest] for some in (self.averages[name], self._live))
            if pieces:
                torch._foreach_lerp_(pieces, live, share)

    def _due(self, updates: int) -> dict[str, float]:
        """The shares of an update; none where it is not one of those that are averaged.

        Nothing has to be kept of the others but how many there were.
        """
        return self.cfg.shares(updates) if updates == self.cfg.averaged(updates) else {}

    def _taken_along(self, names: tuple[str, ...], optimizer: OnePassAdamW) -> dict[str, list[Tensor]]:
        """Averages in tensors like the optimizer's, which updates them with the weights; of frozen ones as ever."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        places = [fragment.place for fragment in self.engine.fragments()]
        for place, live in zip(places, self._live, strict=True):
            if place is not None and place.flat not in self._along:
                self._along[place.flat] = {name: place.flat.detach().clone() for name in names}
            for name in names:
                whole = live.clone() if place is None else self._along[place.flat][name].view(-1)
                found[name].append(whole if place is None else whole.narrow(0, place.start, place.numel))
        self._rest = [i for i, place in enumerate(places) if place is None]
        optimizer.along = self._shares_of
        return found

    def _shares_of(self, tensor: Tensor) -> list[tuple[Tensor, float]]:
        """A tensor's averages, and the shares of the update that is being made."""
        updates = self.engine.updates + 1
        if self._planned[0] != updates:  # or of each tensor anew
            self._planned = updates, self._due(updates)
        due = self._planned[1]
        return [(average, due[name]) for name, average in self._along.get(tensor, {}).items() if name in due]

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the main average inside, and with the live weights, bit for bit, after."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for piece, live in zip(self.pieces, self._live, strict=True):
            held = live.clone()
            live.copy_(piece)
            piece.copy_(held)
        self.engine.sync_weights()

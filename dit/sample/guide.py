"""Guidance: maps of a `DenoiseFn` to a `DenoiseFn`; at neutral strength the very function that was given.

What comes out are still endpoints of x: each guidance changes data and eps together, so that
x = alpha·data + sigma·eps holds and every solver may follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, Registry, config
from dit.flow.path import Coeffs, NoisePath, broadcast
from dit.flow.predict import Cond, Endpoints
from dit.sample.denoise import DenoiseFn

LogitsFn = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, ...), t (B,)) → logits (B, classes), of the noisy x


class Opener(Protocol):
    """Opens other checkpoints for guidance. Raises an error for the user where one does not fit the model.

    opened: name as given -> {"checkpoint": what was found there, "step": its step}, JSON values.
    """

    @property
    def opened(self) -> dict[str, dict[str, Any]]:
        """What was opened so far."""

    def denoiser(self, checkpoint: str) -> DenoiseFn:
        """The denoiser of a run directory or checkpoint, of latents, classes and noise like the model's."""

    def classifier(self, checkpoint: str) -> LogitsFn:
        """The classifier of noisy latents in a run directory or checkpoint, differentiable in x."""


@dataclass(frozen=True)
class Context:
    """What a guidance may need besides the denoiser. path: the model's. open: None where nothing can be."""

    path: NoisePath
    open: Opener | None = None


class Guidance:
    """A change of the denoiser. Subclasses are frozen `@config` classes giving `is_neutral` and `guide`."""

    @property
    def is_neutral(self) -> bool:
        """Whether this strength, which has no default, changes nothing."""
        raise NotImplementedError

    @property
    def needs_label(self) -> bool:
        """Whether it has an effect on samples of a known class alone."""
        return False

    @property
    def jumps(self) -> bool:
        """Whether the guided denoiser jumps at some time, which solvers that choose their steps cannot follow."""
        return False

    def check(self, channels: int) -> None:
        """ConfigError for what cannot guide latents of so many channels."""

    def guide(self, denoise: DenoiseFn, context: Context | None) -> DenoiseFn:
        """The guided denoiser; never asked of a neutral one."""
        raise NotImplementedError

    def __call__(self, denoise: DenoiseFn, context: Context | None = None) -> DenoiseFn:
        """The guided denoiser: `denoise` itself at neutral strength. ValueError where a context lacks."""
        return denoise if self.is_neutral else self.guide(denoise, context)

    def _path(self, context: Context | None) -> NoisePath:
        if context is None:
            raise ValueError(f"{self} needs the path: give a Context")
        return context.path

    def _opener(self, context: Context | None) -> Opener:
        if context is None or context.open is None:
            raise ValueError(f"{self} needs another checkpoint: give a Context with an Opener")
        return context.open


GUIDANCES: Registry[Guidance] = Registry("guidance")


# --- two branches ------------------------------------------------------------------------------------------


def cfg(scale: float) -> ClassifierFree:
    """Classifier-free guidance of this scale; 1 is none."""
    return ClassifierFree(scale=scale)


@GUIDANCES.register("cfg")
@config
class ClassifierFree(Guidance):
    """null + scale·(conditional − null) (arXiv 2207.12598, eq. 6, scale = 1 + w).

    interval: guide for t in [lo, hi] alone; elsewhere the conditional branch is the only one evaluated, B rows
        in place of 2B (arXiv 2404.07724). Samples of one batch may have different t. Looking at t waits for the device.
    channels: guide the first so many alone, as DiT's forward_with_cfg does with 3 of 4; the rest are the
        conditional's.
    rescale: share in which the guided data get the standard deviation, over a sample, of the conditional's (phi
        of arXiv 2305.08891, section 3.4). There it is the network's v; data is the same at zero SNR, where it
        matters, whatever the network predicts.

    Both branches go through the network in one call, the conditional first. A learned variance is the conditional's.
    """

    scale: float  # null + scale * (conditional - null); 1 = no guidance
    interval: tuple[float, float] = (0.0, 1.0)  # of t, 0 = data: guidance only there
    channels: Annotated[int, Field(ge=1)] | None = None  # guide the first so many alone (DiT: 3); null = all
    rescale: Annotated[float, Field(ge=0, le=1)] = 0.0  # towards the conditional's contrast

    def __post_init__(self) -> None:
        lo, hi = self.interval
        if not 0 <= lo < hi <= 1:
            raise ConfigError(
                f"{GUIDANCES.name_of(self)}'s interval must be [lo, hi] with 0 <= lo < hi <= 1, got [{lo}, {hi}]"
            )

    @property
    def is_neutral(self) -> bool:
        return self.scale == 1.0

    @property
    def needs_label(self) -> bool:
        return not self.is_neutral

    @property
    def jumps(self) -> bool:
        return not self.is_neutral and self.interval != (0.0, 1.0)

    def check(self, channels: int) -> None:
        if self.channels is not None and self.channels > channels:
            raise ConfigError(
                f"{GUIDANCES.name_of(self)}'s channels = {self.channels}, but there are {channels}; "
                "leave it out to guide them all"
            )

    def guide(self, denoise: DenoiseFn, context: Context | None) -> DenoiseFn:
        """The guided denoiser; it refuses an empty `cond`. Of cfg, only `rescale` needs the context."""
        path = self._path(context) if self._needs_path else None

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            if not cond:
                raise ValueError(
                    f"guidance of scale {self.scale} needs a condition, cond is empty; use scale 1"
                )
            rows = self._rows(t)
            if not len(t[rows]):
                return denoise(x, t, cond)
            both = denoise(torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), with_null(cond, x, rows))
            conditional, dropped = each(lambda v: v[: len(x)], both), each(lambda v: v[len(x) :], both)
            wanted = each(lambda v: v[rows], conditional)
            coeffs = None if path is None else path.coeffs(t[rows])
            mixed = self._mix(dropped, wanted, coeffs, x[rows])
            if isinstance(rows, slice):
                return mixed
            return each(lambda v, new: v.index_copy(0, rows, new), conditional, mixed)

        return guided

    def _rows(self, t: Tensor) -> Tensor | slice:
        """Which samples are guided."""
        lo, hi = self.interval
        if (lo, hi) == (0.0, 1.0):
            return slice(None)
        rows = ((t >= lo) & (t <= hi)).nonzero()[:, 0]
        return slice(None) if len(rows) == len(t) else rows  # of all, nothing is gathered and put back

    @property
    def _needs_path(self) -> bool:
        return self.rescale > 0

    def _mix(self, dropped: Endpoints, conditional: Endpoints, coeffs: Coeffs | None, x: Tensor) -> Endpoints:
        """The guided endpoints of x (B, C, ...), from those of both branches; coeffs: None unless `_needs_path`."""
        mixed, n = dropped.lerp(conditional, self.scale), self.channels
        if n is not None:
            self.check(conditional.data.shape[1])
            mixed = each(lambda a, b: torch.cat([a[:, :n], b[:, n:]], 1), mixed, conditional)
        if not self.rescale or coeffs is None:
            return mixed
        return self._rescaled(mixed, conditional, coeffs, x)

    def _rescaled(self, mixed: Endpoints, conditional: Endpoints, coeffs: Coeffs, x: Tensor) -> Endpoints:
        have, want = (ends.data.flatten(1).std(1) for ends in (mixed, conditional))
        factor = torch.where(have > 0, 1 + self.rescale * (want / have - 1), 1.0)
        return mixed.with_data(coeffs, x, broadcast(factor, x) * mixed.data)


def null(cond: Cond, like: Tensor) -> Cond:
    """`cond` with every condition dropped; `like` (B, ...) gives the batch and the device."""
    return {**cond, "drop": torch.ones(len(like), dtype=torch.bool, device=like.device)}


def with_null(cond: Cond, like: Tensor, rows: Tensor | slice) -> Cond:
    """The conditions of B samples, then those of `rows` of them, dropped. A missing "drop" is no drop.

    ValueError when an entry's first axis is not that of `like` (B, ...).
    """
    for key, value in cond.items():
        if len(value) != len(like):
            raise ValueError(f"cond['{key}'] has {len(value)} entries for a batch of {len(like)}")
    first = {"drop": torch.zeros(len(like), dtype=torch.bool, device=like.device), **cond}
    second = null({key: value[rows] for key, value in cond.items()}, like[rows])
    return {key: torch.cat([first[key], second[key]]) for key in first}


def each(change: Callable[..., Tensor], *ends: Endpoints) -> Endpoints:
    """Endpoints whose data, eps and log_variance are each `change` of those of `ends`."""
    extra = [e.log_variance for e in ends]
    return Endpoints(
        change(*(e.data for e in ends)),
        change(*(e.eps for e in ends)),
        None if any(e is None for e in extra) else change(*extra),
    )


@GUIDANCES.register("autoguidance")
@config
class Autoguidance(Guidance):
    """weak + scale·(model − weak): away from a weaker version of the model (arXiv 2406.02507, section 4).

    The weaker one is a smaller or less trained run on the same latents and path; both are conditional. Costs an
    evaluation of each. A learned variance is the model's.
    """

    checkpoint: str  # run directory or checkpoint of the weaker model
    scale: float  # weak + scale * (model - weak); 1 = no guidance

    @property
    def is_neutral(self) -> bool:
        return self.scale == 1.0

    def guide(self, denoise: DenoiseFn, context: Context | None) -> DenoiseFn:
        weak = self._opener(context).denoiser(self.checkpoint)

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            return weak(x, t, cond).lerp(denoise(x, t, cond), self.scale)

        return guided

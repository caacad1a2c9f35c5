"""The training objective: path + prediction + times + weight + coupling (+ auxiliary terms)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from dit.compiling import compile_for_one_size
from dit.config import ConfigError, config
from dit.flow.auxiliary import AUXILIARIES, Auxiliary, Context, call_tapped
from dit.flow.couple import COUPLINGS, Coupling, Independent
from dit.flow.loss import Loss
from dit.flow.path import PATHS, Coeffs, Linear, NoisePath
from dit.flow.predict import (
    PREDICTIONS,
    Cond,
    Model,
    Prediction,
    Velocity,
    call_network,
    check_cond,
    check_steps,
    split_channels,
    usable,
)
from dit.flow.spread import SPREADS, IndependentDraws, Spread
from dit.flow.times import BASE_DIMENSION, TIMES, Times, Uniform, shift_time
from dit.flow.weight import WEIGHTS, UniformWeight, Weight
from dit.rng import Draws, Purpose
from dit.several import Plainest


class _Ends(NamedTuple):
    """What comes before and after the network in a loss."""

    noised: Callable[[Objective, Coeffs, Tensor, Tensor], tuple[Tensor, Tensor]]
    weighted: Callable[[Objective, Coeffs, Tensor, Tensor, Tensor], Tensor]


@config
class Objective:
    """What is minimised: E weight·|pred − target|² over data, eps and t, the square a mean over elements.

    spread: how times are drawn over the global batch. auxiliary: terms added to that, such as what trains a
    learned variance: None, one, or a tuple of several.
    """

    path: Annotated[NoisePath, PATHS] = Linear()  # how data become noise: alpha and sigma of t
    prediction: Annotated[Prediction, PREDICTIONS] = Velocity()  # what the network is trained to say
    times: Annotated[Times, TIMES] = Uniform()  # how often each time in (0, 1) is trained on
    spread: Annotated[Spread, SPREADS] = IndependentDraws()  # how times are drawn over the global batch
    weight: Annotated[Weight, WEIGHTS] = UniformWeight()  # of the loss at each time
    coupling: Annotated[Coupling, COUPLINGS] = Independent()  # which noise goes with which data
    # terms added to the loss; one alone needs no brackets, null = none
    auxiliary: Annotated[
        Annotated[Auxiliary, AUXILIARIES] | tuple[Annotated[Auxiliary, AUXILIARIES], ...] | None, Plainest()
    ] = None

    @property
    def terms(self) -> tuple[Auxiliary, ...]:
        """The auxiliary terms, in the order given."""
        if self.auxiliary is None:
            return ()
        return self.auxiliary if isinstance(self.auxiliary, tuple) else (self.auxiliary,)

    @property
    def uses_variance(self) -> bool:
        """Whether the network must give twice the channels."""
        return any(term.uses_variance for term in self.terms)

    @property
    def group(self) -> int:
        """How many consecutive slots the coupling and the terms need in one micro-batch."""
        return math.lcm(self.coupling.group, *(term.slots for term in self.terms))

    @property
    def forwards(self) -> int:
        """Forward passes of the network that the terms take beside the one that is trained, each time."""
        return sum(term.forwards for term in self.terms)

    @property
    def uncoupled(self) -> Objective:
        """The same of samples that know nothing of each other: any batch will do."""
        alone = tuple(term for term in self.terms if term.slots == 1)
        return replace(self, coupling=Independent(), auxiliary=alone)

    @property
    def taps(self) -> tuple[int, ...]:
        """Behind which of the network's blocks, counted from 1, the terms look at the tokens."""
        return tuple(sorted({n for term in self.terms for n in term.taps}))

    def loss(
        self,
        model: Model,
        data: Tensor,
        cond: Cond,
        draws: Draws,
        paired: Tensor | None = None,
        *,
        compiled: bool = False,
    ) -> Loss:
        """The loss of clean latents (B, C, ...); every random number is a function of `draws` alone.

        paired: (B, C, ...) the eps stored with each sample, which a `stored` coupling takes; ValueError if it
        is missing there. compiled: what comes right before and after the network is two compiled functions, for
        batches of one size. Nothing here waits for the device, the OT coupling aside.
        """
        data = data.to(torch.promote_types(data.dtype, torch.float32))
        if len(draws.slots) != len(data):
            raise ValueError(f"draws for {len(draws.slots)} slots were given for {len(data)} samples")
        check_cond(cond, len(data))
        t = self.time(self.spread(draws).double(), data[0].numel()).to(
            data.dtype
        )  # float64: bitwise t on any device and batch
        eps, metrics = self.coupling(data, self._eps(data, draws, paired), cond, draws)
        around = _compiled() if compiled else EAGER
        per_sample, coeffs, x, output, taps = self._call(model, data, eps, t, cond, self.taps, around)
        if not self.terms:
            return Loss(per_sample.mean(), per_sample, t, metrics)
        ends = self.prediction.endpoints(coeffs, x, output)
        context = Context(
            self.path, self.prediction, t, coeffs, data, eps, x, output, ends, taps, cond, draws,
            self.weight(coeffs, self.prediction.row(coeffs)), partial(call_network, model, self.path),
        )  # fmt: skip
        found = {term.metric: term.term(context) for term in self.terms}
        metrics = {**metrics, **{name: value.detach().mean() for name, value in found.items()}}
        auxiliary = torch.stack(list(found.values())).sum(0)
        return Loss((per_sample + auxiliary).mean(), per_sample, t, metrics, auxiliary)

    def _eps(self, data: Tensor, draws: Draws, paired: Tensor | None) -> Tensor:
        """(B, C, ...) the noise that the coupling chooses from, in the dtype of data."""
        if not self.coupling.stored:
            return draws.normal(Purpose.EPS, data.shape[1:]).to(data.dtype)
        if paired is None or paired.shape != data.shape:
            given = None if paired is None else tuple(paired.shape)
            raise ValueError(
                f"coupling {self.coupling} takes the eps stored with each sample, of shape {tuple(data.shape)}; "
                f"got {given}. Train on pairs made by tools/sample.py --save_pairs"
            )
        return paired.to(data.dtype)

    def time(self, u: Tensor, dimension: int | None = None) -> Tensor:
        """t (B,) from uniform u (B,): the times' distribution, clamped here to the usable interval.

        dimension: numbers in a latent, which the shift of that name is of.
        """
        return self.times(u, self.path, dimension).clamp(*usable(self.path, self.prediction))

    def per_sample(self, model: Model, data: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B,) weighted loss at given data, eps (B, C, ...) and t (B,), in float32 at least.

        The main term alone; a network may give variance channels whether an auxiliary term trains them or not.
        """
        return self._call(model, data, eps, t, cond)[0]

    def _call(
        self,
        model: Model,
        data: Tensor,
        eps: Tensor,
        t: Tensor,
        cond: Cond,
        taps: tuple[int, ...] = (),
        ends: _Ends | None = None,
    ) -> tuple[Tensor, Coeffs, Tensor, Tensor, Mapping[int, Tensor]]:
        """(B,) the weighted loss of one call of the network; coefficients and x that it was of; its output and taps."""
        ends = ends or EAGER
        coeffs = self.path.coeffs(
            t
        )  # of numbers in tables that are kept, which compiled code would make each time
        x, target = ends.noised(self, coeffs, data, eps)
        output, tapped = call_tapped(model, self.path, x, t, cond, taps)
        per_sample = ends.weighted(self, coeffs, output, x, target)
        return per_sample, coeffs, x, output.to(target.dtype), tapped

    def noised(self, coeffs: Coeffs, data: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """x = alpha·data + sigma·eps (B, C, ...) at given coefficients, and what the network should say of it."""
        return coeffs.mix(data, eps), self.prediction.target(coeffs, data, eps)

    def weighted(self, coeffs: Coeffs, output: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """(B,) the weighted loss of what the network said of x; channels beyond those of x do not count."""
        pred, _ = split_channels(output, x)
        error = (pred.to(target.dtype) - target).square().flatten(1).mean(1)
        return self.weight(coeffs, self.prediction.row(coeffs)) * error

    def first_losses(self, t: Tensor, correlation: float = 0.0) -> Tensor:
        """(B,) float64: expected losses of a network that says 0, for unit-variance latents at times t (B,).

        weight·(a² + b² + 2·a·b·correlation), the correlation being that of data and eps, which a coupling logs as
        `pairing_cost_drop`. A sample's loss is this times a mean of squares, so it scatters by sqrt(2 / numel) of
        it for Gaussian latents of `numel` elements, and far less than with the times.
        """
        coeffs = self.path.coeffs(t.double())
        a, b = self.prediction.row(coeffs)
        return self.weight(coeffs, (a, b)) * (a.square() + b.square() + 2 * correlation * a * b)

    def check(self, dimension: int = BASE_DIMENSION) -> None:
        """ConfigError for parts that cannot be trained or sampled together, on latents of so many numbers.

        The path, and the usable interval of the prediction on it, must reach from nearly clean data to nearly
        pure noise, where sampling starts, and the interval hold every step of a discrete path. Most training
        times must fall inside; and each auxiliary term must be defined on the path, and be there once.
        """
        _check_reach(self.path, 0.0, 1.0, f"path {self.path}", "change its coefficients")
        lo, hi = usable(self.path, self.prediction)
        what = f"prediction {self.prediction} is usable on path {self.path} only for t in [{lo:.6g}, {hi:.6g}] and"
        _check_reach(self.path, lo, hi, what, "choose another prediction such as v")
        self._check_sigma_data()
        check_steps(self.path, self.prediction)
        self._check_times(dimension)
        self._check_terms()

    def check_depth(self, depth: int) -> None:
        """ConfigError for a term that looks behind a block which a network of `depth` blocks does not have."""
        for term in self.terms:
            if term.taps and max(term.taps) > depth:
                raise ConfigError(
                    f"auxiliary {AUXILIARIES.name_of(term)} looks behind block {max(term.taps)}, and the network has "
                    f"{depth}: set {term.places} to blocks from 1 to {depth}"
                )

    def _check_terms(self) -> None:
        names = [AUXILIARIES.name_of(term) for term in self.terms]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                f"auxiliary names {twice[0]} {names.count(twice[0])} times: keep one of them, with the weight of all"
            )
        for term in self.terms:
            term.check(self.path)

    def _check_sigma_data(self) -> None:
        """Whatever scales by the std of the data must have one std in mind."""
        parts = {"path": self.path, "prediction": self.prediction, "weight": self.weight}
        found = {name: part.sigma_data for name, part in parts.items() if hasattr(part, "sigma_data")}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name}.sigma_data = {value:g}" for name, value in found.items())
            raise ConfigError(f"{said}: they are one number, the std of the data; set them alike")

    def _check_times(self, dimension: int) -> None:
        lo, hi = usable(self.path, self.prediction)
        u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        t = self.times.quantile(u, self.path)  # not snapped: a step is no end
        t = shift_time(t, self.times.shift, dimension)
        outside = float(((t <= lo) | (t >= hi)).double().mean())
        if outside > 0.1:
            raise ConfigError(
                f"{outside:.0%} of the training times of {self.times} lie at the ends of what path {self.path} and "
                f"prediction {self.prediction} can be trained on, t in [{lo:.6g}, {hi:.6g}] or beyond; "
                "move the times' distribution inside"
            )


EAGER = _Ends(Objective.noised, Objective.weighted)


@lru_cache(maxsize=1)
def _compiled() -> _Ends:
    return _Ends(compile_for_one_size(EAGER.noised), compile_for_one_size(EAGER.weighted))


def _check_reach(path: NoisePath, lo: float, hi: float, what: str, mend: str) -> None:
    """ConfigError unless sigma/alpha is at most 1/10 at t = lo and at least 10 at t = hi."""
    alpha, sigma = path.alpha_sigma(torch.tensor([lo, hi], dtype=torch.float64))
    if sigma[0] > 0.1 * alpha[0] or alpha[1] > 0.1 * sigma[1]:
        raise ConfigError(
            f"{what} does not reach from data to noise: there (alpha, sigma) goes from "
            f"({float(alpha[0]):.4g}, {float(sigma[0]):.4g}) to ({float(alpha[1]):.4g}, {float(sigma[1]):.4g}), and "
            f"sigma/alpha must go from at most 0.1 to at least 10; {mend}"
        )

"""The law L(N, D) = E + A/N^α + B/D^β, and the sizes that are best at a budget (arXiv 2203.15556, eq. 2 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dit.errors import UserError


class LawError(UserError):
    """A law that cannot be fitted to what there is, or cannot be asked what it is asked."""


@dataclass(frozen=True)
class Law:
    """L = E + A/N^alpha + B/D^beta: E the loss that nothing lowers, N parameters, D tokens. Numbers, or arrays (R,)."""

    E: Any
    A: Any
    B: Any
    alpha: Any
    beta: Any

    @classmethod
    def of(cls, theta: np.ndarray) -> Law:
        """The law of (log A, log B, log E, alpha, beta), (5,) or (R, 5) for R laws at once."""
        numbers = np.moveaxis(np.asarray(theta, float), -1, 0)
        a, b, e = np.exp(numbers[:3])
        found = (e, a, b, numbers[3], numbers[4])
        return cls(*found) if np.ndim(theta) > 1 else cls(*(float(one) for one in found))

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> Law:
        """R laws at once, of rows [E, A, B, alpha, beta] (R, 5)."""
        return cls(*np.asarray(rows, float).reshape(-1, 5).T)

    @property
    def rows(self) -> np.ndarray:
        """[E, A, B, alpha, beta], (5,) or (R, 5)."""
        return np.stack([self.E, self.A, self.B, self.alpha, self.beta], -1)

    @property
    def n_opt_exponent(self) -> Any:
        """N_opt ∝ C^(beta / (alpha + beta))."""
        return self.beta / (self.alpha + self.beta)

    @property
    def d_opt_exponent(self) -> Any:
        """D_opt ∝ C^(alpha / (alpha + beta))."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def loss_exponent(self) -> Any:
        """L_opt − E ∝ C^(−alpha·beta / (alpha + beta))."""
        return -self.alpha * self.beta / (self.alpha + self.beta)

    def loss(self, params: Any, tokens: Any) -> Any:
        """The loss of models with so many parameters trained on so many tokens; arrays broadcast."""
        return self.E + self.A * params ** (-self.alpha) + self.B * tokens ** (-self.beta)

    def optimum(self, flops: Any, flops_per_param_token: float = 6.0) -> tuple[Any, Any, Any]:
        """(params, tokens, loss) of the lowest loss at a budget of flops = flops_per_param_token · params · tokens.

        In closed form: there alpha·A/N^alpha = beta·B/D^beta. flops: a positive number, or an array that broadcasts
        with the law's numbers.
        """
        product = flops / flops_per_param_token
        balance = np.log(self.alpha * self.A / (self.beta * self.B)) / (self.alpha + self.beta)
        params = np.exp(balance + self.n_opt_exponent * np.log(product))
        tokens = product / params
        best = params, tokens, self.loss(params, tokens)
        return best if np.ndim(best[0]) else (float(best[0]), float(best[1]), float(best[2]))

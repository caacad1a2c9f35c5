"""Classifier guidance against the exact conditional model, and dynamic thresholding against Imagen's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit.flow.path import Linear, NoisePath, broadcast
from dit.flow.predict import Cond, Endpoints
from dit.sample.correct import ClassifierGuidance, DynamicThreshold, log_likelihood_gradient
from dit.sample.denoise import DenoiseFn
from dit.sample.guide import Context, LogitsFn
from tests.gaussian import ALL_PATHS, Gaussian, normal

MEANS, STD = (-1.0, 0.3, 0.8), 0.6  # of three classes, as likely as each other
LABELS = torch.tensor([0, 2, 1, 2])
TIMES = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)


class Classes:
    """Data of three classes of which all is known: the class given x, and data given x with or without it."""

    def __init__(self, path: NoisePath):
        self.path = path
        self.each = [Gaussian(mean, STD) for mean in MEANS]

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """log N(x; alpha·mean, alpha²·std² + sigma²) of each class, up to a constant."""
        alpha, sigma = (broadcast(v, x) for v in self.path.alpha_sigma(t))
        squares = [(x - alpha * g.mean).square() / (alpha**2 * g.std**2 + sigma**2) for g in self.each]
        return torch.stack([-0.5 * s.flatten(1).sum(1) for s in squares], dim=1)

    def unconditional(self, x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        """E[data | x] and E[eps | x], whatever the class."""
        share = self.logits(x, t).softmax(1)
        ends = [g.endpoints(self.path, x, t) for g in self.each]
        data = sum(broadcast(share[:, k], x) * e.data for k, e in enumerate(ends))
        eps = sum(broadcast(share[:, k], x) * e.eps for k, e in enumerate(ends))
        return Endpoints(data, eps, torch.ones_like(x))

    def conditional(self, x: Tensor, t: Tensor, label: Tensor) -> Endpoints:
        """The same, the class being known."""
        ends = [self.each[k].endpoints(self.path, x[i : i + 1], t[i : i + 1]) for i, k in enumerate(label)]
        return Endpoints(torch.cat([e.data for e in ends]), torch.cat([e.eps for e in ends]))

    def denoiser(self, checkpoint: str) -> DenoiseFn:
        raise AssertionError("no other model is wanted")

    def classifier(self, checkpoint: str) -> LogitsFn:
        assert checkpoint == "classes"
        return self.logits

    def guided(self, scale: float) -> DenoiseFn:
        guidance = ClassifierGuidance(checkpoint="classes", scale=scale)
        return guidance(self.unconditional, Context(self.path, self))


@pytest.mark.parametrize("path", ALL_PATHS, ids=str)
def test_a_perfect_classifier_makes_the_unconditional_model_the_conditional_one(path: NoisePath) -> None:
    """Bayes: ∇ log p(x | y) = ∇ log p(x) + ∇ log p(y | x), exactly, for every path and noise level."""
    classes, x = Classes(path), normal(4, 2, 1, 1) * path.alpha_sigma(TIMES)[1].amax()
    with torch.no_grad():
        found = classes.guided(1.0)(x, TIMES, {"label": LABELS})
    want = classes.conditional(x, TIMES, LABELS)
    torch.testing.assert_close(found.data, want.data, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.eps, want.eps, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.log_variance, torch.ones_like(x))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_the_change_grows_with_the_scale(scale: float) -> None:
    """eps − scale·sigma·∇ log p: Dhariwal & Nichol's equation 14."""
    path, x = Linear(), normal(4, 2, 1, 1)
    classes = Classes(path)
    plain = classes.unconditional(x, TIMES, {})
    one, many = (classes.guided(s)(x, TIMES, {"label": LABELS}) for s in (1.0, scale))
    torch.testing.assert_close(many.eps - plain.eps, scale * (one.eps - plain.eps))
    torch.testing.assert_close(many.data - plain.data, scale * (one.data - plain.data))
    gradient = log_likelihood_gradient(classes.logits, x, TIMES, LABELS, LABELS >= 0)
    torch.testing.assert_close(one.eps, plain.eps - broadcast(TIMES, x) * gradient)


def test_without_a_label_there_is_no_guidance() -> None:
    path, x = Linear(), normal(4, 2, 1, 1)
    classes = Classes(path)
    label, drop = torch.tensor([0, -1, 2, 1]), torch.tensor([False, False, True, False])
    found = classes.guided(2.0)(x, TIMES, {"label": label, "drop": drop})
    plain, full = (
        classes.unconditional(x, TIMES, {}),
        classes.guided(2.0)(x, TIMES, {"label": label.clamp(min=0)}),
    )
    for name in ("data", "eps"):
        assert torch.equal(getattr(found, name)[1:3], getattr(plain, name)[1:3])
        assert torch.equal(getattr(found, name)[[0, 3]], getattr(full, name)[[0, 3]])
    with pytest.raises(ValueError, match=r"needs cond\['label'\], got \['text'\]"):
        classes.guided(2.0)(x, TIMES, {"text": x})


@pytest.mark.parametrize("path", ALL_PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_both_ends_it_stays_finite(path: NoisePath, dtype: torch.dtype) -> None:
    """At t = 1 many paths have lost the data, some to rounding alone: alpha = cos(π/2) is not 0, nor positive."""
    classes, x = Classes(path), normal(2, 2, 1, 1, dtype=dtype)
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    plain, found = classes.unconditional(x, t, {}), classes.guided(5.0)(x, t, {"label": LABELS[:2]})
    assert torch.isfinite(found.data).all()
    change = (
        (found.eps - plain.eps).abs().flatten(1).amax(1),
        (found.data - plain.data).abs().flatten(1).amax(1),
    )
    alpha, sigma = path.alpha_sigma(t)
    for moved in change:
        assert float(moved[1]) < 20
        assert (float(moved[1]) > 0) == (float(alpha[1]) > 1e-3 * float(sigma[1]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_gradient_is_taken_whatever_the_mode(mode: type) -> None:
    """The sampler runs under no_grad; a classifier with weights of its own keeps no gradient of them."""
    weight = normal(2, 3).requires_grad_()

    def classify(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1)) @ weight * t.unsqueeze(1)

    with mode():
        x, t, label = normal(3, 2, 1, 1), TIMES[:3].clone(), LABELS[:3].clone()
        found = log_likelihood_gradient(classify, x, t, label, label != 1)
    assert not found.requires_grad
    assert weight.grad is None
    x, t = x.clone(), t.clone()
    step = 1e-6
    for i, j in ((0, 0), (1, 1), (2, 0)):
        moved = [x.clone(), x.clone()]
        for m, sign in zip(moved, (1, -1), strict=True):
            m.flatten(1)[i, j] += sign * step
        up, down = (classify(m, t).log_softmax(1)[i, label[i]].item() for m in moved)
        want = (up - down) / (2 * step) if label[i] != 1 else 0.0
        assert float(found.flatten(1)[i, j]) == pytest.approx(want, abs=1e-6)


# --- dynamic thresholding ----------------------------------------------------------------------------------


def thresholded(data: Tensor, t: Tensor, **fields: float) -> Endpoints:
    """What thresholding makes of these data on the linear path."""
    path, eps = Linear(), normal(*data.shape, seed=5)
    x = path.coeffs(t).mix(data, eps)
    found = DynamicThreshold(**fields)(lambda *_: Endpoints(data, eps), Context(path))
    return found(x, t, {})


@settings(max_examples=50, deadline=None)
@given(
    share=st.floats(0.01, 1.0), floor=st.floats(0.1, 3.0), size=st.floats(0.1, 10.0), seed=st.integers(0, 99)
)
def test_it_is_imagens_thresholding(share: float, floor: float, size: float, seed: int) -> None:
    """s = max(percentile of |data|, floor); clip to [−s, s]; divide by s, back to the floor's range."""
    data = size * normal(3, 2, 4, 4, seed=seed)
    found = thresholded(data, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), quantile=share, floor=floor)
    for i in range(3):
        one = data[i].numpy()
        s = max(np.quantile(np.abs(one), share), floor)
        np.testing.assert_allclose(found.data[i].numpy(), np.clip(one, -s, s) / s * floor, rtol=1e-9)
    assert float(found.data.abs().max()) <= floor * (1 + 1e-12)


def test_data_within_the_floor_are_left_alone() -> None:
    data = normal(2, 3, 4, 4).clamp(-1, 1) * 0.999
    found = thresholded(data, torch.tensor([0.0, 0.5], dtype=torch.float64), quantile=0.9, floor=1)
    assert torch.equal(found.data, data)
    torch.testing.assert_close(found.eps, normal(2, 3, 4, 4, seed=5))

"""The solver's way: frames at the grid's times, the last of which is the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dit.config import ConfigError
from dit.flow.path import PATHS, Linear
from dit.flow.predict import Cond, Velocity
from dit.sample.adaptive import DormandPrince
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.solve import SOLVERS, Euler, Heun
from dit.sample.trajectory import FRAMES, trajectory, write_animation

INDEX, LABEL = torch.arange(3), torch.zeros(3, dtype=torch.int64)


def curved(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """A velocity that turns, so that solvers differ. time: 1000 t, as the linear path has it."""
    return torch.sin(3 * x) + time.view(-1, 1, 1, 1) / 1000


def sampler(**spec) -> Sampler:
    return Sampler(
        curved, Linear(), Velocity(), lambda x: x, (3, 4, 4), SamplerSpec(**spec), torch.device("cpu")
    )


def fixed() -> list[str]:
    names = [name for name, solver in SOLVERS.items() if not solver().uses_variance]
    return [name for name in names if SOLVERS[name]().nfe(4) is not None]


@pytest.mark.parametrize("name", fixed())
def test_it_ends_in_the_image_and_begins_in_its_noise(name: str) -> None:
    """With every solver of fixed steps; watching changes no bit."""
    drawn = sampler(solver=SOLVERS[name](), num_steps=4)
    frames = trajectory(drawn, INDEX, LABEL)
    times = [frame.t for frame in frames]
    assert times == sorted(set(times), reverse=True)
    assert set(times) <= set(drawn.times().tolist())
    assert torch.equal(frames[-1].x, drawn.latents(INDEX, LABEL))
    assert torch.equal(frames[-1].data, frames[-1].x)
    if not drawn.spec.solver.stochastic:
        assert torch.equal(frames[0].x, drawn.noise(INDEX))
        assert len(frames) == 5


def test_the_last_call_at_a_time_wins() -> None:
    """Euler's frames are its own steps, done here once more; Heun's are those that its corrector reached."""
    for solver, by_hand in ((Euler(), 1), (Heun(), 2), (SOLVERS["rk4"](), 4)):
        drawn = sampler(solver=solver, num_steps=3)
        frames = trajectory(drawn, INDEX, LABEL)
        x, times = drawn.noise(INDEX), drawn.times()
        for frame, now, after in zip(frames, times, times[1:], strict=False):
            torch.testing.assert_close(frame.x, x, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(frame.data, x - float(now) * velocity(x, now), rtol=1e-5, atol=1e-5)
            h = float(after - now)
            k1 = velocity(x, now)
            if by_hand == 1:
                x = x + h * k1
            elif by_hand == 2:
                x = x + h / 2 * (k1 + velocity(x + h * k1, after))
            else:
                middle = (now + after) / 2
                k2 = velocity(x + h / 2 * k1, middle)
                k3 = velocity(x + h / 2 * k2, middle)
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, after))


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return curved(x, 1000 * t.float().expand(len(x)), {})


def test_a_solver_of_its_own_times_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="--trajectory with the solver dopri5: each image has its own times"
    ):
        trajectory(sampler(solver=DormandPrince()), INDEX, LABEL)


@pytest.mark.parametrize("steps", [3, 150])
def test_the_animation(tmp_path: Path, steps: int) -> None:
    """A frame a time, 64 at most; what begins it is not what ends it."""
    drawn = sampler(num_steps=steps)
    frames = trajectory(drawn, INDEX, LABEL)
    count = write_animation(tmp_path / "a.webp", frames, drawn)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == count == min(len(frames), FRAMES)
        assert image.size == (3 * 6 + 2, 2 * 8)
        image.seek(count - 1)
        image.load()
        assert image.info["duration"] > 1000


def test_noise_of_a_large_scale_is_shown_at_that_of_the_data() -> None:
    """On the path of EDM x begins at 80 standard deviations."""
    drawn = Sampler(
        curved,
        PATHS["ve"](),
        Velocity(),
        lambda x: x,
        (3, 4, 4),
        SamplerSpec(num_steps=2),
        torch.device("cpu"),
    )
    first = trajectory(drawn, INDEX, LABEL)[0]
    assert 0.5 < float(first.x.std()) < 1.5

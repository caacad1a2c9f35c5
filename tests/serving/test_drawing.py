"""What the page draws: the pixels of `dit.load` and of its own command, the way there, and an end to it."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

import tools.sample
from dit.config import ConfigError, from_dict
from dit.experiments.loaded import TrainedModel, load
from dit.sample.generate import image_grid
from dit.serving.drawing import TooLong, draw
from dit.serving.setting import Limits, Setting
from tests.commands import call
from tests.datasets import Digits
from tests.train.runs import random_run

pytestmark = pytest.mark.filterwarnings("ignore::dit.errors.Notice")  # averages of so few steps

GIVEN = {
    "plain": {"images": 3, "steps": 2},
    "a class, guided in an interval": {
        "classes": "3",
        "images": 2,
        "steps": 3,
        "seed": 5,
        "solver": "unipc",
        "scale": 2,
        "interval_from": 0.2,
        "interval_to": 0.7,
    },
    "a solver that draws": {"images": 2, "steps": 3, "solver": "edm", "grid": "karras", "scale": 2},
}


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(digits, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return load(run)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
def test_the_images_are_those_of_load_and_of_the_command(
    run: Path, model: TrainedModel, given: dict, tmp_path: Path
) -> None:
    setting, shares = from_dict(Setting, given), list[float]()
    drawn = draw(model, setting, Limits(frames=3), shares.append)
    spec = setting.spec()
    images = model.sample(
        setting.images,
        setting.classes,
        batch_size=setting.images,
        solver=spec.solver,
        grid=spec.grid,
        num_steps=spec.num_steps,
        seed=spec.seed,
        cfg_scale=spec.cfg_scale,
        guidance=spec.guidance,
    )
    np.testing.assert_array_equal(drawn.grid, image_grid(images, setting.images))
    line = drawn.about.splitlines()[0]
    assert str(run) not in drawn.about
    program, tool, *words = shlex.split(line)
    assert (program, tool) == ("python", "tools/sample.py")
    places = {"RUN": str(run), "--out=FOLDER": f"--out={tmp_path / 'out'}"}
    assert call(tools.sample.main, *(places.get(word, word) for word in words)) == 0
    with np.load(tmp_path / "out" / "samples.npz") as held:
        np.testing.assert_array_equal(held["arr_0"], images)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_way_goes_from_noise_to_the_images(model: TrainedModel) -> None:
    setting = from_dict(Setting, {"images": 2, "steps": 8})
    whole = draw(model, setting, Limits())
    assert [text for _, text in whole.way] == [f"t = {t / 8:.3f}" for t in range(8, -1, -1)]
    height = whole.grid.shape[0]
    np.testing.assert_array_equal(whole.way[-1][0][:height], whole.grid)
    assert (whole.way[0][0][:height] != whole.grid).mean() > 0.5
    few = draw(model, setting, Limits(frames=3))
    assert [text for _, text in few.way] == ["t = 1.000", "t = 0.500", "t = 0.000"]
    none = draw(model, setting, Limits(frames=0))
    assert none.way == []
    np.testing.assert_array_equal(none.grid, whole.grid)


def test_a_solver_that_chooses_its_steps_draws_without_the_way(model: TrainedModel) -> None:
    drawn = draw(model, from_dict(Setting, {"images": 2, "solver": "dopri5"}), Limits())
    assert drawn.way == []
    assert drawn.grid.std() > 0


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_what_takes_too_long_is_given_up(model: TrainedModel, solver: str) -> None:
    setting = from_dict(Setting, {"images": 2, "steps": 250, "solver": solver})
    with pytest.raises(TooLong, match=r"given up after 1e-06 s .*--max_seconds"):
        draw(model, setting, Limits(max_seconds=1e-6))


def test_what_has_no_effect_and_what_is_too_much_is_refused(model: TrainedModel) -> None:
    with pytest.raises(ConfigError, match="no class"):
        draw(model, from_dict(Setting, {"classes": "-1", "scale": 2}), Limits())
    with pytest.raises(ConfigError, match="out of range"):
        draw(model, from_dict(Setting, {"classes": "10000"}), Limits())
    with pytest.raises(ConfigError, match="images: at most 16"):
        draw(model, from_dict(Setting, {"images": 17}), Limits())


def test_latents_far_from_those_of_data_are_told(model: TrainedModel) -> None:
    drawn = draw(model, from_dict(Setting, {"images": 1, "steps": 2, "scale": 1e4}), Limits(frames=0))
    assert "warning: latents reach" in drawn.about

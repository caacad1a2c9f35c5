"""The recipes of configs/recipes are the networks of their papers, by parameters and multiply-adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit.configfile import load
from dit.experiments.diffusion import Experiment
from dit.model.cost import cost

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
# as published: millions of parameters, G multiply-adds of a forward pass at 256 pixels
PUBLISHED = {
    "dit_2023": (675, 118.6),
    "sit": (675, 118.6),
    "lightning": (675, 118.6),
    "jit": (131, 25),
    "ddt": (675, 131.5),
}


def read(name: str) -> Experiment:
    return load(Experiment, RECIPES / f"{name}.yaml", {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_its_paper_s_network(name: str) -> None:
    channels, side = (3, 256) if name == "jit" else (4, 32)
    found = cost(read(name).model, (side, side), channels, 1000)
    parameters, multiply_adds = PUBLISHED[name]
    assert found.parameters.trainable / 1e6 == pytest.approx(parameters, rel=1e-3)
    assert found.multiply_adds / 1e9 == pytest.approx(multiply_adds, rel=1e-2)


def test_each_recipe_is_there_at_512_pixels_too_with_data_and_folder_of_its_own() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")} - {"base"}
    assert names == {name + end for name in PUBLISHED for end in ("", "_512")}
    for name in PUBLISHED:
        small, large = read(name), read(f"{name}_512")
        assert "512" in str(large.data.path)
        assert small.run_dir != large.run_dir
        assert small.optim == large.optim

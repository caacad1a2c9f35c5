"""A run that several tests of experiments load from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.datasets import Digits
from tests.train.runs import go, values


@pytest.fixture(scope="session")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    go(values(digits, folder, engine="local", train={"steps": 3}, checkpoint={"every": 1}))
    return folder

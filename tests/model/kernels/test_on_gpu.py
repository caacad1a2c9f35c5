"""The kernels where they are compiled: the cases of cases.py, on a GPU."""

import pytest

from tests.model.kernels.cases import *  # noqa: F403

pytestmark = pytest.mark.gpu

"""The kernels by Triton's interpreter, in a process of their own: it is chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from tests.model.modern import COMPONENTS

CASES = Path(__file__).with_name("cases.py")


pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_on_gpu.py runs the same"),
]


def run_cases(report: Path, marker: str) -> int:
    """Run those with or without the marker; how many there were, none of which failed or was left out."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marker]
    done = subprocess.run(
        [*command, f"--junitxml={report}", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert suite.get("skipped") == "0"
    return int(suite.get("tests", 0))


@pytest.mark.slow
def test_the_kernels_compute_what_they_must(tmp_path: Path) -> None:
    assert run_cases(tmp_path / "report.xml", "not slow") > 30


@pytest.mark.slow
def test_they_do_at_other_shapes_and_in_networks_of_all_components(tmp_path: Path) -> None:
    assert run_cases(tmp_path / "report.xml", "slow") > len(COMPONENTS) + 40

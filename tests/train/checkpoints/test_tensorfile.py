"""Files that the safetensors library reads as its own, with the checksum and size of what is on the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dit.train.checkpoints.tensorfile import write_tensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]  # fmt: skip


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(d): torch.randint(0, 2, (3, 5), generator=generator).to(d) for d in DTYPES}
    tensors |= {
        "a scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 4),
        "transposed": torch.arange(12.0).view(3, 4).T,
        "with 'quotes' and é": torch.arange(7),
    }
    path = tmp_path / "x.safetensors"
    digest, size = write_tensors(path, tensors, {"who": "we"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert path.stat().st_size == size
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"who": "we"}


def test_more_than_a_chunk(tmp_path: Path) -> None:
    big = torch.arange(5_000_003, dtype=torch.int64)  # 40 MB
    digest, size = write_tensors(tmp_path / "x", {"big": big, "small": torch.ones(3, dtype=torch.uint8)})
    assert torch.equal(load_file(tmp_path / "x")["big"], big)
    assert hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest() == digest
    assert (tmp_path / "x").stat().st_size == size


def test_no_tensors_at_all(tmp_path: Path) -> None:
    """A rank that owns nothing (stage 0) writes such a file."""
    write_tensors(tmp_path / "x", {})
    assert load_file(tmp_path / "x") == {}


def test_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="complex64"):
        write_tensors(tmp_path / "x", {"z": torch.zeros(2, dtype=torch.complex64)})

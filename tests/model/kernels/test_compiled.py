"""The kernels compiled for a GPU that need not be there: the interpreter takes more of Python than the compiler."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit.model.kernels import activation_triton, heads_triton, residual_triton

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
BATCH, TOKENS, WIDTH, HIDDEN = 8, 256, 1152, 4608  # of XL/2


class Compiled:
    """Stands where a kernel is launched, and compiles it for the arguments of the launch."""

    def __init__(self, kernel: Any):
        self.kernel, self.asm = kernel, {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(extent >= 1 for extent in grid)
        return self._launched

    def _launched(self, *args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
        names, signature, known, aligned = self.kernel.arg_names, {}, {}, {}
        for i, value in enumerate([*args, *(constants[n] for n in names[len(args) :])]):
            if value is None or i >= len(args) or (isinstance(value, int) and value == 1):
                signature[names[i]], known[i,] = "constexpr", value
            elif isinstance(value, float):
                signature[names[i]] = "fp32"
            else:
                signature[names[i]] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
                if isinstance(value, torch.Tensor) or value % 16 == 0:
                    aligned[i,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, known, aligned)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        self.asm = triton.compile(source, target=HOPPER, options=options).asm


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def half_block(module: Any, backward: bool) -> None:
    x, h, rows = (
        made(BATCH, TOKENS, WIDTH, dtype=torch.float32),
        made(BATCH, TOKENS, WIDTH),
        made(BATCH, WIDTH),
    )
    rows = rows.float()
    if backward:
        sums = made(BATCH, 3, WIDTH, dtype=torch.float32)
        module.backward(x, h, x, h, rows, rows, x, h, sums, 1e-6, True)
    else:
        module.forward(x, h, rows, rows, rows, x, h, 1e-6, True)


def gelu(module: Any, backward: bool, gated: bool = False) -> None:
    h, out = made(BATCH * TOKENS, HIDDEN * (1 + gated)), made(BATCH * TOKENS, HIDDEN)
    bias = made(HIDDEN * (1 + gated), dtype=torch.float32)
    if backward:
        module.backward(out, h, bias, h, out, gated)
    else:
        module.forward(h, bias, out, gated)


def swiglu(module: Any, backward: bool) -> None:
    gelu(module, backward, gated=True)


def heads(module: Any, backward: bool, width: int = 72) -> None:
    qkv, q = made(BATCH, TOKENS, 3, 16, width), made(BATCH, TOKENS, 16, width)
    gain, table = made(2, width, dtype=torch.float32), made(2, TOKENS, width // 2, dtype=torch.float32)
    if backward:
        module.backward(q, q, q, qkv, gain, table, qkv, 1e-6, True, False)
    else:
        module.forward(qkv, gain, None, table, q, q, 1e-6, True, False)


LAUNCHES = [
    (residual_triton, half_block), (activation_triton, gelu), (activation_triton, swiglu), (heads_triton, heads)
]  # fmt: skip


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("module", "launch"), LAUNCHES, ids=[launch.__name__ for _, launch in LAUNCHES])
def test_kernels_compile_and_move_16_bytes_at_a_time(
    module: Any, launch: Callable[..., None], backward: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """At XL/2's shapes, and heads 72 channels wide, which are no multiple of 16."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = "_backward" if backward else "_forward"
    compiled = Compiled(getattr(module, name))
    monkeypatch.setattr(module, name, compiled)
    launch(module, backward)
    assert compiled.asm["cubin"]
    moves = re.findall(r"(?:ld|st)\.global[.\w]*", compiled.asm["ptx"])
    widest = sum(".v4.b32" in move for move in moves)
    assert widest >= (3 if backward else 2), moves
    assert not [move for move in moves if move.endswith((".b16", ".b8"))], moves

"""The decoupled transformer: says nothing at first, every number trained and counted, decoders of another width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit.config import ConfigError, from_dict
from dit.model.cost import cost
from dit.model.ddt import DDT, DDTConfig
from dit.model.dit import MODELS
from tests.model.test_block import perturbed

KINDS: dict[str, dict[str, Any]] = {
    "alike": {},
    "wide and shallow": {"decoder_width": 64, "decoder_depth": 1},
    "modern": {
        "decoder_width": 48,
        "decoder_heads": 6,
        "block": {"norm": "rms", "qk_norm": "rms", "mlp": "swiglu", "rope": "alternating"},
        "position_table": False,
        "registers": 2,
    },
}
every = pytest.mark.parametrize("kind", KINDS)


def config(kind: str, **more: Any) -> DDTConfig:
    return from_dict(DDTConfig, {"width": 32, "depth": 2, "heads": 4, "patch": 2, **KINDS[kind], **more})


def built(kind: str, **more: Any) -> DDT:
    model = config(kind, **more).build((4, 6), 3, 5, torch.Generator().manual_seed(0))
    assert isinstance(model, DDT)
    return model


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.2, 0.7]), {"label": torch.tensor([1, -1])}


@every
def test_says_nothing_at_first_and_then_every_parameter_learns(kind: str) -> None:
    model = built(kind)
    assert torch.equal(model(*inputs()), torch.zeros(2, 3, 4, 6))
    gradients = []
    for checkpointed in (False, True):
        model = perturbed(built(kind, checkpoint_blocks=checkpointed))
        model(*inputs()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        if not name.startswith("output.end.modulation.bias"):
            assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@every
def test_parameters_and_flops_are_counted(kind: str) -> None:
    cfg = config(kind)
    found = cost(cfg, (4, 6), 3, 5)
    with torch.device("meta"):
        model = cfg.build((4, 6), 3, 5)
        x, t, label = torch.empty(3, 3, 4, 6), torch.empty(3), torch.zeros(3).long()
    assert sum(p.numel() for p in model.parameters()) == found.parameters.trainable
    with FlopCounterMode(display=False) as counter:
        model(x, t, {"label": label})
    assert counter.get_total_flops() == 3 * found.forward_flops


def test_what_the_encoder_says_of_a_token_changes_that_token_alone_in_a_decoder_without_attention() -> None:
    """The end layer reads each token's own condition."""
    model = perturbed(built("alike"))
    x, _, _ = inputs()
    c = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
    for block in model.output.blocks:
        torch.nn.init.zeros_(block.modulation.weight)
        torch.nn.init.zeros_(block.modulation.bias)
    first = model.output(x, c)
    c[:, 2] += 1.0
    changed = (model.output(x, c) != first).any(-1)
    assert changed.tolist() == [[False, False, True, False, False, False]] * 2


def test_blocks_of_both_compile_to_one_graph_each() -> None:
    model = perturbed(built("modern"))
    expected = model(*inputs())
    model.compile_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs()), expected)


def test_is_an_entry_of_the_models() -> None:
    cfg = MODELS.parse({"name": "ddt", "size": "nano", "decoder_depth": 1})
    assert isinstance(cfg, DDTConfig)
    with pytest.raises(ConfigError, match=r"takes no block\.modulation but full"):
        from_dict(DDTConfig, {"size": "nano", "block": {"modulation": "single"}})
    with pytest.raises(ConfigError, match="not a multiple of heads 7"):
        from_dict(DDTConfig, {"size": "nano", "decoder_width": 60, "decoder_heads": 7})

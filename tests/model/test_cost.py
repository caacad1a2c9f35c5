"""Costs against what torch counts: parameters are in test_dit.py, here FLOPs, memory and utilisation."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dit.config import ConfigError
from dit.model.cost import PRECISIONS, cost, counted_training_flops, peak_flops
from dit.model.dit import DiTConfig
from dit.model.sizes import SIZES

QK = {"name": "adaln_zero", "qk_norm": True}


def counted_flops(cfg, input_size, channels, batch, backward=False):
    """FLOPs that torch counts, on the meta device: nothing is computed."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    with torch.device("meta"):
        model = cfg.build(input_size, channels, 10)
        x, t, label = (
            torch.empty(batch, channels, height, width),
            torch.empty(batch),
            torch.zeros(batch).long(),
        )
    with FlopCounterMode(display=False) as counter:
        out = model(x, t, {"label": label})
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("cfg", "input_size", "channels"),
    [
        *((DiTConfig(size=size, patch=4), 32, 4) for size in SIZES),
        (DiTConfig(size="S", patch=2, learn_sigma=True), 32, 4),
        (DiTConfig(size="nano", patch=8), 64, 3),
        (DiTConfig(size="nano", patch=1), (6, 10), 16),
        (DiTConfig(width=96, depth=3, heads=6, mlp_ratio=2.5, patch=2, block=QK), 8, 4),
    ],
)
def test_forward_flops_are_those_torch_counts(cfg, input_size, channels):
    assert (
        counted_flops(cfg, input_size, channels, 2) == 2 * cost(cfg, input_size, channels, 10).forward_flops
    )


def test_any_networks_training_flops_can_be_counted():
    """The analytic cost of a DiT, found by counting; neither the network nor its weights change."""
    cfg = DiTConfig(size="nano", patch=2)
    model = cfg.build(8, 4, 10)
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1), {"label": torch.zeros(1).long()}
    moved = (*inputs[:2], {"label": inputs[2]["label"].to("meta")})
    assert counted_training_flops(model, *moved) == cost(cfg, 8, 4, 10).training_flops
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="this torch does not count the CPU's fused attention",
)
def test_forward_flops_are_those_of_the_fused_attention_too():
    cfg = DiTConfig(size="nano", block=QK)
    model = cfg.build(8, 4, 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(3, 4, 8, 8), torch.zeros(3), {"label": torch.zeros(3).long()})
    assert counter.get_total_flops() == 3 * cost(cfg, 8, 4, 10).forward_flops


def test_training_flops_are_three_times_forward_and_nearly_what_torch_counts():
    """The first layers need no gradient of their input, so torch counts a little less."""
    cfg = DiTConfig(size="S", patch=4)
    estimate = cost(cfg, 32, 4, 10)
    assert estimate.training_flops == 6 * estimate.multiply_adds
    assert counted_flops(cfg, 32, 4, 1, backward=True) == pytest.approx(estimate.training_flops, rel=0.01)


@pytest.mark.parametrize(
    ("size", "patch", "giga"),
    [("S", 2, 6.06), ("S", 4, 1.41), ("S", 8, 0.36), ("B", 2, 23.01), ("L", 2, 80.7), ("XL", 2, 118.6)],
)
def test_multiply_adds_are_the_papers_gflops(size, patch, giga):
    cfg = DiTConfig(size=size, patch=patch, learn_sigma=True)
    digits = len(str(giga).split(".")[1])
    assert round(cost(cfg, 32, 4, 1000).multiply_adds / 1e9, digits) == giga


def kept_for_backward(cfg, batch, autocast):
    """Bytes in distinct storages that autograd keeps, parameters aside."""
    model = cfg.build(16, 4, 10)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    x, label = torch.randn(batch, 4, 16, 16), torch.zeros(batch).long()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        out = model(x, torch.rand(batch), {"label": label})
    assert out.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("cfg", "tolerance"),
    [
        (DiTConfig(size="micro"), 0.02),
        (DiTConfig(size="micro", patch=4, mlp_ratio=2.0), 0.02),
        (DiTConfig(size="nano", learn_sigma=True), 0.02),
        (DiTConfig(size="nano", block=QK), 0.12),  # kernels differ in what they keep of an RMSNorm
    ],
)
def test_activations_are_what_autograd_keeps(cfg, tolerance, precision):
    memory = cost(cfg, 16, 4, 10).memory(3, precision=precision)
    kept = kept_for_backward(cfg, 3, precision == "bf16")
    assert memory.activations + memory.copies == pytest.approx(kept, rel=tolerance)


def test_checkpointing_keeps_one_residual_a_block_and_one_block():
    whole, less = (
        cost(DiTConfig(size="S", checkpoint_blocks=c), 32, 4, 1000).memory(8) for c in (False, True)
    )
    residual = 8 * 256 * 384 * 4
    per_block = (whole.activations - less.activations) / 12 + residual
    assert per_block > 10 * residual
    assert 12 * residual < less.activations < 17 * residual  # and what comes after the blocks
    last = less.moments[1].held  # of the last block's backward pass, the others' inputs still there
    assert 12 * residual + per_block < last < 17 * residual + 1.5 * per_block
    # the first block's is the last: all gradients are there by then, and all weights' of the others
    assert less.moments[-1].done > 0.8
    assert less.total < whole.total


def test_states_are_shared_stage_by_stage():
    estimate = cost(DiTConfig(size="S"), 32, 4, 1000)
    full = 4 * estimate.parameters.trainable
    table = 4 * estimate.parameters.position
    share = -(-full // 4)
    expected = {  # stage: parameters, gradients, master, Adam, EMA
        0: (full + table, full, 0, 2 * full, full),
        1: (full + table, full, share, 2 * share, share),
        2: (full + table, share, share, 2 * share, share),
        3: (share + table, share, share, 2 * share, share),
    }
    for stage, parts in expected.items():
        memory = estimate.memory(0, zero_stage=stage, world_size=4)
        got = (memory.parameters, memory.gradients, memory.master, memory.optimizer, memory.ema)
        assert got == parts
        # at stage 3 the backward pass has the blocks' weights in its graph, and two blocks' gathered
        weights = 4 * 12 * estimate.blocks[0].linear_parameters + 8 * estimate.blocks[0].parameters
        assert memory.total == sum(parts) + (weights if stage == 3 else 0)
    assert estimate.memory(0, averages=0).ema == 0
    assert estimate.memory(0, averages=3).ema == 3 * estimate.memory(0).ema


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "bf17"}, "unknown precision 'bf17'; did you mean bf16"),
        ({"zero_stage": 4}, "ZeRO stage of 0 to 3"),
        ({"world_size": 0}, "world size of 1 or more"),
    ],
)
def test_impossible_memory_questions_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        cost(DiTConfig(size="nano"), 8, 4, 10).memory(1, **arguments)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40", None),
        ("AMD EPYC 9654", None),
        ("cpu", None),
    ],
)
def test_peaks(name, peak):
    assert peak_flops(name) == peak


def test_utilisation_and_hours_are_two_views_of_one_rate():
    estimate = cost(DiTConfig(size="XL", learn_sigma=True), 32, 4, 1000)
    peak = 8 * peak_flops("NVIDIA H100 80GB HBM3")
    rate = 2000.0  # images/s on eight devices
    mfu = 6 * 118.621421568e9 * rate / peak
    assert estimate.hours(1_000_000, peak, mfu) == pytest.approx(1_000_000 / rate / 3600)

"""The whole network: counts, shapes, zero at first, gradients everywhere, precision, one graph."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from dit.config import ConfigError, from_dict, to_dict
from dit.model.block import BLOCKS
from dit.model.cost import cost
from dit.model.dit import MODELS, DiT, DiTConfig
from dit.model.embed import position_table
from dit.model.sizes import SIZES

# Parameters of the reference at 32×32×4 latents, both output halves and 1,001 label rows, its position table
# counted: depth·(18·D² + 15·D) in blocks, and the rest. XL/2 is the figure its authors' checkpoint has.
REFERENCE_PARAMETERS = {
    ("S", 2): 32_963_360,
    ("S", 4): 32_945_024,
    ("S", 8): 33_148_160,
    ("B", 2): 130_512_416,
    ("B", 4): 130_475_648,
    ("B", 8): 130_881_536,
    ("L", 2): 458_102_816,
    ("L", 4): 458_053_760,
    ("L", 8): 458_594_816,
    ("XL", 2): 675_129_632,
    ("XL", 4): 675_074_432,
    ("XL", 8): 675_683_072,
}
COND = {"label": torch.tensor([0, 9, -1]), "drop": torch.tensor([False, False, True])}


def on_meta(cfg, input_size=32, channels=4, num_classes=1000):
    with torch.device("meta"):
        return cfg.build(input_size, channels, num_classes)


def inputs(cfg, size=8):
    generator = torch.Generator().manual_seed(3)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(3, 4, height, width, generator=generator), torch.rand(3, generator=generator), COND


def trained(cfg, size=8, std=0.1):
    """A model with noise on every parameter, as if trained."""
    model = cfg.build(size, 4, 10, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("size", "patch"), REFERENCE_PARAMETERS)
def test_reference_sizes_have_the_reference_parameter_counts(size, patch):
    cfg = DiTConfig(size=size, patch=patch, learn_sigma=True)
    model = on_meta(cfg)
    trainable = sum(p.numel() for p in model.parameters())
    assert trainable + model.position.numel() == REFERENCE_PARAMETERS[size, patch]
    # and by the formula, the parts written out
    d, depth, _ = SIZES[size]
    tokens, patch_in, patch_out = (32 // patch) ** 2, 4 * patch**2, 8 * patch**2
    blocks = depth * (18 * d * d + 15 * d)
    ends = (patch_in + 1) * d + (257 * d + d * d + d) + 1001 * d + (2 * d * d + 2 * d) + (d + 1) * patch_out
    assert blocks + ends + tokens * d == REFERENCE_PARAMETERS[size, patch]


def test_the_position_table_is_counted_by_the_reference_and_is_a_buffer_here():
    model = on_meta(DiTConfig(size="XL", learn_sigma=True))
    assert model.position.numel() == 294_912
    assert "position" not in model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 675_129_632 - 294_912


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", BLOCKS.names())
def test_every_size_has_the_parameters_its_cost_says(size, block):
    cfg = from_dict(DiTConfig, {"size": size, "block": block})
    model = on_meta(cfg)
    counts = cost(cfg, 32, 4, 1000).parameters
    assert sum(p.numel() for p in model.parameters()) == counts.trainable
    for part in ("patch_embed", "time_embed", "conditioners", "blocks", "output"):
        assert sum(p.numel() for p in getattr(model, part).parameters()) == getattr(counts, part), part
    assert (model.dims.width, model.dims.depth, model.dims.heads) == SIZES[size]


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(("size", "patch"), [(8, 2), (8, 4), (16, 8), ((4, 12), 2)])
def test_shapes(size, patch, learn_sigma):
    cfg = DiTConfig(size="nano", patch=patch, learn_sigma=learn_sigma)
    model = cfg.build(size, 4, 10)
    x, t, cond = inputs(cfg, size)
    assert model(x, t, cond).shape == (3, 8 if learn_sigma else 4, *x.shape[2:])


def test_another_input_size_is_refused():
    model = DiTConfig(size="nano").build(8, 4, 10)
    with pytest.raises(ValueError, match="built for that size"):
        model(torch.zeros(3, 4, 16, 16), torch.zeros(3), COND)


@pytest.mark.parametrize("name", MODELS.names())
@pytest.mark.parametrize("block", BLOCKS.names())
@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_is_exactly_zero_at_first(name, block, autocast):
    cfg = MODELS.parse({"name": name, "size": "nano", "block": block})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = cfg.build(8, 4, 10)(*inputs(cfg))
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.zeros_like(out))


def test_initialisation_is_the_reference_and_follows_the_generator():
    cfg = DiTConfig(size="micro", block={"name": "adaln_zero", "qk_norm": True})
    model, again = (cfg.build(8, 4, 10, torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "modulation" in name or name.startswith("output"):
            assert not parameter.any(), name
        elif name.startswith(("time_embed", "conditioners")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("gain"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:  # Xavier: uniform within sqrt(6 / (in + out))
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.98 * bound < parameter.abs().max().item() <= bound, name


def test_a_model_made_on_meta_is_filled_by_reset_parameters():
    cfg = DiTConfig(size="nano")
    model = on_meta(cfg, 8, 4, 10).to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(7))
    expected = cfg.build(8, 4, 10, torch.Generator().manual_seed(7))
    assert torch.equal(model.position, position_table(64, (4, 4)).float())
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("block", BLOCKS.names())
@pytest.mark.parametrize("labels", [[0, 1, 2], [-1, -1, -1]])
def test_the_gradient_reaches_every_parameter_whatever_the_labels(block, labels):
    cfg = from_dict(DiTConfig, {"size": "nano", "block": block})
    model = trained(cfg)
    x, t, _ = inputs(cfg)
    model(x, t, {"label": torch.tensor(labels)}).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(autocast):
    grads = []
    for checkpoint_blocks in (False, True):
        cfg = DiTConfig(size="nano", checkpoint_blocks=checkpoint_blocks)
        model = trained(cfg)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(*inputs(cfg))
        out.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*grads, strict=True):
        assert torch.equal(kept, recomputed)


def test_checkpointed_blocks_run_twice():
    runs = []
    cfg = DiTConfig(size="nano", checkpoint_blocks=True)
    model = trained(cfg)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    out = model(*inputs(cfg))
    assert len(runs) == 2
    out.sum().backward()
    assert len(runs) == 4


def test_a_dropped_label_is_the_null_condition():
    cfg = DiTConfig(size="nano")
    model = trained(cfg)
    x, t, _ = inputs(cfg)
    label = torch.tensor([3, 3, 3])
    with torch.no_grad():
        null = model(x, t, {"label": torch.tensor([-1, -1, -1])})
        assert torch.equal(model(x, t, {"label": label, "drop": torch.ones(3, dtype=torch.bool)}), null)
        assert not torch.equal(model(x, t, {"label": label}), null)


def test_the_network_is_its_parts_in_the_reference_order():
    cfg = DiTConfig(size="nano", learn_sigma=True)
    model = trained(cfg)
    x, t, cond = inputs(cfg)
    rows = torch.tensor([0, 9, 10])  # the last sample is dropped
    with torch.no_grad():
        c = F.silu(model.time_embed(t) + model.conditioners[0].table.weight[rows])
        h = model.patch_embed(x) + position_table(64, (4, 4)).float()
        for block in model.blocks:
            h = block(h, c)
        patches = model.output(h, c).view(3, 4, 4, 2, 2, 8)  # n h w p q c
        expected = patches.permute(0, 5, 1, 3, 2, 4).reshape(3, 8, 8, 8)
        assert torch.equal(model(x, t, cond), expected)


def test_a_stored_position_table_is_state_and_no_parameter():
    model, computed = (DiTConfig(size="nano", stored_position=s).build(8, 4, 10) for s in (True, False))
    assert torch.equal(model.position, computed.position)
    assert set(model.state_dict()) - set(computed.state_dict()) == {"position"}
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in computed.named_parameters()]


def test_float64_goes_all_the_way_through():
    cfg = DiTConfig(size="nano")
    model = trained(cfg)
    x, t, cond = inputs(cfg)
    single = model(x, t, cond)
    double = model.double()(x.double(), t.double(), cond)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_bfloat16_products_stay_near_float32():
    """By autocast and by bfloat16 parameters; a float32 output of either kind."""
    cfg = DiTConfig(size="nano")
    model = trained(cfg, std=0.03)
    x, t, cond = inputs(cfg)
    with torch.no_grad():
        exact = model(x, t, cond)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = model(x, t, cond)
        narrow = model.bfloat16()(x, t, cond)
    for out in (under_autocast, narrow):
        assert out.dtype == torch.float32
        assert 0 < (out - exact).norm() < 0.03 * exact.norm()


def test_the_time_is_seen_in_full_under_autocast():
    cfg = DiTConfig(size="nano")
    model = trained(cfg)
    x, t, cond = inputs(cfg)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model.time_embed(t), model.time_embed(t + 1e-4))
        with pytest.raises(ValueError, match="float32 or float64, got"):
            model(x, t.bfloat16(), cond)


def test_the_network_compiles_to_one_graph_with_and_without_checkpointing():
    for checkpoint_blocks in (False, True):
        torch.compiler.reset()
        cfg = DiTConfig(width=32, depth=1, heads=2, checkpoint_blocks=checkpoint_blocks)
        model = trained(cfg)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = compiled(*inputs(cfg)), model(*inputs(cfg))
        torch.testing.assert_close(out, expected)


def test_compile_blocks_compiles_once_for_all_blocks():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    cfg = DiTConfig(width=32, depth=3, heads=2)
    model = trained(cfg)
    expected = model(*inputs(cfg))
    model.compile_blocks(fullgraph=True, backend=counter)
    out = model(*inputs(cfg))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert counter.frame_count == 1


def test_a_config_survives_its_plain_form():
    cfg = DiTConfig(width=32, depth=1, heads=2, block={"name": "adaln_zero", "qk_norm": True}, num_classes=12)
    plain = to_dict(cfg)
    assert plain["name"] == "dit"
    assert plain["block"]["qk_norm"] == {"name": "rms", "gain": True, "epsilon": None}
    assert plain["block"]["mlp_epsilon"] == 1e-6
    assert MODELS.parse(plain) == cfg
    assert hash(MODELS.parse(plain)) == hash(cfg)
    assert isinstance(MODELS.parse("dit").build(8, 4, 10), DiT)


def test_classes_come_from_the_data_unless_the_config_has_room_for_more():
    assert DiTConfig(size="nano").dims(8, 4, 10).num_classes == 10
    assert DiTConfig(size="nano", num_classes=1000).dims(8, 4, 10).num_classes == 1000
    with pytest.raises(ConfigError, match="num_classes is 9 and the data have 10"):
        DiTConfig(size="nano", num_classes=9).dims(8, 4, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "SX"}, "unknown size 'SX'"),
        ({"size": "S", "width": 64}, "got size 'S' and also width"),
        ({"width": 64, "heads": 2}, "got only width, heads"),
        ({"width": 65, "depth": 1, "heads": 5}, "not a multiple of 4"),
        ({"width": 64, "depth": 1, "heads": 3}, "not a multiple of heads 3"),
        ({"width": 64, "depth": 0, "heads": 2}, "depth must be at least 1"),
        ({"size": "S", "patch": 0}, "patch"),
        ({"size": "S", "mlp_ratio": 0.0}, "mlp_width must be at least 1"),
        ({"size": "S", "mlp_ratio": math.inf}, "mlp_ratio must be finite, got inf"),
        ({"size": "S", "block": "adaln"}, "unknown block 'adaln'; did you mean adaln_zero"),
        ({"size": "S", "cond": ["clas"]}, "unknown conditioner 'clas'; did you mean class"),
        ({"sise": "S"}, "did you mean size"),
    ],
)
def test_impossible_configs_are_refused_with_a_reason(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(DiTConfig, fields)


# --- tokens behind blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS.names())
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_taps_are_the_image_s_tokens_behind_blocks_beside_the_same_prediction(name, checkpoint_blocks):
    """Not those of registers or of conditions in the sequence, in the order asked for; gradients go through them."""
    beside = {
        "registers": 2,
        "cond": [{"name": "class", "context": 3}],
        "checkpoint_blocks": checkpoint_blocks,
    }
    cfg = from_dict(MODELS[name], {"width": 32, "depth": 3, "heads": 2, **beside})
    model, seen = trained(cfg), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(out))
    said, taps = model(*inputs(cfg), taps=(3, 1))
    behind = [out[0] if isinstance(out, tuple) else out for out in seen]
    assert len(behind) == 3
    assert [tuple(tap.shape) for tap in taps] == [(3, 16, 32)] * 2
    for tap, n in zip(taps, (3, 1), strict=True):
        assert torch.equal(tap, behind[n - 1][:, -16:])
    assert torch.equal(said, model(*inputs(cfg)))
    taps[1].square().sum().backward()
    assert float(model.blocks[0].mlp.fc1.weight.grad.abs().max()) > 0
    assert model.blocks[1].mlp.fc1.weight.grad is None


@pytest.mark.parametrize("wrong", [0, 4])
def test_a_tap_behind_no_block_is_refused(wrong):
    cfg = DiTConfig(width=32, depth=3, heads=2)
    with pytest.raises(ValueError, match=f"tap {wrong}: the network has blocks 1 to 3"):
        trained(cfg)(*inputs(cfg), taps=(1, wrong))


def test_a_network_with_taps_compiles_to_one_graph():
    torch.compiler.reset()
    cfg = DiTConfig(width=32, depth=1, heads=2)
    model = trained(cfg)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out, expected = (network(*inputs(cfg), taps=(1,)) for network in (compiled, model))
    torch.testing.assert_close(out, expected)

"""diffusers' own class on the same weights, both ways, and the folders that are none of a DiT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from dit.config import from_dict
from dit.interop.pipeline import transformer
from dit.interop.weights import LABELS, WeightsError, network, to_ours
from dit.model.dit import DiT, DiTConfig
from tests.gaussian import normal
from tests.interop.random_models import NANO, random_model

EXACT = {"rtol": 1e-5, "atol": 1e-5}
OTHER = {"block": {"name": "adaln_zero", "mlp_epsilon": 1e-5}, "learn_sigma": True}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"size": 8, "channels": 4, "classes": 10},
    "other": {"size": 8, "channels": 4, "classes": 10, **OTHER},
    "patches": {"size": 12, "channels": 3, "classes": 2, "patch": 4, "heads": 2, "depth": 3},
    "wide": {"size": 4, "channels": 16, "classes": 5, "patch": 1, "width": 48, "heads": 3, "depth": 1},
}


def theirs(model: DiT, classes: int) -> Any:
    made = DiTTransformer2DModel.from_config(transformer.config_of(model, classes))
    made.load_state_dict(transformer.state_of(model, classes))
    return made.eval()


def outputs(model: DiT, made: Any, null: int) -> tuple[Tensor, Tensor]:
    """Of both, for times from end to end, and none between steps; the last label is no class."""
    d = model.dims
    x, t = normal(4, d.channels, *d.image_size).float(), torch.tensor([0.0, 17.0, 500.25, 999.0])
    label = torch.tensor([0, 1, 1, -1])
    with torch.no_grad():
        ours = model(x, t, {"label": label})
        return ours, made(x, t, class_labels=torch.where(label < 0, null, label)).sample


@pytest.mark.parametrize("name", SHAPES)
def test_their_class_computes_what_ours_does(name: str) -> None:
    model = random_model(**SHAPES[name], time_frequencies="ddpm")
    for classes in (model.dims.num_classes, 1000):
        ours, got = outputs(model, theirs(model, classes), classes)
        assert ours.std() > 0.1
        torch.testing.assert_close(got, ours, **EXACT)


def test_other_sinusoids_of_time_are_seen_in_the_output() -> None:
    """Why there is a key for them: at 127 in place of 128 nothing else differs."""
    model = random_model(**SHAPES["plain"])
    ours, got = outputs(model, theirs(model, 10), 10)
    assert (ours - got).abs().max() > 0.01


@pytest.mark.parametrize("kwargs", [{}, {"safe_serialization": False}, {"max_shard_size": "20KB"}])
def test_a_folder_that_they_saved_is_ours_to_the_bit(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model = random_model(**SHAPES["other"], time_frequencies="ddpm")
    theirs(model, 10).save_pretrained(tmp_path, **kwargs)
    found = transformer.read(tmp_path)
    assert found.model() == from_dict(DiTConfig, {**NANO, **OTHER, "time_frequencies": "ddpm"})
    back = network(to_ours(found.state, found.arguments), found.arguments).state_dict()
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_half_precision_and_the_older_class_are_read(tmp_path: Path) -> None:
    model = random_model(**SHAPES["plain"], time_frequencies="ddpm")
    theirs(model, 10).half().save_pretrained(tmp_path)
    change(tmp_path, _class_name="Transformer2DModel", cross_attention_dim=None)
    found = transformer.read(tmp_path)
    assert {tensor.dtype for tensor in found.state.values()} == {torch.float32}
    assert torch.equal(found.state[LABELS], model.conditioners[0].table.weight.half().float())


def test_embedders_that_differ_are_refused(tmp_path: Path) -> None:
    """As their class starts: each block's own. Copies of one tensor are one network of ours."""
    torch.manual_seed(0)
    settings = transformer.config_of(random_model(**SHAPES["plain"]), 10)
    DiTTransformer2DModel.from_config(settings).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"transformer_blocks\.1\.norm1\.emb.* is another than in block 0"):
        transformer.read(tmp_path)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sample_size": [8, 12]}, r"sample_size is \[8, 12\], .* only square inputs are known"),
        ({"num_attention_heads": None}, "num_attention_heads is null, expected a whole number above 0"),
        ({"attention_head_dim": "8"}, "attention_head_dim is '8', expected a whole number"),
        ({"in_channels": None}, "in_channels is null"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"norm_eps": None}, "norm_eps is null, expected a number"),
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel', expected DiTTransformer2DModel"),
        ({"activation_fn": "geglu"}, "activation_fn = 'geglu', not 'gelu-approximate'"),
        ({"out_channels": 5}, "out_channels = 5, neither in_channels nor twice as many"),
        ({"num_layers": 3}, r"missing: transformer_blocks\.2\."),
        ({"num_layers": 1}, r"unexpected: transformer_blocks\.1\."),
        ({"num_embeds_ada_norm": 9}, r"embedding_table\.weight: is \(11, 32\), expected \(10, 32\)"),
        ({"num_layers": "two"}, "num_layers is 'two'"),
    ],
)
def test_what_is_no_dit_is_refused(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    theirs(random_model(**SHAPES["plain"]), 10).save_pretrained(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(WeightsError, match=says):
        transformer.read(tmp_path)


def test_files_that_are_not_there_or_damaged_are_named(tmp_path: Path) -> None:
    theirs(random_model(**SHAPES["plain"]), 10).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cannot read weights from"):
        transformer.read(tmp_path)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        transformer.read(tmp_path)
    for text, says in (("{", "is not JSON"), ("[]", "holds no settings")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=says):
            transformer.read(tmp_path)
    with pytest.raises(WeightsError, match=r"cannot read .*config\.json"):
        transformer.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mlp_ratio": 2.0}, "MLPs of 4 times its width, these are 2 times"),
        ({"block": {"name": "adaln_zero", "qk_norm": True}}, r"differs in block\.qk_norm"),
        ({"cond": []}, "differs in cond"),
    ],
)
def test_a_network_that_they_lack_is_not_given_out(fields: dict[str, Any], says: str) -> None:
    model = random_model(**SHAPES["plain"], **fields)
    with pytest.raises(WeightsError, match=says):
        theirs(model, 10)


def test_a_position_table_that_is_not_the_computed_one_is_told() -> None:
    model = random_model(**SHAPES["plain"])
    assert transformer.position_error(model) == 0.0
    model.position += 0.01
    assert transformer.position_error(model) == pytest.approx(0.01, rel=1e-4)

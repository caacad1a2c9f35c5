"""Conditioners: the null condition, labels out of range, and branches that start at nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dit.config import ConfigError, from_dict
from dit.model.block import AdaLNZero
from dit.model.cond import CONDITIONERS, ClassConditioner, ConditionerConfig, Injection, joined
from dit.model.dit import DiT, DiTConfig

CFG = DiTConfig(size="nano", patch=4)
COND = {"label": torch.tensor([0, 4, -1]), "drop": torch.tensor([False, True, False])}


def perturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_dropped_label_is_no_label_is_the_last_row():
    conditioner = ClassConditioner(5, 8)
    vector = conditioner(COND).vector
    assert torch.equal(vector, conditioner.table.weight[[0, 5, 5]])
    assert torch.equal(conditioner({"label": torch.tensor([0, -1, -7])}).vector, vector)


def test_data_without_classes_have_the_null_row_alone():
    conditioner = ClassConditioner(0, 8)
    label = torch.full((2,), -1)
    assert torch.equal(conditioner({"label": label}).vector, conditioner.table.weight[[0, 0]])


def test_the_whole_table_has_a_gradient_when_nothing_is_dropped():
    conditioner = ClassConditioner(5, 8)
    conditioner({"label": torch.tensor([1, 1])}).vector.sum().backward()
    grad = conditioner.table.weight.grad
    assert grad.shape == (6, 8)
    assert grad.abs().sum(1).tolist() == [0, 16, 0, 0, 0, 0]


@pytest.mark.parametrize("label", [5, 6, 1000])
def test_a_label_that_is_no_class_never_becomes_the_null_row(label):
    with pytest.raises(ValueError, match=rf"label {label}: this model has classes 0 to 4"):
        ClassConditioner(5, 8)({"label": torch.tensor([label])})


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"needs cond\['label'\].*got \['text'\]"):
        ClassConditioner(5, 8)({"text": torch.zeros(1)})


def test_injections_are_joined_and_an_empty_one_changes_nothing():
    full = Injection(torch.ones(1, 2), torch.ones(1, 3, 2), torch.ones(1, 1, 4, 4), (torch.ones(1, 4, 2),))
    for pair in ((full, Injection()), (Injection(), full)):
        total = joined(pair)
        assert all(a is b for a, b in zip(total[:3], full[:3], strict=True))
        assert total.residuals[0] is full.residuals[0]
    assert joined([]) == Injection()
    twice = joined([full, full._replace(residuals=full.residuals * 2)])
    assert torch.equal(twice.vector, torch.full((1, 2), 2.0))
    assert twice.tokens.shape == (1, 6, 2)
    assert twice.channels.shape == (1, 2, 4, 4)
    assert [r.flatten()[0].item() for r in twice.residuals] == [2.0, 1.0]


@pytest.mark.parametrize("name", CONDITIONERS.names())
def test_every_conditioner_counts_its_own_parameters(name):
    dims = CFG.dims(8, 4, 10)
    config = CONDITIONERS[name]()
    assert config.parameters(dims) == sum(p.numel() for p in config.build(dims).parameters())


class Everything(nn.Module):
    """A conditioner that fills the vector, the channels and the residuals, from layers that start at zero."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.vector, self.residual = nn.Linear(1, width), nn.Linear(1, width)
        self.tokens = tokens

    def zero_layers(self) -> list[nn.Linear]:
        return [self.vector, self.residual]

    def forward(self, cond: dict[str, Tensor]) -> Injection:
        key = cond["key"][:, None]  # (B, 1)
        residual = self.residual(key)[:, None].expand(-1, self.tokens, -1)  # (B, T, D)
        channels = key[:, :, None, None].expand(-1, 3, 8, 8)  # (B, 3, 8, 8)
        return Injection(vector=self.vector(key), channels=channels, residuals=(residual,))


class EverythingConfig(ConditionerConfig):
    extra_channels = 3

    def build(self, dims):
        return Everything(dims.width, dims.tokens)

    def parameters(self, dims):
        return 4 * dims.width


def test_a_new_branch_leaves_a_trained_model_unchanged_and_then_learns(monkeypatch):
    monkeypatch.setitem(CONDITIONERS._classes, "everything", EverythingConfig)
    dims = CFG.dims(8, 4, 10)
    plain, more = DiT(CFG, dims), DiT(replace(CFG, cond=(*CFG.cond, EverythingConfig())), dims)
    perturb(plain)
    missing, unexpected = more.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == [
        "conditioners.1.residual.bias",
        "conditioners.1.residual.weight",
        "conditioners.1.vector.bias",
        "conditioners.1.vector.weight",
        "patch_embed.extra.weight",
    ]
    assert unexpected == []
    x, t, cond = torch.randn(3, 4, 8, 8), torch.rand(3), {**COND, "key": torch.randn(3)}
    out = more(x, t, cond)
    assert torch.equal(out, plain(x, t, cond))
    out.square().mean().backward()
    for name in missing:
        assert more.get_parameter(name).grad.abs().max() > 0, name


class TokensConfig(EverythingConfig):
    gives_tokens = True


def test_tokens_need_a_block_that_reads_them(monkeypatch):
    monkeypatch.setitem(CONDITIONERS._classes, "tokens", TokensConfig)
    with pytest.raises(ConfigError, match="block adaln_zero does not read the tokens"):
        from_dict(DiTConfig, {"size": "nano", "cond": (TokensConfig(),)})


class Reading(nn.Module):
    def forward(self, x: Tensor, c: Tensor, tokens: Tensor) -> Tensor:
        return x + tokens.mean(1, keepdim=True)


class ReadingConfig(AdaLNZero):
    reads_tokens = True

    def build(self, dims):
        return Reading()


class Tokens(nn.Module):
    def forward(self, cond: dict[str, Tensor]) -> Injection:
        return Injection(tokens=cond["key"][:, None, None].expand(-1, 2, 64))


class GivingConfig(TokensConfig):
    extra_channels = 0

    def build(self, dims):
        return Tokens()


def test_tokens_reach_the_blocks_and_residuals_must_have_one_each(monkeypatch):
    monkeypatch.setitem(CONDITIONERS._classes, "giving", GivingConfig)
    torch.manual_seed(0)
    dims = CFG.dims(8, 4, 10)
    model = DiT(replace(CFG, block=ReadingConfig(), cond=(GivingConfig(), GivingConfig())), dims)
    perturb(model)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    first, second = (
        model(x, t, {"key": key}) for key in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 5.0]))
    )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    model.conditioners.append(_Residuals())
    with pytest.raises(ValueError, match="got 3 residuals for 2 blocks"):
        model(x, t, {"key": torch.zeros(2)})


class _Residuals(nn.Module):
    def forward(self, cond: dict[str, Tensor]) -> Injection:
        return Injection(residuals=(torch.zeros(()),) * 3)

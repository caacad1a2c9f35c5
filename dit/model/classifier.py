"""A classifier of noisy latents: the DiT's blocks with logits at the end, for classifier guidance.

model = ClassifierConfig(size="nano").build(input_size=8, channels=4, num_classes=10)
logits = model(x, model_time, {})
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from torch import Tensor, nn

from dit.config import ConfigError, config
from dit.flow.predict import Cond
from dit.model.block import BLOCKS, AdaLNZero, BlockConfig
from dit.model.dims import Dims
from dit.model.dit import DiT, DiTConfig, Tapped
from dit.model.embed import WideLinear
from dit.model.modulation import FullRows, cut, modulate


@config
class ClassifierConfig:
    """A transformer of a `size`, or of a `width`, `depth` and `heads`. Input and classes come from the data."""

    size: str | None = None  # as the model's: nano, micro, tiny, S, B, L, XL; S if no width is given either
    patch: int = 2  # latent pixels of a patch, on a side
    width: int | None = None  # channels of a token; null = by size
    depth: int | None = None  # blocks of the transformer; null = by size
    heads: int | None = None  # of the attention, divides width; null = by size
    mlp_ratio: float = 4.0  # hidden width of the MLPs over width
    checkpoint_blocks: bool = False  # recompute blocks in the backward pass: a third more work, less memory
    block: Annotated[BlockConfig, BLOCKS] = AdaLNZero()  # kind of transformer block

    def __post_init__(self) -> None:
        """Refuse what no DiT could be built from."""
        self._trunk()

    def _trunk(self) -> DiTConfig:
        return DiTConfig(**{f.name: getattr(self, f.name) for f in fields(self)}, cond=())

    def build(self, input_size: int | tuple[int, int], channels: int, num_classes: int) -> Classifier:
        """The initialised network for inputs (B, channels, *input_size), from torch's global generator.

        ConfigError for fewer than two classes.
        """
        if num_classes < 2:
            raise ConfigError(f"a classifier needs data of at least two classes, these have {num_classes}")
        dims = self._trunk().dims(input_size, channels, num_classes)
        return Classifier(self._trunk(), dims)


class LogitLayer(nn.Module):
    """Modulated norm, mean over the tokens, and a linear layer that starts at zero: all in float32 at least."""

    def __init__(self, cfg: DiTConfig, dims: Dims):
        super().__init__()
        self.norm = cfg.block.norm.build(dims.width)
        self.modulation = FullRows(dims.width, 2 * dims.width)
        self.proj = WideLinear(dims.width, dims.num_classes)

    def zero_layers(self) -> list[nn.Module]:
        """Layers that start at zero: with them every class is as likely, and the loss is ln(classes)."""
        return [self.modulation, self.proj]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), c (B, D) after its SiLU -> (B, classes)."""
        shift, scale = cut(self.modulation(c), 2)  # each (B, 1, D)
        out: Tensor = self.proj(modulate(self.norm(x), shift, scale).mean(1))  # (B, classes)
        return out


class Classifier(DiT):
    """log p(y | x, t) up to a constant, of the noisy x."""

    @staticmethod
    def output_layer(cfg: DiTConfig, dims: Dims) -> nn.Module:
        """Logits of the classes."""
        return LogitLayer(cfg, dims)

    def forward(
        self, x: Tensor, model_time: Tensor, cond: Cond, taps: tuple[int, ...] = ()
    ) -> Tensor | Tapped:
        """x (B, C, H, W), model_time (B,) float32 or float64 -> logits (B, classes), float32 at least.

        Nothing in cond is read: the network is called as every other one is.
        """
        h, c, _, tapped = self.hidden(x, model_time, cond, taps)  # (B, T, D), (B, D)
        logits: Tensor = self.output(h, c)  # (B, classes)
        return (logits, tapped) if taps else logits

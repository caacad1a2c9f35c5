"""A decoupled diffusion transformer: an encoder makes each token's condition, a decoder the prediction.

Wang et al., arXiv 2504.05741. The encoder is a DiT without its end; what it says of a token, with the time, modulates
that token in the decoder, which sees the noisy input anew. The decoder may be wider and shallower (DiT^DH, arXiv
2510.11690, section 5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dit.compiling import compile_forward
from dit.config import ConfigError, config
from dit.flow.predict import Cond
from dit.model.block import OutputCost, OutputLayer, output_cost, run_block
from dit.model.dims import Dims
from dit.model.dit import DiT, DiTConfig, Tapped
from dit.model.embed import PatchEmbed, WideLinear
from dit.model.kinds import MODELS
from dit.model.recompute import NOTHING, Recompute
from dit.model.stream import as_stream


@MODELS.register("ddt")
@config
class DDTConfig(DiTConfig):
    """A DDT: the keys of a DiT are its encoder's, and its decoder has blocks of the same kind."""

    decoder_depth: Annotated[int, Field(ge=1)] = 2  # blocks of the decoder, beside the encoder's `depth`
    decoder_width: Annotated[int, Field(ge=4)] | None = None  # channels of its tokens; null = the encoder's
    decoder_heads: Annotated[int, Field(ge=1)] | None = (
        None  # of its attention; null = as wide as the encoder's
    )

    def __post_init__(self) -> None:
        """Refuse what a decoder whose tokens each have a condition of their own cannot have."""
        DiTConfig.__post_init__(self)
        if self.block.shared_rows or self.block.carries_value:
            raise ConfigError(
                "model ddt takes no block.modulation but full and no value_residual: its decoder is modulated token by "
                "token, its encoder image by image, and they share no layer"
            )
        decoder = self.decoder(self.dims(self.patch, 1, 0))
        if self.block.rope is not None:
            self.block.rope.check(decoder.head_width)

    @property
    def blocks(self) -> int:
        """Blocks of encoder and decoder."""
        return super().blocks + self.decoder_depth

    def decoder(self, dims: Dims) -> Dims:
        """The decoder's shapes, of the encoder's."""
        width = self.decoder_width or dims.width
        return replace(
            dims,
            width=width,
            depth=self.decoder_depth,
            heads=self.decoder_heads or max(1, width // dims.head_width),
            mlp_width=int(width * self.mlp_ratio),
            beside=0,
            modulated=dims.tokens,
        )

    def stacks(self, dims: Dims) -> tuple[Dims, ...]:
        """The encoder's shapes, and the decoder's."""
        return (*super().stacks(dims), self.decoder(dims))

    def output_cost(self, dims: Dims) -> OutputCost:
        """The decoder's cost."""
        own = self.decoder(dims)
        d, t, patch = own.width, own.tokens, own.channels * own.patch**2
        bridge = dims.width if d != dims.width else 0  # inputs of the layer between two widths
        end = output_cost(own, self.output_norm or self.block.norm)
        return OutputCost(
            parameters=end.parameters + (patch + 1) * d + (bridge + 1) * d * (bridge > 0),
            multiply_adds=end.multiply_adds + t * (patch + bridge) * d,
            saved=end.saved + t * (patch + 2 * dims.width + d),
            blocks=(self.block.cost(own),) * own.depth,
        )

    def _network(self, dims: Dims, generator: torch.Generator | None = None) -> DDT:
        """The network of these shapes, initialised in the standard way."""
        return DDT(self, dims, generator)


class DDT(DiT):
    """The network: `blocks` are the encoder's, `output` is the decoder."""

    output: Decoder

    @staticmethod
    def output_layer(cfg: DiTConfig, dims: Dims) -> nn.Module:
        """The decoder."""
        return Decoder(cast(DDTConfig, cfg), dims)

    def tables(self) -> dict[str, Tensor]:
        """The buffers by name; the decoder's too."""
        found = super().tables()
        if self.cfg.block.rope is not None:
            own = self.output.dims
            found["output.rotation"] = self.cfg.block.rope.table(own.grid, own.head_width)
        return found

    def compile_blocks(self, **options: object) -> None:
        """Compile the blocks of encoder and decoder in place."""
        super().compile_blocks(**options)
        for block in self.output.blocks:
            compile_forward(block, **options)

    def forward(
        self, x: Tensor, model_time: Tensor, cond: Cond, taps: tuple[int, ...] = ()
    ) -> Tensor | Tapped:
        """x (B, C, H, W), model_time (B,) float32 or float64, cond -> prediction, at least float32.

        With taps (n = behind the encoder's n-th block) the prediction and their tokens, as a DiT gives them.
        """
        h, _, time, tapped = self.hidden(x, model_time, cond, taps)  # (B, T, D), (B, D)
        again = self.recompute.after(len(self.blocks))
        said = self.as_image(self.output(x, F.silu(time.unsqueeze(1) + h), again), x)
        return (said, tapped) if taps else said

    def encode(self, x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """What the encoder says of each token, (B, T, D): the part of `forward` that evaluations may share."""
        return self.hidden(x, model_time, cond)[0]

    def decode(self, x: Tensor, model_time: Tensor, said: Tensor) -> Tensor:
        """The prediction from what the encoder says; of this very x and time it is `forward`'s, to the bit."""
        time = self.time_embed(model_time)  # (B, D)
        return self.as_image(self.output(x, F.silu(time.unsqueeze(1) + said)), x)


class Decoder(nn.Module):
    """Says the prediction of an input whose every token has a condition of its own."""

    rotation: Tensor | None

    def __init__(self, cfg: DDTConfig, dims: Dims):
        super().__init__()
        self.dims = cfg.decoder(dims)
        self.residual = cfg.residual
        width = self.dims.width
        self.patch_embed = PatchEmbed(self.dims)
        self.bridge = None if width == dims.width else WideLinear(dims.width, width)
        self.blocks = nn.ModuleList(cfg.block.build(self.dims) for _ in range(self.dims.depth))
        self.end = OutputLayer(self.dims, cfg.output_norm or cfg.block.norm)
        turns = (
            None if cfg.block.rope is None else torch.empty(2, self.dims.tokens, self.dims.head_width // 2)
        )
        self.register_buffer("rotation", turns, persistent=False)

    def forward(self, x: Tensor, c: Tensor, recompute: Recompute = NOTHING) -> Tensor:
        """x (B, C, H, W), c (B, T, D) what the encoder says of each token -> (B, T, p·p·C)."""
        if self.bridge is not None:
            c = self.bridge(c)  # (B, T, D')
        h = as_stream(self.patch_embed(x), self.residual, self.patch_embed.proj.weight.dtype)  # (B, T, D')
        carried = {} if self.rotation is None else {"rotation": self.rotation}
        for i, block in enumerate(self.blocks):
            h = run_block(block, recompute.at(i), carried, h, c)  # (B, T, D')
        out: Tensor = self.end(h, c)  # (B, T, p·p·C)
        return out

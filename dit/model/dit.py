"""The diffusion transformer: patches and time in, blocks, patches out (Peebles & Xie, arXiv 2212.09748).

    model = DiTConfig(size="S", patch=2).build(input_size=32, channels=4, num_classes=1000)
    prediction = model(x, model_time, {"label": label, "drop": drop})

A size, a block, a conditioner: each is an entry of its own table, and the network knows none by name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dit.compiling import compile_forward
from dit.config import ConfigError, config
from dit.flow.predict import Cond
from dit.model.block import BLOCKS, AdaLNZero, BlockConfig, OutputCost, OutputLayer, output_cost, run_block
from dit.model.cond import CONDITIONERS, ClassLabel, ConditionerConfig, check_context, joined
from dit.model.dims import Dims, grid_of
from dit.model.embed import MAX_PERIOD, PatchEmbed, Spacing, TimeEmbed, position_table, unpatchify, wide
from dit.model.kernels.choice import KERNELS, Auto, Kernels, use
from dit.model.kinds import MODELS, ModelConfig
from dit.model.modulation import FullRows
from dit.model.norms import NORMS, Norm
from dit.model.parametrization import PARAMETRIZATIONS, Parametrization, Standard, scale
from dit.model.recompute import Keep, Recompute
from dit.model.sdpa import Backend
from dit.model.sizes import SIZES, Size, check_size
from dit.model.stream import Residual, as_stream

Tapped = tuple[Tensor, tuple[Tensor, ...]]  # a prediction, and tokens behind blocks
EMBEDDING_STD = 0.02  # of the initial weights of embeddings and the time MLP, as in the reference


@MODELS.register("dit")
@config
class DiTConfig(ModelConfig):
    """A DiT: of a `size`, or of a `width`, `depth` and `heads`. Input and classes come from the data."""

    size: str | None = None  # S, B, L, XL; nano, micro, tiny for CPUs; S if no width is given either
    patch: int = 2  # latent pixels of a patch, on a side
    width: int | None = None  # channels of a token; null = by size
    depth: int | None = None  # blocks of the transformer; null = by size
    heads: int | None = None  # of the attention, divides width; null = by size
    head_width: int | None = None  # channels of a head, in place of `heads`, also of a size; null = by heads
    mlp_ratio: float = 4.0  # hidden width of the MLPs over width
    num_classes: int | None = None  # of labels; null = as many as the data has
    learn_sigma: bool = False  # twice the output channels: a prediction, then its log-variance
    # of what lies between a block's matrix products: plain torch (which torch.compile fuses), triton, or auto
    kernels: Annotated[Kernels, KERNELS] = Auto()
    # recompute blocks in the backward pass: less memory, a third more work; a number = the first so many of them
    checkpoint_blocks: bool | Annotated[int, Field(ge=1)] = False
    checkpoint_keep: Keep = (
        "input"  # of such a block; products = also what matrix products and attention give
    )
    residual: Residual = "float32"  # of the tokens between blocks; bfloat16 needs train.precision: bf16
    # torch's kernel of attention in training: auto = torch's choice; cudnn and efficient need a GPU
    attention: Backend = "auto"
    position_table: bool = True  # add the table of places to the patches; false: rope alone tells them
    stored_position: bool = False  # keep the position table in checkpoints, as foreign weights do
    # of the sinusoids of time: adm = 10000^(-i/128), as in DiT and SiT; ddpm = 10000^(-i/127), as in diffusers
    time_frequencies: Spacing = "adm"
    time_period: Annotated[float, Field(gt=0)] = MAX_PERIOD  # of the slowest sinusoid over 2 pi
    # by which the path's model time is multiplied before them
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    # learned tokens in the sequence that become no patch (arXiv 2309.16588)
    registers: Annotated[int, Field(ge=0)] = 0
    # numbers that a patch is pressed into before the width (arXiv 2511.13720); null = none
    bottleneck: Annotated[int, Field(ge=1)] | None = None
    context_from: Annotated[int, Field(ge=0)] = 0  # first block whose sequence has the tokens of `cond`
    output_norm: Annotated[Norm, NORMS] | None = None  # before the output; null = the blocks'
    block: Annotated[BlockConfig, BLOCKS] = AdaLNZero()  # kind of transformer block
    # what is told to the network besides the time, in turn
    cond: tuple[Annotated[ConditionerConfig, CONDITIONERS], ...] = (ClassLabel(),)
    # how initial weights and rates follow the width; mup: the best rate of base_width is that of this width
    parametrization: Annotated[Parametrization, PARAMETRIZATIONS] = Standard()

    def __post_init__(self) -> None:
        """Refuse an unknown size, and a size given in two ways or in half of one."""
        check_size(self.size, {name: getattr(self, name) for name in Size._fields}, self.head_width)
        check_context(self.context, self.context_from, self.blocks, self.block.carries_value)
        if self.checkpoint_keep != "input" and not self.checkpoint_blocks:
            raise ConfigError(
                f"checkpoint_keep is {self.checkpoint_keep}, and no block is computed again: set checkpoint_blocks too"
            )
        _ = self.recompute
        if any(c.gives_tokens for c in self.cond) and not self.block.reads_tokens:
            raise ConfigError(
                f"block {BLOCKS.name_of(self.block)} does not read the tokens that `cond` gives"
            )
        if not math.isfinite(self.mlp_ratio):
            raise ConfigError(f"mlp_ratio must be finite, got {self.mlp_ratio}")
        dims = self.dims(self.patch, 1, 0)  # refuses wrong shapes now, not when the data are there
        self.parametrization.base(dims)
        if self.block.rope is not None:
            self.block.rope.check(dims.head_width)

    @property
    def blocks(self) -> int:
        """Blocks of the whole network."""
        return self._size().depth

    @property
    def recompute(self) -> Recompute:
        """What is computed again in the backward pass; ConfigError for more blocks than there are."""
        return Recompute.of(self.checkpoint_blocks, self.checkpoint_keep, self.blocks)

    @property
    def context(self) -> int:
        """Tokens that `cond` puts into the sequence."""
        return sum(c.context for c in self.cond)

    def _size(self) -> Size:
        """Width, depth and heads."""
        size = SIZES[self.size or "S"]
        if self.width is not None and self.depth is not None:
            size = Size(self.width, self.depth, self.heads or 1)
        if self.head_width is None:
            return size
        if self.head_width < 1 or size.width % self.head_width:
            raise ConfigError(f"head_width {self.head_width} does not divide the width {size.width}")
        return size._replace(heads=size.width // self.head_width)

    def dims(self, input_size: int | tuple[int, int], channels: int, num_classes: int) -> Dims:
        """Every shape, for inputs (B, channels, *input_size) and data with that many classes."""
        size = self._size()
        classes = num_classes if self.num_classes is None else self.num_classes
        if classes < num_classes:
            raise ConfigError(
                f"num_classes is {classes} and the data have {num_classes}; leave it out or raise it"
            )
        return Dims(
            **size._asdict(),
            mlp_width=int(size.width * self.mlp_ratio),
            patch=self.patch,
            grid=grid_of(input_size, self.patch),
            channels=channels,
            out_channels=2 * channels if self.learn_sigma else channels,
            num_classes=classes,
            attention_scale=self.parametrization.attention_scale(size.width // size.heads),
            attention=self.attention,
        )

    def stacks(self, dims: Dims) -> tuple[Dims, ...]:
        """The shapes of each stack of blocks, with all tokens that attend to each other there."""
        return (replace(dims, beside=self.registers + self.context),)

    def build(
        self,
        input_size: int | tuple[int, int],
        channels: int,
        num_classes: int,
        generator: torch.Generator | None = None,
    ) -> DiT:
        """The initialised network, on the default device; `generator` None is torch's global one."""
        dims = self.dims(input_size, channels, num_classes)
        model = self._network(dims, generator)
        base = self.parametrization.base(dims)
        if base is not None:
            with torch.device("meta"):
                like = self._network(base)
            scale(model, like)
        return model

    def output_cost(self, dims: Dims) -> OutputCost:
        """The cost of what comes after the blocks."""
        return output_cost(dims, self.output_norm or self.block.norm)

    def _network(self, dims: Dims, generator: torch.Generator | None = None) -> DiT:
        """The network of these shapes, initialised in the standard way."""
        return DiT(self, dims, generator)


class DiT(nn.Module):
    """The network. `blocks` holds units that ZeRO-3 gathers, and torch.compile compiles, one by one."""

    position: Tensor
    rotation: Tensor | None

    def __init__(self, cfg: DiTConfig, dims: Dims, generator: torch.Generator | None = None):
        super().__init__()
        block, width = cfg.block, dims.width
        self.cfg, self.dims, self.recompute = cfg, dims, cfg.recompute
        extra = sum(c.extra_channels for c in cfg.cond)
        self.patch_embed = PatchEmbed(dims, extra_channels=extra, bottleneck=cfg.bottleneck)
        self.time_embed = TimeEmbed(
            width, max_period=cfg.time_period, spacing=cfg.time_frequencies, scale=cfg.time_scale
        )
        self.conditioners = nn.ModuleList(c.build(dims) for c in cfg.cond)
        self.registers = nn.Embedding(cfg.registers, width) if cfg.registers else None
        self.modulation = FullRows(width, block.shared_rows * width) if block.shared_rows else None
        self.blocks = nn.ModuleList(block.build(dims) for _ in range(dims.depth))
        self.output = self.output_layer(cfg, dims)
        use(self, cfg.kernels)
        # functions of the shapes: not learned, so neither in state_dict nor cast with the parameters of ZeRO
        self.register_buffer("position", torch.empty(dims.tokens, width), persistent=cfg.stored_position)
        beside = cfg.registers + cfg.context
        turns = None if block.rope is None else torch.empty(2, beside + dims.tokens, dims.head_width // 2)
        self.register_buffer("rotation", turns, persistent=False)
        self.reset_parameters(generator)

    @staticmethod
    def output_layer(cfg: DiTConfig, dims: Dims) -> nn.Module:
        """What comes after the blocks: (tokens (B, T, D), c (B, D)) -> what comes out."""
        return OutputLayer(dims, cfg.output_norm or cfg.block.norm)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter and the position table: the one place that does, but for `parametrization`.

        As the reference: Xavier for linear layers, normal(0.02) for embeddings and the time MLP, zero for
        biases and for what modules list in `zero_layers()`: modulations and output, so the output is zero.
        """
        for name, table in self.tables().items():
            self.get_buffer(name).copy_(table)
        in_time = set(self.time_embed.modules())
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD, generator=generator)
            elif isinstance(module, nn.Linear):
                if module in in_time:
                    nn.init.normal_(module.weight, std=EMBEDDING_STD, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()  # norms, convolutions: their own
        for module in self.modules():
            for layer in cast(Any, module).zero_layers() if hasattr(module, "zero_layers") else ():
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)

    def tables(self) -> dict[str, Tensor]:
        """The buffers by name, in float64 on the CPU: functions of the shapes alone."""
        position = position_table(self.dims.width, self.dims.grid)  # (T, D)
        found = {"position": position if self.cfg.position_table else torch.zeros_like(position)}
        rope = self.cfg.block.rope
        if self.rotation is not None and rope is not None:
            turns = rope.table(self.dims.grid, self.dims.head_width)  # (2, T, d/2)
            beside = self.cfg.registers + self.cfg.context  # what is no patch has no place, and is not turned
            found["rotation"] = torch.stack(
                [F.pad(turns[i], (0, 0, beside, 0), value=angle) for i, angle in enumerate((1.0, 0.0))]
            )  # (2, N + T, d/2)
        return found

    def initial_std(self, module: nn.Module) -> float:
        """Give the standard deviation with which `reset_parameters` draws a linear layer or an embedding."""
        if isinstance(module, nn.Linear) and module not in set(self.time_embed.modules()):
            return math.sqrt(2 / (module.in_features + module.out_features))
        return EMBEDDING_STD

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks in place (options of torch.compile); before the engine wraps the model."""
        for block in self.blocks:
            compile_forward(block, **options)

    def forward(
        self, x: Tensor, model_time: Tensor, cond: Cond, taps: tuple[int, ...] = ()
    ) -> Tensor | Tapped:
        """x (B, C, H, W), model_time (B,) float32 or float64, cond -> prediction, at least float32.

        (B, C, H, W), or (B, 2C, H, W) with `learn_sigma`: the prediction, then the log-variance channels.
        With taps (n = behind the n-th block) the prediction and their tokens, (B, T, D) each, in that order.
        """
        h, c, _, tapped = self.hidden(x, model_time, cond, taps)  # (B, T, D), (B, D)
        said = self.as_image(self.output(h, c), x)  # (B, C or 2C, H, W)
        return (said, tapped) if taps else said

    def as_image(self, tokens: Tensor, x: Tensor) -> Tensor:
        """(B, T, p·p·C) -> (B, C, H, W), in at least float32: as the input x is."""
        return unpatchify(tokens, self.dims.patch, self.dims.grid).to(wide(x).dtype)

    def hidden(
        self, x: Tensor, model_time: Tensor, cond: Cond, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Tokens after the last block (B, T, D), c (B, D) of every modulation, the embedded time (B, D), and taps."""
        if wrong := [n for n in taps if not 1 <= n <= len(self.blocks)]:
            raise ValueError(f"tap {wrong[0]}: the network has blocks 1 to {len(self.blocks)}")
        given = joined([conditioner(cond) for conditioner in self.conditioners])
        h = self.patch_embed(x, given.channels) + self.position  # (B, T, D)
        h = as_stream(h, self.cfg.residual, self.patch_embed.proj.weight.dtype)
        if len(given.residuals) > len(self.blocks):
            raise ValueError(f"got {len(given.residuals)} residuals for {len(self.blocks)} blocks")
        time = self.time_embed(model_time)  # (B, D)
        c = F.silu(time if given.vector is None else time + given.vector)  # (B, D), of every modulation
        tokens = () if given.tokens is None else (given.tokens,)
        carried: dict[str, Tensor] = {} if self.modulation is None else {"shared": self.modulation(c)}
        after: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            h = self._joined_by(given.context, h, i)  # (B, N + T, D): tokens beside the image's come first
            if self.rotation is not None:
                carried["rotation"] = self.rotation[:, -h.shape[1] :]  # (2, N + T, d/2)
            h = run_block(block, self.recompute.at(i), carried, h, c, *tokens)  # (B, N + T, D)
            if i < len(given.residuals):
                more = F.pad(given.residuals[i], (0, 0, h.shape[1] - self.dims.tokens, 0))  # (B, N + T, D)
                h = (h + more).to(h.dtype)
            if i + 1 in taps:
                after[i + 1] = h[:, h.shape[1] - self.dims.tokens :]  # (B, T, D)
        return h[:, h.shape[1] - self.dims.tokens :], c, time, tuple(after[n] for n in taps)

    def _joined_by(self, context: Tensor | None, h: Tensor, block: int) -> Tensor:
        """The sequence that a block gets: registers come before the first, the conditioners' tokens at context_from."""
        if block == 0 and self.registers is not None:
            rows = self.registers(torch.arange(self.cfg.registers, device=h.device))  # (R, D)
            h = torch.cat([rows.to(h.dtype).expand(len(h), -1, -1), h], dim=1)  # (B, R + T, D)
        if block == self.cfg.context_from and context is not None:
            h = torch.cat([context.to(h.dtype), h], dim=1)  # (B, N + T, D)
        return h

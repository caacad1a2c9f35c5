"""The diffusion transformer: patches and time in, blocks, patches out (Peebles & Xie, arXiv 2212.09748).

    model = DiTConfig(size="S", patch=2).build(input_size=32, channels=4, num_classes=1000)
    prediction = model(x, model_time, {"label": label, "drop": drop})

A size, a block, a conditioner: each is an entry of its own table, and the network knows none by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit.config import ConfigError, Registry, config, did_you_mean
from dit.flow.predict import Cond
from dit.model.block import BLOCKS, AdaLNZero, BlockConfig, OutputLayer
from dit.model.cond import CONDITIONERS, ClassLabel, ConditionerConfig, joined
from dit.model.dims import Dims, grid_of
from dit.model.embed import PatchEmbed, Spacing, TimeEmbed, position_table, unpatchify, wide
from dit.model.parametrization import PARAMETRIZATIONS, Parametrization, Standard, scale

EMBEDDING_STD = 0.02  # of the initial weights of embeddings and the time MLP, as in the reference


class Size(NamedTuple):
    """Width, depth and heads of a model."""

    width: int
    depth: int
    heads: int


SIZES: dict[str, Size] = {
    "nano": Size(64, 2, 2),  # these three are ours, for CPUs and tests
    "micro": Size(128, 4, 4),
    "tiny": Size(192, 12, 3),
    "S": Size(384, 12, 6),  # these four are the paper's, table 1
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}


class ModelConfig(ABC):
    """A kind of network, (x, model_time, cond) -> prediction, and how to build it."""

    @abstractmethod
    def build(self, input_size: int | tuple[int, int], channels: int, num_classes: int) -> nn.Module:
        """The initialised network for inputs (B, channels, *input_size) and that many classes."""


MODELS: Registry[ModelConfig] = Registry("model", default="dit")


@MODELS.register("dit")
@config
class DiTConfig(ModelConfig):
    """A DiT: of a `size`, or of a `width`, `depth` and `heads`. Input and classes come from the data."""

    size: str | None = None  # S, B, L, XL; nano, micro, tiny for CPUs; S if no width is given either
    patch: int = 2  # latent pixels of a patch, on a side
    width: int | None = None  # channels of a token; null = by size
    depth: int | None = None  # blocks of the transformer; null = by size
    heads: int | None = None  # of the attention, divides width; null = by size
    mlp_ratio: float = 4.0  # hidden width of the MLPs over width
    num_classes: int | None = None  # of labels; null = as many as the data has
    learn_sigma: bool = False  # twice the output channels: a prediction, then its log-variance
    checkpoint_blocks: bool = False  # recompute blocks in the backward pass: a third more work, less memory
    stored_position: bool = False  # keep the position table in checkpoints, as foreign weights do
    # of the sinusoids of time: adm = 10000^(-i/128), as in DiT and SiT; ddpm = 10000^(-i/127), as in diffusers
    time_frequencies: Spacing = "adm"
    block: Annotated[BlockConfig, BLOCKS] = AdaLNZero()  # kind of transformer block
    # what is told to the network besides the time, in turn
    cond: tuple[Annotated[ConditionerConfig, CONDITIONERS], ...] = (ClassLabel(),)
    # how initial weights and rates follow the width; mup: the best rate of base_width is that of this width
    parametrization: Annotated[Parametrization, PARAMETRIZATIONS] = Standard()

    def __post_init__(self) -> None:
        """Refuse an unknown size, and a size given in two ways or in half of one."""
        given = [name for name in Size._fields if getattr(self, name) is not None]
        if self.size is not None and self.size not in SIZES:
            raise ConfigError(f"unknown size '{self.size}'{did_you_mean(self.size, SIZES)}")
        if self.size is not None and given:
            raise ConfigError(
                f"got size '{self.size}' and also {', '.join(given)}; leave out one of the two ways to say it"
            )
        if given and len(given) < len(Size._fields):
            raise ConfigError(f"got only {', '.join(given)}; without `size`, give width, depth and heads")
        if any(c.gives_tokens for c in self.cond) and not self.block.reads_tokens:
            raise ConfigError(
                f"block {BLOCKS.name_of(self.block)} does not read the tokens that `cond` gives"
            )
        if not math.isfinite(self.mlp_ratio):
            raise ConfigError(f"mlp_ratio must be finite, got {self.mlp_ratio}")
        dims = self.dims(self.patch, 1, 0)  # refuses wrong shapes now, not when the data are there
        self.parametrization.base(dims)

    def dims(self, input_size: int | tuple[int, int], channels: int, num_classes: int) -> Dims:
        """Every shape, for inputs (B, channels, *input_size) and data with that many classes."""
        if self.width is not None and self.depth is not None and self.heads is not None:
            size = Size(self.width, self.depth, self.heads)
        else:
            size = SIZES[self.size or "S"]
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
        )

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

    def _network(self, dims: Dims, generator: torch.Generator | None = None) -> DiT:
        """The network of these shapes, initialised in the standard way."""
        kept = (self.stored_position, self.time_frequencies)
        return DiT(dims, self.block, self.cond, self.checkpoint_blocks, generator, *kept)


class DiT(nn.Module):
    """The network. `blocks` holds units that ZeRO-3 gathers, and torch.compile compiles, one by one."""

    position: Tensor
    output_layer: type[nn.Module] = (
        OutputLayer  # built from Dims; (tokens (B, T, D), c (B, D)) -> what comes out
    )

    def __init__(
        self,
        dims: Dims,
        block: BlockConfig,
        cond: Sequence[ConditionerConfig],
        checkpoint_blocks: bool = False,
        generator: torch.Generator | None = None,
        stored_position: bool = False,
        time_frequencies: Spacing = "adm",
    ):
        super().__init__()
        self.dims, self.checkpoint_blocks = dims, checkpoint_blocks
        self.patch_embed = PatchEmbed(dims, extra_channels=sum(c.extra_channels for c in cond))
        self.time_embed = TimeEmbed(dims.width, spacing=time_frequencies)
        self.conditioners = nn.ModuleList(c.build(dims) for c in cond)
        self.blocks = nn.ModuleList(block.build(dims) for _ in range(dims.depth))
        self.output = self.output_layer(dims)
        # a function of the shapes: not learned, so neither in state_dict nor cast with the parameters of ZeRO
        self.register_buffer("position", torch.empty(dims.tokens, dims.width), persistent=stored_position)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter and the position table: the one place that does, but for `parametrization`.

        As the reference: Xavier for linear layers, normal(0.02) for embeddings and the time MLP, zero for
        biases and for what modules list in `zero_layers()`: modulations and output, so the output is zero.
        """
        self.position.copy_(position_table(self.dims.width, self.dims.grid))
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

    def initial_std(self, module: nn.Module) -> float:
        """Give the standard deviation with which `reset_parameters` draws a linear layer or an embedding."""
        if isinstance(module, nn.Linear) and module not in set(self.time_embed.modules()):
            return math.sqrt(2 / (module.in_features + module.out_features))
        return EMBEDDING_STD

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks in place (options of torch.compile); before the engine wraps the model."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward, **options)

    def forward(self, x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """x (B, C, H, W), model_time (B,) float32 or float64, cond -> prediction, at least float32.

        (B, C, H, W), or (B, 2C, H, W) with `learn_sigma`: the prediction, then the log-variance channels.
        """
        h, c = self.hidden(x, model_time, cond)  # (B, T, D), (B, D)
        out = unpatchify(self.output(h, c), self.dims.patch, self.dims.grid)  # (B, C or 2C, H, W)
        return out.to(wide(x).dtype)

    def hidden(self, x: Tensor, model_time: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The tokens after the last block (B, T, D), and c (B, D), what every modulation starts with."""
        given = joined([conditioner(cond) for conditioner in self.conditioners])
        h = self.patch_embed(x, given.channels) + self.position  # (B, T, D)
        if len(given.residuals) > len(self.blocks):
            raise ValueError(f"got {len(given.residuals)} residuals for {len(self.blocks)} blocks")
        c = self.time_embed(model_time)  # (B, D)
        if given.vector is not None:
            c = c + given.vector  # (B, D)
        c = F.silu(c)  # (B, D), what every modulation starts with
        tokens = () if given.tokens is None else (given.tokens,)
        for i, block in enumerate(self.blocks):
            h = self._run(block, h, c, *tokens)  # (B, T, D)
            if i < len(given.residuals):
                h = h + given.residuals[i]  # (B, T, D)
        return h, c

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """One block; its activations are dropped and recomputed in the backward pass if so configured."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False))
        return cast(Tensor, block(*inputs))

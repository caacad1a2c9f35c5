"""The numbers that fix every shape in a model: its parts are built from them, its cost computed."""

from __future__ import annotations

from dataclasses import dataclass

from dit.config import ConfigError
from dit.model.sdpa import Backend


@dataclass(frozen=True)
class Dims:
    """Shapes of one DiT. Inputs are (B, channels, grid[0]·patch, grid[1]·patch)."""

    width: int  # D, of a token
    depth: int  # blocks
    heads: int
    mlp_width: int  # hidden width of a block's MLP
    patch: int  # pixels of the latent on a side
    grid: tuple[int, int]  # tokens down, tokens across
    channels: int  # of the input
    out_channels: int  # of the prediction: channels, twice that with a learned variance
    num_classes: int  # labels 0..num_classes-1; 0 for data without labels
    beside: int = 0  # tokens in the sequence that are no patches: registers, conditions
    modulated: int = 1  # conditions an image has: one, or one of each token
    attention_scale: float | None = None  # factor of attention's logits; None = 1/√(head width)
    attention: Backend = "auto"  # which of torch's kernels computes attention

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        for name in ("width", "depth", "heads", "mlp_width", "patch", "channels", "out_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_classes < 0:
            raise ConfigError(f"num_classes must be 0 (no labels) or more, got {self.num_classes}")
        if self.width % self.heads:
            raise ConfigError(
                f"width {self.width} is not a multiple of heads {self.heads}; heads share it equally"
            )
        if self.width % 4:
            raise ConfigError(
                f"width {self.width} is not a multiple of 4; the position table needs a sine and a cosine "
                "for each of two axes"
            )

    @property
    def tokens(self) -> int:
        """T, image tokens in the sequence."""
        return self.grid[0] * self.grid[1]

    @property
    def sequence(self) -> int:
        """Tokens that attend to each other, those beside the image's too."""
        return self.tokens + self.beside

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the input."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch


def grid_of(input_size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """Tokens (down, across) for an input of `input_size`: (H, W), or one number for a square."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if patch < 1 or height < 1 or width < 1 or height % patch or width % patch:
        raise ConfigError(
            f"patch {patch} does not divide the input of {height}×{width} latent pixels; "
            "choose a patch that divides both"
        )
    return height // patch, width // patch

"""All networks there are: importing this registers them."""

from dit.model.ddt import DDTConfig
from dit.model.dit import MODELS, DiTConfig

__all__ = ["MODELS", "DDTConfig", "DiTConfig"]

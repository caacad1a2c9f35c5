"""All networks there are: importing this registers them."""

from dit.model.ddt import DDTConfig
from dit.model.dit import DiTConfig
from dit.model.kinds import MODELS

__all__ = ["MODELS", "DDTConfig", "DiTConfig"]

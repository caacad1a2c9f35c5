"""What a kind of network is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from dit.config import Registry


class ModelConfig(ABC):
    """A kind of network, (x, model_time, cond) -> prediction, and how to build it."""

    @abstractmethod
    def build(self, input_size: int | tuple[int, int], channels: int, num_classes: int) -> nn.Module:
        """The initialised network for inputs (B, channels, *input_size) and that many classes."""


MODELS: Registry[ModelConfig] = Registry("model", default="dit")

"""What is known of a project whose weights come in and go out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from dit.flow.objective import Objective
from dit.interop.weights import Arguments, StateDict, infer
from dit.model.dit import DiT, DiTConfig

SCALE = 0.18215  # of Stable Diffusion's first VAEs, which DiT, SiT and DDT were trained with
FACTOR = 8  # pixels of a latent pixel, of the same


class RunArguments(Protocol):
    """A project's arguments of a network, by which a run of it is written."""

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""

    @property
    def input_size(self) -> int:
        """Latent pixels on a side."""

    @property
    def num_classes(self) -> int:
        """Classes without the null row."""

    @property
    def has_null(self) -> bool:
        """Whether the label table has a null row."""

    def model(self, stored_position: bool = False) -> DiTConfig:
        """Our config of the same network."""

    def build(self, stored_position: bool = False) -> DiT:
        """The network without numbers, on the meta device."""


KnownArguments = TypeVar("KnownArguments", bound=RunArguments)


class Format(ABC, Generic[KnownArguments]):
    """A project whose weights are known: `FacebookDiT`, `SiT`, `LightningDiT`, `DDT`."""

    factor = FACTOR  # pixels of a latent pixel, where nothing says another
    scale: float | None = SCALE  # what its latents are multiplied with; None = the statistics of a file tell

    @abstractmethod
    def infer(
        self, state: StateDict, num_heads: int | None = None, num_classes: int | None = None
    ) -> KnownArguments:
        """The arguments of the network that a state dict is of. WeightsError where it is no such state dict.

        num_heads, num_classes: where the weights do not tell them.
        """

    @abstractmethod
    def ours(self, state: StateDict, arguments: KnownArguments) -> tuple[KnownArguments, dict[str, Tensor]]:
        """(arguments of our network, its weights). WeightsError where the state dict does not fit."""

    @abstractmethod
    def objective(self, arguments: KnownArguments) -> Objective:
        """What the weights were trained with."""

    @abstractmethod
    def theirs(self, model: DiT, objective: Objective) -> dict[str, Tensor]:
        """The project's state dict of our network. WeightsError for a network or objective that it does not have."""


class DiTFormat(Format[Arguments]):
    """A project whose networks are DiT's."""

    def infer(
        self, state: StateDict, num_heads: int | None = None, num_classes: int | None = None
    ) -> Arguments:
        """The arguments that the shapes speak for."""
        return infer(state, num_heads, num_classes)

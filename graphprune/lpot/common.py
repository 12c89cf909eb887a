"""What LPOT's users import as ``common``."""

from dataclasses import dataclass

from torch import nn

from graphprune.errors import ConfigError


@dataclass(frozen=True)
class Model:
    """A model as it is handed to :class:`~graphprune.lpot.Pruning`; nothing is wrapped around it.

    Attributes:
        model: The user's own module.
    """

    model: nn.Module

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ConfigError(f"common.Model: is given a {type(self.model).__name__}. Give a torch.nn.Module.")

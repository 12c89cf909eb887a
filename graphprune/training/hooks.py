"""What takes part in a training loop."""

from typing import Protocol

from graphprune.errors import ConfigError, shown


class Hooks(Protocol):
    """What takes part in a training loop without being called by name: the four hooks of LPOT's manual."""

    def on_epoch_begin(self, epoch: int) -> object:
        """Before the first batch of an epoch; epochs are counted from zero."""
        ...

    def on_batch_begin(self, step: int) -> object:
        """Before a batch goes through the model; batches are counted from zero in each epoch."""
        ...

    def on_batch_end(self) -> object:
        """After the backward pass of a batch, and the step of the optimizer if one follows it."""
        ...

    def on_epoch_end(self) -> object:
        """After the last batch of an epoch."""
        ...


def check_hooks(hooks: object) -> None:
    """Refuses what has not all four methods of :class:`Hooks`.

    Raises:
        ConfigError: It has not.
    """
    names = ("on_epoch_begin", "on_batch_begin", "on_batch_end", "on_epoch_end")
    missing = [name for name in names if not callable(getattr(hooks, name, None))]
    if missing:
        raise ConfigError(f"hooks: {shown(hooks)} has no {missing[0]}. Give an object with {', '.join(names)}.")

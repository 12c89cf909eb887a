"""Callbacks through which Lightning and the ``Trainer`` of transformers call the four hooks of a training loop."""

import sys
from importlib import import_module
from typing import Any

from graphprune.errors import ConfigError
from graphprune.training.hooks import Hooks, check_hooks


def lightning_callback(hooks: Hooks) -> Any:
    """Returns a callback for the ``Trainer`` of Lightning that calls ``hooks``.

    ``on_batch_begin`` and ``on_batch_end`` surround every batch that goes through the model, also where gradients are
    accumulated over several; the end comes after the step of the optimizer if there is one.

    Args:
        hooks: What takes part in training.

    Raises:
        ConfigError: The hooks are none, or neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    relay = _Relay(hooks)
    calls = {
        "on_train_epoch_start": lambda self, trainer, module: relay.epoch_begin(trainer.current_epoch),
        "on_train_batch_start": lambda self, trainer, module, batch, batch_idx: relay.batch_begin(batch_idx),
        "on_train_batch_end": lambda self, trainer, module, outputs, batch, batch_idx: relay.batch_end(),
        "on_train_epoch_end": lambda self, trainer, module: relay.epoch_end(),
    }
    return type("HooksCallback", _lightning_bases(), calls)()


def transformers_callback(hooks: Hooks) -> Any:
    """Returns a callback for the ``Trainer`` of transformers that calls ``hooks``.

    ``on_batch_begin`` and ``on_batch_end`` surround every batch that goes through the model, also where gradients are
    accumulated over several (``gradient_accumulation_steps``); the end comes after the step of the optimizer if there
    is one.

    Args:
        hooks: What takes part in training.

    Raises:
        ConfigError: The hooks are none, or ``transformers`` is not installed.
    """
    relay = _Relay(hooks)

    def epoch_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was resumed inside an epoch goes on there."""
        epoch, share = divmod(state.epoch or 0.0, 1.0)
        if share > 1 - 1e-9:  # a sum of shares that should be one
            epoch, share = epoch + 1, 0.0
        skips = share and not args.ignore_data_skip
        relay.epoch_begin(int(epoch), round(share * len(kwargs["train_dataloader"])) if skips else 0)

    def substep_end(self: Any, *args: Any, **kwargs: Any) -> None:
        """Between two batches of one step, which are not announced."""
        relay.batch_end()
        relay.batch_begin()

    calls = {
        "on_epoch_begin": epoch_begin,
        "on_step_begin": lambda self, *args, **kwargs: relay.batch_begin(),
        "on_substep_end": substep_end,
        "on_step_end": lambda self, *args, **kwargs: relay.batch_end(),
        "on_epoch_end": lambda self, *args, **kwargs: relay.epoch_end(),
    }
    return type("HooksCallback", (_imported("transformers", "transformers").TrainerCallback,), calls)()


class _Relay:
    """Passes calls on to hooks, and sees to it that each batch that begins also ends."""

    def __init__(self, hooks: Hooks) -> None:
        check_hooks(hooks)
        self._hooks = hooks
        self._next = 0
        self._inside = False

    def epoch_begin(self, epoch: int, first: int = 0) -> None:
        self._next = first
        self._hooks.on_epoch_begin(epoch)

    def batch_begin(self, step: int | None = None) -> None:
        number = self._next if step is None else step
        self._next, self._inside = number + 1, True
        self._hooks.on_batch_begin(number)

    def batch_end(self) -> None:
        self._inside = False
        self._hooks.on_batch_end()

    def epoch_end(self) -> None:
        if self._inside:  # the epoch was left in the middle of a step
            self.batch_end()
        self._hooks.on_epoch_end()


_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
"""One library under two names; the callbacks of one are none to the other."""


def _lightning_bases() -> tuple[type, ...]:
    """The class of callbacks of every Lightning that is in use, or of one that is installed."""
    used = [module for module in map(sys.modules.get, _LIGHTNING) if module is not None]
    modules = used or [_imported("lightning", *_LIGHTNING)]
    return tuple(dict.fromkeys(module.Callback for module in modules))


def _imported(extra: str, *names: str) -> Any:
    """The first module of ``names`` that is installed."""
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
                raise  # it is there, but something that it needs is not
    raise ConfigError(f"{extra}: is not installed. Run pip install 'graphprune[{extra}]'.")

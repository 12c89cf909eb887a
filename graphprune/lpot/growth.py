"""Zeros that become more while a model trains: the four hooks of a training loop at work."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graphprune.config_list import Entry
from graphprune.errors import ConfigError, TrainingError
from graphprune.lpot.config import Goal
from graphprune.pruners.sparsify import tensor_masks
from speedup.masking import attach_masks, attached_masks, multiply_masks


class Growth:
    """Masks in a model, with more zeros as time goes by.

    Time is counted in epochs: before batch ``s`` of ``n`` in epoch ``e`` it is ``e + s / n``. Everything that has to be
    known of a run beside its time is in the masks, so that one whose model is loaded with them goes on as it was.

    Attributes:
        model: The model, in which masks act from the beginning: of ones, until pruning begins.
        goals: What is asked of each tensor; the share is one of each tensor by itself.
        batches: How many there are in an epoch; None if it is not known.
        first: What is added to the numbers of epochs.
        time: What has passed; None before the first epoch.
    """

    def __init__(self, model: nn.Module, goals: Mapping[str, Goal], batches: int | None, first: int = 0) -> None:
        """Attaches masks that mask nothing yet.

        Raises:
            ConfigError: A frequency is no whole number of epochs, and the number of batches is not known.
            PlanError: A parameter cannot be masked.
        """
        for goal in goals.values():
            if goal.frequency % 1 and batches is None:
                raise ConfigError(
                    f"{goal.subject}.frequency: is {goal.frequency:g} epochs, but how many batches an epoch has is not "
                    "known. Set train_dataloader to something with a length, or give train.iteration."
                )
        named = dict(model.named_parameters(remove_duplicate=False))
        self.model, self.goals, self.batches, self.first = model, dict(goals), batches, first
        self.time: float | None = None
        self._epoch = self._step = 0
        self._asked = dict.fromkeys(goals, 0.0)
        attach_masks(model, {name: torch.ones_like(named[name]) for name in goals})

    def on_epoch_begin(self, epoch: int) -> None:
        """Masks what is asked at the beginning of an epoch."""
        self._epoch = epoch + self.first
        self._grow(self._epoch)

    def on_batch_begin(self, step: int) -> None:
        """Masks what is asked before a batch, counted from zero in each epoch."""
        self._check_begun("on_batch_begin")
        self._step = step
        if self.batches is not None:
            self._grow(self._epoch + min(step / self.batches, 1.0))
        multiply_masks(self.model)

    def on_batch_end(self) -> None:
        """Makes zero again what the step of the optimizer made of masked elements."""
        self._check_begun("on_batch_end")
        multiply_masks(self.model)
        self.time = self._epoch + min((self._step + 1) / (self.batches or 1), 1.0)

    def on_epoch_end(self) -> None:
        """The epoch is over; what is asked then is masked when the next one begins, or at the end of all."""
        self._check_begun("on_epoch_end")
        self.time = self._epoch + 1.0

    def finish(self) -> None:
        """Masks what is asked when training is over."""
        if self.time is not None:
            self._grow(self.time)

    def _check_begun(self, hook: str) -> None:
        if self.time is None:
            raise TrainingError(f"{hook}: comes before any on_epoch_begin. Call that at the beginning of each epoch.")

    def _grow(self, time: float) -> None:
        """Masks what is asked at a time: of each tensor the smallest elements, those first that are masked already."""
        self.time = time
        asked = {name: goal.at(time) for name, goal in self.goals.items()}
        grown = {name: share for name, share in asked.items() if share > self._asked[name]}
        if not grown:
            return
        named = dict(self.model.named_parameters(remove_duplicate=False))
        before = attached_masks(self.model)
        masks: dict[str, Tensor] = {}
        for name, share in grown.items():
            masks |= tensor_masks({name: named[name]}, Entry(op_names=(name,), sparsity=share), gone=before)
        attach_masks(self.model, masks)
        self._asked |= grown

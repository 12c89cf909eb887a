"""``Pruning``: a model, a configuration file and a way to train; called, it returns the model with zeros in place."""

import warnings
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.errors import ConfigError, TrainingError
from graphprune.lpot.common import Model
from graphprune.lpot.config import Config, Goal, goals_of, read_lpot
from graphprune.lpot.growth import Growth
from graphprune.lpot.recipe import described
from graphprune.training.fit import Fit, evaluated, fit
from graphprune.training.loop import Loop, Training
from speedup.masking import attached_masks, detach_masks


class Pruning:
    """Gradual pruning of single weights by their size while a model trains (Zhu & Gupta, 2017, with a linear schedule).

    .. code-block:: python

        prune = Pruning("conf.yaml")
        prune.model = common.Model(model)
        prune.pruning_func = train_func  # or nothing, if the file describes the training
        model = prune()

    ``names`` of the file are parameters of the model, and the share of zeros is one of each of them by itself. Between
    ``start_epoch`` and ``end_epoch`` it grows linearly from ``initial_sparsity`` to ``target_sparsity``, by a step each
    ``frequency`` (``update_frequency``) epochs and a last one at ``end_epoch``: with 0.1 there are ten steps in each
    epoch, each before the first batch at which another tenth of the batches is through. Before ``start_epoch`` there
    are no zeros but those of the model. At each step the smallest elements go, and what is zero stays zero: masks act
    in the model, and the parameters themselves are made zero at the beginning and the end of each batch.

    Where training ends with ``end_epoch``, the last step comes after the last batch; an earlier ``end_epoch`` of the
    pruners leaves epochs to recover in.

    Attributes:
        train_dataloader: Batches ``(inputs, targets)`` instead of those of the file. With a ``pruning_func`` it only
            says how many batches an epoch has, for steps inside of epochs.
        pruning_func: ``pruning_func(model)`` trains the model in place and calls the four hooks of this object. None
            if the file describes the training.
        training: How the model is trained otherwise than the file describes it, for as many epochs; None if it is as
            the file says. Its trainer has to call hooks, as that of :meth:`Training.on` does.
        eval_dataloader: For your own ``eval_func``; nothing here reads it.
        eval_func: ``eval_func(model)`` says how good the pruned model is, in eval mode; None if nobody asks.
        config: What the file asks for.
        goals: What was asked of each tensor, after a call.
        sparsity: The share of zeros in each of these, after a call.
        score: What ``eval_func`` said, after a call.
        fit: How the training that the file describes went, after a call.
    """

    def __init__(
        self, config: Path | str, *, seed: int = 0, folder: Path | str | None = None, resume: bool = False
    ) -> None:
        """Reads what is asked; nothing is done yet.

        Args:
            config: A file as LPOT reads it.
            seed: Of the training that the file describes.
            folder: Where that training writes a snapshot after each epoch; not for a ``pruning_func``.
            resume: Whether it goes on with what is in the folder.

        Raises:
            ConfigError: Something in the file makes no sense: one line with the file and the key.
        """
        self.config: Config = read_lpot(config)
        self.train_dataloader: Iterable[Any] | None = None
        self.pruning_func: Callable[[nn.Module], object] | None = None
        self.training: Training | None = None
        self.eval_dataloader: Iterable[Any] | None = None
        self.eval_func: Callable[[nn.Module], float] | None = None
        self.goals: dict[str, Goal] = {}
        self.sparsity: dict[str, float] = {}
        self.score: float | None = None
        self.fit: Fit | None = None
        self._seed, self._folder, self._resume = seed, folder, resume
        self._model: nn.Module | None = None
        self._growth: Growth | None = None

    @property
    def model(self) -> nn.Module | None:
        """The user's own module; set it to that, or to ``common.Model`` of it."""
        return self._model

    @model.setter
    def model(self, model: nn.Module | Model) -> None:
        self._model = Model(model.model if isinstance(model, Model) else model).model

    def __call__(self) -> nn.Module:
        """Returns the model, trained in place and pruned: a plain module with zeros in its weights.

        If training fails, masks are taken out of the model as well.

        Raises:
            ConfigError: The file does not fit the model, or describes no training where there is no ``pruning_func``.
            TrainingError: Training went wrong, or called none of the hooks.
        """
        model = self._model
        if model is None:
            raise ConfigError("model: is not set. Set it to common.Model(model).")
        if attached_masks(model):
            raise ConfigError("model: has masks already. Take them out with speedup.detach_masks.")
        for name in ("pruning_func", "eval_func"):
            if not callable(getattr(self, name)) and getattr(self, name) is not None:
                raise ConfigError(f"{name}: is a {type(getattr(self, name)).__name__}. Give a function of the model.")
        function = self.pruning_func
        for name, value in (("folder", self._folder is not None), ("resume", self._resume)):
            if value and function is not None:
                raise ConfigError(f"{name}: is for training by the file, and there is a pruning_func. Leave it out.")
        self.goals = goals_of(model, self.config)
        growth, train = self._described(model) if function is None else self._own(model, function)
        self._growth = growth
        try:
            train()
            growth.finish()
        finally:
            self._growth = None
            detach_masks(model)
        self._count(model)
        self.score = None if self.eval_func is None else evaluated(self.eval_func, model)
        return model

    def on_epoch_begin(self, epoch: int) -> None:
        """To be called before the first batch of an epoch; epochs are counted from zero."""
        self._grower.on_epoch_begin(epoch)

    def on_batch_begin(self, step: int) -> None:
        """To be called before a batch goes through the model; batches are counted from zero in each epoch.

        Also where gradients are accumulated it is every batch that counts, not every step of the optimizer.
        """
        self._grower.on_batch_begin(step)

    def on_batch_end(self) -> None:
        """To be called after the backward pass of a batch, and the step of the optimizer if one follows it."""
        self._grower.on_batch_end()

    def on_epoch_end(self) -> None:
        """To be called after the last batch of an epoch; a loop may leave it out."""
        self._grower.on_epoch_end()

    @property
    def _grower(self) -> Growth:
        if self._growth is None:
            raise TrainingError(
                "Pruning: a hook is called while nothing is pruned. Set pruning_func to the function that trains, and "
                "call the Pruning object."
            )
        return self._growth

    def _described(self, model: nn.Module) -> tuple[Growth, Callable[[], None]]:
        """The hooks, and what trains as the file says; masks are in the model."""
        train = self.config.train
        training = described(self.config, self.train_dataloader) if self.training is None else self.training
        if train.end_epoch is None:
            raise self.config.missing("end_epoch", "Give it there, or set pruning_func to a function that trains")
        if train.end_epoch <= train.start_epoch:
            raise ConfigError(
                f"{self.config.path}: pruning.train.end_epoch: {train.end_epoch} is no later than the start_epoch "
                f"{train.start_epoch}, so that nothing is trained. Give a later end_epoch."
            )
        for goal in self.goals.values():
            if goal.end > train.end_epoch:
                fact = "starts" if goal.start >= train.end_epoch else "reaches its target"
                raise ConfigError(
                    f"{goal.subject}.end_epoch: {goal.end} is later than that of train, {train.end_epoch}, so that it "
                    f"never {fact}. Train longer, or end it earlier."
                )
        batches = training.trainer.batches if isinstance(training.trainer, Loop) else train.iteration
        growth = Growth(model, self.goals, batches, train.start_epoch)
        epochs, where = train.end_epoch - train.start_epoch, self._folder

        def work() -> None:
            self.fit = fit(model, training, epochs, seed=self._seed, hooks=growth, folder=where, resume=self._resume)
            growth.time = float(train.start_epoch + epochs)  # also where all epochs were done before

        return growth, work

    def _own(self, model: nn.Module, function: Callable[[nn.Module], object]) -> tuple[Growth, Callable[[], None]]:
        """The hooks, and the user's own training; masks are in the model."""
        data = self.train_dataloader
        growth = Growth(model, self.goals, len(data) if isinstance(data, Sized) else self.config.train.iteration)

        def work() -> None:
            returned = function(model)
            if isinstance(returned, nn.Module) and returned is not model:
                raise TrainingError("pruning_func: returns another model than it was given. Train that one in place.")
            if growth.time is None:
                raise TrainingError(
                    "pruning_func: called no hook, so that nothing was pruned. Call on_epoch_begin(epoch), "
                    "on_batch_begin(step) and on_batch_end() of the Pruning object in its loop."
                )

        return growth, work

    def _count(self, model: nn.Module) -> None:
        """Counts the zeros, and says so if they are fewer than asked for."""
        named = dict(model.named_parameters(remove_duplicate=False))
        zeros = {name: int((named[name] == 0).sum()) for name in self.goals}
        self.sparsity = {name: count / named[name].numel() for name, count in zeros.items()}
        for name, goal in self.goals.items():
            if zeros[name] < min(goal.target * named[name].numel() - 1e-9, named[name].numel() - 1):
                warnings.warn(
                    f"{name}: {self.sparsity[name]:.3f} of it is zero, not {goal.target:g}: training ended before "
                    f"epoch {goal.end}. Train longer, or give an earlier end_epoch.",
                    stacklevel=3,
                )
                return

"""How a model is trained: the user's own loop, or nothing but data and a loss."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from graphprune.errors import ConfigError, TrainingError, shown
from graphprune.training.hooks import Hooks
from graphprune.training.loss import Criterion, Penalty, Regularised, Watched, check_loss, own_loss, regularised
from graphprune.training.optimizer import Shrunken, follow, follow_schedule

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Training:
    """How a model is trained for one epoch after another.

    Attributes:
        trainer: Trains for one epoch. It takes ``model, optimizer, criterion, epoch`` (or the first three) in this
            order, or in any order under these names. Under the name ``hooks`` it is given :class:`Hooks` to call, and
            under the name ``callback`` a function that does nothing: what NNI's pruners did in it is part of the
            criterion here.
        optimizer: Of the model; or a function of its parameters, which makes a new one for each model.
        criterion: ``criterion(outputs, targets)``; None if the trainer knows the loss.
        schedule: Of the optimizer, or a function of it; it goes on by one step after each epoch. None if there is none,
            or the trainer has its own.
    """

    trainer: Callable[..., Any]
    optimizer: Optimizer | MakeOptimizer
    criterion: Criterion | None = None
    schedule: LRScheduler | MakeSchedule | None = None

    def __post_init__(self) -> None:
        fields = (("trainer", self.trainer), ("criterion", self.criterion))
        for name, value in fields:
            if not callable(value) and (name == "trainer" or value is not None):
                raise ConfigError(f"{name}: is a {type(value).__name__}. Give a function.")
            if isinstance(value, type) and issubclass(value, nn.Module):
                raise ConfigError(f"{name}: is the class {value.__name__}. Give an instance, {value.__name__}().")
        _arguments(self.trainer)
        if not isinstance(self.optimizer, Optimizer):
            _check_makes("optimizer", self.optimizer, "parameters")
        if self.schedule is not None and not isinstance(self.schedule, LRScheduler):
            _check_makes("schedule", self.schedule, "an optimizer")
        if isinstance(self.schedule, LRScheduler) and self.schedule.optimizer is not self.optimizer:
            raise ConfigError(
                "schedule: belongs to another optimizer. Give a function of the optimizer that makes one."
            )

    @classmethod
    def on(
        cls,
        data: Iterable[Any],
        loss: Criterion | None = None,
        *,
        optimizer: Optimizer | MakeOptimizer | None = None,
        schedule: LRScheduler | MakeSchedule | None = None,
        clip: float | None = None,
    ) -> "Training":
        """Returns the plain loop over batches of data.

        Args:
            data: A loader or list of batches ``(inputs, targets)``, where inputs are a tensor, a tuple of positional
                or a mapping of keyword inputs; or mappings of keyword inputs, the targets among them as ``labels`` or
                ``targets``. Tensors go to the device of the model.
            loss: ``loss(outputs, targets)``, one number. None for models that return it, as those of transformers do:
                a batch is then all of their inputs.
            optimizer: As in :class:`Training`; AdamW with its defaults (lr 0.001) if it is left out.
            schedule: As in :class:`Training`.
            clip: Largest norm of the gradients of all parameters together; larger ones are scaled down to it.

        Raises:
            ConfigError: The data can be gone through only once, or ``clip`` is not positive.
        """
        if isinstance(data, Iterator) or not isinstance(data, Iterable):
            kind = type(data).__name__
            raise ConfigError(f"data: is a {kind}, which cannot be gone through twice. Give a DataLoader or a list.")
        if clip is not None and not (isinstance(clip, Real) and 0 < clip < math.inf):
            raise ConfigError(f"clip: is {shown(clip)}. Give a positive number.")
        return cls(Loop(data, loss is None, clip), optimizer or torch.optim.AdamW, loss or own_loss, schedule)

    def made(self, model: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
        """Returns the optimizer for ``model`` and its schedule.

        Raises:
            ConfigError: The optimizer holds a parameter that is not the model's, or a function makes something else
                than an optimizer or a schedule.
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, Optimizer):
            optimizer = optimizer(list(model.parameters()))
            if not isinstance(optimizer, Optimizer):
                raise ConfigError(f"optimizer: the function makes a {type(optimizer).__name__}. Return an optimizer.")
        owned = {id(parameter) for parameter in model.parameters()}
        strange = sum(id(p) not in owned for group in optimizer.param_groups for p in group["params"])
        if strange:
            raise ConfigError(
                f"optimizer: holds {strange} parameters that the model does not have. Make it from the parameters of "
                "this model, or give a function of parameters that makes one."
            )
        schedule = self.schedule
        if schedule is not None and not isinstance(schedule, LRScheduler):
            schedule = schedule(optimizer)
            if not isinstance(schedule, LRScheduler):
                raise ConfigError(f"schedule: the function makes a {type(schedule).__name__}. Return a schedule.")
        return optimizer, schedule

    def following(self, model: nn.Module, result: Shrunken) -> "Training":
        """Returns the training of a shrunk model: an optimizer of ``model`` and its schedule follow, functions stay.

        Raises:
            ConfigError: As :func:`~graphprune.training.optimizer.follow`.
        """
        if not isinstance(self.optimizer, Optimizer):
            return self
        followed = follow(self.optimizer, model, result)
        if not isinstance(self.schedule, LRScheduler):
            return replace(self, optimizer=followed)
        return replace(self, optimizer=followed, schedule=follow_schedule(self.schedule, self.optimizer, followed))

    def first(self, batches: int) -> "Training":
        """Returns the training of no more than so many batches in each epoch; a trainer of the user's runs on."""
        if not isinstance(self.trainer, Loop):
            return self
        return replace(self, trainer=replace(self.trainer, data=_First(self.trainer.data, batches)))

    def regularised(self, penalty: Penalty) -> "Training":
        """Returns the same training with a penalty on top of the loss.

        Raises:
            ConfigError: The trainer gets no criterion that could carry it.
        """
        if self.criterion is None:
            raise ConfigError("criterion: is None, so that no penalty can be added to it. Give the one of the trainer.")
        return replace(self, criterion=regularised(self.criterion, penalty))

    def epoch(self, model: nn.Module, optimizer: Optimizer, epoch: int, hooks: Hooks | None = None) -> float | None:
        """Trains ``model`` for one epoch and returns the mean of the losses; None if the trainer uses no criterion.

        The mean is that of what the criterion returns while gradients are on, penalty included.

        Args:
            model: The model, which is changed; it is put into training mode.
            optimizer: What :meth:`made` returned for it.
            epoch: Its number.
            hooks: Called at the beginning and the end of the epoch, and by the trainer for each batch.

        Raises:
            TrainingError: A loss or a parameter is no number, the trainer trains something else than the model, or
                leaves a penalty out.
            ConfigError: There are hooks, but the trainer does not take any.
        """
        positions, names = _arguments(self.trainer)
        if hooks is not None and "hooks" not in names:
            raise ConfigError(
                "trainer: takes no hooks, so that nobody calls on_batch_begin and on_batch_end. Add an argument hooks, "
                "and call hooks.on_batch_begin(step) and hooks.on_batch_end() around each batch."
            )
        watched = None if self.criterion is None else Watched(self.criterion, epoch)
        values = {
            "model": model,
            "optimizer": optimizer,
            "criterion": watched,
            "epoch": epoch,
            "callback": _nothing,
            "hooks": hooks,
        }
        before = dict(model.named_parameters())
        model.train()
        if hooks is not None:
            hooks.on_epoch_begin(epoch)
        returned = self.trainer(*(values[name] for name in positions), **{name: values[name] for name in names})
        if hooks is not None:
            hooks.on_epoch_end()
        _check_same(model, before, returned)
        _check_numbers(model, epoch)
        if isinstance(self.criterion, Regularised) and watched is not None and not watched.calls:
            raise TrainingError(
                "trainer: did not call the criterion that it was given, so that the penalty had no effect. Compute the "
                "loss with its argument criterion."
            )
        return watched.total / watched.calls if watched is not None and watched.calls else None


@dataclass(frozen=True)
class Loop:
    """A trainer that is nothing but a loop over batches.

    Attributes:
        data: The batches.
        own: Whether the model returns the loss, so that a batch holds no targets.
        clip: Largest norm of all gradients together; None if they are left as they are.
    """

    data: Iterable[Any]
    own: bool = False
    clip: float | None = None

    def __call__(
        self, model: nn.Module, optimizer: Optimizer, criterion: Criterion, epoch: int, hooks: Hooks | None = None
    ) -> None:
        """Trains ``model`` for one epoch."""
        set_epoch = getattr(getattr(self.data, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError("optimizer: LBFGS needs the loss several times in a step. Give a trainer of your own.")
        device = next(model.parameters()).device
        step = -1
        for step, batch in enumerate(self.data):
            if hooks is not None:
                hooks.on_batch_begin(step)
            args, kwargs, targets = _moved(_parts(batch, self.own), device)
            optimizer.zero_grad()
            loss = criterion(model(*args, **kwargs), targets)
            check_loss(loss)
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            if hooks is not None:
                hooks.on_batch_end()
        if step < 0:
            raise ConfigError(f"data: holds no batches in epoch {epoch}. Give data that can be gone through again.")

    @property
    def batches(self) -> int | None:
        """How many there are in an epoch; None if the data does not say."""
        return len(self.data) if isinstance(self.data, Sized) else None

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that draw the order of the batches, where they are not that of torch."""
        sources = (self.data, getattr(self.data, "sampler", None), getattr(self.data, "batch_sampler", None))
        found = [getattr(source, "generator", None) for source in sources]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


@dataclass(frozen=True)
class _First:
    """The first batches of some data, each time that it is gone through."""

    data: Iterable[Any]
    batches: int

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.data), self.batches)

    def __len__(self) -> int:
        return min(len(self.data), self.batches) if isinstance(self.data, Sized) else self.batches

    def __getattr__(self, name: str) -> Any:
        """What a loop asks of a loader: its sampler and its generator."""
        if name not in ("sampler", "batch_sampler", "generator"):
            raise AttributeError(name)
        return getattr(self.data, name, None)


_FORM = ("model", "optimizer", "criterion", "epoch")
_ON_REQUEST = ("callback", "hooks")


def _arguments(trainer: Callable[..., Any]) -> tuple[Sequence[str], Sequence[str]]:
    """Which values a trainer is given by position, and which by name.

    Raises:
        ConfigError: It takes something else.
    """
    try:
        parameters = list(inspect.signature(trainer).parameters.values())
    except (TypeError, ValueError):  # a built-in
        return _FORM, ()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return _FORM, ()
    known = {*_FORM, *_ON_REQUEST}
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    names = [p.name for p in parameters if p.name in known and p.kind is not p.POSITIONAL_ONLY]
    if "model" in names and all(parameter.name in names for parameter in required):
        return (), names
    places = [p.name for p in required if p.kind is not p.KEYWORD_ONLY]
    ordered = all(name not in known or name == place for name, place in zip(places, _FORM, strict=False))
    if len(places) == len(required) and len(places) in (3, 4) and ordered:
        return _FORM[: len(places)], ()
    taken = ", ".join(map(str, parameters))
    raise ConfigError(f"trainer: takes ({taken}). Let it take ({', '.join(_FORM)}).")


def _check_makes(name: str, function: object, what: str) -> None:
    """Refuses what is no function of parameters or of an optimizer alone.

    Raises:
        ConfigError: It is none.
    """
    if not callable(function):
        raise ConfigError(f"{name}: is a {type(function).__name__}. Give one, or a function of {what} that makes one.")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ConfigError(
            f"{name}: {shown(function)} cannot be called with {what} alone ({error}). Give a function of {what} that "
            "makes one."
        ) from error
    except ValueError:  # a built-in
        return


def _nothing() -> None:
    """What a trainer calls as its callback."""


def in_place(model: nn.Module, train: Callable[[nn.Module], Any], name: str = "finetuner") -> None:
    """Lets a function train a model.

    Raises:
        TrainingError: It returns another model, of which nobody would know.
    """
    _refuse_another(model, train(model), name)


def _refuse_another(model: nn.Module, returned: Any, name: str) -> None:
    if isinstance(returned, nn.Module) and returned is not model:
        raise TrainingError(f"{name}: returns another model than it was given. Train that one in place.")


def _check_same(model: nn.Module, before: Mapping[str, nn.Parameter], returned: Any) -> None:
    """Refuses a trainer that leaves another model than it got."""
    _refuse_another(model, returned, "trainer")
    after = dict(model.named_parameters())
    for name in {**before, **after}:
        if before.get(name) is not after.get(name):
            raise TrainingError(
                f"trainer: replaced parameter {name} of the model, which its optimizer does not know. Change it in "
                "place, with copy_ or load_state_dict."
            )


def _check_numbers(model: nn.Module, epoch: int) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise TrainingError(
                f"{name}: holds values that are not finite after epoch {epoch}. Lower the learning rate, or clip the "
                "gradients."
            )


_TARGETS = ("labels", "targets")


def _parts(batch: Any, own: bool) -> tuple[tuple[Any, ...], Mapping[str, Any], Any]:
    """The positional inputs, the keyword inputs and the targets of a batch."""
    if isinstance(batch, Mapping):
        found = [] if own else [name for name in _TARGETS if name in batch]
        if len(found) == 1 or own:
            return (), {k: v for k, v in batch.items() if k not in found}, batch[found[0]] if found else None
        raise ConfigError(f"data: a batch holds {', '.join(map(str, batch))}. Name its targets labels or targets.")
    if own:
        inputs, targets = batch, None
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    else:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ConfigError(
            f"data: a batch is a {type(batch).__name__}{size}. Give (inputs, targets), or leave out the loss."
        )
    if isinstance(inputs, Mapping):
        return (), dict(inputs), targets
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}, targets


def _moved(values: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values)

"""Training as a configuration file describes it: data, loss and optimizer by their names."""

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from graphprune.config import closest
from graphprune.errors import ConfigError
from graphprune.lpot.config import Config
from graphprune.lpot.sections import Call, Dataloader
from graphprune.training import Training

_RENAMED = {"learning_rate": "lr"}
"""Arguments of optimizers that PyTorch calls otherwise."""


def described(config: Config, data: Iterable[Any] | None = None) -> Training:
    """Returns the training that a file describes.

    The loss and the optimizer are classes of ``torch.nn`` and ``torch.optim``, data those of ``torchvision.datasets``
    and ``torchvision.transforms``, with the arguments that they have there; ``learning_rate`` is ``lr``. An argument
    ``None`` is left out, so that the loss is a mean.

    Args:
        config: The file.
        data: Batches instead of those that the file describes.

    Raises:
        ConfigError: Something is missing, unknown or refuses its arguments, or torchvision is not installed.
    """
    train, where = config.train, f"{config.path}: pruning.train"
    remedy = "Give it there, or set pruning_func to a function that trains"
    for key in ("criterion", "optimizer"):
        if getattr(train, key) is None:
            raise config.missing(key, remedy)
    if data is None and train.dataloader is None:
        raise config.missing("dataloader", f"{remedy}, or train_dataloader")
    assert train.criterion is not None and train.optimizer is not None
    loss = _found(nn, train.criterion, nn.modules.loss._Loss, f"{where}.criterion")
    criterion = _made(loss, train.criterion, f"{where}.criterion")
    if getattr(criterion, "reduction", "mean") not in ("mean", "sum"):
        raise ConfigError(
            f"{where}.criterion.{train.criterion.name}.reduction: {criterion.reduction!r} makes no number of a batch. "
            "Use mean or sum."
        )
    optimizer = _optimizer(train.optimizer, f"{where}.optimizer")
    if data is None:
        assert train.dataloader is not None
        data = loader(train.dataloader, f"{where}.dataloader")
    return Training.on(data, criterion, optimizer=optimizer)


def loader(asked: Dataloader, where: str) -> DataLoader[Any]:
    """Returns the loader that a file describes.

    Args:
        asked: What it says.
        where: The file and the key.

    Raises:
        ConfigError: Something is unknown or refuses its arguments, or torchvision is not installed.
    """
    transforms = _torchvision("transforms", where) if asked.transform else None
    steps = [_step(transforms, one, f"{where}.transform") for one in asked.transform]
    kind = _found(_torchvision("datasets", where), asked.dataset, Dataset, f"{where}.dataset")
    extra = {"transform": transforms.Compose(steps)} if transforms is not None else {}
    dataset = _made(kind, asked.dataset, f"{where}.dataset", **extra)
    try:
        return DataLoader(
            dataset,
            batch_size=asked.batch_size,
            shuffle=asked.shuffle,
            drop_last=asked.drop_last,
            num_workers=asked.num_workers,
        )
    except ValueError as error:  # a data set without examples
        raise ConfigError(f"{where}.dataset.{asked.dataset.name}: {_why(error)}. Give one with examples.") from error


def _step(transforms: ModuleType | None, asked: Call, where: str) -> Any:
    """A transform; ``interpolation`` is one of its words, such as ``bilinear``."""
    kind, arguments = _found(transforms, asked, object, where), dict(asked.arguments)
    if isinstance(word := arguments.get("interpolation"), str):
        words = [one.value for one in transforms.InterpolationMode]  # type: ignore[union-attr]
        if word not in words:
            raise ConfigError(
                f"{where}.{asked.name}.interpolation: {word!r} is not known{closest(word, words)}. Use one of "
                f"{', '.join(words)}."
            )
        arguments["interpolation"] = transforms.InterpolationMode(word)  # type: ignore[union-attr]
    return _made(kind, Call(asked.name, arguments, asked.single), where)


def _optimizer(asked: Call, where: str) -> Callable[[list[nn.Parameter]], Optimizer]:
    """What makes the optimizer of some parameters; it was tried on one."""
    kind = _found(torch.optim, asked, Optimizer, where)
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(f"{where}.{asked.name}: needs a closure in each step. Use another, or set pruning_func.")
    call = Call(asked.name, {_RENAMED.get(key, key): value for key, value in asked.arguments.items()}, asked.single)
    _made(kind, call, where, [nn.Parameter(torch.zeros(1))])
    return lambda parameters: kind(parameters, *call.single, **call.arguments)


def _found(home: Any, asked: Call, base: type, where: str) -> Any:
    """The class of that name."""
    names = [
        name
        for name, one in vars(home).items()
        if isinstance(one, type) and issubclass(one, base) and one is not base and not name.startswith("_")
    ]
    if asked.name not in names:
        raise ConfigError(
            f"{where}: {home.__name__} has no {asked.name!r}{closest(asked.name, names)}. Use a name from there."
        )
    return getattr(home, asked.name)


def _made(kind: Callable[..., Any], asked: Call, where: str, *first: Any, **extra: Any) -> Any:
    """An instance of a class."""
    subject = f"{where}.{asked.name}"
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):  # some have no signature
        parameters = MappingProxyType({})
    open_ended = not parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for key in () if open_ended else asked.arguments:
        if key not in parameters:
            known = list(parameters)
            raise ConfigError(
                f"{subject}: {key!r} is no argument of it{closest(key, known)}. It has {', '.join(known)}."
            )
    try:
        return kind(*first, *asked.single, **{**extra, **asked.arguments})
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        given = ", ".join(f"{key} {value!r:.40}" for key, value in asked.arguments.items())
        told = f" ({given})" if given and isinstance(error, TypeError) else ""  # which does not say of what it speaks
        raise ConfigError(f"{subject}: {_why(error)}{told}. Correct its arguments.") from error


def _why(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _torchvision(name: str, where: str) -> ModuleType:
    """A module of torchvision, imported when it is needed."""
    try:
        return import_module(f"torchvision.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torchvision":
            raise  # it is there, but something that it needs is not
        raise ConfigError(
            f"{where}: torchvision is not installed. Run pip install 'graphprune[vision]', or set train_dataloader."
        ) from error
    except RuntimeError as error:  # what it adds to torch was built for another one
        raise ConfigError(
            f"{where}: torchvision cannot be imported ({_why(error)}). Install the one for torch {torch.__version__}."
        ) from error

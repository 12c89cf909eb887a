"""Losses: that of a model, one with a penalty, one that is watched."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import ConfigError, TrainingError

Criterion = Callable[..., Any]
Penalty = Callable[[], Tensor]


def own_loss(outputs: Any, targets: Any = None) -> Tensor:
    """Returns the loss among the outputs of a model: they are it, name it ``loss``, or it is the one scalar of a tuple.

    Raises:
        ConfigError: There is none.
    """
    named = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    entries = outputs if isinstance(outputs, tuple | list) else [outputs]
    found = [one for one in ([named] if named is not None else entries) if isinstance(one, Tensor) and one.dim() == 0]
    if len(found) != 1:
        raise ConfigError(
            f"loss: the model returns a {type(outputs).__name__} without one. Give a loss, or batches with labels."
        )
    return found[0]


class _Wrapped(nn.Module):
    """A criterion inside another, with the attributes of the inner one."""

    def __init__(self, criterion: Criterion) -> None:
        super().__init__()
        self.criterion = criterion

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "criterion":
                raise  # not there yet
            return getattr(self.criterion, name)


class Regularised(_Wrapped):
    """A criterion and a penalty: see :func:`regularised`."""

    def __init__(self, criterion: Criterion, penalty: Penalty) -> None:
        super().__init__(criterion)
        self.penalty = penalty

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, with the penalty while gradients are on."""
        loss = self.criterion(*args, **kwargs)
        return loss + self.penalty() if torch.is_grad_enabled() else loss


def regularised(criterion: Criterion, penalty: Penalty) -> Regularised:
    """Returns ``criterion(outputs, targets) + penalty()``: how regularised pruners act in a loop that they do not know.

    Where gradients are off, in an evaluation, it is the criterion alone. Each call adds the penalty: a loop that sums
    losses before one step has it as often. To a loss for each example it is added to each, which is right for means.

    Args:
        criterion: Any function; the attributes of a module can still be read.
        penalty: Computed from the parameters of the model, one number.
    """
    return Regularised(criterion, penalty)


def shrinkage(tensors: Sequence[Tensor], scale: float) -> Penalty:
    """Returns the penalty ``scale * sum |t|`` (Slim: Liu et al. 2017, arXiv:1708.06519)."""
    return lambda: scale * torch.stack([tensor.abs().sum() for tensor in tensors]).sum()


def proximity(pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]], rho: float) -> Penalty:
    """Returns the penalty ``rho / 2 * sum ||W - V||^2`` over ``pairs()`` of W and V.

    With V = Z - U it is that of ADMM (Zhang et al. 2018, arXiv:1804.03294); Z and U change between epochs, so
    that the pairs are asked for each time.
    """
    return lambda: rho / 2 * torch.stack([(weight - goal).square().sum() for weight, goal in pairs()]).sum()


class Watched(_Wrapped):
    """A criterion that is watched for one epoch.

    Attributes:
        calls: How often it was called while gradients were on.
        total: The sum of what it returned.
    """

    def __init__(self, criterion: Criterion, epoch: int) -> None:
        super().__init__(criterion)
        self.number = epoch
        self.calls = 0
        self.total = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, noted while gradients are on."""
        loss = self.criterion(*args, **kwargs)
        if isinstance(loss, Tensor) and torch.is_grad_enabled():
            value = float(loss.detach().mean())
            if not math.isfinite(value):
                raise TrainingError(
                    f"loss: is {value} in epoch {self.number} after {self.calls} batches. Lower the learning rate, "
                    "clip the gradients, or look for inputs that are no numbers."
                )
            self.total += value
            self.calls += 1
        return loss


def check_loss(loss: Any) -> None:
    """Refuses what is not one number that depends on a parameter.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"loss: is {found}, not one number. Take the mean over the batch.")
    if not loss.requires_grad:
        raise ConfigError("loss: does not depend on a parameter that can be trained. Compute it from the outputs.")

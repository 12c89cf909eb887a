"""Pruning that is learned while the model trains: network slimming, ADMM and movement."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.errors import ConfigError, TrainingError
from graphprune.evidence import at_first_call
from graphprune.training import Training
from graphprune.training.fit import Epoch, fit
from graphprune.training.loss import proximity, shrinkage
from speedup.masked_class import PREFIX, Masked
from speedup.masking import attach_masks, attached_masks, detach_masks

Weights = Mapping[str, Tensor]
"""Tensors by qualified names of parameters."""

Project = Callable[[Weights], Weights]
"""From weights to their masks at the sparsity that is wanted: 1 where an element stays."""


def slim(model: nn.Module, training: Training, scales: Weights, *, scale: float, epochs: int, seed: int = 0) -> None:
    """Trains with ``scale * sum |gamma|`` on top of the loss (Liu et al., Network Slimming, 2017, equation 1).

    Args:
        model: The model, which is changed.
        training: How it is trained.
        scales: The scales of its norms.
        scale: Weight of the penalty.
        epochs: How long.
        seed: Of everything that is random.
    """
    fit(model, training.regularised(shrinkage(list(scales.values()), scale)), epochs, seed=seed)


def admm(
    model: nn.Module,
    training: Training,
    weights: Weights,
    project: Project,
    *,
    rho: float,
    iterations: int,
    epochs: int,
    seed: int = 0,
    waits: bool = False,
) -> None:
    """Trains towards weights that are sparse (Zhang et al., A Systematic DNN Weight Pruning Framework, 2018).

    In turns, beginning with ``Z = W`` projected and ``U = 0``: train with ``rho / 2 * sum norm2(W - Z + U)^2`` on top
    of the loss; then ``Z = projection(W + U)`` and ``U += W - Z``. Of a model with masks ``W`` is multiplied by them.

    Args:
        model: The model, which is changed.
        training: How it is trained.
        weights: Its parameters that become sparse.
        project: Which elements stay of weights at the sparsity that is wanted.
        rho: Weight of the penalty.
        iterations: How many turns.
        epochs: How long a turn trains.
        seed: Of everything that is random.
        waits: Whether the projection depends on the inputs of the model's first call, so that ``Z`` begins with that.

    Raises:
        ConfigError: It waits, and the trainer does not call the model.
    """
    sparse: dict[str, Tensor] = {}
    dual = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    masks = attached_masks(model)

    def masked() -> Weights:
        return {name: weight * masks[name] if name in masks else weight for name, weight in weights.items()}

    def begin(*_: object) -> None:
        sparse.update(_projected(masked(), project))

    def after(epoch: Epoch) -> None:
        if (epoch.epoch + 1) % epochs == 0:
            with torch.no_grad():
                now = masked()
                sparse.update(_projected({name: weight + dual[name] for name, weight in now.items()}, project))
                for name, weight in now.items():
                    dual[name] += weight - sparse[name]

    def pairs() -> list[tuple[Tensor, Tensor]]:
        if not sparse:
            raise ConfigError(
                "trainer: does not call the model before the criterion, so that no inputs are known. Give dummy_input."
            )
        return [(weight, sparse[name] - dual[name]) for name, weight in masked().items()]

    if not waits:
        begin()
    with at_first_call(model, begin) if waits else nullcontext():
        fit(model, training.regularised(proximity(pairs, rho)), iterations * epochs, seed=seed, progress=after)


def _projected(weights: Weights, project: Project) -> dict[str, Tensor]:
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    masks = project(values)
    return {name: value * masks[name].to(value) for name, value in values.items()}


def movement(model: nn.Module, training: Training, scores: "Movement", epochs: int, seed: int = 0) -> None:
    """Trains ``model`` in place for some epochs while scores are learned with it."""
    optimizer, schedule = training.made(model)
    with scores.during(optimizer):
        fit(model, replace(training, optimizer=optimizer, schedule=schedule), epochs, seed=seed)
    if not scores.steps:
        raise TrainingError(
            "trainer: does not step the optimizer that it is given, so that movement learns nothing. Step that one."
        )


class Movement:
    """Scores that are learned with the weights (Sanh et al., Movement Pruning, 2020).

    A masked weight is ``W * M(S)``; the gradient of the loss passes straight through ``M``, so that the scores receive
    ``dL/dS = dL/d(W M) * W``, of masked elements too, summed over all layers that share a weight. What the model's own
    masks had out before stays out. Scores are updated with every step of the model's optimizer. Hard:
    ``M`` keeps the highest scores, of which the share that goes grows cubically from nothing to what is wanted. Soft:
    ``M = sigmoid(S) > threshold``, and ``penalty * mean(sigmoid(S))`` on top of the loss pulls the scores down; as in
    the authors' code, where that leaves less than 0.5 % of a weight its highest scores stay. Scores begin at zero, so
    that a threshold of 0.5 or more begins with those alone: the scores of what is masked learn all the same.

    Attributes:
        scores: The score of each element, by qualified name of its weight, in its shape and single precision at least.
        steps: Steps that were taken.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        keep: Callable[[Weights, Weights, float], Weights],
        *,
        begin: int,
        end: int,
        threshold: float | None = None,
        penalty: float = 0.0,
        learning_rate: float = 1e-2,
    ) -> None:
        """Begins with scores of zero.

        Args:
            model: The model, which gets masks.
            weights: Its parameters that become sparse.
            keep: From scores, the masks that there were before and the share of the way to what is wanted, in [0, 1],
                to masks.
            begin: Steps before anything goes.
            end: The step after which the share stays as it is wanted.
            threshold: Of the sigmoid of a score; None for hard masks.
            penalty: Weight of the penalty on soft scores; it grows as the share of hard ones does.
            learning_rate: Of the scores, which have an Adam optimizer of their own.
        """
        self._model, self._weights, self._keep = model, weights, keep
        self._begin, self._end, self._threshold, self._penalty = begin, end, threshold, penalty
        kinds = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in weights.items()}
        # the eps of Adam is zero in half
        self.scores = {
            name: nn.Parameter(torch.zeros_like(weight, dtype=kinds[name])) for name, weight in weights.items()
        }
        self.steps = 0
        self._before = {name: mask for name, mask in attached_masks(model).items() if name in weights}
        self._optimizer = torch.optim.Adam(self.scores.values(), lr=learning_rate)

    @contextmanager
    def during(self, optimizer: Optimizer) -> Iterator[None]:
        """Learns with every step of ``optimizer`` while the context is open; so long are the masks attached."""
        before = attached_masks(self._model)
        attach_masks(self._model, self.masks())
        self._listen()
        handle = optimizer.register_step_post_hook(self._step)
        try:
            with self._clearing(optimizer):
                yield
        finally:
            handle.remove()
            detach_masks(self._model, multiply=False)
            attach_masks(self._model, before)

    @contextmanager
    def _clearing(self, optimizer: Optimizer) -> Iterator[None]:
        """Lets gradients of masks go where ``optimizer.zero_grad()`` throws those of the weights away."""
        clear = optimizer.zero_grad

        def both(*args: Any, **kwargs: Any) -> None:
            for places in self._attached().values():
                for mask in places:
                    mask.grad = None
            clear(*args, **kwargs)

        setattr(optimizer, "zero_grad", both)  # noqa: B010  # one object's, not the class's
        try:
            yield
        finally:
            delattr(optimizer, "zero_grad")

    def masks(self) -> dict[str, Tensor]:
        """The masks of the scores as they are, by qualified name of the weight."""
        scores = {name: score.detach() for name, score in self.scores.items()}
        if self._threshold is None:
            found = dict(self._keep(scores, self._before, self._progress()))
        else:
            for name, before in self._before.items():
                scores[name] = scores[name].masked_fill(before == 0, float(scores[name].min()) - 1)  # these go first
            found = {name: _above(score, self._threshold) for name, score in scores.items()}
        return {name: mask * self._before[name] if name in self._before else mask for name, mask in found.items()}

    def _progress(self) -> float:
        """``1 - (1 - (t - begin) / (end - begin))^3`` (equation 3 of the paper)."""
        passed = min(max((self.steps - self._begin) / (self._end - self._begin), 0.0), 1.0)
        return 1 - (1 - passed) ** 3

    def _listen(self) -> None:
        for places in self._attached().values():
            for mask in places:
                mask.requires_grad_()  # its gradient is that of the product times the weight

    def _attached(self) -> dict[str, list[Tensor]]:
        """The masks of each weight, one of each layer that has it."""
        found: dict[str, list[Tensor]] = {}
        for name, weight in self._weights.items():
            holders = (module for module in self._model.modules() if isinstance(module, Masked))
            found[name] = [
                module.get_buffer(PREFIX + own)
                for module in holders
                for own, parameter in module._parameters.items()
                if parameter is weight
            ]
        return found

    def _step(self, *_: Any) -> None:
        self.steps += 1
        for name, places in self._attached().items():
            score = self.scores[name]
            gradient = sum((mask.grad for mask in places if mask.grad is not None), torch.zeros_like(score))
            if self._threshold is not None:
                chance = score.detach().sigmoid()
                gradient = gradient + self._penalty * self._progress() * chance * (1 - chance) / chance.numel()
            score.grad = gradient.to(score) if bool(gradient.isfinite().all()) else torch.zeros_like(score)
            for mask in places:
                mask.grad = None
        self._optimizer.step()
        attach_masks(self._model, self.masks())


_LEAST = 0.005
"""The share of a weight of which at least one element more stays, whatever its soft scores are."""


def _above(scores: Tensor, threshold: float) -> Tensor:
    """``M = sigmoid(S) > threshold``, or the highest scores where these are too few; of equal ones the last."""
    mask = scores.sigmoid() > threshold
    least = int(_LEAST * scores.numel()) + 1
    if int(mask.sum()) < least:
        highest = scores.flatten().argsort(stable=True)[-least:]
        mask = torch.zeros_like(mask).flatten().index_fill(0, highest, 1).reshape(mask.shape)
    return mask.to(scores)

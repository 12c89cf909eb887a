"""With what every algorithm works: the batches, how long and how fast it trains, and what says how good a model is."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.training import Training
from graphprune.training.fit import fit

BATCHES = 20
"""Of which activations or gradients are looked at; and for which searches train a candidate."""


@dataclass(frozen=True)
class Shuffled:
    """Batches in a new order each time, drawn from the generator of torch; what fills no batch is left out.

    Attributes:
        count: How many examples there are.
        size: How many of them are a batch.
        batch: The inputs and targets of some examples, by their numbers.
    """

    count: int
    size: int
    batch: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return self.count // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.batch, torch.randperm(self.count).split(self.size)[: len(self)])


@dataclass(frozen=True)
class OneCycle:
    """A trainer whose learning rate rises for a fifth of all steps and then falls to zero as a cosine.

    Attributes:
        data: The batches of an epoch.
        steps: How many of them an epoch takes.
        epochs: After how many epochs the rate is zero.
        rate: The largest rate.
        autocast: Whether the model runs in bfloat16 where that is safe; its weights stay in single precision.
    """

    data: Iterable[tuple[Tensor, Tensor]]
    steps: int
    epochs: int
    rate: float
    autocast: bool

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        """Trains for one epoch."""
        for step, (inputs, targets) in enumerate(itertools.islice(self.data, self.steps)):
            passed = (epoch * self.steps + step + 0.5) / (self.epochs * self.steps)
            for group in optimizer.param_groups:
                group["lr"] = self.rate * cycle(passed)
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast):
                outputs = model(inputs)
            optimizer.zero_grad()
            criterion(outputs.float(), targets).backward()
            optimizer.step()


def cycle(passed: float) -> float:
    """The share of the largest rate when so much of all steps has passed."""
    return passed / 0.2 if passed < 0.2 else (1 + math.cos(math.pi * (passed - 0.2) / 0.8)) / 2


@dataclass(frozen=True)
class Setup:
    """With what every algorithm works.

    Attributes:
        data: The batches of an epoch.
        evaluate: The accuracy of a model in percent, on images that nothing else looks at.
        score: The accuracy by which a search chooses, on training images.
        example_inputs: Of the model.
        epochs: How long a pruned model is trained, over all rounds of a schedule.
        learning: How long algorithms that learn train before.
        rate: Largest learning rate.
        decay: Of weights.
        seed: Of everything that is random.
        autocast: As in :class:`OneCycle`.
        layout: How weights lie in memory while they are trained.
    """

    data: Shuffled
    evaluate: Callable[[nn.Module], float]
    score: Callable[[nn.Module], float]
    example_inputs: Tensor
    epochs: int
    learning: int = 2
    rate: float = 0.05
    decay: float = 1e-4
    seed: int = 0
    autocast: bool = False
    layout: torch.memory_format = torch.contiguous_format

    def training(self, epochs: int, *, rate: float | None = None, steps: int | None = None) -> Training:
        """SGD with momentum for so many epochs of one cycle."""
        trainer = OneCycle(
            self.data,
            len(self.data) if steps is None else min(steps, len(self.data)),
            epochs,
            self.rate if rate is None else rate,
            self.autocast,
        )
        return Training(trainer, partial(sgd, decay=self.decay), nn.functional.cross_entropy)

    def tune(self, model: nn.Module, epochs: int) -> None:
        """Trains a pruned model in place."""
        fit(model.to(memory_format=self.layout), self.training(epochs), epochs, seed=self.seed)

    def touch(self, model: nn.Module) -> None:
        """Trains a candidate of a search in place, for some batches."""
        training = self.training(1, steps=BATCHES)
        fit(model.to(memory_format=self.layout), training, 1, seed=self.seed)

    @property
    def rounds(self) -> int:
        """Of a schedule: four, if the epochs can be shared out between so many."""
        return next(rounds for rounds in (4, 3, 2, 1) if self.epochs % rounds == 0)

    @property
    def round(self) -> int:
        """The epochs of one of them."""
        return self.epochs // self.rounds


def sgd(parameters: list[nn.Parameter], decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=decay)

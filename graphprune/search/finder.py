"""From the command line to a search: what finds the model that is delivered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from graphprune.compress import Calibrate, Progress, Result, Stages
from graphprune.config import Request, closest
from graphprune.errors import ConfigError
from graphprune.pruners.searched import TowardsShares
from graphprune.search.amc import amc
from graphprune.search.annealing import annealing
from graphprune.search.autocompress import Regularise, autocompress
from graphprune.search.candidate import Tune
from graphprune.search.netadapt import netadapt
from graphprune.search.rounds import in_rounds
from graphprune.search.sensitivity import Sensitivity, prune_by_sensitivity, sensitivity
from graphprune.search.space import Space
from graphprune.search.trials import Found, Trials
from graphprune.source import Source
from graphprune.training import Training
from graphprune.training.fit import fit

Search = Callable[[Trials, float, Tune | None, Regularise | None], Found]
"""From how candidates are evaluated, how much goes, what trains a model, and what trains it towards shares."""

SEARCHES: Mapping[str, Search] = {
    "sensitivity": lambda trials, sparsity, tune, _: prune_by_sensitivity(trials, sparsity, finetune=tune),
    "netadapt": lambda trials, sparsity, tune, _: netadapt(trials, 1 - sparsity, finetune=tune),
    "annealing": lambda trials, sparsity, *_: annealing(trials, sparsity),
    "autocompress": lambda trials, sparsity, _, towards: autocompress(trials, sparsity, regularise=towards),
    "amc": lambda trials, sparsity, *_: amc(trials, 1 - sparsity),
}
"""What goes is a share of the multiply-accumulates for netadapt and amc, else of the weights that make channels."""


@dataclass(frozen=True)
class Finder:
    """A search or rounds with a schedule, and training after each shrink.

    Attributes:
        search: A name in :data:`~graphprune.search.named.SEARCHES`; None for rounds.
        schedule: A name in :data:`~graphprune.schedule.SCHEDULES`, of the rounds.
        rounds: How many there are.
        epochs: How long a model is trained after it was shrunk; 0 for not at all.
        journal: File from which a search that was stopped goes on; None for none.
        workers: Where candidates are evaluated; None for this process.
    """

    search: str | None = None
    schedule: str = "linear"
    rounds: int = 1
    epochs: int = 0
    journal: Path | None = None
    workers: str | None = None

    def __post_init__(self) -> None:
        if self.search is not None and self.search not in SEARCHES:
            known = list(SEARCHES)
            raise ConfigError(
                f"search {self.search!r}: is not known{closest(self.search, known)}. Use {', '.join(known)}."
            )

    def __call__(self, source: Source, request: Request, calibrate: Calibrate | None) -> Result:
        """The result of the search, from the usual pipeline.

        Raises:
            ConfigError: The file of the model lacks what is needed.
        """
        if self.search is not None and source.evaluate is None:
            raise ConfigError(f"{source.text}: has no evaluate(model), which --search needs. Add one.")
        training = self._training(source)
        tune = None if training is None else _Tune(training, self.epochs)
        options = request.model_dump(exclude={"sparsity", "scope", "criterion"})
        space = Space.of(
            source.model, source.example_inputs, criterion=request.criterion, calibrate=calibrate, **options
        )
        evaluate = source.evaluate or _nothing
        trials = Trials(space, evaluate, False, self.workers, self.journal, request.seed, source.modules)
        if self.search is not None:
            towards = None if training is None else self._towards(space, training)
            return SEARCHES[self.search](trials, request.sparsity, tune, towards).result
        return in_rounds(trials, request.sparsity, self.schedule, self.rounds, finetune=tune).result

    def _training(self, source: Source) -> Training | None:
        if self.epochs and source.training is None:
            raise ConfigError(f"{source.text}: has no training(), which --epochs needs. Add one.")
        return source.training if self.epochs else None

    def _towards(self, space: Space, training: Training) -> TowardsShares:
        loop = {"trainer": training.trainer, "optimizer": training.optimizer, "criterion": training.criterion}
        turns = {"iterations": self.epochs, "training_epochs": 1}
        return TowardsShares(space.layers, space.example_inputs, {**loop, **turns})


def analysed(
    source: Source,
    shares: Sequence[float],
    criterion: str,
    journal: Path | None,
    workers: str | None,
    seed: int,
    progress: Progress,
) -> tuple[Space, Sensitivity]:
    """Returns what can be chosen of a model, and its score at each share of each group.

    Raises:
        ConfigError: The file of the model has no ``evaluate(model)``, or a share makes no sense.
    """
    if source.evaluate is None:
        raise ConfigError(f"{source.text}: has no evaluate(model). Add one.")
    stage = Stages(progress)
    calibrate = None if source.training is None else _Tune(source.training.first(20), 1)
    options = {"criterion": criterion, "calibrate": calibrate, "seed": seed, "round_to": 1}
    space = stage("analyse", Space.of, source.model, source.example_inputs, **options)
    trials = Trials(space, source.evaluate, False, workers, journal, seed, source.modules)
    return space, stage("evaluate", sensitivity, trials, shares)


@dataclass(frozen=True)
class _Tune:
    """Trains a model in place; a value, so that it can go to a worker."""

    training: Training
    epochs: int

    def __call__(self, model: nn.Module) -> None:
        fit(model, self.training, self.epochs)


def _nothing(model: nn.Module) -> float:
    """The score of models that nobody evaluates."""
    return 0.0

"""From the command line to a search: what finds the model that is delivered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, field_validator
from torch import nn

from graphprune.compress import Calibrate, Progress, Result, Stages, target_of
from graphprune.config import Request, Said, closest
from graphprune.errors import ConfigError
from graphprune.pruners.searched import TowardsShares
from graphprune.schedule import SCHEDULES
from graphprune.search.amc import amc
from graphprune.search.annealing import annealing
from graphprune.search.asked import asked_sparsity
from graphprune.search.autocompress import Regularise, autocompress
from graphprune.search.candidate import Tune
from graphprune.search.netadapt import netadapt
from graphprune.search.pool import is_address
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
    "annealing": lambda trials, sparsity, tune, _: annealing(trials, sparsity, finetune=tune),
    "autocompress": lambda trials, sparsity, _, towards: autocompress(trials, sparsity, regularise=towards),
    "amc": lambda trials, sparsity, tune, _: amc(trials, 1 - sparsity, finetune=tune),
}
"""What goes is a share of the multiply-accumulates for netadapt and amc, else of the weights that make channels."""


class Finder(Said):
    """A search or rounds with a schedule, and training after each shrink.

    Attributes:
        search: A name in :data:`SEARCHES`; None for rounds.
        schedule: A name in :data:`~graphprune.schedule.SCHEDULES`, of the rounds.
        rounds: How many there are.
        epochs: How long a model is trained after it was shrunk; 0 for not at all. Annealing and amc train what they
            have found; autocompress trains towards the shares of each round, so many times an epoch.
        journal: File from which a search that was stopped goes on; None for none.
        workers: Where candidates are evaluated; None for this process.
    """

    search: str | None = None
    schedule: str = "one_shot"
    rounds: int = 1
    epochs: int = 0
    journal: Path | None = None
    workers: str | None = None

    @field_validator("search", "schedule")
    @classmethod
    def _names_are_known(cls, value: str | None, info: ValidationInfo) -> str | None:
        known: list[str] = list(SEARCHES if info.field_name == "search" else SCHEDULES)
        if value is not None and value not in known:
            raise ValueError(f"is not known{closest(value, known)}. Use one of {', '.join(known)}")
        return value

    @field_validator("rounds", "epochs")
    @classmethod
    def _counts_are_counts(cls, value: int, info: ValidationInfo) -> int:
        least = 1 if info.field_name == "rounds" else 0
        if value < least:
            raise ValueError(f"is below {least}. Use {least} or more")
        return value

    @field_validator("workers")
    @classmethod
    def _workers_have_an_address(cls, value: str | None) -> str | None:
        if value is not None and not is_address(value):
            raise ValueError("is no address. Use 'ray', or one such as 'ray://head:10001'")
        return value

    def __call__(self, source: Source, request: Request, calibrate: Calibrate | None) -> Result:
        """The result of the search, from the usual pipeline.

        Raises:
            ConfigError: The file of the model lacks what is needed.
        """
        if self.search is not None and source.evaluate is None:
            raise ConfigError(f"{source.text}: has no evaluate(model), which --search needs. Add one.")
        training = self._training(source)
        tune = None if training is None else source.in_training(_Tune(training, self.epochs, request.seed))
        grows = self.search is None and self.schedule != "one_shot"
        space = Space.of(
            source.model,
            source.example_inputs,
            asked=partial(target_of, request=request, grows=grows),
            calibrate=calibrate,
            **request.model_dump(exclude={"sparsity"}),
        )
        about = {"epochs": self.epochs, "scope": request.scope}
        trials = Trials(
            space,
            source.evaluate or _nothing,
            workers=self.workers,
            journal=self.journal,
            seed=request.seed,
            modules=source.modules,
            code=source.code,
            about=about,
        )
        if self.search is not None:
            if not (share := asked_sparsity(space)):
                raise ConfigError("sparsity 0: leaves nothing to search for. Ask for a share such as 0.5.")
            towards = None
            if training is not None:
                towards = source.in_training(self._towards(space, training, request.seed))
            return SEARCHES[self.search](trials, share, tune, towards).result
        return in_rounds(trials, self.schedule, self.rounds, finetune=tune).result

    def _training(self, source: Source) -> Training | None:
        if self.epochs and source.training is None:
            raise ConfigError(f"{source.text}: has no training(), which --epochs needs. Add one.")
        return source.training if self.epochs else None

    def _towards(self, space: Space, training: Training, seed: int) -> TowardsShares:
        loop = {"trainer": training.trainer, "optimizer": training.optimizer, "criterion": training.criterion}
        turns = {"iterations": self.epochs, "training_epochs": 1, "seed": seed}
        return TowardsShares(space.layers, space.example_inputs, {**loop, **turns})


def finder_of(values: Mapping[str, Any], request: Request) -> Finder | None:
    """Returns what looks for what goes; None if all of it goes in one shot.

    Args:
        values: The fields of :class:`Finder` that a user gives.
        request: What is asked.

    Raises:
        ConfigError: A value makes no sense, or has no effect beside the others.
    """
    finder = Finder.of(**values)
    if finder.search is None and "schedule" not in values and not finder.epochs:
        for name in ("rounds", "journal", "workers"):
            if name in values:
                raise ConfigError(
                    f"--{name}: has no effect without --schedule, --search or --epochs. Give one of them."
                )
        return None
    if finder.search is not None:
        for name in ("schedule", "rounds"):
            if name in values:
                raise ConfigError(f"--search and --{name}: exclude each other. Give one of them.")
        if request.scope == "global":
            raise ConfigError(
                "--scope global: is not for --search, which says how much of each group goes. Leave it out."
            )
    return finder


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
    calibrate = None
    if source.training is not None:
        calibrate = source.in_training(_Tune(source.training.first(20), 1, seed))
    options = {"criterion": criterion, "calibrate": calibrate, "seed": seed, "round_to": 1}
    space = stage("analyse", Space.of, source.model, source.example_inputs, **options)
    trials = Trials(
        space, source.evaluate, workers=workers, journal=journal, seed=seed, modules=source.modules, code=source.code
    )
    return space, stage("evaluate", sensitivity, trials, shares)


@dataclass(frozen=True)
class _Tune:
    """Trains a model in place; a value, so that it can go to a worker."""

    training: Training
    epochs: int
    seed: int

    def __call__(self, model: nn.Module) -> None:
        fit(model, self.training, self.epochs, seed=self.seed)


def _nothing(model: nn.Module) -> float:
    """The score of models that nobody evaluates."""
    return 0.0

"""Training epoch after epoch, to the last of them or until nothing gets better; what was stopped goes on."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from graphprune.errors import ConfigError, TrainingError, shown
from graphprune.training.hooks import Hooks, check_hooks
from graphprune.training.loop import Loop, Training
from graphprune.training.snapshot import load_best, load_snapshot, newest_snapshot, save_snapshot, seeded

Evaluator = Callable[[nn.Module], float]
Direction = Literal["maximize", "minimize"]
Keep = Literal["last", "best"]


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to.

    Attributes:
        epoch: Its number, from zero.
        loss: Mean of the losses, penalties included; None if the trainer uses no criterion.
        score: What the evaluator said after it; None without one.
        rate: The learning rate of the first group during it.
    """

    epoch: int
    loss: float | None
    score: float | None
    rate: float

    def __str__(self) -> str:
        numbers = {"loss": self.loss, "score": self.score, "rate": self.rate}
        told = (f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
        return f"epoch {self.epoch}: {', '.join(told)}"


@dataclass(frozen=True)
class Fit:
    """What training came to.

    Attributes:
        epochs: All epochs, those before a resumption included.
        best: The number of the first epoch with the best score, or the lowest loss without an evaluator; None if there
            was neither.
        stopped: Whether training ended because nothing got better, be it after the last epoch.
        optimizer: The optimizer as it is now.
        schedule: Its schedule.
    """

    epochs: tuple[Epoch, ...]
    best: int | None
    stopped: bool
    optimizer: Optimizer
    schedule: LRScheduler | None


def fit(
    model: nn.Module,
    training: Training,
    epochs: int,
    *,
    seed: int = 0,
    progress: Callable[[Epoch], object] = lambda epoch: None,
    hooks: Hooks | None = None,
    evaluator: Evaluator | None = None,
    optimize_mode: Direction = "maximize",
    patience: int | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    keep: Keep = "last",
) -> Fit:
    """Trains ``model``, which is changed, and returns how it went.

    The same seed gives the same weights; the random numbers of the process are afterwards where they were. A run that
    was stopped goes on from the last epoch in its folder, and ends with exactly the weights of one that was not: model,
    optimizer, schedule and random numbers are what they were. What hooks, criteria, evaluators and lasting workers of a
    loader remember is not: hooks are told the number of the epoch.

    Args:
        model: The model; it ends in the mode that it began in.
        training: How one epoch is trained.
        epochs: How many there are in all.
        seed: Of Python, numpy and torch, in [0, 2**63); a generator that a loader brings along is left where it is.
        progress: Called after each epoch, when its snapshot is written.
        hooks: Called around epochs and batches.
        evaluator: Called after each epoch with the model in eval mode and gradients off; returns a number.
        optimize_mode: Whether more of it is better.
        patience: Ends training after so many epochs without a better score, or without an evaluator a lower loss.
        folder: Where a snapshot is written after each epoch; only the last is kept.
        resume: Goes on with what is in the folder, if there is something.
        keep: Whether the model ends with the weights of the last epoch or of the best one; the optimizer is always that
            of the last.

    Raises:
        ConfigError: An option makes no sense, nothing can be trained, or the folder holds a run that should not be
            resumed.
        ModelError: The folder holds the run of another model or optimizer.
        TrainingError: A loss, a weight or a score is no number, or the trainer trains something else than the model.
    """
    told = (
        ("model", model, isinstance(model, nn.Module), "a module"),
        (
            "training",
            training,
            isinstance(training, Training),
            "a Training, such as Training(trainer, optimizer, loss)",
        ),
        ("epochs", epochs, _is_whole(epochs, 0), "a whole number, at least 0"),
        ("seed", seed, _is_whole(seed, 0) and seed < 1 << 63, "a whole number in [0, 2**63)"),
        ("progress", progress, callable(progress), "a function of an Epoch"),
        ("evaluator", evaluator, evaluator is None or callable(evaluator), "a function of a model"),
        ("optimize_mode", optimize_mode, optimize_mode in get_args(Direction), "maximize or minimize"),
        ("patience", patience, patience is None or _is_whole(patience, 1), "a whole number, at least 1"),
        ("folder", folder, folder is None or isinstance(folder, str | Path), "a path"),
        ("keep", keep, keep in get_args(Keep), "last or best"),
    )
    for name, value, holds, what in told:
        if not holds:
            raise ConfigError(f"{name}: is {shown(value)}. Give {what}.")
    if hooks is not None:
        check_hooks(hooks)
    _check_trainable(model)
    _check_folder(folder, resume)
    generators = training.trainer.generators if isinstance(training.trainer, Loop) else []
    with seeded(seed), _modes_kept(model):
        optimizer, schedule = training.made(model)
        done: list[Epoch] = []
        found = newest_snapshot(Path(folder)) if folder is not None else None
        if found is not None:
            facts = load_snapshot(found, model, optimizer, schedule, generators)
            done = [Epoch(**fact) for fact in facts]
        better = evaluator is None or optimize_mode == "minimize"
        best = _best(done, lower=better)
        champion = load_best(found) if found is not None and keep == "best" else None
        while len(done) < epochs and not _lame(done, best, patience):
            number, rate = len(done), float(optimizer.param_groups[0]["lr"])
            loss = training.epoch(model, optimizer, number, hooks)
            score = None if evaluator is None else evaluated(evaluator, model)
            _advance(schedule, loss if score is None else score)
            done.append(Epoch(number, loss, score, rate))
            best = _best(done, lower=better)
            if best is None and (patience is not None or keep == "best"):
                what = "keep" if patience is None else "patience"
                raise ConfigError(f"{what}: needs a loss or a score, and there is neither. Give an evaluator.")
            if keep == "best" and best == number:
                champion = copy.deepcopy(model.state_dict())
            if folder is not None:
                facts = [asdict(one) for one in done]
                save_snapshot(Path(folder), model, optimizer, schedule, generators, facts, champion)
            progress(done[-1])
        if champion is not None:
            model.load_state_dict(champion)
    return Fit(tuple(done), best, _lame(done, best, patience), optimizer, schedule)


def evaluated(evaluator: Evaluator, model: nn.Module) -> float:
    """Returns what an evaluator says of a model, which is in eval mode meanwhile, with gradients off.

    Raises:
        TrainingError: It says something else than a number.
    """
    with _modes_kept(model), torch.no_grad():
        said = evaluator(model.eval())
    kind = type(said).__name__
    try:
        score = math.nan if isinstance(said, bool | str) else float(said)
    except (TypeError, ValueError, RuntimeError):
        score = math.nan
    else:
        kind = repr(score) if isinstance(said, float) else kind
    if math.isnan(score):
        raise TrainingError(f"evaluator: returns {kind}, not a number. Return a score of the model as a float.")
    return score


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _check_trainable(model: nn.Module) -> None:
    """Refuses to train where a backward pass would find nothing."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"model: {type(model).__name__} has no parameter that can be trained. Give one that has, or let some "
            "require gradients with requires_grad_()."
        )
    if not torch.is_grad_enabled():
        raise ConfigError("model: gradients are off, so that it cannot be trained. Train outside of torch.no_grad().")


def _check_folder(folder: Path | str | None, resume: bool) -> None:
    if folder is None:
        if resume:
            raise ConfigError("resume: there is no folder to go on from. Give the folder of the run.")
        return
    path = Path(folder)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.absolute().parent} to make it in. Make that first.")
    if not resume and newest_snapshot(path) is not None:
        raise ConfigError(f"{path}: holds a training run. Resume it, or use another folder.")


def _best(done: list[Epoch], *, lower: bool) -> int | None:
    """The first of the best epochs."""
    sign = -1.0 if lower else 1.0
    values = {one.epoch: one.loss if one.score is None else one.score for one in done}
    known = {epoch: sign * value for epoch, value in values.items() if value is not None}
    return max(known, key=lambda epoch: known[epoch]) if known else None


def _lame(done: list[Epoch], best: int | None, patience: int | None) -> bool:
    """Whether there was nothing better for too long."""
    return patience is not None and best is not None and len(done) - 1 - best >= patience


def _advance(schedule: LRScheduler | None, value: float | None) -> None:
    if not isinstance(schedule, ReduceLROnPlateau):
        if schedule is not None:
            schedule.step()
        return
    if value is None:
        raise ConfigError("schedule: needs a loss or a score, and there is neither. Give an evaluator.")
    schedule.step(value)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts every module back into its mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

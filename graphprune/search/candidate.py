"""One candidate: built, trained and evaluated, as a function of nothing but its arguments."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.errors import ConfigError, ModelError
from graphprune.search.state import Weights, shrunk_model, tensors_after
from graphprune.training.loop import in_place
from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.inputs import ExampleInputs
from speedup.labels import Mask
from speedup.repair import repaired

Evaluate = Callable[[nn.Module], Any]
"""Gives a number for a model, which is in eval mode and which it may change."""

Tune = Callable[[nn.Module], Any]
"""Trains a model in place."""


@dataclass(frozen=True, eq=False)
class Origin:
    """What all candidates of a search have in common; it goes to the workers by value.

    Attributes:
        model: The dense model.
        example_inputs: What it is captured with.
        evaluate: Gives the score of a candidate.
        threads: Threads of torch, on which sums depend.
        key: Says which model it is; a worker captures each only once.
    """

    model: nn.Module
    example_inputs: ExampleInputs
    evaluate: Evaluate
    threads: int
    key: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class Job:
    """A candidate: what is left of the model, and the seed of everything random in its training and evaluation.

    Attributes:
        live: The classes that are left, shape (classes,).
        seed: Of torch, numpy and random.
        scored: Whether it is evaluated.
    """

    live: Mask
    seed: int
    scored: bool = True


@dataclass(frozen=True, eq=False)
class Outcome:
    """The score of a candidate, None where it was not asked for, and its tensors by name if it was trained."""

    score: float | None
    weights: Weights | None


def try_candidate(
    origin: Origin, weights: Weights | None, tune: Tune | None, job: Job, analysis: Analysis | None = None
) -> Outcome:
    """Returns what comes of a candidate: a function of its arguments alone, wherever it runs.

    Args:
        origin: What all candidates have in common.
        weights: The dense model's tensors in the state from which the candidate starts; None for those it came with.
        tune: Trains the shrunk model before it is evaluated; None if nothing does.
        job: The candidate.
        analysis: The dense model's analysis where that is at hand.

    Raises:
        ConfigError: The evaluator gives no finite number.
        ModelError: The model is captured differently here.
        TrainingError: What trains it returns another model.
    """
    analysis = analysis or _analysed(origin)
    if len(job.live) != analysis.classes.count:
        raise ModelError("model: a worker captures it differently. Use the same versions of everything there.")
    with seeded(job.seed, origin.threads):
        model = shrunk_model(analysis, job.live, weights)
        if tune is not None:
            in_place(model, tune)
        found = tensors_after(model) if tune is not None else None
        return Outcome(checked_score(origin.evaluate(model.eval())) if job.scored else None, found)


def checked_score(value: Any) -> float:
    """Returns the number that an evaluator gave.

    Raises:
        ConfigError: It is none, or not finite.
    """
    number = number_in(value)
    if number is None:
        raise ConfigError(f"evaluate: returned {_shown(value)}, no number. Let it return one, such as an accuracy.")
    if not math.isfinite(number):
        raise ConfigError(f"evaluate: returned {number}. Let it return a finite number for every model.")
    return number


def number_in(value: Any) -> float | None:
    """Returns the one number that a number, tensor or array is; None if it is none."""
    array: Any = value
    if isinstance(value, Tensor):
        array = (value.detach().cpu().double() if value.is_floating_point() else value.detach().cpu()).numpy()
    if isinstance(array, np.ndarray | np.generic) and array.size == 1:
        value = array.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@lru_cache(maxsize=1)
def _analysed(origin: Origin) -> Analysis:
    """The analysis of a worker's own copy of the model."""
    return analyse(capture(repaired(origin.model, {}, ()), origin.example_inputs))


@contextmanager
def seeded(seed: int, threads: int) -> Iterator[None]:
    """Seeds what users draw from, and fixes threads, type and gradients of torch, for a while."""
    states = random.getstate(), np.random.get_state(), torch.get_num_threads()
    kind = torch.get_default_dtype()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # of torch
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads(states[2])
            torch.set_default_dtype(kind)

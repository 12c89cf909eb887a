"""Simulated annealing over the widths."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from graphprune.errors import ConfigError
from graphprune.search.candidate import Tune
from graphprune.search.reach import reach
from graphprune.search.space import Measure, Space
from graphprune.search.state import State
from graphprune.search.trials import Evaluation, Found, Run, Trials


@dataclass(frozen=True)
class Schedule:
    """How an annealing cools.

    Attributes:
        start: First temperature.
        stop: It ends when the temperature is below this.
        cool: The next temperature is this times the last, in (0, 1).
        perturbation: Largest change of a share at the first temperature; it falls with the temperature.
        tries: Batches at a temperature until one is accepted; then, or after as many, it cools.
        batch: Candidates that are drawn and evaluated at once; the best of them is accepted or not.
    """

    start: float = 100.0
    stop: float = 20.0
    cool: float = 0.9
    perturbation: float = 0.35
    tries: int = 4
    batch: int = 4

    def __post_init__(self) -> None:
        if not (0 < self.stop <= self.start < math.inf and 0 < self.cool < 1):
            raise ConfigError(
                f"annealing: from {self.start} to {self.stop} by {self.cool} never ends. Use 100, 20 and 0.9."
            )
        if self.tries < 1 or self.batch < 1 or not 0 < self.perturbation < math.inf:
            raise ConfigError("annealing: tries, batch and perturbation are above 0. Use 4, 1 and 0.35.")


MANUAL = Schedule()
"""The schedule of the manuals."""


def annealing(
    trials: Trials,
    sparsity: float,
    *,
    of: Measure = "weights",
    schedule: Schedule = MANUAL,
    finetune: Tune | None = None,
) -> Found:
    """Returns the best shares that simulated annealing finds at an overall sparsity.

    Liu et al., AutoCompress, 2020: guided heuristic search. It starts from random shares, sorted so that groups with
    more weights give more. A candidate is the present shares plus uniform numbers in [-m, m], m = perturbation * T /
    start, scaled so that the overall sparsity is met. A worse candidate is accepted with probability

        p = exp(-dE / s * start / T),  s = mean |dE| so far.

    The manuals leave out s: with accuracies in [0, 1] and T from 100 to 20 their exp(-dE/T) is always above 0.95, so
    that nearly everything is accepted and nothing searched. With s the units of the score do not matter: a candidate
    that is worse by as much as is usual is accepted with 0.37 first and 0.007 in the end.

    Args:
        trials: How candidates are evaluated.
        sparsity: What goes, in (0, 1): a share of what ``of`` counts.
        of: What a sparsity counts.
        schedule: How it cools.
        finetune: Trains the model that was found, in place.

    Raises:
        ConfigError: A number is out of range, or so much cannot go.
    """
    if not 0 < sparsity < 1:
        raise ConfigError(f"sparsity {sparsity}: is not in (0, 1). Use one such as 0.5.")
    settings = {"sparsity": sparsity, "of": of, **asdict(schedule)}
    with trials.begin("annealing", **settings, finetune=finetune) as run:
        state = trials.space.start
        return run.trained_and_found(annealed(run, state, 1 - sparsity, of, schedule), state, finetune)


def annealed(run: Run, state: State, left: float, of: Measure, schedule: Schedule) -> Evaluation:
    """Returns the best evaluation of an annealing from ``state`` to where ``left`` of the dense model is left."""
    space = run.space
    draws = np.random.default_rng([run.seed, int(state.key[:15] or "0", 16)])
    (present,) = run.evaluate([reach(space, _first(space, draws), left, of, state)], state)
    wish = _relative(space, present, state)
    best, temperature = present, schedule.start
    changes: list[float] = []
    while temperature >= schedule.stop:
        for _ in range(schedule.tries):
            size = schedule.perturbation * temperature / schedule.start
            wishes = [
                {name: max(w + draws.uniform(-size, size), 0.0) for name, w in wish.items()}
                for _ in range(schedule.batch)
            ]
            found = run.evaluate([reach(space, w, left, of, state) for w in wishes], state)
            better = run.best(found)
            worse = run.merit(present.score) - run.merit(better.score)
            changes.append(abs(worse))
            accepted = draws.random() < acceptance(worse, changes, temperature / schedule.start)
            if run.merit(better.score) > run.merit(best.score):
                best = better
            if accepted:
                present, wish = better, _relative(space, better, state)
                break
        temperature *= schedule.cool
    return best


def acceptance(worse: float, changes: Sequence[float], temperature: float) -> float:
    """Returns the probability with which a candidate is accepted.

    Args:
        worse: How much worse it is than the present one; negative if it is better.
        changes: How much candidates differed from the present one so far.
        temperature: Relative to the first, in (0, 1].
    """
    if worse <= 0:
        return 1.0
    return math.exp(-worse / (sum(changes) / len(changes)) / temperature)


def _first(space: Space, draws: np.random.Generator) -> dict[str, float]:
    """Random wishes, larger ones for groups with more weights."""
    names = sorted(space.groups, key=lambda name: space.weight_counts[name])
    return dict(zip(names, np.sort(draws.uniform(0, 1, len(names))).tolist(), strict=True))


def _relative(space: Space, evaluation: Evaluation, state: State) -> dict[str, float]:
    """The share that each group gives of what it has in ``state``."""
    now = space.shares(state.live)
    return {n: 0.0 if now[n] >= 1 else (share - now[n]) / (1 - now[n]) for n, share in evaluation.shares.items()}

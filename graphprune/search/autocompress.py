"""AutoCompress: rounds of annealing for the widths, structured regularisation, and a speedup."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from torch import nn

from graphprune.errors import ConfigError
from graphprune.search.annealing import MANUAL, Schedule, annealed
from graphprune.search.reach import check_reachable
from graphprune.search.space import Measure, Shares
from graphprune.search.trials import Found, Trials

Regularise = Callable[[nn.Module, Shares], object]
"""Trains a model in place so that of each of its groups a share can go: ADMM with structured projections, for one."""


def autocompress(
    trials: Trials,
    sparsity: float,
    *,
    of: Measure = "weights",
    rounds: int = 3,
    schedule: Schedule = MANUAL,
    regularise: Regularise | None = None,
) -> Found:
    """Returns a model that went through rounds of annealing, regularisation and speedup.

    Liu et al., AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates, 2020.
    For an overall sparsity P in N rounds each takes 1 - (1 - P)^(1/N) of what the ones before have left: annealing
    finds the shares; ``regularise`` trains the weights towards them; what the criterion then says is cut, physically.
    The next round works on the model that is left, with the weights as they were trained.

    Args:
        trials: How candidates are evaluated.
        sparsity: What goes in the end, in (0, 1): a share of what ``of`` counts.
        of: What a sparsity counts.
        rounds: N, 1 or more.
        schedule: How each annealing cools.
        regularise: Trains the model of the round in place, given also the share that each group of it will lose, by the
            name that the group has in the dense model; None goes without.

    Raises:
        ConfigError: A number is out of range, or so much cannot go.
    """
    if not 0 < sparsity < 1:
        raise ConfigError(f"sparsity {sparsity}: is not in (0, 1). Use one such as 0.5.")
    if rounds < 1:
        raise ConfigError(f"rounds {rounds}: is below 1. Use 1 or more.")
    check_reachable(trials.space, 1 - sparsity, of)
    settings = {"sparsity": sparsity, "of": of, "rounds": rounds, **asdict(schedule)}
    with trials.begin("autocompress", **settings, regularise=regularise) as run:
        space, state = trials.space, trials.space.start
        for place in range(1, rounds + 1):
            now = space.shares(state.live)
            best = annealed(run, state, (1 - sparsity) ** (place / rounds), of, schedule)
            if regularise is not None:
                losing = {n: (s - now[n]) / (1 - now[n]) if now[n] < 1 else 0.0 for n, s in best.shares.items()}
                state = run.tuned(now, state, _Towards(regularise, losing), f"towards {best.key}")
                (best,) = run.evaluate([best.shares], state)
            state = space.cut(state, best.live)
        return run.found(best, state)


@dataclass(frozen=True)
class _Towards:
    """Regularises a model towards shares; a value, so that it can go to a worker."""

    regularise: Regularise
    shares: Shares = field(hash=False)

    def __call__(self, model: nn.Module) -> object:
        return self.regularise(model, self.shares)

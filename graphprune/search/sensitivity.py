"""Sensitivity: what the model scores when one group alone gives up channels, and pruning by it."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from graphprune.errors import ConfigError
from graphprune.search.candidate import Tune
from graphprune.search.reach import check_reachable, reach
from graphprune.search.space import Measure, Space
from graphprune.search.state import State
from graphprune.search.trials import Found, Run, Trials

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares that are tried of every group."""


@dataclass(frozen=True)
class Sensitivity:
    """The scores of a model in which one group at a time has given up channels.

    Attributes:
        dense: The score of the model with all of them.
        scores: For each group by name, and for each share of it that goes, the score.
    """

    dense: float
    scores: Mapping[str, Mapping[float, float]]

    def to_csv(self, space: Space) -> str:
        """Returns the table in NNI's columns: «layername,0.1,0.2,...», a row for each layer that makes channels."""
        shares = list(dict.fromkeys(share for row in self.scores.values() for share in row))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layername", *shares])
        for name, row in self.scores.items():
            for layer in space.layers[name]:
                writer.writerow([layer, *(row.get(share, "") for share in shares)])
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str, space: Space, dense: float) -> "Sensitivity":
        """Returns the table that :meth:`to_csv` or NNI wrote.

        Raises:
            ConfigError: It is no such table, names a layer that the model does not have, or gives layers whose channels
                go together different scores.
        """
        rows = list(csv.reader(io.StringIO(text)))
        try:
            shares = [float(share) for share in rows[0][1:]]
            named = {
                row[0]: {s: float(v) for s, v in zip(shares, row[1:], strict=True) if v} for row in rows[1:] if row
            }
        except (IndexError, ValueError) as error:
            raise ConfigError(
                f"csv: is no table of sensitivities ({error}). Its columns are layername,0.1,..."
            ) from error
        groups = {layer: name for name, layers in space.layers.items() for layer in layers}
        found: dict[str, Mapping[float, float]] = {}
        for layer, row in named.items():
            if layer not in groups:
                raise ConfigError(f"csv: {layer!r} makes no channels that may go. Use the table of this model.")
            if found.setdefault(groups[layer], row) != row:
                raise ConfigError(
                    f"csv: {layer} has other scores than a layer whose channels go with its own. Keep one."
                )
        return cls(dense, found)


def sensitivity(trials: Trials, shares: Sequence[float] = SHARES) -> Sensitivity:
    """Returns the score of the model at each share of each group, all other groups whole.

    Args:
        trials: How candidates are evaluated.
        shares: Shares of a group that go, each in (0, 1).

    Raises:
        ConfigError: A share is not in (0, 1).
    """
    _check(shares)
    with trials.begin("sensitivity", shares=list(shares)) as run:
        return _analysed(run, trials.space.start, shares)


def prune_by_sensitivity(
    trials: Trials,
    sparsity: float,
    *,
    of: Measure = "weights",
    step: float = 0.1,
    drop: float = 0.05,
    shares: Sequence[float] = SHARES,
    finetune: Tune | None = None,
) -> Found:
    """Returns a model from which channels went in rounds, more from groups that the score depends on less.

    Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015, set the thresholds of
    layers by their sensitivity; the rounds are those of NNI's SensitivityPruner. In each, the model as it is is
    analysed; a group should give the largest share at which the score has fallen by no more than ``drop`` (between
    two shares that were tried, linear), and of all these wishes the same part is taken, such that the round reaches
    its overall sparsity.

    Args:
        trials: How candidates are evaluated.
        sparsity: What goes in the end, in (0, 1): a share of what ``of`` counts.
        of: What a sparsity counts.
        step: What goes in a round, in (0, 1].
        drop: How far the score may fall, in the units of the evaluator; 0.05 is five percent for accuracies in [0, 1].
        shares: Shares of a group that are tried.
        finetune: Trains the model in place after each round.

    Raises:
        ConfigError: A number is out of range, or so much cannot go.
    """
    _check(shares)
    for name, value, least in (("sparsity", sparsity, "in (0, 1)"), ("step", step, "above 0")):
        if not 0 < value < (1 if name == "sparsity" else 2):
            raise ConfigError(f"{name} {value}: is not {least}. Use one such as 0.5.")
    check_reachable(trials.space, 1 - sparsity, of)
    settings = {"sparsity": sparsity, "of": of, "step": step, "drop": drop, "shares": list(shares)}
    with trials.begin("sensitivity pruner", **settings, finetune=finetune) as run:
        state, gone = trials.space.start, 0.0
        while True:
            table = _analysed(run, state, shares)
            gone = min(gone + step, sparsity)
            wish = {name: _bearable(run, table, row, drop) for name, row in table.scores.items()}
            wanted = reach(trials.space, wish, 1 - gone, of, state)
            (chosen,) = run.evaluate([wanted], state, tune=finetune)
            state = run.trained(chosen, state, finetune)
            gone = max(gone, 1 - trials.space.left(state.live, of))
            if gone >= sparsity - 1e-9:
                return run.found(chosen, state)


def _analysed(run: Run, state: State, shares: Sequence[float]) -> Sensitivity:
    """The table of a state; shares are of what it has left of a group."""
    space = run.space
    now = space.shares(state.live)
    names = [name for name in space.groups if now[name] < space.most(name) - 1e-9]
    pairs = [(name, share) for name in names for share in shares]
    wanted = [now | {name: min(space.most(name), now[name] + share * (1 - now[name]))} for name, share in pairs]
    dense, *found = run.evaluate([now, *wanted], state)
    scores: dict[str, dict[float, float]] = {name: {} for name in names}
    for (name, share), evaluation in zip(pairs, found, strict=True):
        scores[name][share] = evaluation.score
    return Sensitivity(dense.score, scores)


def _bearable(run: Run, table: Sensitivity, row: Mapping[float, float], drop: float) -> float:
    """The share at which the score has fallen by ``drop``, at most the last one before which it always bore it."""
    before, lost_before = 0.0, 0.0
    for share in sorted(row):
        lost = run.merit(table.dense) - run.merit(row[share])
        if lost > drop:
            return before + (share - before) * max(drop - lost_before, 0.0) / max(lost - lost_before, 1e-12)
        before, lost_before = share, lost
    return before


def _check(shares: Sequence[float]) -> None:
    if not shares:
        raise ConfigError("shares: is empty, so that nothing is tried. Use shares such as 0.1.")
    for share in shares:
        if not isinstance(share, Real) or not 0 < share < 1:
            raise ConfigError(f"shares: {share!r} is not in (0, 1). Use shares such as 0.1.")

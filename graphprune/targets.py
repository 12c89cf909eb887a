"""Targets: what is asked of each channel group, as a share of its own units or of a ranking with others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphprune.criteria import Scores
from graphprune.groups import ChannelGroup


@dataclass(frozen=True)
class Target:
    """What is asked of a channel group.

    Attributes:
        sparsity: Share that goes, in [0, 1): of its own units, or of the units of all groups that are ranked with it.
        ranking: Groups with the same name here are ranked together; None ranks the units of each group by themselves.
        most: Largest share of its own units that goes where it is ranked with others, in [0, 1].
        weight: What each of its units counts in the share of a ranking.
        relative: Whether a ranking compares scores divided by their mean in the group, instead of scores as they are.
    """

    sparsity: float
    ranking: str | None = None
    most: float = 1.0
    weight: float = 1.0
    relative: bool = True


def units_to_keep(
    groups: Sequence[ChannelGroup], targets: Mapping[int, Target], scores: Mapping[int, Scores]
) -> dict[int, int]:
    """Returns how many units each group keeps, by its index.

    Args:
        groups: The groups of which something may go.
        targets: What is asked of each of them, by index.
        scores: A score for each unit of each of them, by index, shape (units,).
    """
    together: dict[str, list[ChannelGroup]] = {}
    kept = {}
    for group in groups:
        target = targets[group.index]
        if target.ranking is None:
            kept[group.index] = group.units - _removed(group.size, target.sparsity)
        else:
            together.setdefault(target.ranking, []).append(group)
    for ranked in together.values():
        kept |= _ranked(ranked, targets, scores)
    return kept


def _ranked(
    groups: Sequence[ChannelGroup], targets: Mapping[int, Target], scores: Mapping[int, Scores]
) -> dict[int, int]:
    """Units to keep of groups that are ranked together: the lowest go until their weight is the share asked for."""
    values, owners, weights, total = [], [], [], 0.0
    for place, group in enumerate(groups):
        target = targets[group.index]
        value = np.sort(scores[group.index][~group.locked], kind="stable")
        mean = value.mean()
        total += target.weight * len(value)
        value = value[: min(int(target.most * len(value) + 1e-9), group.units - 1)]
        values.append(value / mean if target.relative and mean > 0 else value)
        owners.append(np.full(len(value), place))
        weights.append(np.full(len(value), target.weight))
    ranking = np.argsort(np.concatenate(values), kind="stable")
    owner, reached = np.concatenate(owners)[ranking], np.cumsum(np.concatenate(weights)[ranking])
    wanted = targets[groups[0].index].sparsity * total
    count = int(np.searchsorted(reached, wanted * (1 - 1e-12) - 1e-9)) + 1 if wanted > 0 else 0
    gone = np.bincount(owner[:count], minlength=len(groups))
    return {group.index: group.units - int(gone[place]) for place, group in enumerate(groups)}


def _removed(units: int, sparsity: float) -> int:
    """How many of ``units`` go: at least the share asked for, but never all."""
    return min(units - 1, int(np.ceil(units * sparsity - 1e-9)))

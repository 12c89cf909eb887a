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
        initial: Share that goes where rounds begin, in [0, sparsity].
    """

    sparsity: float
    ranking: str | None = None
    most: float = 1.0
    weight: float = 1.0
    relative: bool = True
    initial: float = 0.0


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
            kept[group.index] = group.units - removed(group.size, target.sparsity)
        else:
            together.setdefault(target.ranking, []).append(group)
    for ranked in together.values():
        kept |= _ranked(ranked, targets, scores)
    return kept


def lowest_together(
    values: Sequence[Scores], weights: Sequence[float], share: float, most: Sequence[int], *, relative: bool
) -> list[int]:
    """Returns how many of each go when the lowest of all go until their weight is ``share`` of all.

    Args:
        values: The scores of each, shape (size,).
        weights: What one value of each weighs.
        share: The share of all that goes, in [0, 1).
        most: The largest number of each that goes.
        relative: Whether scores are divided by the mean of their own.
    """
    total = sum(weight * len(value) for weight, value in zip(weights, values, strict=True))
    means = [value.mean() if relative and value.mean() > 0 else 1.0 for value in values]
    lowest = [
        np.sort(value, kind="stable")[:count] / mean for value, count, mean in zip(values, most, means, strict=True)
    ]
    sizes = [len(low) for low in lowest]
    ranking = np.argsort(np.concatenate(lowest), kind="stable")
    reached = np.cumsum(np.repeat(weights, sizes)[ranking])
    wanted = share * total
    count = int(np.searchsorted(reached, wanted * (1 - 1e-12) - 1e-9)) + 1 if wanted > 0 else 0
    counts: list[int] = np.bincount(
        np.repeat(np.arange(len(lowest)), sizes)[ranking[:count]], minlength=len(lowest)
    ).tolist()
    return counts


def _ranked(
    groups: Sequence[ChannelGroup], targets: Mapping[int, Target], scores: Mapping[int, Scores]
) -> dict[int, int]:
    """Units to keep of groups that are ranked together."""
    asked = [targets[group.index] for group in groups]
    values = [scores[group.index][~group.locked] for group in groups]
    most = [
        min(int(one.most * len(value) + 1e-9), group.units - 1)
        for one, value, group in zip(asked, values, groups, strict=True)
    ]
    gone = lowest_together(values, [one.weight for one in asked], asked[0].sparsity, most, relative=asked[0].relative)
    return {group.index: group.units - count for group, count in zip(groups, gone, strict=True)}


def removed(units: int, sparsity: float) -> int:
    """Returns how many of ``units`` go: at least the share asked for, but never all."""
    return min(units - 1, int(np.ceil(units * sparsity - 1e-9)))

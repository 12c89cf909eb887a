"""Scores, a target and constraints in; the channels that stay out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, eye_array

from graphprune.criteria import Scores
from graphprune.dependency import ChannelGroup, DependencyGraph
from speedup.atoms import Index, Mask

Scope = Literal["local", "global"]


@dataclass(frozen=True)
class Choice:
    """What was asked of a group and what it got.

    Attributes:
        group: The group.
        asked: Units that the sparsity would keep.
        kept: Units that are kept.
        note: Why the two differ, or why the group was left alone.
    """

    group: ChannelGroup
    asked: int
    kept: int
    note: str | None


@dataclass(frozen=True)
class Selection:
    """The classes that live, shape (classes,), and the choice made for each group."""

    live: Mask
    choices: tuple[Choice, ...]


def select(
    dependencies: DependencyGraph,
    scores: Scores,
    sparsity: float,
    *,
    scope: Scope = "local",
    round_to: int = 1,
    min_channels: int = 1,
    spared: Callable[[ChannelGroup], str | None] = lambda group: None,
) -> Selection:
    """Returns the channels that stay when the share ``sparsity`` of the units of every prunable group goes.

    Args:
        dependencies: The channel groups.
        scores: A score for each class; nan means that the criterion has nothing to say of it.
        sparsity: Share that goes, in [0, 1).
        scope: ``local`` takes that share from each group, ``global`` from all of them by one ranking.
        round_to: What is kept of an axis is rounded down to a multiple of this, never below one multiple of it.
        min_channels: Channels that every axis keeps at least.
        spared: For each group a reason to leave it alone, or None.
    """
    live = np.ones(dependencies.analysis.classes.count, dtype=np.bool_)
    reasons: dict[int, str | None] = {}
    unit_scores: dict[int, Scores] = {}
    for group in dependencies.groups:
        reason = group.pin or spared(group)
        totals = np.bincount(group.unit_of, weights=scores[group.classes], minlength=group.units)
        if reason is None and np.isnan(totals[~group.locked]).any():
            reason = "the criterion has no score for it"
        reasons[group.index] = reason
        unit_scores[group.index] = np.where(np.isnan(totals), 0.0, totals)
    free = [group for group in dependencies.groups if reasons[group.index] is None]
    targets = _targets(free, unit_scores, sparsity, scope)
    choices = []
    for group in dependencies.groups:
        reason = reasons[group.index]
        if reason is not None:
            choices.append(Choice(group, group.units, group.units, reason))
            continue
        asked = targets[group.index]
        wanted, note = _rounded(group, asked, round_to, min_channels)
        keep = _best(group, unit_scores[group.index], wanted)
        live[group.classes[~keep[group.unit_of]]] = False
        kept = int(keep.sum())
        if kept != wanted:
            note = f"{wanted} asked; its blocks must keep the same number in each row"
        choices.append(Choice(group, asked, kept, note))
    for block in dependencies.analysis.classes.blocks:
        if block.slabs is not None:
            live[block.slabs] &= live[block.members].any(axis=1)
    return Selection(live, tuple(choices))


def _targets(
    groups: Sequence[ChannelGroup], scores: Mapping[int, Scores], sparsity: float, scope: Scope
) -> dict[int, int]:
    """Units to keep of each group."""
    if scope == "local":
        return {group.index: group.units - _removed(group.size, sparsity) for group in groups}
    free = {group.index: np.flatnonzero(~group.locked) for group in groups}
    values = [scores[group.index][free[group.index]] for group in groups]
    relative = [value / mean if (mean := value.mean()) > 0 else value for value in values]
    owners = np.concatenate([np.full(len(value), group.index) for value, group in zip(relative, groups, strict=True)])
    ranking = np.argsort(np.concatenate(relative), kind="stable")
    gone = np.bincount(owners[ranking[: _removed(len(ranking), sparsity)]], minlength=max(free, default=0) + 1)
    return {group.index: max(1, group.units - int(gone[group.index])) for group in groups}


def _removed(units: int, sparsity: float) -> int:
    """How many of ``units`` go: at least the share asked for, but never all."""
    return min(units - 1, int(np.ceil(units * sparsity - 1e-9)))


def _rounded(group: ChannelGroup, asked: int, round_to: int, min_channels: int) -> tuple[int, str | None]:
    """Units to keep after rounding, and a note where that is not what was asked."""
    step = round_to // np.gcd(round_to, group.width)
    least = max(1, -(-min_channels // group.width), group.units - group.size)
    wanted = max(int(asked // step * step), min(int(step), group.units), min(least, group.units))
    if wanted > asked:
        return wanted, f"kept {wanted} instead of {asked}: {'at least ' + str(least) if wanted == least else 'a multiple of ' + str(step)}"
    return wanted, f"rounded to a multiple of {step}" if wanted < asked else None


def _best(group: ChannelGroup, scores: Scores, wanted: int) -> Mask:
    """The ``wanted`` units of highest score that leave every block rectangular, shape (units,)."""
    if group.counts:
        return _best_rectangular(group, scores, wanted)
    keep = group.locked.copy()
    free = np.flatnonzero(~group.locked)
    ranking = free[np.argsort(-scores[free], kind="stable")]
    keep[ranking[: max(wanted - int(keep.sum()), 0)]] = True
    return keep


def _best_rectangular(group: ChannelGroup, scores: Scores, wanted: int) -> Mask:
    """Solves the choice as a mixed integer program: one binary for each unit, equal rows in each block.

    The number of units kept and the share kept of each cell may miss their targets, at a price far above any score.
    """
    units = group.units
    cells = int(group.cell_of.max()) + 1
    rows = np.concatenate([table[1:] - table[:1] for table in group.counts])
    rows = rows[rows.any(axis=1)]
    membership = csr_array((np.ones(units), (group.cell_of, np.arange(units))), shape=(cells, units))
    share = wanted / units * membership.sum(axis=1)
    slack = eye_array(cells)
    total = csr_array(np.ones((1, units)))
    one = csr_array(np.ones((1, 1)))
    matrix = block_array(
        [
            [csr_array(rows) if len(rows) else None, None, None, None, None],
            [membership, slack, -slack, None, None],
            [total, None, None, one, -one],
        ][0 if len(rows) else 1 :],
        format="csr",
    )
    right = np.concatenate([np.zeros(len(rows)), share, [wanted]])
    size = scores.max() or 1.0
    cost = np.concatenate([-scores / size, np.full(2 * cells, 4.0), np.full(2, 4.0 * units)])
    low = np.concatenate([group.locked.astype(float), np.zeros(2 * cells + 2)])
    high = np.concatenate([np.ones(units), np.full(2 * cells + 2, np.inf)])
    result = milp(
        cost,
        constraints=LinearConstraint(matrix, right, right),
        bounds=Bounds(low, high),
        integrality=np.concatenate([np.ones(units), np.zeros(2 * cells + 2)]),
        options={"node_limit": 2000, "mip_rel_gap": 1e-3},
    )
    if result.x is None:
        return np.ones(units, dtype=np.bool_)
    keep: Mask = result.x[:units] > 0.5
    return keep


def rectangular(group: ChannelGroup, keep: Mask) -> bool:
    """Whether keeping the units in ``keep`` leaves every block of a group rectangular."""
    tables: tuple[Index, ...] = group.counts
    return all(len(set((table @ keep).tolist()) - {0}) <= 1 for table in tables)

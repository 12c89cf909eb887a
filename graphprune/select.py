"""Scores, a target and constraints in; the channels that stay out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from graphprune.criteria import Scores
from graphprune.dependency import DependencyGraph
from graphprune.groups import ChannelGroup
from graphprune.rectangular import best_rectangular
from speedup.labels import Mask

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
        round_to: What is kept of an axis is rounded down to a multiple of this, or up where that would take away more
            than twice what was asked; never below one multiple of it.
        min_channels: Channels that every axis keeps at least; rounded up to a multiple.
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
        keep = _best(group, unit_scores[group.index], asked, wanted, round_to, min_channels)
        live[group.classes[~keep[group.unit_of]]] = False
        kept = int(keep.sum())
        if kept != wanted:
            note = f"kept {kept}, not {wanted}: as its blocks, splits and shuffles allow"
        choices.append(Choice(group, asked, kept, note))
    return Selection(dependencies.analysis.classes.with_slabs(live), tuple(choices))


def _targets(
    groups: Sequence[ChannelGroup], scores: Mapping[int, Scores], sparsity: float, scope: Scope
) -> dict[int, int]:
    """Units to keep of each group."""
    if scope == "local":
        return {group.index: group.units - _removed(group.size, sparsity) for group in groups}
    if not groups:
        return {}
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
    step = int(round_to // np.gcd(round_to, group.width))
    least = max(_raised(-(-min_channels // group.width), step), group.units - group.size)
    rounded = _multiple(asked, step, group.units)
    wanted = min(max(rounded, least), group.units)
    if wanted > asked:
        why = f"at least {least}" if wanted > rounded else f"a multiple of {step}"
        return wanted, f"kept {wanted}, not {asked}: {why}"
    return wanted, f"rounded to a multiple of {step}" if wanted < asked else None


def _multiple(count: float, step: int, size: int) -> int:
    """``count`` of ``size`` rounded to a multiple of ``step``, at least one multiple, at most ``size``.

    It is rounded down, unless that takes away more than twice what was asked.
    """
    down = max(int(count // step) * step, step)
    return min(down if size - down <= 2 * (size - count) else _raised(int(np.ceil(count)), step), size)


def _raised(count: int, step: int) -> int:
    """``count`` rounded up to a multiple of ``step``."""
    return -(-count // step) * step


def _best(group: ChannelGroup, scores: Scores, asked: int, wanted: int, round_to: int, min_channels: int) -> Mask:
    """The ``wanted`` units of highest score that leave every block rectangular, shape (units,)."""
    if group.counts or group.equals or group.weaves:
        return best_rectangular(group, scores, partial(_axis_count, asked / group.units, round_to, min_channels))
    keep = _highest(group, scores, wanted)
    if all(keep[axis].any() for axis in group.axes) and all(keep[p.members].sum() >= p.least for p in group.parts):
        return keep
    return best_rectangular(group, scores, partial(_axis_count, wanted / group.units, 1, min_channels))


def _highest(group: ChannelGroup, scores: Scores, wanted: int) -> Mask:
    """The ``wanted`` units of highest score, shape (units,); of equal scores the first."""
    keep = group.locked.copy()
    free = np.flatnonzero(~group.locked)
    ranking = free[np.argsort(-scores[free], kind="stable")]
    keep[ranking[: max(wanted - int(keep.sum()), 0)]] = True
    return keep


def _axis_count(share: float, step: int, least: int, size: int) -> int:
    """What an axis of ``size`` channels should keep: its share, rounded down, but not under ``least`` rounded up."""
    return min(max(_multiple(share * size + 1e-9, step, size), _raised(least, step)), size)

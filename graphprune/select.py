"""Scores, a target and constraints in; the channels that stay out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from graphprune.criteria import Scores
from graphprune.dependency import DependencyGraph
from graphprune.groups import ChannelGroup
from graphprune.rectangular import best_rectangular
from graphprune.targets import Target, units_to_keep
from speedup.labels import Mask


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
    target: float | Callable[[ChannelGroup], Target | str],
    *,
    round_to: int = 1,
    min_channels: int = 1,
) -> Selection:
    """Returns the channels that stay when of every prunable group goes what is asked.

    Args:
        dependencies: The channel groups.
        scores: A score for each class; nan means that the criterion has nothing to say of it.
        target: The share of each group that goes, in [0, 1); or for each group what is asked of it, or why it is left
            alone.
        round_to: What is kept of an axis is rounded down to a multiple of this, or up where that would take away more
            than twice what was asked; never below one multiple of it.
        min_channels: Channels that every axis keeps at least; rounded up to a multiple.
    """
    asked_of = target if callable(target) else lambda group: Target(target)
    live = np.ones(dependencies.analysis.classes.count, dtype=np.bool_)
    targets: dict[int, Target] = {}
    reasons: dict[int, str] = {}
    unit_scores: dict[int, Scores] = {}
    for group in dependencies.groups:
        wish = group.pin or asked_of(group)
        totals = np.bincount(group.unit_of, weights=scores[group.classes], minlength=group.units)
        if not isinstance(wish, str) and np.isnan(totals[~group.locked]).any():
            wish = "the criterion has no score for it"
        if isinstance(wish, str):
            reasons[group.index] = wish
        else:
            targets[group.index] = wish
        unit_scores[group.index] = np.where(np.isnan(totals), 0.0, totals)
    keeps = units_to_keep([group for group in dependencies.groups if group.index in targets], targets, unit_scores)
    choices = []
    for group in dependencies.groups:
        if group.index in reasons:
            choices.append(Choice(group, group.units, group.units, reasons[group.index]))
            continue
        asked = keeps[group.index]
        wanted, note = _rounded(group, asked, round_to, min_channels)
        keep = _best(group, unit_scores[group.index], asked, wanted, round_to, min_channels)
        live[group.classes[~keep[group.unit_of]]] = False
        kept = int(keep.sum())
        if kept != wanted:
            note = f"kept {kept}, not {wanted}: as its blocks, splits and shuffles allow"
        choices.append(Choice(group, asked, kept, note))
    return Selection(dependencies.analysis.classes.with_slabs(live), tuple(choices))


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

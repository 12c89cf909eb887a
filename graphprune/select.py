"""Scores, a target and constraints in; the channels that stay out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from graphprune.criteria import Scores
from graphprune.dependency import DependencyGraph
from graphprune.groups import ChannelGroup
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
    """``count`` rounded down to a multiple of ``step``, at least one multiple, at most ``size``."""
    return min(max(int(count // step) * step, step), size)


def _raised(count: int, step: int) -> int:
    """``count`` rounded up to a multiple of ``step``."""
    return -(-count // step) * step


def _best(group: ChannelGroup, scores: Scores, asked: int, wanted: int, round_to: int, min_channels: int) -> Mask:
    """The ``wanted`` units of highest score that leave every block rectangular, shape (units,)."""
    if group.counts or group.equals or group.weaves:
        return _best_rectangular(group, scores, partial(_axis_count, asked / group.units, round_to, min_channels))
    keep = _highest(group, scores, wanted)
    if all(keep[axis].any() for axis in group.axes) and all(keep[p.members].sum() >= p.least for p in group.parts):
        return keep
    return _best_rectangular(group, scores, partial(_axis_count, wanted / group.units, 1, min_channels))


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


def _best_rectangular(group: ChannelGroup, scores: Scores, target: Callable[[int], int]) -> Mask:
    """The units of highest score that leave every block rectangular when each axis keeps ``target`` of its channels.

    Equal parts of a split stay equal if they can: nested halves of halves need counts that can be halved.
    """
    for equals in dict.fromkeys((bool(group.equals), False)):
        keep = _solved(group, (*group.counts, *(group.equals if equals else ())), scores, target)
        if keep is not None:
            return keep
    keep = _approached(group, scores, target)
    return np.ones(group.units, dtype=np.bool_) if keep is None else keep


def _approached(group: ChannelGroup, scores: Scores, target: Callable[[int], int]) -> Mask | None:
    """Two integer programs for counts that cannot all be met: how many stay along each axis, then which units."""
    nearing, choosing = _Program(np.ones(group.units)), _Program(np.ones(group.units))
    axes = [np.bincount(axis, minlength=group.units).astype(float) for axis in group.axes]
    for axis, weights in zip(group.axes, axes, strict=True):
        nearing.aim(weights, target(len(axis)))
    _constrain(nearing, group, group.counts)
    near = nearing.solve(np.zeros(group.units), group.locked.astype(float), gap=0.5)
    if near is None:
        return None
    for weights in axes:
        count = float(weights @ np.rint(near))
        choosing.between(weights, count, count)
    _constrain(choosing, group, group.counts)
    chosen = choosing.solve(scores / (scores.max() or 1.0), group.locked.astype(float), gap=0.02)
    return (near if chosen is None else chosen) > 0.5


def _constrain(program: "_Program", group: ChannelGroup, tables: Sequence[Index]) -> None:
    """Keeps the rows of ``tables`` equal, the parts of a group alive and its weaves in turn."""
    for table in tables:
        for row in table[1:]:
            program.between((row - table[0]).astype(float), 0, 0)
    for part in group.parts:
        program.between(np.bincount(part.members, minlength=group.units).astype(float), part.least, np.inf)
    for weave in group.weaves:
        program.take_turns(weave)


def _solved(group: ChannelGroup, tables: Sequence[Index], scores: Scores, target: Callable[[int], int]) -> Mask | None:
    """Two integer programs: how many units stay of each cell, then which; None where the counts cannot be met.

    Units of one cell stand in the same axes and in the same rows. An axis may miss its count at a price.
    """
    cell_of = _cells(group)
    sizes = np.bincount(cell_of)
    counting = _Program(sizes)
    for axis in group.axes:
        weights = np.bincount(cell_of[axis], minlength=len(sizes)) / sizes
        counting.aim(weights, target(len(axis)))
    for table in tables:
        by_cell = np.stack([np.bincount(cell_of, weights=row, minlength=len(sizes)) / sizes for row in table])
        for row in by_cell[1:]:
            counting.between(row - by_cell[0], 0, 0)
    for part in group.parts:
        counting.between(
            np.bincount(cell_of[part.members], minlength=len(sizes)) / sizes, part.least - 1 + 1e-6, np.inf
        )
    for weave in group.weaves:
        for lead in _leads_between_cells(cell_of[weave], sizes):
            counting.between(lead, 0, 1)
    counts = counting.solve(np.zeros(len(sizes)), np.bincount(cell_of, weights=group.locked).astype(float))
    if counts is None:
        return None
    choosing = _Program(np.ones(group.units))
    for cell, count in enumerate(np.rint(counts)):
        choosing.between((cell_of == cell).astype(float), count, count)
    _constrain(choosing, group, ())
    chosen = choosing.solve(scores / (scores.max() or 1.0), group.locked.astype(float))
    return None if chosen is None else chosen > 0.5


def _cells(group: ChannelGroup) -> Index:
    """The cell of each unit, shape (units,): units that stand equally often in every axis and every row."""
    columns = [np.bincount(axis, minlength=group.units) for axis in group.axes]
    columns += [row for table in (*group.counts, *group.equals) for row in table]
    columns.append(group.locked.astype(np.int64))
    return np.unique(np.stack(columns), axis=1, return_inverse=True)[1].reshape(-1)


def _leads_between_cells(turns: Index, sizes: Index) -> Iterator[NDArray[np.float64]]:
    """Yields how far each row is ahead of the next, in weights of cells, where no cell of a weave is half done."""
    rows = turns.shape[1]
    sequence = turns.reshape(-1)
    _, first = np.unique(sequence, return_index=True)
    last = len(sequence) - 1 - np.unique(sequence[::-1], return_index=True)[1]
    opened = np.zeros(len(sequence) + 1, dtype=np.int64)
    np.add.at(opened, first + 1, 1)
    np.add.at(opened, last + 1, -1)
    for end in np.flatnonzero(np.cumsum(opened)[1:-1] == 0) + 1:
        ahead = np.zeros((rows, len(sizes)))
        np.add.at(ahead, (np.arange(end) % rows, sequence[:end]), 1.0)
        ahead /= sizes
        for row in range(rows):
            yield ahead[row] - ahead[(row + 1) % rows] if row + 1 < rows else ahead[0] - ahead[row]


class _Program:
    """An integer program over what stays of each unit or cell, written down constraint by constraint."""

    def __init__(self, sizes: NDArray[Any]) -> None:
        """Starts with one integer between 0 and each of ``sizes``."""
        self.sizes = sizes
        self.columns = len(sizes)
        self.cost: list[float] = []
        self.high: list[float] = []
        self.entries: list[tuple[Index, Index, NDArray[np.float64]]] = []
        self.bounds: list[tuple[float, float]] = []

    def _variables(self, count: int, high: float, cost: float) -> Index:
        """New variables between 0 and ``high``: their columns."""
        first = self.columns
        self.columns += count
        self.cost += [cost] * count
        self.high += [high] * count
        return np.arange(first, self.columns)

    def _constraint(self, columns: Index, values: NDArray[np.float64], low: float, high: float) -> None:
        self.entries.append((np.full(len(columns), len(self.bounds)), columns, values))
        self.bounds.append((low, high))

    def between(self, weights: NDArray[np.float64], low: float, high: float) -> None:
        """What stays weighs between ``low`` and ``high``."""
        columns = np.flatnonzero(weights)
        if len(columns):
            self._constraint(columns, weights[columns], low, high)

    def aim(self, weights: NDArray[np.float64], target: int) -> None:
        """What stays weighs ``target``, or misses it at a price for each; at least one stays."""
        columns = np.flatnonzero(weights)
        over, under = self._variables(2, np.inf, 1.0)
        self._constraint(np.append(columns, [over, under]), np.append(weights[columns], [-1.0, 1.0]), target, target)
        self._constraint(columns, weights[columns], 1, np.inf)

    def take_turns(self, turns: Index) -> None:
        """Along a weave, shape (turns, rows), each row is ahead of the next, and the first of the last, by 0 or 1."""
        rows = turns.shape[1]
        sequence = turns.reshape(-1)
        lead = self._variables(len(sequence) * (rows - 1), 1, 0).reshape(len(sequence), rows - 1)
        for gap in range(rows - 1):
            for place, unit in enumerate(sequence.tolist()):
                step = (place % rows == gap) - (place % rows == gap + 1)
                columns = [lead[place, gap], *([lead[place - 1, gap]] if place else []), *([unit] if step else [])]
                values = [1.0, *([-1.0] if place else []), *([-float(step)] if step else [])]
                self._constraint(np.array(columns), np.array(values), 0, 0)
        if rows > 2:
            for columns_there in lead:
                self._constraint(columns_there, np.ones(rows - 1), 0, 1)
        self._constraint(lead[-1], np.ones(rows - 1), 0, 0)

    def solve(self, scores: Scores, low: NDArray[np.float64], gap: float = 1e-3) -> NDArray[np.float64] | None:
        """Returns how much stays of each, at least ``low``: the highest sum of scores less the price of what is missed.

        The search ends when the sum is proven to be within ``gap`` of the best, relative.
        """
        rows, columns, values = (np.concatenate(parts) for parts in zip(*self.entries, strict=True))
        matrix = csr_array((values, (rows, columns)), shape=(len(self.bounds), self.columns))
        least, most = np.array(self.bounds).T
        extra = self.columns - len(self.sizes)
        result = milp(
            np.concatenate([-scores, self.cost]),
            constraints=LinearConstraint(matrix, least, most),
            bounds=Bounds(np.concatenate([low, np.zeros(extra)]), np.concatenate([self.sizes, self.high])),
            integrality=np.concatenate([np.ones(len(self.sizes)), np.zeros(extra)]),
            options={"node_limit": 1000, "mip_rel_gap": gap},
        )
        return None if result.x is None else result.x[: len(self.sizes)]


def rectangular(group: ChannelGroup, keep: Mask) -> bool:
    """Whether keeping the units in ``keep`` leaves every block of a group rectangular."""
    tables: tuple[Index, ...] = group.counts
    return all(len(set((table @ keep).tolist()) - {0}) <= 1 for table in tables)

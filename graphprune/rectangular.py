"""Which units stay when blocks must stay rectangular, parts alive and shuffles in turn: integer programs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from graphprune.criteria import Scores
from graphprune.groups import ChannelGroup
from speedup.labels import Index, Mask


def best_rectangular(group: ChannelGroup, scores: Scores, target: Callable[[int], int]) -> Mask:
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

"""Atoms that live or die as one, and the blocks and sequences that what is left of them must respect."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from speedup.errors import PlanError
from speedup.flow import Block, Flow, Part, Pin
from speedup.labels import Index, Labels, Mask, Plane, core, narrowed, support

_ORDERED = ("reshape", "recurrent")
"""Kinds of blocks whose rows may each keep other positions, so that it matters how later reshapes merge them."""


@dataclass(frozen=True)
class Weave:
    """Classes that were merged row by turn, as a channel shuffle does.

    What is left of the rows is merged in turn as well, so the survivors must take turns in the old order, too:
    then the order of channels after the shuffle is that of the dense model, and every later slice still fits.

    Attributes:
        node: Name of the graph node that split them.
        turns: Classes in merged order, shape (turns, rows).
    """

    node: str
    turns: Index

    def keeps_turns(self, live: Mask) -> bool:
        """Whether what is left takes turns as all of it did."""
        row = np.flatnonzero(live[self.turns].reshape(-1)) % self.turns.shape[1]
        return bool((row == np.arange(len(row)) % self.turns.shape[1]).all())


@dataclass(frozen=True)
class Classes:
    """The atoms of a graph, sorted into classes that live or die as one.

    Attributes:
        of: Class of each atom, shape (atoms,).
        count: Number of classes.
        pin_of: For each class the index into ``pins`` of the first reason that fixes it, or -1; shape (count,).
        pins: The reasons.
        blocks: The rectangular blocks, their labels now classes, equal rows once.
        weaves: The sequences in which the rows of a block take turns.
        parts: Classes of which some must live, their labels now classes, each once.
    """

    of: Index
    count: int
    pin_of: Index
    pins: tuple[Pin, ...]
    blocks: tuple[Block, ...]
    weaves: tuple[Weave, ...]
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_of", torch.from_numpy(self.of))
        tables: dict[tuple[tuple[int, ...], bytes], int] = {}
        for place, block in enumerate(self.blocks):
            tables.setdefault((block.members.shape, block.members.tobytes()), place)
        object.__setattr__(self, "_tables", tables)

    def plane(self, plane: Plane, dims: Sequence[int] | None = None) -> Index:
        """The classes of a plane over ``dims`` (its support by default)."""
        classes: Index = self.of[core(plane, dims).numpy()]
        return classes

    def live_mask(self, labels: Labels, live: Mask) -> Tensor | None:
        """Which elements of a tensor live: a boolean tensor that broadcasts to its shape; None where all do."""
        mask: Tensor | None = None
        alive = torch.from_numpy(live)
        for plane in labels.planes:
            part = alive[self.of_tensor[narrowed(plane)]]
            if not bool(part.all()):
                mask = part if mask is None else mask & part
        return mask

    @property
    def of_tensor(self) -> Tensor:
        """:attr:`of` as a tensor that shares its memory."""
        tensor: Tensor = self._of  # type: ignore[attr-defined]  # set in __post_init__
        return tensor

    def with_slabs(self, live: Mask) -> Mask:
        """Returns ``live``, shape (classes,), where a slab lives only if something of its row does."""
        live = live.copy()
        for block in self.blocks:
            if block.slabs is not None:
                live[block.slabs] &= live[block.members].any(axis=1)
        return live

    def nesting(self, labels: Labels, mask: Tensor) -> list[int]:
        """The dimensions along which ``mask`` varies, outer ones first.

        That is their order in the tensor, unless rows with different positions left were transposed: then the
        dimension that counts the rows of the block is the outer one.
        """
        dims = [dim for dim, size in enumerate(mask.shape) if size > 1]
        for plane in labels.planes:
            joint = [dim for dim in support(plane) if dim in dims]
            rows = self._row_dims(plane) if len(joint) > 1 and not _is_product(mask, joint) else None
            if rows is not None:
                inner = [dim for dim in joint if dim not in rows]
                places = [dims.index(dim) for dim in joint]
                for place, dim in zip(places, [*rows, *inner], strict=True):
                    dims[place] = dim
        return dims

    def _row_dims(self, plane: Plane) -> list[int] | None:
        """The dimensions of ``plane`` that count the rows of a block with the same members; None without one."""
        dims = support(plane)
        labels = self.plane(plane)
        tables: dict[tuple[tuple[int, ...], bytes], int] = self._tables  # type: ignore[attr-defined]  # set in __post_init__
        found = []
        for count in range(1, len(dims)):
            for rows in itertools.combinations(range(len(dims)), count):
                inner = [i for i in range(len(dims)) if i not in rows]
                table = labels.transpose(*rows, *inner).reshape(-1, int(np.prod([labels.shape[i] for i in inner])))
                once = _rows_once(table)
                place = tables.get((once.shape, once.tobytes()))
                if place is not None:
                    found.append((place, [dims[i] for i in rows]))
        return min(found)[1] if found else None

    def live_shape(self, labels: Labels, live: Mask, node: str) -> tuple[int, ...]:
        """The shape of a tensor when only ``live`` classes are left.

        Raises:
            PlanError: What is left is no rectangle.
        """
        mask = self.live_mask(labels, live)
        if mask is None:
            return labels.shape
        dims = self.nesting(labels, mask)
        rest = [dim for dim in range(mask.dim()) if dim not in dims]
        counts = mask.permute(*dims, *rest).reshape([mask.shape[dim] for dim in dims]).long()
        shape = list(labels.shape)
        for dim in reversed(dims):
            kept = counts.sum(-1)
            sizes = torch.unique(kept[kept > 0])
            if len(sizes) != 1:
                raise PlanError(
                    f"{node}: its rows would keep {sizes.tolist()} of {mask.shape[dim]} elements each. "
                    "Keep the same number in every row."
                )
            shape[dim], counts = int(sizes), (kept > 0).long()
        return tuple(shape)


def _is_product(mask: Tensor, dims: Sequence[int]) -> bool:
    """Whether what lives along ``dims`` is the same along each of them wherever it lives along the others."""
    product = torch.ones_like(mask)
    for dim in dims:
        product = product & _any(mask, [other for other in dims if other != dim])
    return bool((product == mask).all())


def _any(mask: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        mask = mask.any(dim=dim, keepdim=True)
    return mask


def solve(flow: Flow) -> Classes:
    """Returns the classes of a recorded flow.

    Where a later merge interleaves the rows of a block (a channel shuffle), the order of what is left must not change:
    what stays must take turns as all of it did (a :class:`Weave`). Where the pattern is not that simple, the rows must
    keep the same positions: they are united, and the classes are found again.
    """
    pairs = list(flow.pairs)
    while True:
        of, count = _components(flow.size, pairs)
        weaves: dict[tuple[object, ...], Weave] = {}
        ties = []
        merges = _Merges.of(flow.merges, of)
        for block in flow.blocks:
            found = _weaves(block, merges.meeting(of[block.members]), of) if block.kind in _ORDERED else []
            if found is None:
                first = np.broadcast_to(block.members[0], block.members.shape)
                ties.append((block.members.reshape(-1), first.reshape(-1)))
            else:
                weaves |= {(weave.turns.shape, weave.turns.tobytes()): weave for weave in found}
        if not ties:
            break
        pairs += ties
    pin_of = np.full(count, -1, dtype=np.int64)
    for position in range(len(flow.pins) - 1, -1, -1):
        pin_of[of[flow.pins[position][1]]] = position
    pins = tuple(pin for pin, _ in (*flow.pins, *flow.stored))
    _pin_unread(flow, of, pin_of)
    _pin_rows(flow, of, pin_of)
    blocks: dict[tuple[object, ...], Block] = {}
    for block in flow.blocks:
        rows = of[block.members]
        slabs = None if block.slabs is None else of[block.slabs]
        table = rows if slabs is None else np.concatenate([slabs[:, None], rows], axis=1)
        _, first = np.unique(table, axis=0, return_index=True)
        first.sort()
        slabs = None if slabs is None else slabs[first]
        key = (block.kind, block.every, rows[first].tobytes(), rows.shape, None if slabs is None else slabs.tobytes())
        blocks.setdefault(key, replace(block, members=rows[first], slabs=slabs))
    parts = {}
    for part in flow.parts:
        members = np.unique(of[part.members])
        if (pin_of[members] < 0).sum() > len(members) - part.least:  # enough of the others are fixed
            parts[members.tobytes(), part.least] = Part(members, part.least)
    return Classes(of, count, pin_of, pins, tuple(blocks.values()), tuple(weaves.values()), tuple(parts.values()))


def _components(size: int, pairs: Sequence[tuple[Index, Index]]) -> tuple[Index, int]:
    """Returns for each atom its class, numbered by first atom, and the number of classes."""
    if pairs:
        rows = np.concatenate([first for first, _ in pairs])
        columns = np.concatenate([second for _, second in pairs])
    else:
        rows = columns = np.empty(0, dtype=np.int64)
    links = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(size, size))
    count, of = connected_components(links, directed=False)
    return of.astype(np.int64), int(count)


def _pin_unread(flow: Flow, of: Index, pin_of: Index) -> None:
    """Fixes what is stored and never computed with: positions beyond the length of the example, say.

    What counts a row of which something is read is read as well.
    """
    read = np.zeros(len(pin_of), dtype=np.bool_)
    for atoms in flow.read:
        read[of[atoms]] = True
    for block in reversed(flow.blocks):  # what counts rows may be counted further up
        if block.slabs is not None:
            read[of[block.slabs]] |= read[of[block.members]].any(axis=1)
    for position, (_, atoms) in enumerate(flow.stored, start=len(flow.pins)):
        unread = of[atoms][~read[of[atoms]]]
        pin_of[unread] = np.where(pin_of[unread] >= 0, pin_of[unread], position)


def _pin_rows(flow: Flow, of: Index, pin_of: Index) -> None:
    """Fixes every slab with a fixed member in its row: the row never goes, nor does what counts it, and so on.

    Nor does another slab of the same row. Where every row of a block stays and one is fixed whole, all are: they keep
    the same number.
    """
    alike: dict[tuple[object, ...], list[Index]] = {}
    for block in flow.blocks:
        if block.slabs is not None:
            alike.setdefault((block.members.shape, of[block.members].tobytes()), []).append(of[block.slabs])
    whole = [of[block.members] for block in flow.blocks if block.every]
    while True:
        before = pin_of.copy()
        for members in whole:
            fixed = np.flatnonzero((pin_of[members] >= 0).all(axis=1))
            if len(fixed):
                pin_of[members[pin_of[members] < 0]] = pin_of[members[fixed[0], 0]]
        for block in reversed(flow.blocks):  # what counts rows may be counted further up
            if block.slabs is not None:
                fixed = pin_of[of[block.members]].max(axis=1)
                counting = of[block.slabs]
                pin_of[counting] = np.where(pin_of[counting] >= 0, pin_of[counting], fixed)
        for slabs in alike.values():
            fixed = pin_of[np.stack(slabs)].max(axis=0)
            for counting in slabs:
                pin_of[counting] = np.where(pin_of[counting] >= 0, pin_of[counting], fixed)
        if (pin_of == before).all():
            return


@dataclass(frozen=True)
class _Merges:
    """Merges by the classes that run through them.

    Attributes:
        merges: Atoms in merged order.
        classes: Every class of every merge, in order.
        owners: The merge of each of them.
    """

    merges: Sequence[Index]
    classes: Index
    owners: Index

    @classmethod
    def of(cls, merges: Sequence[Index], of: Index) -> "_Merges":
        """Returns the merges of a flow, where ``of`` is the class of each atom."""
        inside = [np.unique(of[merge]) for merge in merges]
        classes = np.concatenate([np.empty(0, dtype=np.int64), *inside])
        owners = np.repeat(np.arange(len(merges)), [len(one) for one in inside])
        order = np.argsort(classes, kind="stable")
        return cls(merges, classes[order], owners[order])

    def meeting(self, classes: Index) -> list[Index]:
        """The merges through which one of ``classes`` runs, in their order."""
        inside = np.unique(classes)
        start = np.searchsorted(self.classes, inside)
        count = np.searchsorted(self.classes, inside, side="right") - start
        places = np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())
        return [self.merges[owner] for owner in np.unique(self.owners[places])]


def _weaves(block: Block, merges: Sequence[Index], of: Index) -> list[Weave] | None:
    """The weaves that later merges make of the rows of ``block``; None if their pattern is not that simple."""
    table = of[block.members]
    rows = _rows_once(table)
    if len(rows) == 1:
        return []
    if len(np.unique(rows)) < rows.size:  # channels that stand in several places: only their old order is sure to do
        return [] if all(_keeps_order(block.members.reshape(-1), merge, of) for merge in merges) else None
    known: list[Weave] = []
    for sequence, order in _woven(rows, merges, of):
        if any(_follows(sequence, weave) for weave in known):
            continue
        weave = _weave(block, sequence, order)
        if weave is None:
            return None
        known.append(weave)
    return known


def _keeps_order(members: Index, merge: Index, of: Index) -> bool:
    """Whether a merge takes the atoms in ``members`` in their order; or their classes, where it has other atoms."""
    if not np.isin(merge, members).any():
        members, merge = of[members], of[merge]
    channels, taken = _each_once(members), _each_once(merge[np.isin(merge, members)])
    return bool((np.diff(_places(taken, channels)) > 0).all())


def _rows_once(table: Index) -> Index:
    """``table`` without repetitions of rows, in their order."""
    return table[np.sort(np.unique(table, axis=0, return_index=True)[1])]


def _each_once(sequence: Index) -> Index:
    """``sequence`` without repetitions, in its order."""
    return sequence[np.sort(np.unique(sequence, return_index=True)[1])]


def _woven(rows: Index, merges: Sequence[Index], of: Index) -> Iterator[tuple[Index, Index]]:
    """Yields the merges that interleave ``rows`` of classes: classes in merged order, and the row of each."""
    low, high = rows.min(), rows.max()
    row_of = np.full(high - low + 1, -1, dtype=np.int64)
    row_of[rows - low] = np.arange(len(rows))[:, None]
    for merge in merges:
        sequence = of[merge]
        if sequence.min() > high or sequence.max() < low:
            continue
        sequence = sequence[(sequence >= low) & (sequence <= high)]
        order = row_of[sequence - low]
        sequence = sequence[order >= 0]
        once = _each_once(sequence)
        if np.array_equal(np.resize(once, len(sequence)), sequence):  # copies of all of it (a batch) follow the first
            sequence = once
        order = row_of[sequence - low]
        if np.count_nonzero(np.diff(order)) >= len(np.unique(order)) and len(order):
            yield sequence, order


def _places(sequence: Index, order: Index) -> Index:
    """Where each element of ``sequence`` stands in ``order``; anywhere if it does not."""
    ranking = np.argsort(order)
    found: Index = ranking[np.minimum(np.searchsorted(order, sequence, sorter=ranking), len(order) - 1)]
    return found


def _follows(sequence: Index, weave: Weave) -> bool:
    """Whether ``sequence`` is a part of ``weave`` in its order, so that nothing new is asked."""
    order = weave.turns.reshape(-1)
    places = _places(sequence, order)
    return bool((order[places] == sequence).all() and (np.diff(places) > 0).all())


def _weave(block: Block, sequence: Index, order: Index) -> Weave | None:
    """The weave of a merge that takes one member of every row in turn, each once; None for any other pattern."""
    rows = int(order.max()) + 1
    if len(np.unique(sequence)) < len(sequence) or len(order) % rows:
        return None
    if (order.reshape(-1, rows) != order[:rows]).any() or len(set(order[:rows].tolist())) < rows:
        return None
    return Weave(block.node, sequence.reshape(-1, rows))

"""What can happen to labels while they run through a graph, and the record of it.

:class:`Flow` records what the rules find out: which atoms are one, which are fixed, which blocks must stay
rectangular. ``classes.py`` makes sense of the record. Nothing here knows ATen.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from speedup.labels import Index, Labels, Plane, broadcast, core, factor, flat, rows_first, settle, support

SHARED = "shares a dimension with other channels, of which only one kind can shrink it"


@dataclass(frozen=True)
class Pin:
    """Why atoms are fixed.

    Attributes:
        node: Name of the graph node that fixes them.
        reason: One sentence for the report.
        structural: True for dimensions that nobody expects to shrink (kernel sizes, positions, vocabularies).
    """

    node: str
    reason: str
    structural: bool = False


@dataclass(frozen=True)
class Block:
    """Atoms that must stay a rectangle: every row that survives keeps the same number of members.

    Attributes:
        node: Name of the graph node that needs it.
        kind: The field's word for it: reshape, attention, grouped, split, group norm, recurrent.
        members: Labels, shape (rows, row length).
        slabs: Labels, shape (rows,): a row's slab lives as long as any member of the row does; None where rows
            have no label of their own.
        every: Whether no row may go whole: it is a layer, say.
    """

    node: str
    kind: str
    members: Index
    slabs: Index | None = None
    every: bool = False


@dataclass(frozen=True)
class Part:
    """Atoms of which at least ``least`` must live: they are a tensor of their own, or a statistic needs them.

    Attributes:
        members: Their labels, shape (members,).
        least: How many must live.
    """

    members: Index
    least: int = 1


@dataclass
class _Met:
    """One plane of a meeting: which operands brought it, and whether a larger one says it already."""

    dims: tuple[int, ...]
    plane: Plane
    operands: set[int]
    implied: bool = False


@dataclass
class Flow:
    """The record that the rules write while labels run through a graph.

    Attributes:
        size: Atoms so far.
        node: Name of the graph node whose rule runs.
        kind: Its kind of tie.
        pairs: Atoms that are one, in pairs of arrays of equal shape.
        pins: Why which atoms are fixed.
        blocks: What must stay rectangular.
        merges: Atoms along dimensions that a reshape made one, in merged order.
        parts: What must not go all.
        training: Whether it is the graph of the training mode that runs.
        copies: First atom of every plane that only says which copy an element belongs to.
        stored: The atoms of each parameter, with the reason to keep those that nothing computes with.
        read: The atoms that some operator computes with.
    """

    size: int = 0
    node: str = ""
    kind: str = ""
    pairs: list[tuple[Index, Index]] = field(default_factory=list)
    pins: list[tuple[Pin, Index]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    merges: list[Index] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    training: bool = False
    copies: set[int] = field(default_factory=set)
    stored: list[tuple[Pin, Index]] = field(default_factory=list)
    read: list[Index] = field(default_factory=list)

    def mint(self, shape: Sequence[int], dims: Sequence[int]) -> Plane:
        """Returns a plane of new atoms that varies along ``dims``."""
        sizes = [size if dim in dims else 1 for dim, size in enumerate(shape)]
        count = int(np.prod(sizes, dtype=np.int64))
        plane = torch.arange(self.size, self.size + count).reshape(sizes).expand(tuple(shape))
        self.size += count
        return plane

    def store(self, shape: Sequence[int], dims: Sequence[int], name: str) -> Plane:
        """Returns a plane of new atoms for parameter ``name``: what only other inputs reach of it must stay."""
        plane = self.mint(shape, dims)
        self.stored.append((Pin(name, "is not used by inputs like the example", structural=True), flat(core(plane))))
        return plane

    def copy(self, shape: Sequence[int], dim: int) -> Plane:
        """Returns a plane of new atoms along ``dim``, along which the same content stands several times; one stays."""
        plane = self.mint(shape, [dim])
        self.keep_some(plane)
        self.copies.add(int(plane.reshape(-1)[0]))
        return plane

    def unite(self, first: Plane, second: Plane) -> None:
        """Makes the atoms of two planes of equal shape one, element by element."""
        dims = sorted({*support(first), *support(second)})
        self.pairs.append((flat(core(first, dims)), flat(core(second, dims))))

    def pin(self, plane: Plane, reason: str, structural: bool = False) -> None:
        """Fixes every atom of ``plane``."""
        self.pins.append((Pin(self.node, reason, structural), flat(core(plane))))

    def pin_all(self, labels: Labels, reason: str) -> None:
        """Fixes every atom of a tensor."""
        for plane in labels.planes:
            self.pin(plane, reason)

    def freeze(self, labels: Labels, dims: Iterable[int], reason: str, structural: bool = False) -> Labels:
        """Returns ``labels`` with nothing left that varies along ``dims``, which must stay as they are.

        A plane with no other support is pinned; of one with more, atoms that differ only along ``dims`` go together.
        """
        frozen = set(dims)
        planes = []
        for plane in labels.planes:
            rest = [dim for dim in support(plane) if dim not in frozen]
            if len(rest) == len(support(plane)):
                planes.append(plane)
            elif rest:
                first = plane
                for dim in frozen.intersection(support(plane)):
                    first = first.narrow(dim, 0, 1)
                first = first.expand(plane.shape)
                self.unite(plane, first)
                planes.append(first)
            else:
                self.pin(plane, reason, structural)
        return Labels(labels.shape, tuple(planes))

    def block(self, plane: Plane, rows: Sequence[int], slabs: Plane | None = None, *, every: bool = False) -> None:
        """Asks that ``plane`` stay rectangular: its support without ``rows`` is shared out evenly between ``rows``."""
        slab_labels = None if slabs is None else flat(core(slabs, rows))
        self.blocks.append(Block(self.node, self.kind, rows_first(plane, rows), slab_labels, every))

    def turns(self, plane: Plane, dim: int, step: int) -> None:
        """Asks that what is left along ``dim`` of ``plane`` go on in turns of ``step``, as a shuffle's result does."""
        rows = core(plane).reshape(-1, step).T
        self.blocks.append(Block(self.node, "reshape", rows.numpy()))
        self.merges.append(flat(core(plane)))

    def part(self, plane: Plane, dim: int) -> None:
        """Notes that ``plane`` is a part cut along ``dim``: something of it must stay, as a rectangle."""
        dims = support(plane)
        if not dims:
            self.pin(plane, "is taken alone")
            return
        self.keep_some(plane)
        if len(dims) > 1:
            self.block(plane, dims[:-1])

    def keep_some(self, plane: Plane, least: int = 1) -> None:
        """Asks that at least ``least`` atoms of ``plane`` live."""
        self.parts.append(Part(flat(core(plane)), least))

    def meet(self, operands: Sequence[Labels], shape: Sequence[int], reason: str = "") -> Labels:
        """Returns the labels of an elementwise function of ``operands``, broadcast to ``shape``.

        Planes of the same support are united. Where an operand has size but no plane, what meets it there is frozen.
        Where one support contains another, or two overlap, the shared dimensions count slabs of the larger.
        """
        shape = tuple(shape)
        operands = [broadcast(operand, shape) for operand in operands]
        reason = reason or "meets a tensor whose size is fixed"
        met: list[_Met] = []
        for position, operand in enumerate(operands):
            frozen = set().union(*(other.fixed for i, other in enumerate(operands) if i != position))
            fresh = []
            for plane in self.freeze(operand, frozen, reason).planes:
                wide = plane.expand(shape)
                same = [entry for entry in met if entry.dims == support(wide)]
                partner = next((entry for entry in same if position not in entry.operands), None)
                if partner is not None:
                    self.unite(partner.plane, wide)
                    partner.operands.add(position)
                elif same:
                    self.pin(wide, SHARED)
                elif support(wide):
                    fresh.append(_Met(support(wide), wide, {position}))
            met += fresh
        for entry in met:
            lacking = {i for i, operand in enumerate(operands) if all(operand.shape[d] > 1 for d in entry.dims)}
            if any(not _tied(entry, other, met) for other in lacking - entry.operands):
                self.pin(entry.plane, SHARED)
                entry.implied = True
        for first, second in itertools.combinations(met, 2):
            self._overlap(first, second, shape)
        return Labels(shape, tuple(entry.plane for entry in met if not entry.implied))

    def _overlap(self, first: "_Met", second: "_Met", shape: tuple[int, ...]) -> None:
        """Ties two planes of different operands that share dimensions: there they count slabs of each other."""
        shared = tuple(sorted({*first.dims} & {*second.dims}))
        if not shared or first.operands & second.operands:
            return
        small, large = (first, second) if shared == first.dims else (second, first)
        if shared == small.dims:
            self.block(large.plane, shared, slabs=small.plane)
            small.implied = True
        else:
            slabs = self.slabs(first.plane, shared)
            self.block(first.plane, shared, slabs=slabs)
            self.block(second.plane, shared, slabs=slabs)

    def slabs(self, plane: Plane, rows: Sequence[int]) -> Plane:
        """Returns a plane of new atoms along ``rows`` of ``plane``, the same atom for rows with the same members."""
        table = rows_first(plane, rows)
        _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
        atoms = torch.from_numpy(self.size + inverse.reshape(-1).astype(np.int64))
        self.size += len(first)
        sizes = [plane.shape[dim] if dim in rows else 1 for dim in range(plane.dim())]
        return settle(atoms.reshape(sizes).expand(plane.shape))

    def reduce(self, labels: Labels, dims: Iterable[int], keepdim: bool = False) -> Labels:
        """Returns the labels after summing over ``dims``: slabs remain where a plane reaches beyond them."""
        gone = set(dims)
        planes: list[Plane] = [plane for plane in labels.planes if not gone.intersection(support(plane))]
        for plane in labels.planes:
            rest = [dim for dim in support(plane) if dim not in gone]
            known = any(set(rest) <= set(support(other)) for other in planes)
            if rest and len(rest) < len(support(plane)) and not known:
                slabs = self.slabs(plane, rest)
                self.block(plane, rest, slabs=slabs)
                planes.append(slabs)
        rank = len(labels.shape)
        if keepdim:
            shape = tuple(1 if dim in gone else size for dim, size in enumerate(labels.shape))
            index = tuple(slice(0, 1) if dim in gone else slice(None) for dim in range(rank))
        else:
            shape = tuple(size for dim, size in enumerate(labels.shape) if dim not in gone)
            index = tuple(0 if dim in gone else slice(None) for dim in range(rank))  # type: ignore[misc]  # both index
        return Labels(shape, tuple(plane[index] for plane in planes))

    def reshape(self, labels: Labels, shape: Sequence[int]) -> Labels:
        """Returns the labels after a reshape; what is split must stay rectangular, what is merged is noted.

        Copies that are merged with what is copied stay, as if the content had been repeated there in the first place.
        """
        shape = tuple(shape)
        planes = []
        labels = self._nested_where_merged(labels, shape)
        for plane in self._without_merged_copies(labels, shape):
            varying = set(support(plane))
            moved = settle(plane.reshape(shape))
            planes.append(moved)
            for old, new in factor(labels.shape, shape):
                merged = [dim for dim in old if dim in varying]
                if len(merged) > 1:
                    self.merges.append(flat(core(plane, merged)))
                split = [dim for dim in support(moved) if dim in new]
                outside = [dim for dim in support(moved) if dim not in new]
                if varying.intersection(old) and len(split) > 1:
                    for depth in range(1, len(split)):
                        self.block(moved, outside + split[:depth])
        return Labels(shape, tuple(planes))

    def _nested_where_merged(self, labels: Labels, shape: tuple[int, ...]) -> Labels:
        """Returns ``labels`` without planes that a merge would lay over others with which they share dimensions.

        Such a plane counts slabs of the other; what differs along dimensions of its own goes together.
        """
        planes = sorted(labels.planes, key=lambda plane: len(support(plane)))
        for old, _ in factor(labels.shape, shape):
            for first, second in itertools.combinations(planes, 2):
                dims, others = {*support(first)}, {*support(second)}
                laid_over = dims - {*old} == others - {*old} and len((dims | others) & {*old}) > 1
                if laid_over and dims & others & {*old} and dims != others and any(plane is first for plane in planes):
                    slabs = self.freeze(Labels(labels.shape, (first,)), dims - others, "is merged with other channels")
                    self.block(second, sorted(dims & others), slabs=slabs.planes[0])
                    planes = [plane for plane in planes if plane is not first]
        return Labels(labels.shape, tuple(plane for plane in labels.planes if any(plane is p for p in planes)))

    def _without_merged_copies(self, labels: Labels, shape: tuple[int, ...]) -> list[Plane]:
        planes = []
        for plane in labels.planes:
            copied = int(core(plane).reshape(-1)[0]) in self.copies
            merged = next((old for old, new in factor(labels.shape, shape) if {*support(plane)} & {*old}), [])
            others = [other for other in labels.planes if other is not plane and {*support(other)} & {*merged}]
            if copied and others:
                self.pin(plane, "is a copy that is merged with what is copied")
            else:
                planes.append(plane)
        return planes


def _tied(entry: _Met, operand: int, met: Sequence[_Met]) -> bool:
    """Whether an operand that lacks the labels of ``entry`` has others there that can be tied to them."""
    overlapping = [other for other in met if operand in other.operands and {*other.dims} & {*entry.dims}]
    return any(not other.operands & entry.operands and other.dims != entry.dims for other in overlapping)

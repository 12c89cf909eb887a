"""Labels instead of numbers: atoms, planes, and the few things that can happen to them.

Every index of every parameter dimension is an *atom*, a number. A tensor of the graph carries *planes*: integer
tensors expanded to its shape that say to which atom an element belongs. A plane varies along its *support* only
and has stride 0 elsewhere, so it costs next to nothing. An element goes when any of its atoms goes.

:class:`Flow` records what the rules find out about a graph (which atoms are one, which are fixed, which blocks
must stay rectangular); :func:`solve` turns the record into :class:`Classes`. Nothing here knows ATen.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from speedup.errors import PlanError

Plane = Tensor
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Labels:
    """What is known of one tensor: its shape, and its planes, each expanded to that shape."""

    shape: tuple[int, ...]
    planes: tuple[Plane, ...] = ()

    @property
    def covered(self) -> set[int]:
        """The dimensions along which some plane varies."""
        return {dim for plane in self.planes for dim in support(plane)}

    @property
    def fixed(self) -> set[int]:
        """The dimensions that have size but no plane: their content cannot shrink."""
        return {dim for dim, size in enumerate(self.shape) if size > 1} - self.covered

    def along(self, dim: int) -> tuple[Plane, ...]:
        """The planes that vary along ``dim``."""
        return tuple(plane for plane in self.planes if dim in support(plane))


def support(plane: Plane) -> tuple[int, ...]:
    """The dimensions along which ``plane`` varies."""
    return tuple(d for d, (size, stride) in enumerate(zip(plane.shape, plane.stride(), strict=True)) if size > 1 and stride)


def core(plane: Plane, dims: Sequence[int] | None = None) -> Tensor:
    """``plane`` restricted to ``dims`` (its support by default): shape = the sizes of those dimensions."""
    dims = support(plane) if dims is None else dims
    return plane[tuple(slice(None) if dim in dims else 0 for dim in range(plane.dim()))]


def settle(plane: Plane) -> Plane:
    """``plane`` with stride 0 along every dimension along which its labels are constant."""
    for dim in support(plane):
        first = plane.narrow(dim, 0, 1)
        if torch.equal(plane, first.expand_as(plane)):
            plane = first.expand_as(plane)
    return narrowed(plane).expand(plane.shape)


def narrowed(plane: Plane, keep: Iterable[int] = ()) -> Plane:
    """``plane`` with size 1 along the dimensions that are neither in its support nor in ``keep``."""
    wanted = {*support(plane), *keep}
    return plane[tuple(slice(None) if dim in wanted else slice(0, 1) for dim in range(plane.dim()))]


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
        kind: The field's word for it: reshape, attention, grouped, split, group norm.
        members: Labels, shape (rows, row length).
        slabs: Labels, shape (rows,): a row's slab lives as long as any member of the row does; None where rows
            have no label of their own.
    """

    node: str
    kind: str
    members: Index
    slabs: Index | None = None


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


@dataclass
class _Met:
    """One plane of a meeting: which operands brought it, and whether a larger one says it already."""

    dims: tuple[int, ...]
    plane: Plane
    operands: set[int]
    implied: bool = False


@dataclass
class Flow:
    """The record that the rules write while labels run through a graph."""

    size: int = 0
    node: str = ""
    kind: str = ""
    pairs: list[tuple[Index, Index]] = field(default_factory=list)
    pins: list[tuple[Pin, Index]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    merges: list[Index] = field(default_factory=list)
    parts: list[Index] = field(default_factory=list)

    def mint(self, shape: Sequence[int], dims: Sequence[int]) -> Plane:
        """Returns a plane of new atoms that varies along ``dims``."""
        sizes = [size if dim in dims else 1 for dim, size in enumerate(shape)]
        count = int(np.prod(sizes, dtype=np.int64))
        plane = torch.arange(self.size, self.size + count).reshape(sizes).expand(tuple(shape))
        self.size += count
        return plane

    def unite(self, first: Plane, second: Plane) -> None:
        """Makes the atoms of two planes of equal shape one, element by element."""
        dims = sorted({*support(first), *support(second)})
        self.pairs.append((_flat(core(first, dims)), _flat(core(second, dims))))

    def pin(self, plane: Plane, reason: str, structural: bool = False) -> None:
        """Fixes every atom of ``plane``."""
        self.pins.append((Pin(self.node, reason, structural), _flat(core(plane))))

    def pin_all(self, labels: Labels, reason: str) -> None:
        """Fixes every atom of a tensor."""
        for plane in labels.planes:
            self.pin(plane, reason)

    def freeze(self, labels: Labels, dims: Iterable[int], reason: str, structural: bool = False) -> Labels:
        """Returns ``labels`` with nothing left that varies along ``dims``, which must stay as they are.

        A plane with no other support is pinned; of one with more, the atoms that differ only along ``dims`` go together.
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

    def block(self, plane: Plane, rows: Sequence[int], slabs: Plane | None = None) -> None:
        """Asks that ``plane`` stay rectangular: its support without ``rows`` is shared out evenly between ``rows``."""
        slab_labels = None if slabs is None else _flat(core(slabs, rows))
        self.blocks.append(Block(self.node, self.kind, _rows_first(plane, rows), slab_labels))

    def part(self, plane: Plane, dim: int) -> None:
        """Notes that ``plane`` is a part cut along ``dim``: something of it must stay, and what stays is a rectangle."""
        dims = support(plane)
        if not dims:
            self.pin(plane, "is taken alone")
            return
        self.parts.append(_flat(core(plane)))
        if len(dims) > 1:
            self.block(plane, dims[:-1])

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
                    self.pin(wide, "a second set of labels meets a tensor that has one")
                elif support(wide):
                    fresh.append(_Met(support(wide), wide, {position}))
            met += fresh
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
        table = _rows_first(plane, rows)
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
        """Returns the labels after a reshape; what is split must stay rectangular, what is merged is noted."""
        shape = tuple(shape)
        planes = []
        for plane in labels.planes:
            varying = set(support(plane))
            moved = settle(plane.reshape(shape))
            planes.append(moved)
            for old, new in factor(labels.shape, shape):
                merged = [dim for dim in old if dim in varying]
                if len(merged) > 1:
                    self.merges.append(_flat(core(plane, merged)))
                split = [dim for dim in support(moved) if dim in new]
                outside = [dim for dim in support(moved) if dim not in new]
                if varying.intersection(old) and len(split) > 1:
                    for depth in range(1, len(split)):
                        self.block(moved, outside + split[:depth])
        return Labels(shape, tuple(planes))


def broadcast(labels: Labels, shape: tuple[int, ...]) -> Labels:
    """``labels`` with leading dimensions of size 1 added until its rank is that of ``shape``."""
    missing = len(shape) - len(labels.shape)
    index = (None,) * missing + (...,)
    return Labels((1,) * missing + labels.shape, tuple(plane[index] for plane in labels.planes))


def factor(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Returns the shortest runs of old and new dimensions that hold the same number of elements, in order."""
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        have = old[i] if left else 1
        want = new[j] if right else 1
        i, j = i + len(left), j + len(right)
        while have != want:
            if (have < want and i < len(old)) or j >= len(new):
                have *= old[i]
                left.append(i)
                i += 1
            else:
                want *= new[j]
                right.append(j)
                j += 1
        runs.append((left, right))
    return runs


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
        parts: Classes of which at least one must live, because they are a tensor of their own.
    """

    of: Index
    count: int
    pin_of: Index
    pins: tuple[Pin, ...]
    blocks: tuple[Block, ...]
    weaves: tuple[Weave, ...]
    parts: tuple[Index, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_of", torch.from_numpy(self.of))

    def plane(self, plane: Plane, dims: Sequence[int] | None = None) -> Index:
        """The classes of a plane over ``dims`` (its support by default)."""
        return self.of[core(plane, dims).numpy()]

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
        for block in self.blocks:
            if block.members.size != labels.size:
                continue
            for count in range(1, len(dims)):
                for rows in itertools.combinations(range(len(dims)), count):
                    inner = [i for i in range(len(dims)) if i not in rows]
                    table = labels.transpose(*rows, *inner).reshape(-1, int(np.prod([labels.shape[i] for i in inner])))
                    if table.shape == block.members.shape and (table == block.members).all():
                        return [dims[i] for i in rows]
        return None

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
            sizes = kept[kept > 0].unique()
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
        weaves: dict[bytes, Weave] = {}
        ties = []
        for block in flow.blocks:
            known: list[Weave] = []
            for sequence, order in _woven(block, flow.merges, of) if block.kind == "reshape" else ():
                if any(_follows(sequence, weave) for weave in known):
                    continue
                weave = _weave(block, sequence, order)
                if weave is None:
                    first = np.broadcast_to(block.members[0], block.members.shape)
                    ties.append((block.members.reshape(-1), first.reshape(-1)))
                    break
                known.append(weave)
            weaves |= {weave.turns.tobytes(): weave for weave in known}
        if not ties:
            break
        pairs += ties
    pin_of = np.full(count, -1, dtype=np.int64)
    for position in range(len(flow.pins) - 1, -1, -1):
        pin_of[of[flow.pins[position][1]]] = position
    blocks = {}
    for block in flow.blocks:
        rows = of[block.members]
        slabs = None if block.slabs is None else of[block.slabs]
        table = rows if slabs is None else np.concatenate([slabs[:, None], rows], axis=1)
        _, first = np.unique(table, axis=0, return_index=True)
        first.sort()
        slabs = None if slabs is None else slabs[first]
        key = (block.kind, rows[first].tobytes(), rows.shape, None if slabs is None else slabs.tobytes())
        blocks.setdefault(key, replace(block, members=rows[first], slabs=slabs))
    pins = tuple(pin for pin, _ in flow.pins)
    parts = {part.tobytes(): part for part in (np.unique(of[part]) for part in flow.parts)}
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


def _woven(block: Block, merges: Sequence[Index], of: Index) -> Iterator[tuple[Index, Index]]:
    """Yields the merges that interleave the rows of ``block``: classes in merged order, and the row of each."""
    rows = of[block.members]
    rows = rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
    if len(rows) == 1:
        return
    low, high = rows.min(), rows.max()
    row_of = np.full(high - low + 1, -1, dtype=np.int64)
    row_of[rows - low] = np.arange(len(rows))[:, None]
    for merge in merges:
        sequence = of[merge]
        if sequence.min() > high or sequence.max() < low:
            continue
        sequence = sequence[(sequence >= low) & (sequence <= high)]
        order = row_of[sequence - low]
        sequence, order = sequence[order >= 0], order[order >= 0]
        once = np.sort(np.unique(sequence, return_index=True)[1])  # copies (a batch, repeated keys) follow the first
        sequence, order = sequence[once], order[once]
        if np.count_nonzero(np.diff(order)) >= len(np.unique(order)) and len(order):
            yield sequence, order


def _follows(sequence: Index, weave: Weave) -> bool:
    """Whether ``sequence`` is a part of ``weave`` in its order, so that nothing new is asked."""
    order = weave.turns.reshape(-1)
    places = np.searchsorted(order, sequence, sorter=np.argsort(order))
    ranks = np.argsort(order)[np.minimum(places, len(order) - 1)]
    return bool((order[ranks] == sequence).all() and (np.diff(ranks) > 0).all())


def _weave(block: Block, sequence: Index, order: Index) -> Weave | None:
    """The weave of a merge that takes one member of every row in turn, each once; None for any other pattern."""
    rows = int(order.max()) + 1
    if len(order) % rows or (order.reshape(-1, rows) != order[:rows]).any() or len(set(order[:rows].tolist())) < rows:
        return None
    return Weave(block.node, sequence.reshape(-1, rows))


def _rows_first(plane: Plane, rows: Sequence[int]) -> Index:
    """The labels of ``plane`` over its support as a table: its dimensions ``rows`` down, the others across."""
    dims = support(plane)
    order = [dims.index(row) for row in rows] + [i for i, dim in enumerate(dims) if dim not in rows]
    return _flat(core(plane).permute(order)).reshape(int(np.prod([plane.shape[row] for row in rows])), -1)


def _flat(labels: Tensor) -> Index:
    return labels.reshape(-1).numpy()

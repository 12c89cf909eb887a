"""Units: channels that go whole, such as a head or a group of a grouped convolution, and rows that are counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from speedup.flow import Block
from speedup.labels import Index, Mask

_GROUPED = ("convolution", "group norm")
"""Kinds of blocks whose rows go whole only where that is the finer choice; rows of other slabs (heads) always may."""


_HEADS = ("attention", "contraction")
"""Kinds of blocks whose rows are heads: what a product sums over is shared out between them."""


@dataclass(frozen=True)
class Units:
    """What goes whole.

    Attributes:
        of: The unit of each class, shape (classes,).
        counted: The blocks whose rows do not go whole but must keep equal numbers.
        heads: The classes of heads that go whole, shape (classes,).
        head_dims: The classes of heads that keep equal numbers of dimensions, shape (classes,).
    """

    of: Index
    counted: tuple[Block, ...]
    heads: Mask
    head_dims: Mask


def find_units(
    signature: NDArray[np.uint64], pinned: Mask, blocks: Sequence[Block], *, whole_heads: bool = True
) -> Units:
    """Returns what goes whole, and which rows must keep equal numbers.

    Rows go whole together with their slabs, which blocks may share (the heads of queries, keys and values). Where two
    partitions cross (heads, and a scale shared by all heads) the first to come wins: slabs that no parameter carries,
    then few rows. Rows that are all fixed can only be counted, and heads unless they may go whole.
    """
    leaders: dict[int, int] = {}
    sharing: dict[int, list[Block]] = {}
    for position, block in enumerate(blocks):
        if block.slabs is not None:
            slabs = block.slabs.tolist()
            leader = next((leaders[slab] for slab in slabs if slab in leaders), position)
            leaders |= dict.fromkeys(slabs, leader)
            sharing.setdefault(leader, []).append(block)

    def precedence(family: list[Block]) -> tuple[bool, bool, int]:
        carried = any(block.slabs is not None and signature[block.slabs].any() for block in family)
        return any(block.kind in _GROUPED for block in family), carried, len(family[0].members)

    units = _Forest(len(signature))
    heads, head_dims = (np.zeros(len(signature), dtype=np.bool_) for _ in range(2))
    counted = [block for block in blocks if block.slabs is None]
    for family in sorted(sharing.values(), key=precedence):
        grouped = any(block.kind in _GROUPED for block in family)
        lengths = [len(np.unique(units.of(block.members[0]))) for block in family]
        coarse = grouped and min(lengths) > 1 and any(len(b.members) < n for b, n in zip(family, lengths, strict=True))
        fixed = all(pinned[block.slabs].all() for block in family if block.slabs is not None)
        attention = any(block.kind in _HEADS for block in family)
        apart = fixed or coarse or (attention and not whole_heads) or _cross(units, family)
        for block in family if attention else ():
            (head_dims if apart else heads)[block.members] = True
        if apart:
            counted += family
        else:
            units.unite(_rows(family, units.of))
    return Units(units.of(np.arange(len(signature))), tuple(counted), heads, head_dims)


class _Forest:
    """Which classes go together so far: a forest in which the root of each tree is its smallest class."""

    def __init__(self, count: int) -> None:
        self.parents: Index = np.arange(count)

    def of(self, classes: Index) -> Index:
        """The unit of each class: its root."""
        above = self.parents[classes]
        while not np.array_equal(above, classes):
            classes, above = above, self.parents[above]
        return classes

    def unite(self, joined: "_Joined") -> None:
        """Makes one of the units that were found to be joined."""
        self.parents[joined.labels] = joined.leads


@dataclass(frozen=True)
class _Joined:
    """Labels that links join: each label once, in order, and the smallest that it is joined with."""

    labels: Index
    leads: Index

    def of(self, labels: Index) -> Index:
        """The smallest label that each of ``labels`` is joined with."""
        return self.leads[np.searchsorted(self.labels, labels)]


def _cross(units: _Forest, family: Sequence[Block]) -> bool:
    """Whether neither the units nor the rows of a family are parts of the other, so that united they are fewer.

    Rows whose slabs go together already (the features of a head) are one row.
    """
    rows, united = _rows(family, lambda classes: classes), _rows(family, units.of)
    before, alone, after = (
        min(len(np.unique(part(block.members))) for block in family)
        for part in (units.of, rows.of, lambda classes: united.of(units.of(classes)))
    )
    counting = min(len(np.unique(units.of(block.slabs))) for block in family if block.slabs is not None)
    return after < min(before, alone, counting)


def _rows(family: Sequence[Block], labelled: Callable[[Index], Index]) -> _Joined:
    """Every row of ``family`` joined with its slab, classes known by their labels; only these are looked at."""
    slabs = [np.repeat(block.slabs, block.members.shape[1]) for block in family if block.slabs is not None]
    members = [block.members.reshape(-1) for block in family]
    ends = np.concatenate([*slabs, *members])
    labels, place = np.unique(labelled(ends), return_inverse=True)
    first, second = place.reshape(2, -1)
    links = coo_array((np.ones(len(first)), (first, second)), shape=(len(labels), len(labels)))
    _, component = connected_components(links, directed=False)
    _, lead = np.unique(component, return_index=True)
    return _Joined(labels, labels[lead[component]])


def counting_slabs(count: int, counted: Sequence[Block]) -> Mask:
    """The classes that count the rows of a block whose rows all stay."""
    slabs = np.zeros(count, dtype=np.bool_)
    for block in counted:
        if block.slabs is not None:
            slabs[block.slabs] = True
    return slabs

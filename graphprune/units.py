"""Units: channels that go whole, such as a head or a group of a grouped convolution, and rows that are counted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from speedup.flow import Block
from speedup.labels import Index, Mask

_GROUPED = ("convolution", "group norm")
"""Kinds of blocks whose rows go whole only where that is the finer choice; rows of other slabs (heads) always may."""


def find_units(signature: NDArray[np.uint64], blocks: Sequence[Block]) -> tuple[Index, list[Block]]:
    """Returns the unit of each class, and the blocks whose rows do not go whole but must keep equal numbers.

    Rows go whole together with their slabs, which blocks may share (the heads of queries, keys and values). Where two
    partitions cross (heads, and a scale shared by all heads) the first to come wins: slabs that no parameter carries,
    then few rows.
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

    alone = np.arange(len(signature))
    unit = alone
    counted = [block for block in blocks if block.slabs is None]
    for family in sorted(sharing.values(), key=precedence):
        grouped = any(block.kind in _GROUPED for block in family)
        lengths = [len(np.unique(unit[block.members[0]])) for block in family]
        coarse = grouped and min(lengths) > 1 and any(len(b.members) < n for b, n in zip(family, lengths, strict=True))
        united = _united(unit, family)
        if coarse or _cross(unit, _united(alone, family), united, family):
            counted += family
        else:
            unit = united
    return unit, counted


def _cross(unit: Index, rows: Index, united: Index, family: Sequence[Block]) -> bool:
    """Whether neither the units nor the rows of a family are parts of the other, so that united they are fewer."""
    before, alone, after = (
        min(len(np.unique(part[block.members])) for block in family) for part in (unit, rows, united)
    )
    return after < min(before, alone)


def _united(unit: Index, family: Sequence[Block]) -> Index:
    """The units after every row of ``family`` and its slab have become one."""
    rows = [np.repeat(block.slabs, block.members.shape[1]) for block in family if block.slabs is not None]
    columns = [block.members.reshape(-1) for block in family]
    ends = (unit[np.concatenate(rows)], unit[np.concatenate(columns)])
    links = coo_array((np.ones(len(ends[0])), ends), shape=(len(unit), len(unit)))
    _, merged = connected_components(links, directed=False)
    result: Index = merged.astype(np.int64)[unit]
    return result


def counting_slabs(count: int, counted: Sequence[Block]) -> Mask:
    """The classes that count the rows of a block whose rows all stay."""
    slabs = np.zeros(count, dtype=np.bool_)
    for block in counted:
        if block.slabs is not None:
            slabs[block.slabs] = True
    return slabs

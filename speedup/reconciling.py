"""What must stay -> what stays: as little more as blocks, weaves and parts need, so that a plan can be made of it."""

from collections.abc import Sequence

import numpy as np

from speedup.analysis import Analysis
from speedup.classes import Classes, Weave
from speedup.flow import Block
from speedup.labels import Index, Mask


def reconcile(analysis: Analysis, needed: Mask) -> Mask:
    """Returns ``needed``, shape (classes,), with as many classes back as a plan must have beside them.

    Every block becomes a rectangle, every weave takes turns, of every tensor and part something stays. What counts the
    rows of a block stays with a row of which something does, and goes with one of which nothing does; where it is
    needed for another reason, something of the row comes back. Other rows that are gone stay gone, unless their block
    needs every row.

    Classes only ever come back, and everything alive is a plan; so there is an end, and it is one.
    """
    classes = analysis.classes
    live = _without_empty_rows(classes, needed)
    planes = [classes.plane(plane).reshape(-1) for labels in analysis.parameters.values() for plane in labels.planes]
    while True:
        before = live.copy()
        for members in planes:
            live[members[:1]] |= not live[members].any()
        for part in classes.parts:
            gone = part.members[~live[part.members]]
            live[gone[: max(part.least - (len(part.members) - len(gone)), 0)]] = True
        for weave in classes.weaves:
            _complete_turns(weave, live)
        for block in classes.blocks:
            if block.slabs is not None:
                live[block.slabs[live[block.members].any(axis=1)]] = True
        if (live == before).all():
            _level(classes, live)
        if (live == before).all():
            return live


def _without_empty_rows(classes: Classes, needed: Mask) -> Mask:
    """``needed`` without what counts rows of which nothing is; what counts those in turn goes as well."""
    live = needed
    while True:
        left = classes.with_slabs(live) | (needed & (classes.pin_of >= 0))
        if (left == live).all():
            return left
        live = left


def _complete_turns(weave: Weave, live: Mask) -> None:
    """Lets the fewest come back with which what lives takes turns, and the last turn is whole."""
    sequence, rows = weave.turns.reshape(-1), weave.turns.shape[1]
    places = np.flatnonzero(live[sequence])
    last = np.concatenate([[-1], places])
    missing = (np.append(places, len(sequence)) - last - 1) % rows  # behind each place, before the next
    nth = np.arange(missing.sum()) - np.repeat(np.cumsum(missing) - missing, missing)
    live[sequence[np.repeat(last, missing) + 1 + nth]] = True


def _level(classes: Classes, live: Mask) -> None:
    """Lets members come back until the rows of uneven blocks have the same number.

    This is done for the blocks of the shortest rows only: what the others need then may be another thing. Members come
    back from all shorter rows in turn, and of those first what serves the most rows.
    """
    uneven = [block for block in classes.blocks if _missing(block, live).any()]
    length = min((block.members.shape[1] for block in uneven), default=0)
    turn = _turn([block for block in classes.blocks if block.members.shape[1] < length], live)
    served = _served(classes.blocks if uneven else (), live)
    for block in uneven:
        if block.members.shape[1] == length:
            order = np.lexsort((-served[block.members], turn[block.members]), axis=1)
            members = np.take_along_axis(block.members, order, axis=1)
            gone = ~live[members]
            live[members[gone & (np.cumsum(gone, axis=1) <= _missing(block, live)[:, None])]] = True


def _missing(block: Block, live: Mask) -> Index:
    """How many members each row lacks of those that the longest row has, shape (rows,); none where it may be gone."""
    counts = live[block.members].sum(axis=1)
    stays = (counts > 0) | block.every
    if block.slabs is not None:
        stays |= live[block.slabs]
    missing: Index = np.where(stays, max(int(counts.max()), 1) - counts, 0)
    return missing


def _turn(blocks: Sequence[Block], live: Mask) -> Index:
    """At which turn each class that is gone comes back if one of every row does at a time, shape (classes,)."""
    turn = np.zeros(len(live), dtype=np.int64)
    for block in blocks:
        np.maximum.at(turn, block.members, np.cumsum(~live[block.members], axis=1))
    return turn


def _served(blocks: Sequence[Block], live: Mask) -> Index:
    """How many rows lack what each class would bring, less those that it would make too long, shape (classes,)."""
    served = np.zeros(len(live), dtype=np.int64)
    for block in blocks:
        np.add.at(served, block.members, np.where(_missing(block, live) > 0, 1, -1)[:, None])
    return served

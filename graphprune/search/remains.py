"""What is left of a channel group after some of its units are gone: a smaller group with the same constraints."""

from dataclasses import replace

import numpy as np

from graphprune.groups import ChannelGroup
from speedup.flow import Part
from speedup.labels import Index, Mask


def remaining(group: ChannelGroup, alive: Mask) -> ChannelGroup:
    """Returns the group of the units that are left of ``group``.

    Args:
        group: A group.
        alive: Which of its classes are left, shape (classes of the group,): whole units, and so many that the blocks of
            the group are rectangles and its weaves take turns.
    """
    if alive.all():
        return group
    stays = np.ones(group.units, dtype=np.bool_)
    stays[group.unit_of[~alive]] = False
    place = np.cumsum(stays) - 1

    def left(units: Index) -> Index:
        return place[units[stays[units]]]

    def turns(weave: Index) -> Index:
        sequence = left(weave.reshape(-1))
        return sequence[: len(sequence) - len(sequence) % weave.shape[1]].reshape(-1, weave.shape[1])

    parts = [(left(part.members), part.least) for part in group.parts]
    here = stays[group.unit_of]
    return replace(
        group,
        classes=group.classes[here],
        unit_of=place[group.unit_of[here]],
        axes=tuple(left(axis) for axis in group.axes if stays[axis].any()),
        locked=group.locked[stays],
        counts=tuple(table[:, stays] for table in group.counts),
        equals=tuple(table[:, stays] for table in group.equals),
        weaves=tuple(turns(weave) for weave in group.weaves if stays[weave].any()),
        parts=tuple(Part(members, min(least, len(members))) for members, least in parts if len(members)),
        members=tuple(replace(m, channels=m.channels * int(stays.sum()) // group.units) for m in group.members),
    )

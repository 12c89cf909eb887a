"""Channel groups: what goes together or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphprune.kinds import Kind, residual_stream
from graphprune.units import Units, counting_slabs, find_units
from speedup.analysis import Analysis
from speedup.classes import Classes, Weave
from speedup.flow import Block, Part
from speedup.labels import Index, Mask, support

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer, or the part of it that belongs to a group.

    Attributes:
        tensor: Qualified name.
        dims: The dimension; two for a grouped weight, whose inputs differ from group to group.
        channels: How many of its indices belong to the group.
        role: Whether the tensor's operator produces these channels (``out``) or consumes them (``in``).
        node: The first graph node that uses the tensor.
    """

    tensor: str
    dims: tuple[int, ...]
    channels: int
    role: str
    node: str

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that depend on each other through ties or through a block that must stay rectangular.

    Attributes:
        index: Position in :attr:`DependencyGraph.groups`.
        name: The first parameter that produces its channels.
        kind: What its channels are in the network.
        classes: The label classes of the group, shape (classes,).
        unit_of: The unit of each of them, shape (classes,): a unit goes whole (one channel, or one head).
        axes: The units along each axis, equal axes once: shape (channels of the axis,).
        locked: Which units must stay, shape (units,).
        counts: Blocks in which every row must keep the same number: for each block the number of members that a unit
            has in a row, shape (rows, units).
        equals: The same for splits into equal parts, which only the user's own code needs to stay equal.
        weaves: Sequences of units whose survivors must take turns as the rows do, shape (turns, rows).
        parts: Units of which some must stay, their labels now units.
        members: The axes it runs through.
        pin: Why nothing of it may go; None if something may.
    """

    index: int
    name: str
    kind: Kind
    classes: Index
    unit_of: Index
    axes: tuple[Index, ...]
    locked: Mask
    counts: tuple[Index, ...]
    equals: tuple[Index, ...]
    weaves: tuple[Index, ...]
    parts: tuple[Part, ...]
    members: tuple[Member, ...]
    pin: str | None

    @property
    def units(self) -> int:
        """How many units it has."""
        return len(self.locked)

    @property
    def size(self) -> int:
        """How many units may go."""
        return int((~self.locked).sum())

    @property
    def width(self) -> int:
        """Channels that a unit has along an axis (the width of a head, 1 for plain channels)."""
        produced = [m.channels for m in self.members if m.role == "out" and len(m.dims) == 1] or [self.units]
        return max(1, min(produced) // max(self.units, 1))


def find_groups(analysis: Analysis, *, whole_heads: bool = True) -> tuple[ChannelGroup, ...]:
    """Returns the channel groups of an analysed graph, in the order in which it uses them.

    Args:
        analysis: The graph and its labels.
        whole_heads: Whether heads of attention go whole; else each of them keeps the same number of dimensions.
    """
    if not analysis.parameters:
        return ()
    classes = analysis.classes
    axes = _axes(analysis)
    signature = _signatures(classes, axes)
    pinned = classes.pin_of >= 0
    blocks = [block for block in classes.blocks if len(block.members) > 1 and not pinned[block.members].all()]
    units = find_units(signature, pinned, blocks, whole_heads=whole_heads)
    counting = counting_slabs(classes.count, units.counted)
    width = residual_stream(analysis)
    group_of = np.where(counting & (signature == 0), -1, _group_of(signature, pinned, counting, blocks))
    members, carriers = _members(analysis, axes, group_of)
    inside = _positions(group_of)
    parts = _parts(classes.parts, group_of)
    tables = _by_group(units.counted, [block.members for block in units.counted], group_of)
    weaves = _by_group(classes.weaves, [weave.turns for weave in classes.weaves], group_of)
    locked = np.zeros(classes.count, dtype=np.bool_)
    locked[units.of[pinned | counting]] = True  # a row that is counted stays, and so does what is tied to its slab
    return tuple(
        _group(
            index,
            inside[label],
            members[label],
            analysis,
            axes=carriers[label],
            parts=parts.get(label, ()),
            unit_of=units.of,
            locked=locked,
            counted=tables.get(label, ()),
            weaves=weaves.get(label, ()),
            kind=_kind(inside[label], units, width),
        )
        for index, label in enumerate(members)
    )


def _kind(classes: Index, units: Units, width: Mask) -> Kind:
    if units.heads[classes].any():
        return "heads"
    if units.head_dims[classes].any():
        return "head_dims"
    return "width" if width[classes].any() else "ffn"


@dataclass(frozen=True)
class _Axis:
    """The classes along one plane of one parameter: shape of ``classes`` is that of its support."""

    tensor: str
    dims: tuple[int, ...]
    classes: Index


def _axes(analysis: Analysis) -> list[_Axis]:
    return [
        _Axis(name, support(plane), analysis.classes.plane(plane))
        for name, labels in analysis.parameters.items()
        for plane in labels.planes
    ]


def _signatures(classes: Classes, axes: Sequence[_Axis]) -> NDArray[np.uint64]:
    """For each class a number that says through which axes it runs; 0 for classes that no parameter carries."""
    draws = np.random.default_rng(0).integers(1, 2**63, size=len(axes), dtype=np.uint64)
    signature = np.zeros(classes.count, dtype=np.uint64)
    for axis, draw in zip(axes, draws, strict=True):
        np.add.at(signature, axis.classes.reshape(-1), draw)
    return signature


def _group_of(signature: NDArray[np.uint64], pinned: Mask, counting: Mask, blocks: Sequence[Block]) -> Index:
    """The group of each class: classes of one signature, and what a block ties together; -1 for bare labels."""
    mixed = np.where(pinned | counting, signature ^ np.uint64(0x9E3779B97F4A7C15), signature)
    _, cell = np.unique(mixed, return_inverse=True)
    cell = cell.astype(np.int64)
    bare = signature == 0
    cell[bare] = cell.max(initial=0) + 1 + np.arange(int(bare.sum()))
    rows, columns = [], []
    for block in blocks:
        touched = block.members.reshape(-1)
        if block.slabs is not None:
            touched = np.concatenate([touched, block.slabs])
        touched = np.unique(cell[touched[~counting[touched]]])
        rows.append(np.full(len(touched), touched[0] if len(touched) else 0))
        columns.append(touched)
    count = int(cell.max(initial=0)) + 1
    links = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    ends = np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)
    _, component = connected_components(
        coo_array((np.ones(len(links)), (links, ends)), shape=(count, count)), directed=False
    )
    group = component.astype(np.int64)[cell]
    carried = np.zeros(int(group.max(initial=0)) + 1, dtype=np.bool_)
    carried[group[~bare]] = True
    return np.where(carried[group], group, -1)


def _positions(group_of: Index) -> dict[int, Index]:
    """The classes of each group."""
    order = np.argsort(group_of, kind="stable")
    labels, starts = np.unique(group_of[order], return_index=True)
    return dict(zip(labels.tolist(), np.split(order, starts[1:]), strict=True))


def _parts(parts: Sequence[Part], group_of: Index) -> dict[int, list[Part]]:
    """The parts of each group; the group that holds most of a part answers for it."""
    found: dict[int, list[Part]] = {}
    for part in parts:
        labels, counts = np.unique(group_of[part.members], return_counts=True)
        label = int(labels[np.argmax(np.where(labels >= 0, counts, 0))])
        found.setdefault(label, []).append(Part(part.members[group_of[part.members] == label], part.least))
    return found


def _by_group(things: Sequence[T], classes: Sequence[Index], group_of: Index) -> dict[int, list[T]]:
    """The things whose classes belong to each group."""
    found: dict[int, list[T]] = {}
    for thing, inside in zip(things, classes, strict=True):
        for label in np.unique(group_of[inside]).tolist():
            found.setdefault(label, []).append(thing)
    return found


def _members(
    analysis: Analysis, axes: Sequence[_Axis], group_of: Index
) -> tuple[dict[int, list[Member]], dict[int, list[_Axis]]]:
    """The members of each group and their axes, groups in the order in which the graph first uses them."""
    found: dict[int, list[Member]] = {}
    carriers: dict[int, list[_Axis]] = {}
    for axis in axes:
        users = analysis.users.get(axis.tensor, [])
        labels, channels = np.unique(group_of[axis.classes], return_counts=True)
        for label, count in zip(labels.tolist(), channels.tolist(), strict=True):
            inside = axis.classes[group_of[axis.classes] == label]
            role = "out" if analysis.produces(axis.tensor, inside) else "in"
            found.setdefault(label, []).append(
                Member(axis.tensor, axis.dims, count, role, users[0].name if users else "")
            )
            carriers.setdefault(label, []).append(axis)
    return found, carriers


def _group(
    index: int,
    classes: Index,
    members: Sequence[Member],
    analysis: Analysis,
    *,
    axes: Sequence[_Axis],
    parts: Sequence[Part],
    unit_of: Index,
    locked: Mask,
    counted: Sequence[Block],
    weaves: Sequence[Weave],
    kind: Kind,
) -> ChannelGroup:
    units, unit = np.unique(unit_of[classes], return_inverse=True)

    def local(some: Index) -> Index:
        """The unit of each of ``some`` classes within the group; -1 for those of other groups."""
        places = np.minimum(np.searchsorted(classes, some), len(classes) - 1)
        return np.where(classes[places] == some, unit[places], -1)

    tables = [(block.kind, _count_table(block, local(block.members), len(units))) for block in counted]
    turns = [local(weave.turns) for weave in weaves]
    along = [found[found >= 0] for found in (local(axis.classes) for axis in axes)]
    along = [one if len(axis.dims) == 1 else np.unique(one) for one, axis in zip(along, axes, strict=True)]
    producers = [member for member in members if member.role == "out"] or list(members)
    stays = locked[units] | (len(units) == 1)  # something must stay of every group
    return ChannelGroup(
        index=index,
        name=producers[0].tensor,
        kind=kind,
        classes=classes,
        unit_of=unit,
        axes=tuple({units.tobytes(): units for units in along if len(units)}.values()),
        locked=stays,
        counts=tuple(table for kind, table in tables if table is not None and kind != "split"),
        equals=tuple(table for kind, table in tables if table is not None and kind == "split"),
        weaves=tuple(one for one in turns if (one >= 0).all()),
        parts=tuple(_in_units(local(part.members), part.least) for part in parts),
        members=tuple(members),
        pin=_pin_reason(analysis.classes, classes, units) if stays.all() else None,
    )


def _in_units(members: Index, least: int) -> Part:
    units = np.unique(members)
    return Part(units, min(least, len(units)))


def _count_table(block: Block, inside: Index, units: int) -> Index | None:
    """How many members of each unit stand in each row, shape (rows, units); None where any choice is rectangular.

    ``inside`` are the units of the members of ``block``, -1 for those of other groups.
    """
    if (inside < 0).all():
        return None
    table = np.zeros((len(inside), units + 1), dtype=np.int64)
    np.add.at(table, (np.arange(len(inside))[:, None], inside), 1)
    table = table[:, :units]
    full = block.members.shape[1]
    may_vanish = block.slabs is None and not block.every and np.isin(table, (0, full)).all()
    if may_vanish or (table == table[0]).all():
        return None
    return table


def _pin_reason(classes: Classes, inside: Index, units: Index) -> str:
    position = classes.pin_of[inside].max()
    if position < 0 and len(units) == 1:
        return "would have to go all at once"
    if position < 0:
        return "is shared by heads or groups that only go whole"
    pin = classes.pins[position]
    return f"{pin.reason} ({pin.node})"

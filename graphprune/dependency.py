"""Channel groups: what goes together or not at all, as a table and as a ``networkx`` graph of axes and ties."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from speedup.analysis import Analysis, analyse
from speedup.atoms import Block, Index, Labels, Mask, support
from speedup.capture import capture
from speedup.classes import Classes
from speedup.inputs import ExampleInputs
from speedup.rules import rule_for

_KINDS: Mapping[object, str] = {operator.getitem: "slice"}
"""Ties of nodes that are no operators."""

_GROUPED = ("convolution", "group norm")
"""Kinds of blocks whose rows go whole only where that is the finer choice; rows of other slabs (heads) always may."""


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
        classes: The label classes of the group, shape (classes,).
        unit_of: The unit of each of them, shape (classes,): a unit goes whole (one channel, or one head).
        axes: The units along each axis, equal axes once: shape (channels of the axis,).
        locked: Which units must stay, shape (units,).
        counts: Blocks in which every row must keep the same number: for each block the number of members that a unit
            has in a row, shape (rows, units).
        equals: The same for splits into equal parts, which only the user's own code needs to stay equal.
        weaves: Sequences of units whose survivors must take turns as the rows do, shape (turns, rows).
        parts: Units of which at least one must stay, because they are a tensor of their own.
        members: The axes it runs through.
        pin: Why nothing of it may go; None if something may.
    """

    index: int
    name: str
    classes: Index
    unit_of: Index
    axes: tuple[Index, ...]
    locked: Mask
    counts: tuple[Index, ...]
    equals: tuple[Index, ...]
    weaves: tuple[Index, ...]
    parts: tuple[Index, ...]
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


@dataclass(frozen=True)
class DependencyGraph:
    """The dependencies of a model.

    Attributes:
        analysis: The captured graph and its labels.
        groups: All channel groups, in the order in which the model uses them.
    """

    analysis: Analysis
    groups: tuple[ChannelGroup, ...]

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups of which something may go."""
        return tuple(group for group in self.groups if group.pin is None)

    @cached_property
    def graph(self) -> nx.MultiGraph:
        """One node for each axis (tensor, dimension, group), one edge for each tie, with its kind and fx node.

        Its connected components are the channel groups: an axis that several groups share (after a concatenation)
        stands once for each.
        """
        return _axis_graph(self)


def trace(model: nn.Module, example_inputs: ExampleInputs) -> DependencyGraph:
    """Returns the channel groups of ``model``.

    Args:
        model: Any module that ``torch.export`` can capture; it is left as it was.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.

    Raises:
        CaptureError: The model raises on the example, or cannot be captured.
    """
    return find_groups(analyse(capture(model, example_inputs)))


def find_groups(analysis: Analysis) -> DependencyGraph:
    """Returns the channel groups of an analysed graph."""
    classes = analysis.classes
    axes = _axes(analysis)
    signature = _signatures(classes, axes)
    pinned = classes.pin_of >= 0
    blocks = [block for block in classes.blocks if len(block.members) > 1 and not pinned[block.members].all()]
    unit_of, counted = _units(signature, blocks)
    counting = _counting_slabs(classes.count, counted)
    group_of = np.where(counting & (signature == 0), -1, _group_of(signature, pinned, counting, blocks))
    members = _members(analysis, axes, group_of)
    parts = _positions(group_of)
    carriers: dict[str, list[_Axis]] = {}
    for axis in axes:
        carriers.setdefault(axis.tensor, []).append(axis)

    def by_tensor(inside: Sequence[Member]) -> list[_Axis]:
        return [axis for name in dict.fromkeys(member.tensor for member in inside) for axis in carriers[name]]

    found = [
        _group(index, parts[label], members[label], analysis, by_tensor(members[label]), unit_of, counted)
        for index, label in enumerate(members)
    ]
    return DependencyGraph(analysis, tuple(found))


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


def _units(signature: NDArray[np.uint64], blocks: Sequence[Block]) -> tuple[Index, list[Block]]:
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
        coarse = grouped and any(block.members.shape[0] < block.members.shape[1] for block in family)
        united = _united(unit, family)
        slabs = np.unique(np.concatenate([block.slabs for block in family if block.slabs is not None]))
        if coarse or len(np.unique(united[slabs])) < len(np.unique(_united(alone, family)[slabs])):
            counted += family
        else:
            unit = united
    return unit, counted


def _united(unit: Index, family: Sequence[Block]) -> Index:
    """The units after every row of ``family`` and its slab have become one."""
    rows = [np.repeat(block.slabs, block.members.shape[1]) for block in family if block.slabs is not None]
    columns = [block.members.reshape(-1) for block in family]
    ends = (unit[np.concatenate(rows)], unit[np.concatenate(columns)])
    links = coo_array((np.ones(len(ends[0])), ends), shape=(len(unit), len(unit)))
    _, merged = connected_components(links, directed=False)
    result: Index = merged.astype(np.int64)[unit]
    return result


def _counting_slabs(count: int, counted: Sequence[Block]) -> Mask:
    """The classes that count the rows of a block whose rows all stay."""
    slabs = np.zeros(count, dtype=np.bool_)
    for block in counted:
        if block.slabs is not None:
            slabs[block.slabs] = True
    return slabs


def _positions(group_of: Index) -> dict[int, Index]:
    """The classes of each group."""
    order = np.argsort(group_of, kind="stable")
    labels, starts = np.unique(group_of[order], return_index=True)
    return dict(zip(labels.tolist(), np.split(order, starts[1:]), strict=True))


def _members(analysis: Analysis, axes: Sequence[_Axis], group_of: Index) -> dict[int, list[Member]]:
    """The members of each group, groups in the order in which the graph first uses them."""
    found: dict[int, list[Member]] = {}
    for axis in axes:
        users = analysis.users.get(axis.tensor, [])
        labels, channels = np.unique(group_of[axis.classes], return_counts=True)
        for label, count in zip(labels.tolist(), channels.tolist(), strict=True):
            inside = axis.classes[group_of[axis.classes] == label]
            role = "out" if analysis.produces(axis.tensor, inside) else "in"
            found.setdefault(label, []).append(
                Member(axis.tensor, axis.dims, count, role, users[0].name if users else "")
            )
    return found


def _group(
    index: int,
    classes: Index,
    members: Sequence[Member],
    analysis: Analysis,
    axes: Sequence[_Axis],
    unit_of: Index,
    counted: Sequence[Block],
) -> ChannelGroup:
    pinned = analysis.classes.pin_of >= 0
    units, unit = np.unique(unit_of[classes], return_inverse=True)
    locked = np.isin(units, unit_of[pinned])
    local = np.full(analysis.classes.count, -1, dtype=np.int64)
    local[classes] = unit
    for block in counted:  # a row that is counted stays, and so does what is tied to its slab
        if block.slabs is not None:
            locked[local[block.slabs][local[block.slabs] >= 0]] = True
    tables = [(block.kind, _count_table(block, local, len(units))) for block in counted]
    weaves = [local[weave.turns] for weave in analysis.classes.weaves if (local[weave.turns] >= 0).all()]
    along = [local[axis.classes[local[axis.classes] >= 0]] for axis in axes if len(axis.dims) == 1]
    producers = [member for member in members if member.role == "out"] or list(members)
    return ChannelGroup(
        index=index,
        name=producers[0].tensor,
        classes=classes,
        unit_of=unit,
        axes=tuple({units.tobytes(): units for units in along if len(units)}.values()),
        locked=locked,
        counts=tuple(table for kind, table in tables if table is not None and kind != "split"),
        equals=tuple(table for kind, table in tables if table is not None and kind == "split"),
        weaves=tuple(weaves),
        parts=tuple(np.unique(local[part]) for part in analysis.classes.parts if (local[part] >= 0).all()),
        members=tuple(members),
        pin=_pin_reason(analysis.classes, classes) if locked.all() else None,
    )


def _count_table(block: Block, local: Index, units: int) -> Index | None:
    """How many members of each unit stand in each row, shape (rows, units); None where any choice is rectangular."""
    inside = local[block.members]
    if (inside < 0).all():
        return None
    table = np.zeros((len(inside), units + 1), dtype=np.int64)
    np.add.at(table, (np.arange(len(inside))[:, None], inside), 1)
    table = table[:, :units]
    full = block.members.shape[1]
    if np.isin(table, (0, full)).all() or (table == table[0]).all():
        return None
    return table


def _pin_reason(classes: Classes, inside: Index) -> str:
    position = classes.pin_of[inside].max()
    if position < 0:
        return "counts rows that must all stay"
    pin = classes.pins[position]
    return f"{pin.reason} ({pin.node})"


def _axis_graph(dependencies: DependencyGraph) -> nx.MultiGraph:
    analysis = dependencies.analysis
    group_of = np.full(analysis.classes.count, -1, dtype=np.int64)
    for group in dependencies.groups:
        group_of[group.classes] = group.index
    graph: nx.MultiGraph = nx.MultiGraph()

    def axes(name: str, labels: Labels) -> Mapping[int, list[tuple[str, int, int]]]:
        found: dict[int, list[tuple[str, int, int]]] = {}
        for plane in labels.planes:
            for index in np.unique(group_of[analysis.classes.plane(plane)]).tolist():
                if index >= 0:
                    found.setdefault(index, []).extend((name, dim, index) for dim in support(plane))
        return found

    for node in analysis.captured.nodes:
        labels = analysis.labels.get(node.name)
        rule = rule_for(node.target)
        kind = "tied" if node.op == "get_attr" else rule.kind if rule else _KINDS.get(node.target, "unknown")
        name = analysis.aliases.get(str(node.target), node.name) if node.op == "get_attr" else node.name
        touched: dict[int, list[tuple[str, int, int]]] = {}
        outputs = labels if isinstance(labels, list) else [labels]
        sources = [analysis.labels.get(source.name) for source in node.all_input_nodes]
        named = [(name, output) for output in outputs]
        named += [
            (analysis.aliases.get(str(s.target), s.name) if s.op == "get_attr" else s.name, item)
            for s, label in zip(node.all_input_nodes, sources, strict=True)
            for item in (label if isinstance(label, list) else [label])
        ]
        for owner, label in named:
            if isinstance(label, Labels):
                for index, found in axes(owner, label).items():
                    touched.setdefault(index, []).extend(found)
        for index, found in touched.items():
            unique = list(dict.fromkeys(found))
            for axis in unique:
                graph.add_node(axis, tensor=axis[0], dim=axis[1], group=index)
            for other in unique[1:]:
                graph.add_edge(unique[0], other, key=(kind, node.name), kind=kind, node=node.name)
    return graph

"""The dependencies of a model: its channel groups, and a ``networkx`` graph of axes and ties."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from torch import nn

from graphprune.groups import ChannelGroup, find_groups
from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.inputs import ExampleInputs
from speedup.labels import Labels, support
from speedup.rules import rule_for

_KINDS: Mapping[object, str] = {operator.getitem: "slice"}
"""Ties of nodes that are no operators."""


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
    return find_dependencies(analyse(capture(model, example_inputs)))


def find_dependencies(analysis: Analysis, *, whole_heads: bool = True) -> DependencyGraph:
    """Returns the dependencies that the labels of an analysed graph show; heads go whole, or dimensions of them."""
    return DependencyGraph(analysis, find_groups(analysis, whole_heads=whole_heads))


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

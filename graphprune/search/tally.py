"""What a choice of channels costs, counted on labels: no weight is cut and no graph is built."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphprune.budget import counted, flops_by_node, used_parameters
from speedup.analysis import Analysis, bind
from speedup.capture import attribute
from speedup.inputs import batch_size
from speedup.labels import Index, Labels, Mask
from speedup.literals import LITERALS, Remains
from speedup.rules import Call


@dataclass(frozen=True)
class Tally:
    """Counts parameters and multiply-accumulates of a captured model at any choice of channels.

    A node is counted by itself at the shapes that its labels say are left, and once for each of those.

    Attributes:
        analysis: The model and its labels.
    """

    analysis: Analysis
    _seen: dict[Any, int] = field(default_factory=dict, repr=False, compare=False)

    def params(self, live: Mask) -> int:
        """Parameters that are left when the classes ``live``, shape (classes,), are; tied ones count once."""
        return sum(math.prod(self._shape(name, live)) for name in self._parameters)

    def macs(self, live: Mask) -> int:
        """Multiply-accumulates for one example that are left when the classes ``live`` are."""
        flops = sum(self._flops(node, live) for node in self.dense)
        return flops // 2 // batch_size((self.analysis.captured.args, self.analysis.captured.kwargs))

    @cached_property
    def dense(self) -> Mapping[fx.Node, int]:
        """Floating-point operations of every node of the dense graph that has some, for the example inputs."""
        return flops_by_node(self.analysis.captured.graph_module, self.analysis.captured)

    @cached_property
    def _parameters(self) -> tuple[str, ...]:
        graph_module = self.analysis.captured.graph_module
        used = {id(parameter) for parameter in used_parameters(graph_module).values()}
        return tuple(name for name in self.analysis.parameters if id(attribute(graph_module, name)) in used)

    @cached_property
    def _calls(self) -> Mapping[fx.Node, Call]:
        captured = self.analysis.captured
        return {node: bind(node, self.analysis.labels, captured.known) for node in self.dense}

    def _shape(self, name: str, live: Mask) -> tuple[int, ...]:
        return self.analysis.classes.live_shape(self.analysis.parameters[name], live, name)

    @cached_property
    def _touched(self) -> Mapping[fx.Node, Index]:
        """For each node of :attr:`dense` the classes that its inputs carry."""
        found = {}
        for node in self.dense:
            planes = [plane for source in _tensors_into(node) for plane in self._labels(source).planes]
            classes = [np.unique(self.analysis.classes.plane(plane)) for plane in planes]
            found[node] = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *classes]))
        return found

    def _flops(self, node: fx.Node, live: Mask) -> int:
        """The operations of ``node`` with tensors of the shapes that are left."""
        same = (node, live[self._touched[node]].tobytes())
        if same not in self._seen:
            live_shape = self.analysis.classes.live_shape
            shapes = {source: live_shape(self._labels(source), live, source.name) for source in _tensors_into(node)}
            key = (node, tuple(shapes.values()))
            if key not in self._seen:
                self._seen[key] = self._counted(node, shapes, live)
            self._seen[same] = self._seen[key]
        return self._seen[same]

    def _labels(self, source: fx.Node) -> Labels:
        labels = self.analysis.labels[source.name]
        assert isinstance(labels, Labels)
        return labels

    def _counted(self, node: fx.Node, shapes: Mapping[fx.Node, tuple[int, ...]], live: Mask) -> int:
        rewrite = LITERALS.get(node.target)
        new = rewrite(Remains(self.analysis, live, self._calls[node])) if rewrite is not None else {}
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # an OpOverload
        args = tuple(new.get(name, value) for name, value in zip(names, node.args, strict=False))
        kwargs = {**node.kwargs, **{name: value for name, value in new.items() if name in names[len(node.args) :]}}
        with torch.no_grad(), FakeTensorMode():

            def stand_in(source: fx.Node) -> Any:
                if source not in shapes:
                    return _number(source.meta.get("val"))
                value = source.meta["val"]
                return torch.empty(shapes[source], dtype=value.dtype, device=value.device)

            given, named = fx.node.map_arg((args, kwargs), stand_in)
            return counted(lambda: node.target(*given, **named))[1]  # type: ignore[operator]  # an OpOverload


def _tensors_into(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]


def _number(value: Any) -> Any:
    """A size as the example has it."""
    return int(value) if isinstance(value, torch.SymInt) else value

"""Runs the rules over a captured graph: which channels are one, which are fixed, and what must stay rectangular."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from speedup.capture import Captured, attribute, output_names
from speedup.classes import Classes, solve
from speedup.flow import Flow, Pin
from speedup.labels import Index, Labels, Mask, Plane, core, flat, support
from speedup.rules import Call, Rule, rule_for
from speedup.symbolic import batch_dims, hint, sizes

aten = torch.ops.aten
_GROUPED = frozenset(
    {
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
        aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """What the labels say about a captured model.

    Attributes:
        captured: The graph.
        labels: Labels of every tensor node by node name; a list for nodes with several outputs.
        parameters: Labels of every parameter and buffer by its qualified name; those that only training uses as well.
        aliases: For each name under which a tensor is registered, the name that ``parameters`` uses.
        classes: The atoms, sorted into classes.
        unknown: Nodes whose operator has no rule.
    """

    captured: Captured
    labels: Mapping[str, Labels | list[Labels]]
    parameters: Mapping[str, Labels]
    aliases: Mapping[str, str]
    classes: Classes
    unknown: tuple[fx.Node, ...]

    def pinned_by(self, planes: tuple[Plane, ...]) -> Pin | None:
        """The first reason that fixes an atom of ``planes``."""
        for plane in planes:
            for position in self.classes.pin_of[np.unique(self.classes.plane(plane))]:
                if position >= 0:
                    pin: Pin = self.classes.pins[position]
                    return pin
        return None

    @cached_property
    def users(self) -> Mapping[str, list[fx.Node]]:
        """For each parameter by name the nodes that compute with it and with the inputs of the model.

        What is made of parameters alone, such as a weight divided by its norm, is followed to where it meets the
        inputs; where it never does, the nodes are those that read the parameter.
        """
        users: dict[str, list[fx.Node]] = {}
        readers: dict[str, list[fx.Node]] = {}
        made_of: dict[fx.Node, dict[str, None]] = {}  # nodes that know nothing of the inputs
        for node in self.captured.nodes:
            if node.op == "get_attr":
                made_of[node] = {self.aliases.get(str(node.target), str(node.target)): None}
            if node.op != "call_function":
                continue
            sources = node.all_input_nodes
            names = {name: None for source in sources for name in made_of.get(source, ())}
            if all(source in made_of for source in sources):
                made_of[node] = names
            else:
                for name in names:
                    users.setdefault(name, []).append(node)
            for source in sources:
                for name in made_of[source] if source.op == "get_attr" else ():
                    readers.setdefault(name, []).append(node)
        return {**readers, **users}

    def producers(self, name: str, classes: Index) -> list[fx.Node]:
        """The nodes that compute with parameter ``name`` and give out the channels ``classes``."""
        return [node for node in self.users.get(name, ()) if self._carries(self.labels[node.name], classes)]

    def produces(self, name: str, classes: Index) -> bool:
        """Whether the channels ``classes`` of parameter ``name`` come out of an operator that uses it."""
        return bool(self.producers(name, classes))

    def _carries(self, labels: Any, classes: Index) -> bool:
        return any(
            np.isin(classes.reshape(-1)[:1], self.classes.plane(plane)).any()
            for output in _tensors(labels)
            for plane in output.planes
        )

    def kept(self, name: str, live: Mask) -> list[Index | None]:
        """For each dimension of parameter ``name`` the indices whose labels live, None where all do."""
        labels = self.parameters[name]
        keeps: list[Index | None] = [None] * len(labels.shape)
        for plane in labels.planes:
            dims = support(plane)
            if len(dims) == 1:
                alive = live[self.classes.plane(plane)]
                if not alive.all():
                    keeps[dims[0]] = np.flatnonzero(alive)
        return keeps


def analyse(captured: Captured) -> Analysis:
    """Returns the labels of every tensor of ``captured``, found in one pass over its graph.

    What training alone computes, with the same parameters, is followed as well: its channels are the same ones.
    """
    flow = Flow()
    names = tensor_names(captured.graph_module, *filter(None, [captured.training]))
    names |= _other_names(captured.model, names)
    parameters: dict[str, Labels] = {}
    end = "is an output of the model" if captured.parts is None else "leaves what could be captured of the model"
    labels, unknown = _labelled(flow, captured.graph_module, names, parameters, captured.known, end)
    if captured.training is not None:
        flow.training = True
        _labelled(flow, captured.training, names, parameters, partial(attribute, captured.training), end)
    return Analysis(captured, labels, parameters, names, solve(flow), tuple(unknown))


def _labelled(
    flow: Flow,
    graph_module: fx.GraphModule,
    names: Mapping[str, str],
    parameters: dict[str, Labels],
    known: Callable[[str], Any],
    end: str,
) -> tuple[dict[str, Any], list[fx.Node]]:
    """Returns the labels of every node of a graph, and the nodes without a rule; adds the ``parameters`` it meets.

    What is returned is pinned, with the reason ``end``.
    """
    nodes = list(graph_module.graph.nodes)
    joint = _joint_parameters(nodes, names)
    labels: dict[str, Any] = {}
    unknown = []
    varying: set[fx.Node] = set()  # tensors that depend on what an input holds
    for node in nodes:
        flow.node, flow.kind = node.name, ""
        if node.op == "get_attr" and not node.users:
            continue  # not used in this mode: an auxiliary head, another name of a tied weight
        if node.op == "get_attr":
            name = names.get(str(node.target), str(node.target))
            if name not in parameters:
                parameters[name] = _parameter(flow, name, attribute(graph_module, name), name in joint)
            labels[node.name] = parameters[name]
        elif node.op == "placeholder":
            value = node.meta.get("val")
            labels[node.name] = Labels(sizes(value)) if isinstance(value, Tensor) else hint(value)
        elif node.op == "output":
            _pin_outputs(flow, node, labels, output_names(graph_module), end)
        elif node.target is operator.getitem and isinstance(labels[str(node.args[0])], list | tuple):
            labels[node.name] = labels[node.args[0].name][node.args[1]]
        elif not isinstance(node.meta.get("val"), Tensor | list | tuple):
            labels[node.name] = hint(node.meta.get("val"))
        else:
            call = bind(node, labels, known)
            rule = rule_for(node.target)
            if rule is None:
                unknown.append(node)
            labels[node.name] = _run(flow, call, rule)
            _note_read(flow, call, rule, labels[node.name], varying=not varying.isdisjoint(node.all_input_nodes))
        given = node.op == "placeholder" or not varying.isdisjoint(node.all_input_nodes)
        if given and isinstance(node.meta.get("val"), Tensor | list | tuple):
            varying.add(node)
    return labels, unknown


def _pin_outputs(flow: Flow, node: fx.Node, labels: Mapping[str, Any], names: Sequence[str], end: str) -> None:
    """Fixes what a graph returns; the reason ``end`` tells its name where there are several."""
    leaves = pytree.tree_leaves(node.args)
    told = names if len(names) == len(leaves) > 1 else [""] * len(leaves)
    for leaf, name in zip(leaves, told, strict=True):
        for tensor in _tensors(labels[leaf.name]) if isinstance(leaf, fx.Node) else ():
            flow.pin_all(tensor, f"{end}{f', {name}' if name else ''}")


def _note_read(flow: Flow, call: Call, rule: Rule | None, outcome: Any, varying: bool) -> None:
    """Notes which atoms a call computes with.

    Moving is no computing. What depends on no input is a table, and may yet be cut to the size of the inputs: of its
    atoms only those are read that a product or a sum takes away.
    """
    if rule is not None and rule.moves:
        return
    read = [flat(core(plane)) for tensor in call.tensors() for plane in tensor.planes]
    if not varying:
        stays = [flat(core(plane)) for tensor in _tensors(outcome) for plane in tensor.planes]
        left = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *stays]))
        read = [np.setdiff1d(atoms, left) for atoms in read] if rule is None or rule.kind in _SUMMING else []
    flow.read += read


_SUMMING = frozenset({"contraction", "convolution", "attention", "reduction"})
"""Kinds of operators that take away dimensions of what goes in."""


def _run(flow: Flow, call: Call, rule: Rule | None) -> Labels | list[Labels]:
    several = isinstance(call.node.meta["val"], list | tuple)
    if not several and 0 in call.shape:
        return Labels(call.shape)
    if rule is not None:
        flow.kind = rule.kind
        outcome = rule.flow(flow, call)
        if several and isinstance(outcome, Labels):
            return [outcome if shape == outcome.shape else Labels(shape) for shape in call.outputs]
        return outcome
    for tensor in call.tensors():
        flow.pin_all(tensor, f"goes into {call.node.target}, an operator without a rule")
    unlabelled = [Labels(shape) for shape in call.outputs]
    return unlabelled if several else unlabelled[0]


def bind(node: fx.Node, labels: Mapping[str, Any], known: Callable[[str], Any]) -> Call:
    """Returns the call of ``node`` with every argument by name, tensors as labels and numbers as in the example.

    Args:
        node: A call of an operator.
        labels: Labels of every node before it.
        known: What the tensor of a name holds.
    """
    schema = node.target._schema.arguments  # type: ignore[union-attr]  # call_function nodes hold OpOverloads
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    raw = {
        argument.name: given.get(argument.name, argument.default_value)
        for argument in schema
        if argument.name in given or argument.has_default_value()
    }
    constants: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, fx.Node) and value.op == "get_attr":
            constants[name] = known(str(value.target))
        elif isinstance(value, list | tuple):
            held = {i: item for i, item in enumerate(value) if isinstance(item, fx.Node) and item.op == "get_attr"}
            if held:
                constants[name] = _contents({i: known(str(item.target)) for i, item in held.items()})
    constants = _contents(constants)
    value = node.meta["val"]
    outputs = value if isinstance(value, list | tuple) else [value]
    values = {name: fx.node.map_arg(item, lambda n: labels[n.name]) for name, item in raw.items()}
    return Call(
        node,
        {name: list(item) if isinstance(item, tuple) else item for name, item in values.items()},
        tuple(sizes(output) for output in outputs if isinstance(output, Tensor)),
        tuple(batch_dims(output) for output in outputs if isinstance(output, Tensor)),
        constants,
    )


def _contents(constants: Mapping[Any, Any]) -> dict[Any, Any]:
    """What is known of ``constants``: tensors on the meta device hold nothing."""
    hollow = (value for value in constants.values() if isinstance(value, Tensor) and value.is_meta)
    unknown = {id(None), *map(id, hollow)}
    return {key: value for key, value in constants.items() if id(value) not in unknown}


def tensor_names(*graph_modules: fx.GraphModule) -> dict[str, str]:
    """For every name under which the graphs read a tensor the first name of that tensor: tied weights are one."""
    first: dict[int, str] = {}
    names = {}
    for graph_module in graph_modules:
        for node in graph_module.graph.find_nodes(op="get_attr"):
            if node.users and isinstance(node.meta.get("val"), Tensor):
                name = str(node.target)
                names[name] = first.setdefault(id(attribute(graph_module, name)), name)
    return names


def _other_names(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Names of the model's parameters and buffers that the graphs do not read, but under another name."""
    registered = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    known = {id(tensor): names[name] for name, tensor in registered if name in names}
    return {name: known[id(tensor)] for name, tensor in registered if name not in names and id(tensor) in known}


def _parameter(flow: Flow, name: str, tensor: Tensor, joint: bool) -> Labels:
    """A parameter's labels: one plane for each dimension; a grouped weight has its second one for each output."""
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point() and not tensor.is_complex():
        return Labels(shape)
    spans = [[dim] for dim, size in enumerate(shape) if size > 1]
    if joint:
        spans = [[0, 1] if span == [1] else span for span in spans]
    return Labels(shape, tuple(flow.store(shape, span, name) for span in spans))


def _joint_parameters(nodes: list[fx.Node], names: Mapping[str, str]) -> set[str]:
    """Names of the weights of grouped convolutions, whose second dimension means other channels in each group."""
    found = set()
    for node in nodes:
        if node.target not in _GROUPED or _groups(node) == 1:
            continue
        weight = node.args[1]
        while isinstance(weight, fx.Node) and weight.op != "get_attr":
            shape = sizes(weight.meta["val"])
            sources = [n for n in weight.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            weight = next((n for n in sources if sizes(n.meta["val"]) == shape), None)
        if isinstance(weight, fx.Node):
            found.add(names[str(weight.target)])
    return found


def _groups(node: fx.Node) -> int:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]  # a convolution is an OpOverload
    position = [argument.name for argument in arguments].index("groups")
    groups = node.args[position] if len(node.args) > position else node.kwargs.get("groups", 1)
    return groups if isinstance(groups, int) else 1


def _tensors(value: Any) -> list[Labels]:
    if isinstance(value, Labels):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []

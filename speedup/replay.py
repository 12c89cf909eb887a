"""What a graph does, call by call, with every size as a number: two graphs that do the same are one."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from speedup.capture import attribute, source_line
from speedup.inputs import with_batch
from speedup.program import beside
from speedup.rules.call import raw_argument

aten = torch.ops.aten


@dataclass(frozen=True)
class _Made:
    """A tensor by where it comes from: an input, a call, a part of what a call gives, or a tensor that is held."""

    origin: str
    place: Any


@dataclass(frozen=True)
class _Constant:
    """A tensor that no model owns, by its content."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Constant) or self.tensor.is_meta or other.tensor.is_meta:
            return isinstance(other, _Constant) and self.tensor is other.tensor  # without content only itself is equal
        return torch.equal(self.tensor, other.tensor)

    __hash__ = None  # type: ignore[assignment]  # content has none


class _Writes(fx.Interpreter):
    """Runs a graph on shapes alone and notes whose memory is written to after it was made."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, garbage_collect_values=False)  # memory that is free again would be taken for another
        self.mode = mode
        self.memory: dict[str, int] = {}
        self.written: set[int] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return self.mode.from_tensor(attribute(self.module, str(n.target)))
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.memory[n.name] = value.untyped_storage()._cdata
        schema = getattr(n.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            given = dict(zip((argument.name for argument in schema.arguments), n.args, strict=False)) | n.kwargs
            for argument in schema.arguments:
                target = given.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(target, fx.Node):
                    self.written.add(self.env[target].untyped_storage()._cdata)
        return value


def _idle(module: fx.GraphModule, mode: FakeTensorMode, inputs: Sequence[Any]) -> set[str]:
    """The calls that give back what they get: whether ``contiguous`` copies depends on the sizes, not what it holds.

    A copy that is written to, or whose source is, is no such call.
    """
    calls = [node for node in module.graph.nodes if node.target is aten.contiguous.default]
    if not calls:
        return set()
    run = _Writes(module, mode)
    run.run(*inputs, enable_io_processing=False)
    around = {node.name: {run.memory.get(node.name), run.memory.get(str(node.args[0]))} for node in calls}
    return {name for name, memory in around.items() if None not in memory and not memory & run.written}


class _Replay(fx.Interpreter):
    """Runs a graph on shapes alone and writes down its calls."""

    def __init__(
        self, module: fx.GraphModule, mode: FakeTensorMode, owned: Container[int], idle: Container[str]
    ) -> None:
        super().__init__(module)
        self.mode, self.owned, self.idle = mode, owned, idle
        self.calls: list[tuple[fx.Node, Any]] = []
        self.made: dict[str, Any] = {}
        self.inputs = 0
        self.returned: Any = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            self.returned = _plain(fx.node.map_arg(n.args, lambda n: self.made[n.name]))
        elif n.op == "placeholder":
            self.made[n.name] = _Made("input", self.inputs) if isinstance(value, Tensor) else value
            self.inputs += 1
        elif n.op == "get_attr":
            tensor = attribute(self.module, str(n.target))
            self.made[n.name] = _Made("held", id(tensor) if id(tensor) in self.owned else _Constant(tensor))
            return self.mode.from_tensor(tensor)
        elif n.name in self.idle:
            self.made[n.name] = self.made[str(n.args[0])]
        elif n.op == "call_function" and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            self._write_down(n, value)
        else:  # a number
            self.made[n.name] = value
        return value

    def _write_down(self, node: fx.Node, value: Any) -> None:
        if not hasattr(node.target, "_schema"):  # getitem
            source, index = node.args
            self.made[node.name] = _Made("part", (self.made[str(source)], index))
            return
        arguments = {a.name: raw_argument(node, a.name) for a in node.target._schema.arguments}
        told: dict[str, Any] = dict(fx.node.map_arg(arguments, lambda n: self.made[n.name]))
        if node.target is aten.slice.Tensor:
            told |= _bounds(told, self.env[node.args[0]])  # type: ignore[index]  # a node
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        self.calls.append((node, (node.target, _plain(told), shapes)))
        self.made[node.name] = _Made("call", len(self.calls))


def first_difference(
    one: fx.GraphModule, other: fx.GraphModule, inputs: Sequence[Any], *, batches: Sequence[int], owned: Container[int]
) -> tuple[str, fx.Node | None]:
    """Returns where ``other`` does something else than ``one``, as text and node; empty if both make the same calls.

    Args:
        one: A graph.
        other: Another, with the same inputs.
        inputs: An example of each input.
        batches: Batch sizes at which all sizes are compared.
        owned: Identities of the tensors of a model, which are the same only if they are one; others, if they are equal.
    """
    for batch in batches:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            given = beside(one, with_batch(list(inputs), batch))
            fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given]
            runs = []
            try:
                for module in (one, other):
                    runs.append(_Replay(module, mode, owned, _idle(module, mode, fakes)))
                    runs[-1].run(*fakes, enable_io_processing=False)
            except DynamicOutputShapeException:  # sizes depend on the data: the numbers that were compared must do
                return "", None
        for (_, expected), (node, found) in zip(runs[0].calls, runs[1].calls, strict=False):
            if expected != found:
                return f"{source_line(node) or node.name}: computes something else than the rewritten graph", node
        if len(runs[0].calls) != len(runs[1].calls) or runs[0].returned != runs[1].returned:
            return "its Python code returns something else than the rewritten graph", None
    return "", None


def _bounds(call: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
    """The bounds of a slice as positions: an open end is the last one."""
    start, end, _ = slice(call["start"], call["end"], call["step"]).indices(x.shape[call["dim"]])
    return {"start": start, "end": end}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

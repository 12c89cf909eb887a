"""(graph, plan) -> a smaller graph: tensors cut, literals rewritten."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from speedup.analysis import tensor_names
from speedup.capture import Captured, attribute
from speedup.errors import PlanError
from speedup.plan import Scaled, ShrinkPlan
from speedup.program import copied
from speedup.rules.call import raw_argument

aten = torch.ops.aten


class ShrunkGraph(fx.GraphModule):
    """The rewritten graph, with the parameter names of the original; ``train`` and ``eval`` reach its nodes."""

    def train(self, mode: bool = True) -> "ShrunkGraph":
        """Switches batch norm and dropout between training and evaluation."""
        super().train(mode)
        for node in self.graph.nodes:
            if "mode_argument" in node.meta:
                _set_argument(node, node.meta["mode_argument"], mode)
        self.recompile()
        return self


def shrink_graph(captured: Captured, plan: ShrinkPlan) -> ShrunkGraph:
    """Returns the graph of ``captured`` with its tensors cut and its literals rewritten as ``plan`` says.

    Raises:
        PlanError: The plan does not fit the model.
    """
    source = captured.graph_module
    graph = copied(source.graph)
    tensors = cut_tensors(captured, plan)
    names = tensor_names(source)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
            continue
        for argument in ("training", "train") if hasattr(node.target, "_schema") else ():
            if raw_argument(node, argument) is False:  # True in eval mode means always
                node.meta["mode_argument"] = argument
        for argument, value in plan.literals.get(node.name, {}).items():
            _rewrite(graph, node, argument, value, tensors)
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = names.get(str(node.target), str(node.target))
            root[str(node.target)] = tensors[name] if name in tensors else attribute(source, name)
    shrunk = ShrunkGraph(root, graph, type(captured.model).__name__)
    _name_again(captured, shrunk)
    shrunk.register_forward_pre_hook(_CapturedSizes.of(captured), with_kwargs=True)
    return shrunk


def _name_again(captured: Captured, shrunk: ShrunkGraph) -> None:
    """Gives the parameters of a rewritten graph all the names that they have in the model, where some are tied."""
    kept = dict(shrunk.named_parameters())
    tied: dict[int, list[str]] = {}
    for name, parameter in captured.model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        known = next((name for name in names if name in kept), None)
        for name in names if known is not None else ():
            path, _, last = name.rpartition(".")
            owner: nn.Module = shrunk
            for part in path.split(".") if path else ():
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if last not in owner._parameters:
                owner.register_parameter(last, kept[str(known)])


@dataclass(frozen=True)
class _CapturedSizes:
    """A hook that refuses inputs of other sizes than the graph was specialised to: its numbers might be wrong.

    Attributes:
        shapes: Of each input, with None where any size will do; None for what is no tensor.
    """

    shapes: tuple[tuple[int | None, ...] | None, ...]

    @classmethod
    def of(cls, captured: Captured) -> "_CapturedSizes":
        values = [node.meta.get("val") for node in captured.nodes if node.op == "placeholder"]
        return cls(
            tuple(
                tuple(int(size) if is_concrete_int(size) else None for size in value.shape)
                if isinstance(value, Tensor)
                else None
                for value in values
            )
        )

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for leaf, shape in zip(pytree.tree_leaves((args, kwargs)), self.shapes, strict=False):
            if not isinstance(leaf, Tensor) or shape is None or len(shape) != leaf.dim():
                continue
            if any(size is not None and size != found for size, found in zip(shape, leaf.shape, strict=True)):
                wanted = "x".join("any" if size is None else str(size) for size in shape)
                raise PlanError(
                    f"{'x'.join(map(str, leaf.shape))}: the graph was captured for inputs of {wanted} and is right for "
                    "those only. Compress with an example of this size."
                )


def cut_tensors(captured: Captured, plan: ShrinkPlan) -> dict[str, Tensor]:
    """Returns for every tensor of the graph by name what the plan keeps of it, as a new tensor."""
    result: dict[str, Tensor] = {}
    for name in dict.fromkeys(tensor_names(captured.graph_module).values()):
        result[name] = plan.cut_copy(name, attribute(captured.graph_module, name))
    return result


def _rewrite(graph: fx.Graph, node: fx.Node, argument: str, value: Any, tensors: dict[str, Tensor]) -> None:
    """Puts a new value into one argument of ``node``."""
    if argument == "split_sizes" and node.target is not aten.split_with_sizes.default:
        dim = raw_argument(node, "dim")
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], value, 0 if dim is None else dim), {}
        return
    if argument in ("index", "indices") and isinstance(value, list):
        name = f"kept_index_of_{node.name}"
        tensors[name] = torch.tensor(value[-1] if argument == "indices" else value)
        with graph.inserting_before(node):
            index = graph.get_attr(name)
        value = [*value[:-1], index] if argument == "indices" else index
    elif isinstance(value, list):
        old = raw_argument(node, argument)
        value = [_entry(graph, node, entry, old[i]) for i, entry in enumerate(value)]
    elif isinstance(value, Scaled):
        value = _entry(graph, node, value, raw_argument(node, argument))
    _set_argument(node, argument, value)


def _entry(graph: fx.Graph, node: fx.Node, entry: Any, old: Any) -> Any:
    """One entry of a size list: a multiple of the batch is scaled where it is used."""
    if isinstance(entry, fx.Node):
        return old  # unchanged, and a node of the copied graph
    if not isinstance(entry, Scaled):
        return entry
    with graph.inserting_before(node):
        return graph.call_function(operator.floordiv, (graph.call_function(operator.mul, (old, entry.new)), entry.old))


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # an OpOverload
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)

"""(graph, plan) -> a smaller graph: tensors cut, literals rewritten."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from speedup.analysis import tensor_names
from speedup.capture import Captured, attribute
from speedup.errors import PlanError
from speedup.inputs import batch_size
from speedup.plan import Scaled, ShrinkPlan
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
    graph = copy.deepcopy(source.graph)
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
    if captured.fixed_batch is not None:
        shrunk.register_forward_pre_hook(_at_batch_only(captured.fixed_batch), with_kwargs=True)
    return shrunk


def _at_batch_only(batch: int) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that refuses inputs of another batch than the one that the graph was specialised to."""

    def check(module: nn.Module, args: Any, kwargs: Any) -> None:
        if batch_size((args, kwargs)) != batch:
            raise PlanError(
                f"batch {batch_size((args, kwargs))}: the model fixes its batch in Python, so its graph is right for "
                f"{batch} only. Read sizes with x.shape and avoid len(x) and int()."
            )

    return check


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

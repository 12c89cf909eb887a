"""(graph, plan) -> a smaller module: the user's own class where its Python still fits, else the rewritten graph."""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from speedup.analysis import attribute, tensor_names
from speedup.capture import Captured, batch_size, evaluating, with_batch
from speedup.errors import PlanError
from speedup.numeric import perturbed, relative_difference
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
            root[str(node.target)] = tensors.get(name, None) if name in tensors else _attribute(source, name)
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
        dense = attribute(captured.graph_module, name)
        cut = plan.cut(name, dense.detach()).clone()
        result[name] = nn.Parameter(cut, dense.requires_grad) if isinstance(dense, nn.Parameter) else cut
    return result


def _attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


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


@dataclass(frozen=True)
class Repair:
    """An attribute of a submodule that held a dense size and now holds the new one."""

    module: str
    attribute: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Shrunk:
    """A shrunk model.

    Attributes:
        model: The user's own class, or the rewritten graph.
        graph: The rewritten graph, which shares its tensors with ``model``.
        repairs: Attributes that were changed; empty for a graph.
        obstacle: Why the user's own class could not be used; None where it is.
    """

    model: nn.Module
    graph: ShrunkGraph
    repairs: tuple[Repair, ...]
    obstacle: str | None


def shrink(captured: Captured, plan: ShrinkPlan) -> Shrunk:
    """Returns the shrunk model: the user's class if its Python code then computes what the rewritten graph computes.

    That is checked in double precision on the example inputs at two batch sizes, not assumed.
    """
    graph = shrink_graph(captured, plan)
    for module in captured.graph_module.modules():
        module.training = captured.model.training
    swaps = _swaps(captured, graph)
    obstacle = ""
    for repairs in _candidates(find_repairs(captured, plan)):
        module = repaired(captured.model, swaps, repairs)
        found = difference(module, graph, captured)
        if found is None:
            return Shrunk(module, graph, repairs, None)
        obstacle = obstacle or found
    graph.train(captured.model.training)
    return Shrunk(graph, graph, (), obstacle)


def _candidates(repairs: tuple[Repair, ...]) -> Iterator[tuple[Repair, ...]]:
    """Yields the repairs, then the repairs without one of the attribute names: a number can be equal by chance."""
    yield repairs
    names = dict.fromkeys(repair.attribute for repair in repairs)
    for name in names:
        yield tuple(repair for repair in repairs if repair.attribute != name)
    if len(names) > 1:
        yield ()


def _swaps(captured: Captured, graph: ShrunkGraph) -> dict[int, Tensor]:
    """For each tensor of the user's model by identity the one that takes its place."""
    names = tensor_names(captured.graph_module)
    return {id(attribute(captured.graph_module, name)): attribute(graph, name) for name in names}


def repaired(model: nn.Module, swaps: Mapping[int, Tensor], repairs: Iterable[Repair]) -> nn.Module:
    """Returns a copy of ``model`` with other tensors in the places of its own, and attributes set to new sizes."""
    module = copy.deepcopy(model, dict(swaps))
    for repair in repairs:
        setattr(module.get_submodule(repair.module), repair.attribute, repair.new)
    for submodule in module.modules():
        for kind, sizes in STANDARD_SIZES.items():
            if isinstance(submodule, kind):
                for name, value in sizes(submodule).items():
                    setattr(submodule, name, value)
    return module


def _convolution_sizes(module: Any) -> dict[str, Any]:
    first, second = module.weight.shape[:2]
    if module.transposed:
        return {"in_channels": first, "out_channels": second * module.groups}
    return {"in_channels": second * module.groups, "out_channels": first}


def _vector_length(*names: str) -> Callable[[Any], dict[str, Any]]:
    """Sizes of a norm: those of its weight, or of its running mean."""

    def sizes(module: Any) -> dict[str, Any]:
        vectors = (getattr(module, name, None) for name in ("weight", "running_mean"))
        vector = next((v for v in vectors if v is not None), None)
        if vector is None:
            return {}
        return {name: tuple(vector.shape) if name == "normalized_shape" else vector.shape[0] for name in names}

    return sizes


STANDARD_SIZES: Mapping[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    nn.modules.conv._ConvNd: _convolution_sizes,
    nn.Linear: lambda module: {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]},
    nn.modules.batchnorm._NormBase: _vector_length("num_features"),
    nn.GroupNorm: _vector_length("num_channels"),
    nn.LayerNorm: _vector_length("normalized_shape"),
    nn.RMSNorm: _vector_length("normalized_shape"),
    nn.Embedding: lambda module: {"embedding_dim": module.weight.shape[1]},
    nn.PReLU: _vector_length("num_parameters"),
    nn.MultiheadAttention: lambda module: {
        "embed_dim": module.out_proj.weight.shape[0],
        "kdim": module.out_proj.weight.shape[0],
        "vdim": module.out_proj.weight.shape[0],
        "head_dim": module.out_proj.weight.shape[0] // module.num_heads,
    },
}
"""The attributes of layers of ``torch.nn`` that repeat the sizes of their tensors."""


def find_repairs(captured: Captured, plan: ShrinkPlan) -> tuple[Repair, ...]:
    """Returns the attributes that hold a size which a literal of the graph had to give up.

    A changed literal names its module by ``nn_module_stack``; an integer of that module that equals the old value,
    alone or inside a tuple, is given the new one. Two literals that disagree leave the attribute as it is.
    """
    changes: dict[str, dict[int, set[int]]] = {}
    batch = next((leaf.shape[0] for leaf in captured.flat_inputs() if isinstance(leaf, Tensor) and leaf.dim()), 1)
    modules = dict(captured.model.named_modules())
    for node in captured.nodes:
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path in modules]
        if node.name not in plan.literals or not stack:
            continue
        for argument, value in plan.literals[node.name].items():
            old = raw_argument(node, argument)
            entries = value if isinstance(value, list) else [value]
            olds = list(old) if isinstance(old, list | tuple) else [old]
            for new_entry, old_entry in zip(entries, olds, strict=False):
                if isinstance(new_entry, Scaled) and new_entry.old % batch == new_entry.new % batch == 0:
                    changes.setdefault(stack[-1], {}).setdefault(new_entry.old // batch, set()).add(
                        new_entry.new // batch
                    )
                elif isinstance(new_entry, int) and isinstance(old_entry, int) and new_entry != old_entry:
                    changes.setdefault(stack[-1], {}).setdefault(old_entry, set()).add(new_entry)
    repairs = []
    for path, sizes in changes.items():
        certain = {old: news.copy().pop() for old, news in sizes.items() if len(news) == 1}
        for name, value in vars(modules[path]).items():
            new = _replaced(value, certain)
            if not name.startswith("_") and new != value:
                repairs.append(Repair(path, name, value, new))
    return tuple(repairs)


def _replaced(value: Any, sizes: Mapping[int, int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return sizes.get(value, value)
    if isinstance(value, tuple | list):
        return type(value)(_replaced(item, sizes) for item in value)
    return value


def difference(module: nn.Module, graph: ShrunkGraph, captured: Captured) -> str | None:
    """Returns how ``module`` differs from ``graph`` at two batch sizes; None if it does not.

    Both run with the same perturbed parameters, so that no zero can hide a mistake, and in their own precision: they
    are the same calls in the same order.
    """
    module, graph = copy.deepcopy((module, graph))  # together: they share their tensors
    generator = torch.Generator().manual_seed(0)
    with evaluating(module, graph), torch.no_grad():
        for tensor in (*graph.parameters(), *graph.buffers()):
            tensor.copy_(perturbed(tensor, generator))
        example = batch_size((captured.args, captured.kwargs))
        for batch in (example, 3) if captured.fixed_batch is None else (example,):
            args, kwargs = with_batch((captured.args, captured.kwargs), batch)
            args, kwargs = pytree.tree_map(lambda leaf: _moved(leaf, generator), (args, kwargs))
            try:
                expected = pytree.tree_leaves(graph(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
            except Exception as error:  # noqa: BLE001  # the proof will name the node
                return f"the rewritten graph fails: {str(error).splitlines()[0]}"
            try:
                found = pytree.tree_leaves(module(*args, **kwargs))
            except Exception as error:  # noqa: BLE001  # whatever the user's code raises
                return f"{_last_line_of(error)}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            if len(found) != len(expected) or not all(map(_same, expected, found)):
                return "its Python code computes something else than the rewritten graph"
    return None


def _moved(leaf: Any, generator: torch.Generator) -> Any:
    moved = perturbed(leaf, generator)
    return moved.to(leaf.device, leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _same(expected: Any, found: Any) -> bool:
    """Whether two outputs are one up to rounding."""
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return not isinstance(expected, Tensor) or torch.equal(expected, found)
    if not isinstance(found, Tensor) or expected.shape != found.shape:
        return False
    return relative_difference(expected.double(), found.double()) <= 100 * torch.finfo(expected.dtype).eps


def _last_line_of(error: Exception) -> str:
    """The last line of the user's code in a traceback, as file:line."""
    frame, place = error.__traceback__, "the model's code"
    while frame is not None:
        code = frame.tb_frame.f_code
        if "site-packages" not in code.co_filename and not code.co_filename.endswith("shrink.py"):
            place = f"{code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place

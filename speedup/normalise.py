"""One dialect for the rules: regions become part of the graph, and composite operators without a rule what they do.

``torch.export`` keeps composite operators whole. Those that have a rule stay so; of the others PyTorch itself says
what they are made of (``tile`` of ``repeat``, ``outer`` of ``mul``, ``gru_cell`` of two products and gates).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import make_fx

from speedup.program import reshape_views
from speedup.rules import rule_for

aten = torch.ops.aten

_REGIONS = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)
"""The operators that ``torch.export`` makes of a ``with torch.no_grad()`` or ``with torch.autocast()`` in a forward."""


def normalise(graph_module: fx.GraphModule) -> None:
    """Rewrites a captured graph in place until it speaks the dialect of the rules as far as it can."""
    for node in list(graph_module.graph.nodes):
        if node.target in _REGIONS:
            _inline(graph_module, node)
        elif _is_composite(node) and rule_for(node.target) is None:
            _decompose(graph_module.graph, node)


def _inline(graph_module: fx.GraphModule, region: fx.Node) -> None:
    """Puts the nodes of a region into the graph, between calls that enter and leave its mode."""
    place = next(i for i, argument in enumerate(region.args) if isinstance(argument, fx.Node))
    settings, body, operands = region.args[:place], region.args[place], region.args[place + 1 :]
    assert isinstance(body, fx.Node)
    inner = graph_module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    normalise(inner)
    graph = graph_module.graph
    with graph.inserting_before(region):
        if region.target is _REGIONS[0]:
            before = graph.call_function(torch.is_grad_enabled)
            graph.call_function(torch._C._set_grad_enabled, settings)
        else:
            before = graph.call_function(autocast_mode._enter_autocast, settings)
        copies = _copies(graph, inner.graph, operands)
        leave = torch._C._set_grad_enabled if region.target is _REGIONS[0] else autocast_mode._exit_autocast
        graph.call_function(leave, (before,))
    _replace(graph, region, inner.graph, copies)
    if not body.users:
        graph.erase_node(body)
        graph_module.delete_submodule(str(body.target))


def _is_composite(node: fx.Node) -> bool:
    """Whether a call is of an operator that PyTorch composes of others, and gives out tensors."""
    if not isinstance(node.target, OpOverload) or not _gives_tensors(node):
        return False
    name = node.target.name()  # type: ignore[no-untyped-call]  # of torch
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _gives_tensors(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | list | tuple)


def _decompose(graph: fx.Graph, node: fx.Node) -> None:
    """Puts what a composite operator is made of in its place, if all of that has rules."""
    operands = node.all_input_nodes
    inner = _traced(node, operands)
    if inner is None:
        return
    reshape_views(inner)
    with graph.inserting_before(node):
        copies = _copies(graph, inner, operands)
    origin = {name: node.meta[name] for name in ("stack_trace", "nn_module_stack") if name in node.meta}
    for copy in set(copies.values()).difference(operands):
        copy.meta |= origin
    _replace(graph, node, inner, copies)


def _traced(node: fx.Node, operands: Sequence[fx.Node]) -> fx.Graph | None:
    """The graph of what a composite operator does with ``operands``; None where it is no graph that the rules know.

    A decomposition that asks how large the batch is would be right at some batches only.
    """

    def run(*values: Any) -> Any:
        known = dict(zip(operands, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        return node.target.decompose(*args, **kwargs)  # type: ignore[union-attr]  # an OpOverload

    values = [operand.meta.get("val") for operand in operands]
    environment = next((value.fake_mode.shape_env for value in values if isinstance(value, FakeTensor)), None)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))  # its recurrent layers are not composite
            if environment is not None:
                stack.enter_context(environment.error_on_new_guards())
            inner = make_fx(run)(*values).graph
    except Exception:  # noqa: BLE001  # what cannot be traced on shapes alone, at any batch, stays whole
        return None
    inner.eliminate_dead_code()
    calls = [node for node in inner.nodes if isinstance(node.target, OpOverload) and _gives_tensors(node)]
    own_constants = any(node.op == "get_attr" for node in inner.nodes)
    return None if own_constants or any(rule_for(call.target) is None for call in calls) else inner


def _copies(graph: fx.Graph, inner: fx.Graph, operands: Sequence[Any]) -> dict[fx.Node, Any]:
    """Copies the nodes of another graph to where ``graph`` inserts; returns what each of them has become."""
    copies: dict[fx.Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
    for node in inner.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return copies


def _replace(graph: fx.Graph, node: fx.Node, inner: fx.Graph, copies: Mapping[fx.Node, Any]) -> None:
    """Lets the users of ``node`` use what the copied graph gives out instead."""
    results: Any = fx.node.map_arg(inner.output_node().args[0], lambda n: copies[n])
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)

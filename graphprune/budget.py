"""What a graph costs: parameters and multiply-accumulates, for the whole and for each layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from speedup.capture import Captured, attribute
from speedup.inputs import batch_size
from speedup.program import beside


@dataclass(frozen=True)
class Cost:
    """What a graph costs for one example.

    Attributes:
        params: Number of parameters that it uses; tied weights count once.
        macs: Multiply-accumulates for one example (half the floating-point operations that PyTorch counts).
        macs_by_layer: The same for each module that owns the weight of an operator.
        shapes: Shape of every parameter by name.
    """

    params: int
    macs: int
    macs_by_layer: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def _recurrent_flops(x: Sequence[int], feed: Sequence[int], back: Sequence[int], *_: Any, **__: Any) -> int:
    """Every step of every example multiplies by both weights; x has shape (steps, examples, inputs)."""
    return 2 * math.prod(x[:2]) * (math.prod(feed) + math.prod(back))


def _bilinear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Every example multiplies by the whole weight."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


_FLOPS: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
    torch.ops.aten._trilinear: _bilinear_flops,
}
"""Floating-point operations, from shapes, of operators that PyTorch counts none of."""


class _Counting(fx.Interpreter):
    """Runs a graph and writes down the operations of each layer."""

    def __init__(self, module: fx.GraphModule, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__(module)
        self.flops: dict[fx.Node, int] = {}
        self.copied = copied
        """Gives a stand-in for a tensor of the module or an input, which the graph may overwrite."""

    def placeholder(self, *args: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.copied, super().placeholder(*args))

    def get_attr(self, *args: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.copied, super().get_attr(*args))

    def run_node(self, n: fx.Node) -> Any:
        result, count = counted(lambda: super(_Counting, self).run_node(n))
        if count:
            self.flops[n] = count
        return result


def counted(work: Callable[[], Any]) -> tuple[Any, int]:
    """Returns the result of ``work()`` and the floating-point operations that it took."""
    with FlopCounterMode(display=False, custom_mapping=dict(_FLOPS)) as counter:
        result = work()
    return result, counter.get_total_flops()


def flops_by_node(module: fx.GraphModule, captured: Captured) -> Mapping[fx.Node, int]:
    """Returns the floating-point operations of every node of ``module`` that has some, for the example inputs."""
    with torch.no_grad():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                counting = _Counting(module, mode.from_tensor)
                counting.run(*beside(module, captured.flat_inputs()), enable_io_processing=False)
        except DynamicOutputShapeException:  # a mask as an index: how many it takes is no shape
            counting = _Counting(module, Tensor.clone)
            counting.run(*captured.flat_inputs(), enable_io_processing=False)
    return counting.flops


def used_parameters(module: fx.GraphModule) -> dict[str, nn.Parameter]:
    """Returns the parameters that a graph computes with, tied ones once."""
    used = {id(attribute(module, str(n.target))) for n in module.graph.find_nodes(op="get_attr") if n.users}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in used}


def cost(module: fx.GraphModule, captured: Captured) -> Cost:
    """Returns what ``module``, the captured graph or a shrunk one, costs; computed on shapes alone."""
    batch = batch_size((captured.args, captured.kwargs))
    flops = flops_by_node(module, captured)
    layers: dict[str, int] = {}
    for node, count in flops.items():
        owners = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        layer = owners[0].rpartition(".")[0] if owners else node.name
        layers[layer] = layers.get(layer, 0) + count
    parameters = used_parameters(module)
    return Cost(
        params=sum(parameter.numel() for parameter in parameters.values()),
        macs=sum(flops.values()) // 2 // batch,
        macs_by_layer={layer: count // 2 // batch for layer, count in layers.items()},
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
    )

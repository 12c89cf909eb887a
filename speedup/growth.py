"""Whether a shrunk graph is right at any batch: its tensors grow with the batch as those of the original do."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from speedup.capture import Captured, at_source, attribute
from speedup.cut import ShrunkGraph
from speedup.errors import BUG, ProofError, first_line
from speedup.inputs import with_batch
from speedup.program import beside


def check_growth(captured: Captured, shrunk: ShrunkGraph) -> None:
    """Refuses a shrunk graph that is right at the batch of the example only: every size must grow as in the original.

    Only shapes are computed.

    Raises:
        ProofError: A tensor does not grow with the batch as that of the original does, or the shrunk graph fails.
    """
    inputs = captured.flat_inputs()
    sizes: list[list[dict[str, tuple[int, ...]]]] = []
    for module in (captured.graph_module, shrunk):
        sizes.append([])
        for batch in captured.batches:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
                run = _Shapes(module, mode)
                leaves = beside(module, with_batch(inputs, batch))
                try:
                    run.run(*pytree.tree_map_only(Tensor, mode.from_tensor, leaves), enable_io_processing=False)
                except DynamicOutputShapeException:  # sizes depend on the data
                    return
                except Exception as error:  # any operator may refuse any shape
                    if module is not shrunk:
                        return
                    raise ProofError(
                        f"{run.node}: fails for a batch of {batch} ({first_line(error)}). {BUG}"
                    ) from error
                sizes[-1].append(run.shapes)
    for node in captured.nodes:
        found = [one[node.name] for shapes in sizes for one in shapes if node.name in one]
        if len(found) < 4:
            continue
        dense, wide, small, grown = found
        if any(a * d != b * c for a, b, c, d in zip(dense, wide, small, grown, strict=True)):
            raise ProofError(
                f"{node.name}: has shape {grown} for a batch of {captured.batches[1]}, where the original has {wide}"
                f"{at_source(node)}. {BUG}"
            )


class _Shapes(fx.Interpreter):
    """Runs a graph on shapes alone and notes them."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.node = ""
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.node = n.name
        if n.op == "get_attr":
            value = attribute(self.module, str(n.target))
            value = self.mode.from_tensor(value) if isinstance(value, Tensor) else value
        else:
            value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value

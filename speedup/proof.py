"""The proof: the dense graph with its removed channels masked, run in lockstep with the shrunk graph, node by node.

Both run in double precision on the example inputs, with every parameter moved a little away from where it is, so
that no zero, no tie and no fresh batch norm can hide a mistake. The masked original multiplies every intermediate
by its live mask; norms and means count what is left.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from speedup.analysis import Analysis, analyse, tensor_names
from speedup.capture import at_source, attribute, capture
from speedup.cut import ShrunkGraph, shrink_graph
from speedup.errors import BUG, ProofError, first_line
from speedup.growth import check_growth
from speedup.inputs import ExampleInputs, batch_size
from speedup.labels import Labels, Mask
from speedup.masked import exact_defaults, execute, masked
from speedup.numeric import exact, perturbed, relative_difference, varied
from speedup.plan import ShrinkPlan
from speedup.planning import live_from_keep
from speedup.program import evaluating

aten = torch.ops.aten
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Proof:
    """What was compared and how far apart the two were.

    Attributes:
        nodes: Number of graph nodes compared.
        difference: Largest difference at any node, relative to the largest value of that node.
        node: Where that was.
        tolerance: What was allowed.
        batch: Batch size of the inputs.
    """

    nodes: int
    difference: float
    node: str
    tolerance: float
    batch: int


def prove(
    analysis: Analysis,
    live: Mask,
    plan: ShrinkPlan,
    shrunk: ShrunkGraph,
    *,
    seed: int = 0,
    written: Callable[[str], Tensor] | None = None,
) -> Proof:
    """Proves that ``shrunk`` equals the captured model with everything but ``live`` masked.

    Tensors are read when they are needed and dropped after their last use: the largest of them, in double precision,
    is about what it takes of memory.

    Args:
        analysis: The captured model and its labels.
        live: Which classes live, shape (classes,).
        plan: The plan that ``shrunk`` was made with.
        shrunk: The rewritten graph.
        seed: Of the perturbation of parameters and inputs.
        written: Gives what each shrunk tensor holds by its name, where ``shrunk`` is on the meta device.

    Raises:
        ProofError: They differ; the message names the first node at which they do.
    """
    run = _Lockstep(analysis, live, plan, shrunk, seed, written)
    with exact_defaults(), torch.no_grad(), evaluating(shrunk):
        proof = run.proof()
    if analysis.captured.fixed_batch is None:
        check_growth(analysis.captured, shrunk)
    return proof


def verify(model: nn.Module, plan: ShrinkPlan, example_inputs: ExampleInputs, *, seed: int = 0) -> Proof:
    """Proves that what ``plan`` makes of ``model`` equals ``model`` with everything else masked.

    Args:
        model: The dense model; it is left as it was.
        plan: What is kept of it.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        seed: Of the perturbation of parameters and inputs.

    Raises:
        ProofError: They differ; the message names the first node at which they do.
        PlanError: The plan does not fit the model.
    """
    analysis = analyse(capture(model, example_inputs))
    return prove(analysis, live_from_keep(analysis, plan), plan, shrink_graph(analysis.captured, plan), seed=seed)


class _Lockstep:
    def __init__(
        self,
        analysis: Analysis,
        live: Mask,
        plan: ShrinkPlan,
        shrunk: ShrunkGraph,
        seed: int,
        written: Callable[[str], Tensor] | None,
    ) -> None:
        self.analysis, self.live, self.plan, self.shrunk, self.written = analysis, live, plan, shrunk, written
        self.names = tensor_names(analysis.captured.graph_module)
        self.seeds = {name: seed + place for place, name in enumerate(analysis.parameters, 1)}
        self.sizes: dict[str, float] = {}  # largest magnitude of each node's value
        generator = torch.Generator().manual_seed(seed)
        self.inputs = [exact(varied(leaf, generator)) for leaf in analysis.captured.flat_inputs()]

    def proof(self) -> Proof:
        dense_nodes = {node.name: node for node in self.analysis.captured.nodes}
        dense_ends = last_uses(self.analysis.captured.graph_module.graph)
        small_ends = last_uses(self.shrunk.graph)
        dense: dict[str, Any] = {}
        small: dict[str, Any] = {}
        inputs = iter(self.inputs)
        worst, where, compared = 0.0, "", 0
        for node in _late(self.shrunk.graph, dense_nodes):
            twin = dense_nodes.get(node.name)
            if node.op == "placeholder":
                value = next(inputs)
                dense[node.name], small[node.name] = _fresh(value), _fresh(value)
            elif node.op == "get_attr":
                small[node.name], dense[node.name] = self._held(node)
            elif node.op == "output":
                if str(node.args) != str(self.analysis.captured.nodes[-1].args):
                    raise ProofError("output: the shrunk graph returns other nodes. Compress the model again.")
            else:
                small[node.name] = self._call(node, small)
                if twin is not None:
                    dense[node.name] = masked(self.analysis, self.live, twin, dense)
            if twin is not None and node.op != "output":
                far = self._distance(twin, dense[node.name], small[node.name])
                compared += 1
                if far > worst:
                    worst, where = far, node.name
            for name in dense_ends.get(node.name, ()):
                dense.pop(name, None)
            for name in small_ends.get(node.name, ()):
                small.pop(name, None)
        batch = batch_size(self.analysis.captured.flat_inputs())
        return Proof(compared, worst, where, TOLERANCE, batch)

    def _held(self, node: fx.Node) -> tuple[Any, Any]:
        """A tensor, perturbed: cut for the shrunk graph, masked for the dense one."""
        value = attribute(self.shrunk, str(node.target))
        name = self.names.get(str(node.target))
        if not isinstance(value, Tensor) or name is None:
            return value, value
        given = self.analysis.captured.tensor(name).detach()
        if value.is_meta and self.written is not None:
            value = self.written(name)
        cut = self.plan.cut(name, given)
        if cut.dtype != value.dtype or not torch.equal(cut, value.to(cut.device)):
            raise ProofError(f"{node.name}: {name} does not hold what the plan keeps of it. Compress the model again.")
        del cut, value
        exact = perturbed(given, torch.Generator().manual_seed(self.seeds[name]))
        small = _fresh(self.plan.cut(name, exact))
        mask = self.analysis.classes.live_mask(self.analysis.parameters[name], self.live)
        if exact is given:  # what is not perturbed is still the user's
            exact = exact.clone()
        return small, exact if mask is None else exact.mul_(mask)

    def _call(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        try:
            return execute(node, values)
        except Exception as error:  # any operator may refuse any shape
            raise ProofError(
                f"{node.name}: the shrunk graph fails there ({first_line(error)}){at_source(node)}. {BUG}"
            ) from error

    def _distance(self, node: fx.Node, dense: Any, small: Any) -> float:
        labels = self.analysis.labels.get(node.name)
        if isinstance(dense, list | tuple) and isinstance(labels, list):
            return max((self._gap(node, d, s, w) for d, s, w in zip(dense, small, labels, strict=False)), default=0.0)
        return self._gap(node, dense, small, labels)

    def _gap(self, node: fx.Node, dense: Any, small: Any, labels: Any) -> float:
        if not isinstance(dense, Tensor) or not isinstance(small, Tensor) or not isinstance(labels, Labels):
            return 0.0
        if not dense.numel() and not small.numel():
            return 0.0
        expected = self._compacted(node, dense, labels)
        if expected.is_floating_point() and expected.numel() and expected.isnan().all():
            raise ProofError(
                f"{node.name}: is nan everywhere{at_source(node)}, so nothing can be compared there. "
                "Use example inputs on which the model gives numbers."
            )
        if expected.shape != small.shape:
            raise ProofError(
                f"{node.name}: the shrunk graph has shape {tuple(small.shape)} where the masked original has "
                f"{tuple(expected.shape)}{at_source(node)}. {BUG}"
            )
        if not expected.is_floating_point() and not expected.is_complex():
            far = 0.0 if torch.equal(expected, small) else float("inf")
        else:
            floor = 1e-4 * max((self.sizes.get(source.name, 0.0) for source in node.all_input_nodes), default=0.0)
            far = relative_difference(expected, small, floor)
            size = _largest(expected)
            self.sizes[node.name] = size if size > 1e-6 * floor else 1e4 * floor  # what cancelled out is rounding
        if not far <= TOLERANCE:
            raise ProofError(
                f"{node.name}: the shrunk graph differs from the masked original by {far:.3g} relative "
                f"(allowed {TOLERANCE:g}){at_source(node)}. {BUG}"
            )
        return far

    def _compacted(self, node: fx.Node, value: Tensor, labels: Labels) -> Tensor:
        """What lives of a dense value, in the order of the dense tensor."""
        mask = self.analysis.classes.live_mask(labels, self.live)
        if mask is None:
            return value
        shape = self.analysis.classes.live_shape(labels, self.live, node.name)
        dims = self.analysis.classes.nesting(labels, mask)
        order = [*dims, *(dim for dim in range(mask.dim()) if dim not in dims)]
        alive = mask.permute(order).reshape([mask.shape[dim] for dim in dims])
        picked = value.permute(order)[alive].reshape([shape[dim] for dim in order])
        return picked.permute([order.index(dim) for dim in range(value.dim())])


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _largest(value: Tensor) -> float:
    """The largest magnitude of a finite element; 0 without one."""
    if value.numel() and not value.is_complex():
        low, high = map(float, value.aminmax())
        if math.isfinite(low) and math.isfinite(high):
            return max(-low, high)
    finite = value[value.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _late(graph: fx.Graph, twins: Mapping[str, fx.Node]) -> list[fx.Node]:
    """The nodes of a graph in an order in which they can run: tensors are read where they or their twins are needed."""
    own = {node.name: node for node in graph.nodes}
    order: dict[str, None] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            users = [user for user in (node, twins.get(node.name)) if user is not None]
            read = [source.name for user in users for source in user.all_input_nodes if source.op == "get_attr"]
            order |= dict.fromkeys([*read, node.name])
    return [own[name] for name in order]


def last_uses(graph: fx.Graph) -> dict[str, list[str]]:
    """For each node the values that are not needed after it."""
    seen: set[str] = set()
    ends: dict[str, list[str]] = {}
    for node in reversed(list(graph.nodes)):
        for source in (*node.all_input_nodes, node):
            if source.name not in seen:
                seen.add(source.name)
                ends.setdefault(node.name, []).append(source.name)
    return ends

"""What criteria know of a model beside its weights: its activations on data, and the gradients of its loss."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.errors import ConfigError
from speedup.analysis import Analysis
from speedup.capture import attribute
from speedup.labels import Labels, support
from speedup.rules import rule_for

Need = Literal["weights", "activations", "gradients"]
"""What a criterion looks at."""

aten = torch.ops.aten
ACTIVATIONS: Mapping[str, tuple[object, ...]] = {
    "relu": (aten.relu.default, aten.relu_.default),
    "relu6": (aten.relu6.default, aten.relu6_.default, aten.hardtanh.default, aten.hardtanh_.default),
    "leaky_relu": (aten.leaky_relu.default, aten.leaky_relu_.default, aten.prelu.default),
    "elu": (aten.elu.default, aten.elu_.default, aten.selu.default, aten.selu_.default, aten.celu.default),
    "gelu": (aten.gelu.default, aten.gelu_.default),
    "silu": (aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default, aten.mish.default),
    "sigmoid": (aten.sigmoid.default, aten.sigmoid_.default, aten.hardsigmoid.default),
    "tanh": (aten.tanh.default, aten.tanh_.default),
    "softplus": (aten.softplus.default, aten.log_sigmoid.default),
}  # fmt: skip
"""Functions after which an activation is looked at, by the name that a user may ask for."""


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at beside the weights.

    Attributes:
        seed: Of everything that is random.
        active: For each class the share of its activations that is not zero, shape (classes,), in [0, 1] for each
            function that it goes through and summed over these; None if no activations were observed.
        means: For each class the mean of its activations, summed likewise.
        saliency: By canonical name of a parameter the mean over batches of (gradient * weight)^2, in its shape; None if
            no gradients were observed.
    """

    seed: int = 0
    active: NDArray[np.float64] | None = None
    means: NDArray[np.float64] | None = None
    saliency: Mapping[str, Tensor] | None = None


NOTHING = Evidence()


class Observer:
    """Looks on while somebody else's code runs a model, for a number of batches.

    Activations are those of the graph in evaluation mode on the inputs that the model receives, at the weights that it
    has then; gradients are those that reach its parameters.
    """

    def __init__(
        self, analysis: Analysis, need: Need, batches: int, functions: Sequence[str] = tuple(ACTIVATIONS)
    ) -> None:
        """Prepares to look.

        Args:
            analysis: The model.
            need: What to look at.
            batches: How many calls of the model, or backward passes, are looked at.
            functions: Names in :data:`ACTIVATIONS`: after which functions an activation counts.
        """
        self._analysis, self._need, self._batches = analysis, need, batches
        self._tallies = [_Tally(analysis, _after(functions)), _Tally(analysis, _is_contraction)]
        self._saliency: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._calls = 0

    @property
    def count(self) -> int:
        """How many batches were looked at."""
        return min(self._calls if self._need == "activations" else max(self._seen.values(), default=0), self._batches)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Looks on while the context is open."""
        model = self._analysis.captured.model
        if self._need == "activations":
            handles = [model.register_forward_pre_hook(self._on_call, with_kwargs=True)]
        else:
            graph = self._analysis.captured.graph_module
            learned = [(name, attribute(graph, name)) for name in self._analysis.parameters]
            handles = [
                tensor.register_hook(functools.partial(self._on_gradient, name, tensor))
                for name, tensor in learned
                if tensor.requires_grad
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def evidence(self, seed: int) -> Evidence:
        """Returns what was seen.

        Raises:
            ConfigError: Nothing was.
        """
        if not self.count:
            what = "was not called" if self._need == "activations" else "received no gradients"
            raise ConfigError(f"calibrate: the model {what} while it ran. Run the model that is given on some batches.")
        if self._need == "gradients":
            return Evidence(seed, saliency={name: total / self._seen[name] for name, total in self._saliency.items()})
        first, second = self._tallies
        active, means = (
            np.where(first.seen, one, other) for one, other in zip(first.shares(), second.shares(), strict=True)
        )
        return Evidence(seed, active=active, means=means)

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls >= self._batches:
            return
        captured = self._analysis.captured
        known = {name: kwargs[name] for name in captured.kwargs if name in kwargs}
        leaves, spec = pytree.tree_flatten((args, known))
        expected = pytree.tree_structure((captured.args, captured.kwargs))
        fact = "is captured in parts" if captured.parts is not None else "is called in another way than on the example"
        if captured.parts is not None or len(known) != len(kwargs) or spec != expected:
            raise ConfigError(f"{type(module).__name__}: {fact}, so that its activations cannot be seen. Use weights.")
        self._calls += 1
        with torch.no_grad():
            _Reading(captured.graph_module, self._tallies).run(*leaves, enable_io_processing=False)

    def _on_gradient(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        if self._seen.get(name, 0) >= self._batches:
            return
        self._seen[name] = self._seen.get(name, 0) + 1
        found = (gradient.detach().double() * parameter.detach().double()).square()
        self._saliency[name] = self._saliency[name] + found if name in self._saliency else found


@dataclass
class _Tally:
    """Sums over the activations of each class, at some of the nodes."""

    analysis: Analysis
    counts: Callable[[fx.Node], bool]
    nodes: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, node: fx.Node, value: Any) -> None:
        labels = self.analysis.labels.get(node.name)
        if not isinstance(labels, Labels) or not isinstance(value, Tensor) or not self.counts(node):
            return
        numbers = value.double()
        found = self.nodes.setdefault(node.name, np.zeros((3, self.analysis.classes.count)))
        for plane in labels.planes:
            dims = support(plane)
            others = [dim for dim in range(numbers.dim()) if dim not in dims]
            where = self.analysis.classes.plane(plane).reshape(-1)
            active, sums = (part.sum(others) if others else part for part in ((numbers != 0).double(), numbers))
            for row, part in enumerate((active, sums, torch.full_like(sums, numbers.numel() / sums.numel()))):
                np.add.at(found[row], where, part.reshape(-1).cpu().numpy())

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which classes have activations here, shape (classes,)."""
        seen = np.zeros(self.analysis.classes.count, dtype=np.bool_)
        for found in self.nodes.values():
            seen |= found[2] > 0
        return seen

    def shares(self) -> NDArray[np.float64]:
        """Share that is not zero and mean of each class, summed over the nodes, shape (2, classes)."""
        total = np.zeros((2, self.analysis.classes.count))
        for found in self.nodes.values():
            total += found[:2] / np.maximum(found[2], 1)
        return total


def _after(functions: Sequence[str]) -> Callable[[fx.Node], bool]:
    targets = {target for name in functions for target in ACTIVATIONS[name]}
    return lambda node: node.target in targets


def _is_contraction(node: fx.Node) -> bool:
    rule = rule_for(node.target)
    return rule is not None and rule.kind in ("convolution", "contraction")


class _Reading(fx.Interpreter):
    """Runs a graph and shows every value to the tallies."""

    def __init__(self, graph_module: fx.GraphModule, tallies: Sequence[_Tally]) -> None:
        super().__init__(graph_module)
        self._tallies = tallies

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        value = super().run_node(n)
        for tally in self._tallies:
            tally.add(n, value)
        return value


def gather(
    analysis: Analysis,
    need: Need,
    run: Callable[[], object],
    *,
    batches: int,
    seed: int = 0,
    functions: Sequence[str] = tuple(ACTIVATIONS),
) -> Evidence:
    """Returns what is seen of a model while ``run`` runs it; the model is put back as it was before.

    Args:
        analysis: The model.
        need: What to look at.
        run: Runs the model, and for gradients its loss backwards, on some batches: usually an epoch of training.
        batches: How many batches are looked at.
        seed: For the evidence.
        functions: Names in :data:`ACTIVATIONS`: after which functions an activation counts.

    Raises:
        ConfigError: ``run`` does not run the model.
    """
    observer = Observer(analysis, need, batches, functions)
    with _put_back(analysis.captured.model), observer.watching():
        run()
    return observer.evidence(seed)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Gives the tensors of a model back what they held, their gradients, and the modules their modes."""
    tensors = [*model.parameters(), *model.buffers()]
    held = [tensor.detach().clone() for tensor in tensors]
    gradients = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before, gradient in zip(tensors, held, gradients, strict=True):
                tensor.copy_(before)
                tensor.grad = gradient
        for module, mode in modes.items():
            module.training = mode

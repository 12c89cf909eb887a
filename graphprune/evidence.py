"""What criteria know of a model beside its weights: its activations on data, and the gradients of its loss."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from graphprune.errors import ConfigError
from speedup.analysis import Analysis
from speedup.capture import Captured, attribute
from speedup.inputs import ExampleInputs
from speedup.labels import Labels, support
from speedup.masking import attached_masks
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

    Attributes:
        analysis: The model; made from the inputs of the first call if it was not known before.
    """

    def __init__(
        self,
        known: Analysis | Callable[[ExampleInputs], Analysis],
        model: nn.Module,
        need: Need,
        batches: int,
        functions: Sequence[str] = tuple(ACTIVATIONS),
    ) -> None:
        """Prepares to look.

        Args:
            known: The analysed model, or what makes it from example inputs.
            model: The model that is run.
            need: What to look at.
            batches: How many calls of the model, or backward passes, are looked at.
            functions: Names in :data:`ACTIVATIONS`: after which functions an activation counts.
        """
        self.analysis: Analysis | None = known if isinstance(known, Analysis) else None
        self._make = None if isinstance(known, Analysis) else known
        self._model, self._need, self._batches, self._functions = model, need, batches, functions
        self._tallies: list[_Tally] = []
        self._saliency: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._calls = 0

    @property
    def count(self) -> int:
        """How many batches were looked at."""
        return min(self._calls if self._need == "activations" else max(self._seen.values(), default=0), self._batches)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Looks on while the context is open.

        Raises:
            ConfigError: There will be no gradients, because no parameter requires any.
        """
        if self._need == "gradients" and not any(one.requires_grad for one in self._model.parameters()):
            raise ConfigError(
                "model: no parameter of it requires gradients, so that there are none to look at. Let some require "
                "them with requires_grad_()."
            )
        with ExitStack() as stack:
            if self.analysis is not None:
                self._start(stack, self.analysis)
            else:
                self._wait(stack)
            yield

    def _wait(self, stack: ExitStack) -> None:
        """Makes the analysis of the first call, and starts with that call."""

        def on_first_call(inputs: ExampleInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert self._make is not None
            self.analysis = self._make(inputs)
            self._start(stack, self.analysis)
            if self._need == "activations":
                self._on_call(self._model, args, kwargs)

        stack.enter_context(at_first_call(self._model, on_first_call))

    def _start(self, stack: ExitStack, analysis: Analysis) -> None:
        if self._need == "activations":
            self._tallies = self._tallies or [
                _Tally(analysis, _after(self._functions)),
                _Tally(analysis, _is_contraction),
            ]
            stack.callback(self._model.register_forward_pre_hook(self._on_call, with_kwargs=True).remove)
            return
        for name in analysis.parameters:
            tensor = attribute(analysis.captured.graph_module, name)
            if tensor.requires_grad:
                stack.callback(tensor.register_hook(partial(self._on_gradient, name, tensor)).remove)

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

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if self._calls >= self._batches or kwargs is None:  # a hook that an earlier one has removed gets none
            return
        assert self.analysis is not None
        captured = self.analysis.captured
        leaves = _leaves(captured, args, kwargs)
        fact = "is captured in parts" if captured.parts is not None else "is called in another way than on the example"
        if captured.parts is not None or leaves is None:
            raise ConfigError(f"{type(module).__name__}: {fact}, so that its activations cannot be seen. Use weights.")
        self._calls += 1
        with torch.no_grad():
            _Reading(captured.graph_module, self._tallies, attached_masks(module)).run(
                *leaves, enable_io_processing=False
            )

    def _on_gradient(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        if self._seen.get(name, 0) >= self._batches:
            return
        self._seen[name] = self._seen.get(name, 0) + 1
        found = (gradient.detach().double() * parameter.detach().double()).square()
        self._saliency[name] = self._saliency[name] + found if name in self._saliency else found


@contextmanager
def at_first_call(
    model: nn.Module, then: Callable[[ExampleInputs, tuple[Any, ...], dict[str, Any]], object]
) -> Iterator[None]:
    """Calls ``then`` once with copies of the inputs of the model's first call, and the inputs themselves."""

    def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        inputs = args if not kwargs else {**_named(module, args), **kwargs}
        then(pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs), args, kwargs)

    handle = model.register_forward_pre_hook(on_call, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _named(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional inputs by the names that the forward of ``module`` gives them."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False))


def _leaves(captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The inputs of a call, one for each placeholder of the graph; None if they have another form."""
    if captured.kwargs and args:
        args, kwargs = (), {**_named(captured.model, args), **kwargs}
    known = {name: kwargs[name] for name in captured.kwargs if name in kwargs}
    leaves, spec = pytree.tree_flatten((args, known))
    expected = pytree.tree_structure((captured.args, captured.kwargs))
    return leaves if spec == expected and len(known) == len(kwargs) else None


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
    """Runs a graph, its parameters multiplied by masks, and shows every value to the tallies."""

    def __init__(self, graph_module: fx.GraphModule, tallies: Sequence[_Tally], masks: Mapping[str, Tensor]) -> None:
        super().__init__(graph_module)
        self._tallies, self._masks = tallies, masks

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        value = super().run_node(n)
        if n.op == "get_attr" and str(n.target) in self._masks:
            value = value * self._masks[str(n.target)]
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
    observer = Observer(analysis, analysis.captured.model, need, batches, functions)
    with put_back(analysis.captured.model), observer.watching():
        run()
    return observer.evidence(seed)


@contextmanager
def put_back(model: nn.Module, optimizer: object = None) -> Iterator[None]:
    """Gives the tensors of a model back what they held, their gradients, and the modules their modes.

    So does an optimizer, if that is what is given, with what it remembers.
    """
    remembered = copy.deepcopy(optimizer.state_dict()) if isinstance(optimizer, Optimizer) else None
    buffers = {module: dict(module._buffers) for module in model.modules()}
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
                if not torch.equal(tensor, before):  # what is expanded cannot be written to, nor can it have changed
                    tensor.copy_(before)
                tensor.grad = gradient
        for module, mode in modes.items():
            module.training = mode
            module._buffers.clear()  # a forward may have put other tensors there
            module._buffers.update(buffers[module])
        if isinstance(optimizer, Optimizer) and remembered is not None:
            optimizer.load_state_dict(remembered)

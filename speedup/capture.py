"""A model in, one graph of ATen calls out: the only place that knows ``torch.export``.

The graph keeps composite operators (``conv2d``, ``linear``, ``layer_norm``, ...), every shape, the fully
qualified name of every parameter and the line of Python that made each node.
"""

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from speedup.errors import CaptureError

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Attributes:
        model: The user's own module, never changed.
        graph_module: The captured graph; its ``get_attr`` nodes name the tensors of ``model``, which it shares.
        args: Positional example inputs, with a batch of two or more.
        kwargs: Keyword example inputs, likewise.
        program: What ``torch.export`` gave, from which the graph was made.
    """

    model: nn.Module
    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    program: ExportedProgram

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the graph in the order in which they run."""
        return list(self.graph_module.graph.nodes)

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size at which the graph is right; None where it is right at any."""
        inputs = [node.meta.get("val") for node in self.nodes if node.op == "placeholder"]
        sizes = [size for value in inputs if isinstance(value, Tensor) for size in value.shape]
        dynamic = any(not is_concrete_int(size) for size in sizes)
        return None if dynamic else batch_size((self.args, self.kwargs))

    def flat_inputs(self) -> list[Any]:
        """The example inputs, one for each placeholder."""
        return pytree.tree_leaves((self.args, self.kwargs))


def split_inputs(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns example inputs of any accepted form as positional and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def batch_size(inputs: Any) -> int:
    """Returns the size of the first dimension of the first tensor found in ``inputs``, or 1."""
    sizes = (t.shape[0] for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim())
    return next(sizes, 1)


def with_batch(inputs: Any, batch: int) -> Any:
    """Returns ``inputs`` with another batch: tensors that carry it are repeated or cut along dimension 0."""
    present = batch_size(inputs)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != present:
            return leaf
        rounds = -(-batch // present)
        return leaf.repeat(rounds, *[1] * (leaf.dim() - 1))[:batch]

    return pytree.tree_map(resize, inputs)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts ``models`` into eval mode and gives each submodule its own mode back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    was_training = {model: model.training for model in models}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for model in models:
            model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer hides its structure
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for model in models:
            model.train(was_training[model])
        for module, mode in modes:
            module.training = mode


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps from the user what torch prints, logs and warns of on its own internals; what matters is raised."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Captured:
    """Returns ``model`` as a graph whose batch dimension is dynamic.

    The model is captured in eval mode and is left as it was. An example with a batch of one is repeated to two,
    because ``torch.export`` takes a size of one for a constant.

    Args:
        model: Any module that ``torch.export`` can capture whole.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.

    Raises:
        CaptureError: The model raises on the example, or cannot be captured whole.
    """
    name = type(model).__name__
    args, kwargs = pytree.tree_map(_own, split_inputs(example_inputs))
    with evaluating(model):
        try:
            with torch.no_grad():
                model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception as error:  # whatever the user's code raises is the user's to read
            raise CaptureError(
                f"{name}: raises {type(error).__name__} on the example inputs ({_first_line(error)}). "
                f"Check the shapes and types of the inputs: {_describe((args, kwargs))}."
            ) from error
        refusal: Exception | None = None
        for some_args, some_kwargs, dynamic in _attempts(args, kwargs):
            try:
                exported = _export(model, some_args, some_kwargs, dynamic)
            except Exception as error:  # noqa: BLE001   # torch.export has no common error class
                refusal = refusal or error
                continue
            return captured_from(exported, model)
    assert refusal is not None
    raise CaptureError(
        f"{name}: torch.export cannot capture it whole ({_first_line(refusal)}). "
        "Remove control flow that depends on data, or prune a submodule."
    ) from refusal


def captured_from(program: ExportedProgram, model: nn.Module | None = None) -> Captured:
    """Returns an exported program, fresh or loaded from a .pt2 file, as a graph.

    Args:
        program: Exported without decomposition, so that composite operators are whole.
        model: The module it was exported from; if there is none any more, its graph stands for it.
    """
    with quiet():
        graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.view.default:  # whether a view is possible depends on type and device
            node.target = torch.ops.aten.reshape.default
    graph_module.recompile()
    args, kwargs = program.example_inputs
    return Captured(graph_module if model is None else model, graph_module, args, kwargs, program)


def _own(leaf: Any) -> Any:
    """A copy of a tensor: export takes one tensor that is given twice for one input."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _attempts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], bool]]:
    """Yields example inputs to try: a dynamic batch first, the example exactly as it is last."""
    if batch_size((args, kwargs)) < 2:
        wide_args, wide_kwargs = with_batch((args, kwargs), 2)
        yield wide_args, wide_kwargs, True
    else:
        yield args, kwargs, True
    yield args, kwargs, False


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> ExportedProgram:
    batch = batch_size((args, kwargs))

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and dynamic and leaf.dim() and leaf.shape[0] == batch:
            return {0: Dim.AUTO}
        return None

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = {name: pytree.tree_map(spec, value) for name, value in bound.items()}
    with quiet():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _describe(inputs: Any) -> str:
    parts = [
        f"{'x'.join(map(str, leaf.shape)) or 'scalar'} {str(leaf.dtype).removeprefix('torch.')}"
        for leaf in pytree.tree_leaves(inputs)
        if isinstance(leaf, Tensor)
    ]
    return ", ".join(parts) or "no tensors"

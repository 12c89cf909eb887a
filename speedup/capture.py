"""A model in, one graph of ATen calls out, through ``torch.export``.

The graph keeps composite operators (``conv2d``, ``linear``, ``layer_norm``, ...), every shape, the fully
qualified name of every parameter and the line of Python that made each node.
"""

import copy
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp import autocast_mode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from speedup.errors import CaptureError, first_line
from speedup.inputs import ExampleInputs, attempts, batch_size, carries_batch, describe, split_inputs


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Attributes:
        model: The user's own module, never changed.
        graph_module: The captured graph; its ``get_attr`` nodes name the tensors of ``model``, which it shares.
        args: Positional example inputs, with a batch of two or more.
        kwargs: Keyword example inputs, likewise.
        program: What ``torch.export`` gave, from which the graph was made.
        training: The graph of the training mode, where that uses parameters which evaluation does not (auxiliary
            heads); None if it does not, or cannot be captured.
    """

    model: nn.Module
    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    program: ExportedProgram
    training: fx.GraphModule | None = None

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

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes to compare at: that of the example, and another where the graph is right at any."""
        example = batch_size((self.args, self.kwargs))
        return (example, 3) if self.fixed_batch is None else (example,)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters that the graph does not use: heads for training only, spare layers."""
        read = self.graph_module.graph.find_nodes(op="get_attr")
        used = {id(attribute(self.graph_module, str(node.target))) for node in read if node.users}
        return tuple(name for name, tensor in self.model.named_parameters() if id(tensor) not in used)

    def flat_inputs(self) -> list[Any]:
        """The example inputs, one for each placeholder."""
        return pytree.tree_leaves((self.args, self.kwargs))


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Captured:
    """Returns ``model`` as a graph, with an open batch if its code allows one.

    The model is captured in eval mode and is left as it was.

    Args:
        model: Any module that ``torch.export`` can capture whole.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.

    Raises:
        CaptureError: The model raises on the example, or cannot be captured whole.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{model!r:.80}: is no torch.nn.Module. Give an instance of one.")
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, split_inputs(example_inputs))
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and (not leaf.numel() or (leaf.is_floating_point() and not _numbers(leaf))):
            fact = "holds nan" if leaf.numel() else "is empty"
            raise CaptureError(f"{describe(leaf)}: this example input {fact}. Give one that the model is made for.")
    refusal: CaptureError | None = None
    with evaluating(model):
        try:
            with torch.no_grad():
                model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception as error:  # whatever the user's code raises is the user's to read
            raise CaptureError(
                f"{type(model).__name__}: raises {type(error).__name__} on the example inputs ({first_line(error)}). "
                f"Check the shapes and types of the inputs: {describe((args, kwargs))}."
            ) from error
        for some_args, some_kwargs, dynamic in attempts(args, kwargs):
            try:
                captured = captured_from(to_program(model, some_args, some_kwargs, dynamic=dynamic), model)
                return replace(captured, training=_training_graph(captured))
            except CaptureError as error:
                refusal = refusal or error
    assert refusal is not None
    raise refusal


def _numbers(tensor: Tensor) -> bool:
    return tensor.is_meta or not bool(tensor.isnan().any())


def captured_from(program: ExportedProgram, model: nn.Module | None = None) -> Captured:
    """Returns an exported program, fresh or loaded from a .pt2 file, as a graph.

    Args:
        program: Exported without decomposition, so that composite operators are whole.
        model: The module it was exported from; if there is none any more, its graph stands for it.
    """
    with quiet():
        graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    _normalise(graph_module)
    graph_module.recompile()
    args, kwargs = program.example_inputs
    return Captured(graph_module if model is None else model, graph_module, args, kwargs, program)


def _training_graph(captured: Captured) -> fx.GraphModule | None:
    if not captured.unused:
        return None
    captured.model.train()  # capture puts the modes back
    try:
        dynamic = captured.fixed_batch is None
        program = to_program(captured.model, captured.args, captured.kwargs, dynamic=dynamic)
    except CaptureError:
        return None
    return captured_from(program, captured.model).graph_module


def attribute(module: nn.Module, name: str) -> Any:
    """Whatever is registered in ``module`` under the qualified ``name``."""
    return operator.attrgetter(name)(module)


def source_line(node: fx.Node) -> str:
    """Where in the user's code a node comes from, as file:line; empty if unknown."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).splitlines()]
    frames = [line for line in lines if line.startswith("File")]
    if not frames:
        return ""
    file, _, rest = frames[-1].removeprefix('File "').partition('", line ')
    return f"{file}:{rest.split(',')[0]}"


def to_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool) -> ExportedProgram:
    """Returns ``model`` as a program of ``torch.export``; if ``dynamic``, no input's batch is a constant in it.

    Args:
        model: The model, in the mode in which it is wanted.
        args: Positional inputs, for a dynamic batch with one of two or more.
        kwargs: Keyword inputs, likewise.
        dynamic: Whether the first dimension of every tensor that carries the batch is left open.

    Raises:
        CaptureError: ``torch.export`` cannot capture the model whole, or not with an open batch.
    """
    name = type(model).__name__
    # One tensor that is given twice would become one input.
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    batch = batch_size((args, kwargs))
    parameters = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(lambda leaf: {0: Dim.AUTO} if carries_batch(leaf, batch) else None, parameters)
    try:
        with quiet():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes if dynamic else None, strict=False)
    except Exception as error:  # torch.export has no common error class
        raise CaptureError(
            f"{name}: torch.export cannot capture it whole ({first_line(error)}). "
            "Remove control flow that depends on data, or prune a submodule."
        ) from error
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for place, leaf in zip(inputs, pytree.tree_leaves((args, kwargs)), strict=True):
        # AUTO makes a constant of a batch that the code turns into a number, and says nothing.
        if dynamic and carries_batch(leaf, batch) and is_concrete_int(values[place].shape[0]):
            raise CaptureError(f"{name}: its code makes a number of the batch of {place}. Leave it a size.")
    return program


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts ``models`` into eval mode; afterwards they are what they were: modes, attributes, contents of buffers."""
    modules = [module for model in models for module in model.modules()]
    attributes = [(module, dict(vars(module))) for module in modules]
    was_training = [(model, model.training) for model in models]
    buffers = [(module, name, buffer) for module in modules for name, buffer in module.named_buffers(recurse=False)]
    contents = [(buffer._version, buffer.detach().clone()) for _, _, buffer in buffers]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for model in models:
            model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer hides its structure
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for model, mode in was_training:
            model.train(mode)  # which may do more than set the attribute
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for (module, name, buffer), (edition, content) in zip(buffers, contents, strict=True):
            module._buffers[name] = buffer
            if buffer._version != edition:
                buffer.data.copy_(content)


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


_REGIONS = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)
"""The operators that ``torch.export`` makes of a ``with torch.no_grad()`` or ``with torch.autocast()`` in a forward."""


def _normalise(graph_module: fx.GraphModule) -> None:
    """Makes views reshapes (whether a view is possible depends on type and device) and puts regions into the graph."""
    for node in list(graph_module.graph.nodes):
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        elif node.target in _REGIONS:
            _inline(graph_module, node)


def _inline(graph_module: fx.GraphModule, region: fx.Node) -> None:
    """Puts the nodes of a region into the graph, between calls that enter and leave its mode."""
    place = next(i for i, argument in enumerate(region.args) if isinstance(argument, fx.Node))
    settings, body, operands = region.args[:place], region.args[place], region.args[place + 1 :]
    assert isinstance(body, fx.Node)
    inner = graph_module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    _normalise(inner)
    graph = graph_module.graph
    copies: dict[fx.Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(region):
        if region.target is _REGIONS[0]:
            before = graph.call_function(torch.is_grad_enabled)
            graph.call_function(torch._C._set_grad_enabled, settings)
        else:
            before = graph.call_function(autocast_mode._enter_autocast, settings)
        for node in inner.graph.nodes:
            if node.op == "output":
                results = fx.node.map_arg(node.args[0], lambda n: copies[n])
            elif node.op != "placeholder":
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        leave = torch._C._set_grad_enabled if region.target is _REGIONS[0] else autocast_mode._exit_autocast
        graph.call_function(leave, (before,))
    for user in list(region.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(region)
    if not body.users:
        graph.erase_node(body)
        graph_module.delete_submodule(str(body.target))

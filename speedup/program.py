"""What ``torch.export`` makes of a module: a program, without a word to the user of what goes on inside."""

import copy
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, is_concrete_int
from torch.utils import _pytree as pytree

from speedup.errors import CaptureError, first_line
from speedup.inputs import batch_size, carries_batch
from speedup.symbolic import depends_on_data

T = TypeVar("T")


def write_program(program: ExportedProgram, path: Path) -> None:
    """Writes a program for ``torch.export.load``; made in memory, for PyTorch ends the process where a disk is full.

    Raises:
        OSError: The file cannot be written.
        Exception: The program holds something that no archive can store; what that raises has no common class.
    """
    archive = io.BytesIO()
    torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())


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
    args, kwargs = beside(model, pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs)))
    batch = batch_size((args, kwargs))
    parameters = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(lambda leaf: {0: Dim.AUTO} if carries_batch(leaf, batch) else None, parameters)
    try:
        with quiet():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes if dynamic else None, strict=False)
    except Exception as error:  # torch.export has no common error class
        unknown = re.search(r"Found <class '(\S+)'> in output", str(error))
        if unknown:
            raise CaptureError(
                f"{name}: returns a {unknown[1].rpartition('.')[2]}, which torch.export does not know. Have it return "
                "tensors only (in transformers: config.use_cache = False while it is compressed)."
            ) from error
        raise CaptureError(
            f"{name}: torch.export cannot capture it whole ({_fact(error)}). "
            "Remove control flow that depends on data, or prune a submodule."
        ) from error
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            reshape_views(module.graph)
            module.recompile()
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and depends_on_data(value):
                raise CaptureError(
                    f"{name}: makes a tensor of shape {tuple(value.shape)}, whose size depends on the data. "
                    "Select with torch.where instead of boolean masks and nonzero(), or prune a submodule."
                )
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for place, leaf in zip(inputs, pytree.tree_leaves((args, kwargs)), strict=True):
        # AUTO makes a constant of a batch that the code turns into a number, and says nothing.
        if dynamic and carries_batch(leaf, batch) and is_concrete_int(values[place].shape[0]):
            raise CaptureError(f"{name}: its code makes a number of the batch of {place}. Leave it a size.")
    return program


def reshape_views(graph: fx.Graph) -> None:
    """Makes reshapes of views: whether a view is possible depends on types, devices and what came before."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def beside(model: nn.Module, inputs: Any) -> Any:
    """Returns ``inputs`` on the meta device if ``model`` is on it, else as they are."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs) if is_hollow(model) else inputs


def is_hollow(model: nn.Module) -> bool:
    """Whether ``model`` is on the meta device, where tensors have shapes and hold nothing."""
    return any(parameter.is_meta for parameter in model.parameters())


def copied(what: T) -> T:
    """Returns a deep copy of a graph or a module with one, without what torch warns of in its own pytrees."""
    with quiet():
        return copy.deepcopy(what)


def _fact(error: Exception) -> str:
    """What stopped ``torch.export``; of control flow that depends on data the place, not the formula."""
    if not isinstance(error, GuardOnDataDependentSymNode):
        return first_line(error)
    place = re.search(r'File "(.+)", line (\d+)', str(error)) or re.search(r"Caused by: \((.+):(\d+) in", str(error))
    return f"what its code does depends on the data{f', at {place[1]}:{place[2]}' if place else ''}"


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts ``models`` into eval mode; afterwards they are what they were: modes, attributes, hooks, buffers.

    What a forward puts into a container of its module (hooks that record outputs, a cache) is taken out again.
    """
    modules = [module for model in models for module in model.modules()]
    attributes = [(module, dict(vars(module))) for module in modules]
    containers = [
        (value, copy.copy(value))
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, dict | list | set) and name not in ("_parameters", "_buffers", "_modules")
    ]
    was_training = [(model, model.training) for model in models]
    buffers = [(module, name, buffer) for module in modules for name, buffer in module.named_buffers(recurse=False)]
    tables = [module for module in modules if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    bounded = [table.weight for table in tables if table.max_norm is not None]  # a lookup shortens what is too long
    contents = [(tensor._version, tensor.detach().clone()) for tensor in (*(b for *_, b in buffers), *bounded)]
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
        for container, filled in containers:
            container.clear()
            container.extend(filled) if isinstance(container, list) else container.update(filled)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for tensor, (edition, content) in zip((*(b for *_, b in buffers), *bounded), contents, strict=True):
            # A batch norm in training writes its running mean and leaves the version as it was.
            if tensor._version != edition or not (tensor.is_meta or torch.equal(tensor, content)):
                tensor.data.copy_(content)


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

"""A model as a program of ``torch.export``, with an open batch or that of the example."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from speedup.capture import _first_line, batch_size
from speedup.errors import CaptureError


def to_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool) -> ExportedProgram:
    """Returns ``model`` as a program; if ``dynamic``, no input's batch has become a constant in it.

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
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes if dynamic else None, strict=False)
    except Exception as error:  # torch.export has no common error class
        raise CaptureError(
            f"{name}: torch.export cannot capture it whole ({_first_line(error)}). Remove control flow that depends on "
            "data."
        ) from error
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for place, leaf in zip(inputs, pytree.tree_leaves((args, kwargs)), strict=True):
        # AUTO makes a constant of a batch that the code turns into a number, and says nothing.
        if dynamic and carries_batch(leaf, batch) and is_concrete_int(values[place].shape[0]):
            raise CaptureError(f"{name}: its code makes a number of the batch of {place}. Leave it a size.")
    return program


def carries_batch(leaf: Any, batch: int) -> bool:
    """Whether ``leaf`` is a tensor with the batch as its first dimension, as ``with_batch`` takes it to be."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch

"""Sizes that ``torch.export`` leaves open: the numbers that they have in the example, and whether they have any."""

import torch
from torch import Tensor


def hint(value: object) -> object:
    """``value``, a symbolic number replaced by the one it has in the example; None if that depends on the data."""
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value
    if value.node.has_hint():
        return value.node.hint
    return value.node.maybe_as_int()


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a (fake) tensor with the batch of the example."""
    return tuple(hint(size) for size in tensor.shape)  # type: ignore[misc]  # hints of sizes are whole numbers


def depends_on_data(tensor: Tensor) -> bool:
    """Whether a size of a fake tensor is known only when the data are."""
    return any(hint(size) is None for size in tensor.shape)


def batch_dims(tensor: Tensor) -> frozenset[int]:
    """The dimensions of a fake tensor that are the batch; one that is the batch times heads is none."""
    return frozenset(
        dim for dim, size in enumerate(tensor.shape) if isinstance(size, torch.SymInt) and size.node.expr.is_symbol
    )

"""Example inputs in any accepted form, and what is done with their batch."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


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


def carries_batch(leaf: Any, batch: int) -> bool:
    """Whether ``leaf`` is a tensor with the batch as its first dimension."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def with_batch(inputs: Any, batch: int) -> Any:
    """Returns ``inputs`` with another batch: tensors that carry it are repeated or cut along dimension 0."""
    present = batch_size(inputs)

    def resize(leaf: Any) -> Any:
        if not carries_batch(leaf, present):
            return leaf
        rounds = -(-batch // present)
        return leaf.repeat(rounds, *[1] * (leaf.dim() - 1))[:batch]

    return pytree.tree_map(resize, inputs)


def attempts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], bool]]:
    """Yields inputs to export with, and whether their batch is open: open first, the example exactly as it is last.

    An example with a batch of one is repeated to two, because ``torch.export`` takes a size of one for a constant.
    """
    if batch_size((args, kwargs)) < 2:
        wide_args, wide_kwargs = with_batch((args, kwargs), 2)
        yield wide_args, wide_kwargs, True
    else:
        yield args, kwargs, True
    yield args, kwargs, False


def describe(inputs: Any) -> str:
    """Returns the shapes and types of the tensors in ``inputs`` as text."""
    parts = [
        f"{'x'.join(map(str, leaf.shape)) or 'scalar'} {str(leaf.dtype).removeprefix('torch.')}"
        for leaf in pytree.tree_leaves(inputs)
        if isinstance(leaf, Tensor)
    ]
    return ", ".join(parts) or "no tensors"

"""Whether something else than PyTorch computes what a model computes: varied inputs, and a distance for outputs."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from speedup import numeric
from speedup.errors import ExportError, first_line
from speedup.inputs import ExampleInputs, describe, split_inputs, with_batch
from speedup.program import evaluating

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest value of an output."""

Run = Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Tensor]]
"""Runs what a file holds on positional and keyword inputs; returns its outputs in the order of the model's tensors."""


@dataclass(frozen=True)
class Agreement:
    """How near a file's outputs are to the model's.

    Attributes:
        checked: Whether they were compared.
        difference: Largest difference in any output, relative to that output's largest value; None if not compared.
        batches: The batch sizes that were compared.
        note: Why they were not compared; empty if they were.
    """

    checked: bool
    difference: float | None
    batches: tuple[int, ...]
    note: str


def compare(
    run: Run,
    path: Path | str,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batches: Sequence[int] = (1, 3),
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Returns how near `run` is to `model` in eval mode, on the example with other floats.

    Args:
        run: Runs the file.
        path: Names the file in errors.
        model: What the file should compute; it is left as it was.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        batches: Batch sizes to compare at.
        tolerance: Largest difference allowed, relative to the largest value of an output. With types so coarse that
            16 of their roundings are more, that much is allowed.

    Raises:
        ExportError: The model fails for a batch, or an output has another shape or is further off than allowed.
    """
    worst = 0.0
    for batch in batches:
        args, kwargs = varied(split_inputs(example_inputs), batch)
        copied_args, copied_kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        with evaluating(model), torch.no_grad():
            try:
                expected = tensors(model(*copied_args, **copied_kwargs))
            except Exception as error:  # whatever the user's code raises
                raise ExportError(
                    f"{type(model).__name__}: cannot be run with batch {batch} ({first_line(error)}). Write no batch "
                    "into its code."
                ) from error
            found = run(args, kwargs)
        if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
            raise ExportError(
                f"{path}: returns {describe(found)} for batch {batch}, the model {describe(expected)}. Name the "
                "dimension where the model squeezes or asks for a size."
            )
        allowed = max(tolerance, 16 * _coarsest_step((*weights(model), *tensors((args, kwargs)), *expected)))
        for index, (right, other) in enumerate(zip(expected, found, strict=True)):
            difference = off_by(right.cpu(), other.cpu())
            if difference > allowed:
                raise ExportError(
                    f"{path}: output {index} for batch {batch} is off by {difference:.2g} of the model's largest "
                    f"value, more than {allowed:.2g}. Use another opset or format."
                )
            worst = max(worst, difference)
    return Agreement(True, worst, tuple(batches), "")


def varied(inputs: Any, batch: int) -> Any:
    """Returns `inputs` with a batch of `batch` and other floats, so that its rows differ."""
    generator = torch.Generator().manual_seed(batch)
    return pytree.tree_map(lambda leaf: numeric.varied(leaf, generator), with_batch(inputs, batch))


def off_by(right: Tensor, other: Tensor) -> float:
    """Largest difference over the largest finite value of `right`; the same infinity, or NaN in both, is none."""
    right, other = right.double(), other.double()
    largest = right.where(right.isfinite(), 0.0).abs()
    return numeric.relative_difference(right, other, floor=float(largest.max()) if largest.numel() else 0.0)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in any nesting, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    return itertools.chain(model.parameters(), model.buffers())


def _coarsest_step(values: Iterable[Tensor]) -> float:
    """The largest relative rounding step among the floating types of `values`."""
    return max((torch.finfo(value.dtype).eps for value in values if value.is_floating_point()), default=0.0)

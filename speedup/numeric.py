"""Numbers to compare models with: inputs and weights in general position, and how far two results are apart."""

from typing import Any

import torch
from torch import Tensor


def perturbed(value: Any, generator: torch.Generator) -> Any:
    """A tensor in double precision, every number moved by about a tenth; vectors upwards only (they may be variances).

    What holds for numbers in general position holds for all: no zero, no tie and no fresh norm can hide a mistake.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return value
    exact = value.detach().double().cpu()
    size = exact[exact.isfinite()].abs().mean().nan_to_num().clamp(min=0.1)
    noise = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
    return exact + (0.1 * size * noise if exact.dim() < 2 else 0.2 * size * (noise - 0.5))


def relative_difference(expected: Tensor, found: Tensor, floor: float = 0.0) -> float:
    """Returns max |expected - found| / max(max |expected|, floor); infinite if nan or inf stand in other places."""
    if not expected.numel():
        return 0.0
    finite = torch.isfinite(expected)
    if not torch.allclose(expected[~finite], found[~finite], equal_nan=True):
        return float("inf")
    expected, found = expected[finite], found[finite]
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), floor)
    gap = float((expected - found).abs().max())
    return gap / scale if scale else gap

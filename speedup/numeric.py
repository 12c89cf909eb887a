"""Numbers to compare models with: inputs and weights in general position, and how far two results are apart."""

from typing import Any

import torch
from torch import Tensor

_PART = 1 << 18
"""Elements that are worked on at once: they fit into a cache, and a weight needs memory for itself and little else."""


def perturbed(value: Any, generator: torch.Generator) -> Any:
    """A weight in double precision, every number moved by up to a tenth of itself, zeros a little upwards.

    What holds for numbers in general position holds for all: no zero, no tie and no fresh norm can hide a mistake.
    Signs stay, so that what may be a variance or the argument of a logarithm still is one.
    """
    if isinstance(value, Tensor) and value.is_complex():
        return torch.view_as_complex(perturbed(torch.view_as_real(value.detach()), generator))
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return value
    exact = torch.empty(value.shape, dtype=torch.float64)
    flat = exact.view(-1)
    given_flat = value.detach().reshape(-1)
    parts = [(flat[i : i + _PART], given_flat[i : i + _PART]) for i in range(0, len(flat), _PART)]
    total, count = 0.0, 0
    for part, given in parts:
        finite = part.copy_(given).isfinite()
        numbers = part if bool(finite.all()) else part[finite]
        total, count = total + float(numbers.abs().sum()), count + len(numbers)
    size = max(total / count, 0.1) if count else 0.1
    for part, _ in parts:
        noise = torch.rand(part.shape, generator=generator, dtype=torch.float64)
        zeros = part == 0
        fillers = noise[zeros] * (0.1 * size)
        part.mul_(noise.mul_(0.2).add_(0.9))
        part[zeros] = fillers
    return exact


def varied(value: Any, generator: torch.Generator) -> Any:
    """An input with other floats: between 3/4 and all of what they were, so that signs, zeros and infinities stay.

    A tensor that is the same everywhere stands for any numbers and gets some between 0 and 1, which every domain has.
    Integers stay: others might be no valid index.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return value
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device)
    if bool((value == value.flatten()[0]).all()):
        return noise.to(value.dtype)
    return (value * (1 - noise / 4)).to(value.dtype)


def exact(value: Any) -> Any:
    """A tensor on the CPU, in double precision if it holds floats; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


def relative_difference(expected: Tensor, found: Tensor, floor: float = 0.0) -> float:
    """Returns the largest |expected - found| relative to the numbers around it; infinite if nan or inf stand elsewhere.

    A number is measured by the largest one of its own order, and by ``floor`` at least: a mask of -1e9 hides nothing
    beside it, and rounding of what has cancelled out counts for nothing.
    """
    if torch.equal(expected, found):
        return 0.0
    if expected.is_complex():
        expected, found = (torch.view_as_real(value.resolve_conj()) for value in (expected, found))
    finite = torch.isfinite(expected)
    if not torch.allclose(expected[~finite], found[~finite], equal_nan=True):
        return float("inf")
    expected, found = expected[finite], found[finite]
    if not expected.numel():
        return 0.0
    sizes, gaps = expected.abs(), (expected - found).abs()
    if not torch.isfinite(gaps).all():
        return float("inf")
    worst = 0.0
    for scale in _scales(sizes):
        inside = sizes <= scale
        gap = float(gaps[inside].max())
        worst = max(worst, gap / max(scale, floor) if gap else 0.0)
    return worst


def _scales(sizes: Tensor) -> list[float]:
    """The largest of ``sizes``, and before it every one after which they jump by four orders; a sample is looked at."""
    largest = float(sizes.max()) or 1.0
    sample = sizes[:: max(1, len(sizes) // 4096)]
    ordered = sample[sample > 0].sort().values
    few = max(3, len(ordered) // 50)  # a lone tiny number is no order of its own
    jumps = torch.nonzero(ordered[few:] > 1e4 * ordered[few - 1 : -1]).flatten() if len(ordered) > few else ()
    return [*(float(ordered[few - 1 + int(jump)]) for jump in jumps), largest]

"""Kinds of values by their shape: an image (C, H, W), a sequence (N, C) or a vector (C,), without the batch."""

from __future__ import annotations

Shape = tuple[int, ...]

WIDTHS = (4, 6, 8, 12)
"""Numbers of channels to choose from."""

VECTOR, SEQUENCE, IMAGE = frozenset({1}), frozenset({2}), frozenset({3})
"""Kinds of values as sets of ranks, so that `SEQUENCE | VECTOR` is either."""


def is_image(shape: Shape) -> bool:
    return len(shape) in IMAGE


def is_sequence(shape: Shape) -> bool:
    return len(shape) in SEQUENCE


def is_vector(shape: Shape) -> bool:
    return len(shape) in VECTOR


def channel_axis(shape: Shape) -> int:
    """The dimension of the channels, with the batch."""
    return 2 if is_sequence(shape) else 1


def channels(shape: Shape) -> int:
    return shape[channel_axis(shape) - 1]


def besides_channels(shape: Shape) -> Shape:
    """The other sizes."""
    axis = channel_axis(shape) - 1
    return shape[:axis] + shape[axis + 1 :]


def divisors(number: int, low: int = 2) -> list[int]:
    return [n for n in range(low, number + 1) if number % n == 0]

"""A program: a network as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from random_nets.shapes import Shape

Choose = Callable[[Sequence[Any]], Any]  # picks one of a sequence
Settings = dict[str, Any]  # the constructor arguments of an operation


@dataclass(frozen=True)
class Step:
    """One operation: what it is, on which values, with which settings; or the module of an earlier step again."""

    op: str
    operands: tuple[int, ...]
    settings: Settings
    again: int | None = None


@dataclass(frozen=True)
class Program:
    """A network as data.

    Attributes:
        inputs: Shape of each input without the batch; an input of rank 1 named by a negative size holds token ids.
        steps: What is done, in order; values are numbered: inputs first, then the outputs of each step.
        outputs: The values that the network returns.
        container: How it returns them: tensor, list, tuple, dict.
        ties: Pairs of parameter names of which the second is the first.
        unused: Whether the network has parameters that it never uses.
        training: The mode it is in.
        seed: Of its parameters and inputs.
        exact: Whether masked weights compute the same as a smaller network.
    """

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    container: str
    ties: tuple[tuple[str, str], ...]
    unused: bool
    training: bool
    seed: int
    exact: bool

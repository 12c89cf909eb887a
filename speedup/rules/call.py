"""One ATen call as a rule sees it: arguments by name, tensors as labels, batch sizes as the example's numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from speedup.flow import Flow
from speedup.labels import Labels

Outcome = Labels | list[Labels]
RuleFunction = Callable[[Flow, "Call"], Outcome]


@dataclass(frozen=True)
class Rule:
    """How labels flow through an operator.

    Attributes:
        kind: The field's word for the tie it makes: add, mul, concat, grouped, reshape, contraction, attention, ...
        flow: The rule itself.
        moves: Whether the operator only moves elements, so that what was masked stays masked.
    """

    kind: str
    flow: RuleFunction
    moves: bool = False


@dataclass(frozen=True)
class Call:
    """A call of an ATen operator.

    Attributes:
        node: The graph node.
        values: Every argument of the operator's schema by name, defaults filled in.
        outputs: Shape of each tensor that comes out, with the batch of the example.
        batch_dims: For each output, the dimensions that are the batch.
        constants: The value of each tensor argument that is known and no parameter, by name.
    """

    node: fx.Node
    values: Mapping[str, Any]
    outputs: tuple[tuple[int, ...], ...]
    batch_dims: tuple[frozenset[int], ...]
    constants: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument ``name``, or ``default`` where the operator has none of that name or it is None."""
        value = self.values.get(name)
        return default if value is None else value

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.outputs[0]

    def raw(self, name: str) -> Any:
        """Argument ``name`` as it stands in the graph; its default where left out, None if unknown."""
        return raw_argument(self.node, name)

    def is_masked(self, name: str) -> bool:
        """Whether a tensor in the list ``name`` is a mask: true or false for each element."""
        nodes = [item for item in self.raw(name) if item is not None]
        return any(node.meta["val"].dtype in (torch.bool, torch.uint8) for node in nodes)

    def tensors(self) -> list[Labels]:
        """Every tensor argument, in the order of the schema."""
        found = []
        for value in self.values.values():
            items = value if isinstance(value, list | tuple) else [value]
            found += [item for item in items if isinstance(item, Labels)]
        return found

    def dims(self, rank: int, name: str = "dim") -> list[int]:
        """The dimensions in argument ``name`` as non-negative numbers; all of them where it is None or empty."""
        value = self.values.get(name)
        if value is None or (isinstance(value, list | tuple) and not value):
            return list(range(rank))
        return [dim % rank for dim in (value if isinstance(value, list | tuple) else [value])] if rank else []

    def dim(self, rank: int, name: str = "dim") -> int:
        """The one dimension in argument ``name`` as a non-negative number."""
        return int(self.values[name]) % rank if rank else 0


def raw_argument(node: fx.Node, name: str) -> Any:
    """Argument ``name`` of a call as it stands in the graph; its default where left out, None if unknown."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]  # an OpOverload
    for position, argument in enumerate(schema):
        if argument.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[position] if position < len(node.args) else argument.default_value
    return None


def present(names: Iterable[str]) -> list[Callable[..., object]]:
    """The overloads of ATen operators that this version of PyTorch has, by name."""
    found = []
    for name in names:
        packet = getattr(torch.ops.aten, name, None)
        found += [getattr(packet, overload) for overload in packet.overloads() if overload != "out"] if packet else []
    return found


def numel(shape: Sequence[int]) -> int:
    """The number of elements of a shape."""
    return math.prod(shape)

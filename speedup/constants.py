"""What is certain of the tensors of a graph: the elements that hold the same number whatever the inputs are.

The graph runs on numbers, and beside every tensor goes a mask of the elements that vary: with what the inputs hold,
with their batch or with the size of their space. What does not vary is a constant, and its number is there to be read.
Where it is not understood how an operator hands constants on, all that comes out varies, unless nothing that goes in
does.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from speedup.masked import UNSET, execute, is_in_place
from speedup.rules.call import raw_argument
from speedup.spreading import Seen, filled, spread_for


@dataclass
class Constants:
    """A graph that runs on numbers, node by node.

    Attributes:
        values: What each node holds that has run.
        varies: Which elements of that vary: a mask of the shape of a tensor, a list where a node has several.
    """

    values: dict[str, Any] = field(default_factory=dict)
    varies: dict[str, Any] = field(default_factory=dict)

    def give(self, node: fx.Node, value: Any, *, varies: bool) -> None:
        """Sets what ``node`` holds: an input, which varies, or a tensor of the model, which does not."""
        self.values[node.name] = value
        self.varies[node.name] = filled(value, varies)

    def forget(self, name: str) -> None:
        """Drops what a node holds."""
        self.values.pop(name, None)
        self.varies.pop(name, None)

    def run(self, node: fx.Node) -> None:
        """Runs a call whose operands are there."""
        call = Seen(node, self.values, self.varies)
        if is_in_place(node):
            call = Seen(node, self.values | _copied({n.name: self.values[n.name] for n in call.sources}), self.varies)
        result = execute(node, self.values)
        self.values[node.name] = result
        self.varies[node.name] = varies = _varying(call, result)
        if is_in_place(node) and isinstance(result, Tensor):
            self._overwritten(result, varies)

    def _overwritten(self, written: Tensor, varies: Tensor) -> None:
        """Notes that ``written`` holds other numbers now, and so does what shares its memory."""
        for name, value in self.values.items():
            several = isinstance(value, list | tuple)
            for place, tensor in enumerate(value if several else [value]):
                if not isinstance(tensor, Tensor) or not _shares_memory(tensor, written):
                    continue
                new = varies if _is_same_view(tensor, written) else filled(tensor, True)
                if several:
                    self.varies[name][place] = new
                else:
                    self.varies[name] = new


def _varying(call: Seen, result: Any) -> Any:
    """Which elements of the result of a call vary."""
    node = call.node
    if not hasattr(node.target, "_schema"):  # an item of a list, or no operator on tensors
        sources = [call.varies[source.name] for source in node.all_input_nodes]
        if isinstance(result, Tensor) and len(sources) == 1 and isinstance(sources[0], list | tuple):
            return sources[0][node.args[1]]  # type: ignore[index]  # the place is a whole number
        return filled(result, any(map(_some, sources)))
    found = None
    if not _is_random(node):
        if not any(_some(call.varies[source.name]) for source in node.all_input_nodes):
            found = filled(result, False)
        else:
            spread = spread_for(node.target)
            found = None if spread is None else spread(call, result)
    if found is None:
        found = filled(result, True)
    if isinstance(result, list | tuple):
        return [_checked(value, mask) for value, mask in zip(result, found, strict=True)]
    return _checked(result, found)


def _checked(value: Any, mask: Any) -> Any:
    """``mask`` in the shape of ``value``; what is infinite or no number is never taken for a constant."""
    if not isinstance(value, Tensor):
        return mask
    mask = mask.expand(value.shape)
    return mask | ~value.isfinite() if value.is_floating_point() else mask


def _is_random(node: fx.Node) -> bool:
    """Whether what a call gives is drawn, or whatever memory held."""
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    steady = raw_argument(node, "train") is False or raw_argument(node, "dropout_p") == 0
    return node.target in UNSET or (drawn and not steady) or raw_argument(node, "train") is True


def _some(mask: Any) -> bool:
    return any(bool(leaf.any()) if isinstance(leaf, Tensor) else bool(leaf) for leaf in pytree.tree_leaves(mask))


def _copied(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, values)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _is_same_view(one: Tensor, other: Tensor) -> bool:
    views = ((x.shape, x.stride(), x.storage_offset(), x.dtype) for x in (one, other))
    return next(views) == next(views)

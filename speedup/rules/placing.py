"""Operators that read or write at places which another tensor holds: gather, scatter, index_add, index_put."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedup.flow import Flow
from speedup.labels import Labels, broadcast, narrowed
from speedup.rules.call import Call, Rule, present

aten = torch.ops.aten
_REASON = "is written at places that a tensor holds"


def gather(flow: Flow, call: Call) -> Labels:
    """y[..., i, ...] = x[..., index[..., i, ...], ...] along ``dim``, which is frozen; elsewhere places are one."""
    x, table = call["self"], call["index"]
    dim = call.dim(len(x.shape))
    cut = {d for d, size in enumerate(table.shape) if size != x.shape[d]} | {dim}
    frozen = flow.freeze(x, cut, "is gathered by an index")
    single = tuple(1 if d in cut else size for d, size in enumerate(x.shape))
    planes = (
        plane[tuple(slice(0, 1) if d in cut else slice(None) for d in range(plane.dim()))] for plane in frozen.planes
    )
    return flow.meet([Labels(single, tuple(planes)), table], call.shape)


def scatter(flow: Flow, call: Call) -> Labels:
    """y = x, and y[.., index[.., i, ..], ..] = (or +=) source[.., i, ..]: ``dim`` stays whole, the others are one."""
    x = call["self"]
    dim = call.dim(len(x.shape))
    others = [tensor for tensor in call.tensors() if tensor is not x and len(tensor.shape) == len(x.shape)]
    operands = [_without(flow, tensor, [dim], _REASON) for tensor in (x, *others)]
    return _met(flow, call, operands, x.shape, {dim})


def index_put(flow: Flow, call: Call) -> Labels:
    """y = x, and y[.., index, ..] = (or +=) values: indexed dimensions stay whole, the others of x and values are one.

    One number in all places of a mask is elementwise.
    """
    x, values = call["self"], call["values"]
    indices: list[Any] = list(call["indices"])
    places = [dim for dim, value in enumerate(indices) if value is not None]
    first, shapes = places[0], [indices[dim].shape for dim in places]
    indexed = list(range(first, places[-1] + 1))
    spread = len(np.broadcast_shapes(*shapes))  # dimensions that the index makes of those it indexes
    masked = any(flag.dtype in (torch.bool, torch.uint8) for flag in _index_values(call))
    if masked:
        indexed, spread = list(range(first, first + len(shapes[0]))), 1
        if len(places) == 1 and not any(size > 1 for size in values.shape):
            return flow.meet([x, _seen_within(indices[first], first, len(x.shape))], x.shape)
    rank = len(x.shape) - len(indexed) + spread
    if (len(places) > 1 if masked else places != indexed) or len(values.shape) > rank:
        for tensor in call.tensors():
            flow.pin_all(tensor, _REASON)
        return Labels(x.shape)
    values = broadcast(values, (1,) * rank)
    values = _without(flow, values, range(first, first + spread), _REASON, drop=True)
    ones = (slice(None),) * first + (None,) * len(indexed)
    shape = (*values.shape[:first], *(1,) * len(indexed), *values.shape[first:])
    content = Labels(shape, tuple(plane[ones] for plane in values.planes))
    single = tuple(1 if dim in indexed else size for dim, size in enumerate(x.shape))
    met = flow.meet([_without(flow, x, indexed, _REASON), content], single)
    return Labels(x.shape, tuple(plane.expand(x.shape) for plane in met.planes))


def _index_values(call: Call) -> list[Tensor]:
    """The (fake) tensors among the indices of a call."""
    return [node.meta["val"] for node in call.raw("indices") if node is not None]


def _seen_within(x: Labels, first: int, rank: int) -> Labels:
    """A tensor as one of rank ``rank`` whose dimension ``first`` is the first of its own."""
    after = rank - first - len(x.shape)
    shape = (*(1,) * first, *x.shape, *(1,) * after)
    return Labels(shape, tuple(plane[(None,) * first + (...,) + (None,) * after] for plane in x.planes))


def _without(flow: Flow, x: Labels, dims: Iterable[int], reason: str, *, drop: bool = False) -> Labels:
    """``x`` with size 1 along ``dims``, or without them, which must stay as they are."""
    gone = set(dims)
    frozen = flow.freeze(x, gone, reason)
    index = tuple((0 if drop else slice(0, 1)) if dim in gone else slice(None) for dim in range(len(x.shape)))
    sizes = ((dim, 1 if dim in gone else size) for dim, size in enumerate(x.shape))
    shape = tuple(size for dim, size in sizes if not (drop and dim in gone))
    return Labels(shape, tuple(plane[index] for plane in frozen.planes))


def _met(flow: Flow, call: Call, operands: list[Labels], shape: tuple[int, ...], free: set[int]) -> Labels:
    """The operands as one, if they have equal sizes beside the dimensions ``free``; else all of them are pinned."""
    sizes = {tuple(1 if dim in free else size for dim, size in enumerate(operand.shape)) for operand in operands}
    if len(sizes) > 1:
        for operand in operands:
            flow.pin_all(operand, f"goes into {call.node.target} beside a tensor of other sizes")
        return Labels(shape)
    met = flow.meet(operands, np.broadcast_shapes(*(operand.shape for operand in operands)))
    return Labels(shape, tuple(narrowed(plane).expand(shape) for plane in met.planes))


_SCATTERS = (
    "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_add",
    "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_",
)  # fmt: skip

RULES: dict[object, Rule] = {
    aten.gather.default: Rule("index", gather),
    **dict.fromkeys(present(_SCATTERS), Rule("index", scatter)),
    **dict.fromkeys((aten.index_put.default, aten.index_put_.default), Rule("index", index_put)),
}

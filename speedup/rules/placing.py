"""Operators that read or write at places which another tensor holds: gather, scatter, index_add, index_put."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from speedup.flow import Flow
from speedup.labels import Labels, broadcast
from speedup.rules.call import Call, Rule

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
    """y = x, and y[.., index[.., i, ..], ..] = (or +=) source[.., i, ..]: likewise."""
    x = call["self"]
    dim = call.dim(len(x.shape))
    others = [tensor for tensor in call.tensors() if tensor is not x and len(tensor.shape) == len(x.shape)]
    return _met(flow, call, [_without(flow, tensor, [dim], _REASON) for tensor in (x, *others)], x.shape, dim)


def index_put(flow: Flow, call: Call) -> Labels:
    """y = x, and y[.., index, ..] = (or +=) values: indexed dimensions stay whole, the others of x and values are one.

    One number in all places of a mask is elementwise.
    """
    x, values = call["self"], call["values"]
    indices: list[Any] = list(call["indices"])
    places = [dim for dim, value in enumerate(indices) if value is not None]
    first, dims = places[0], list(range(places[0], places[-1] + 1))
    made = int(np.max([len(indices[dim].shape) for dim in places]))  # dimensions that stand for those indexed
    if masked := call.is_masked("indices"):
        dims, made = list(range(first, first + made)), 1
        if len(places) == 1 and not any(size > 1 for size in values.shape):
            return flow.meet([x, _within(indices[first], first, len(x.shape))], x.shape)
    rank = len(x.shape) - len(dims) + made
    if (len(places) > 1 if masked else places != dims) or len(values.shape) > rank:
        for tensor in call.tensors():
            flow.pin_all(tensor, _REASON)
        return Labels(x.shape)
    values = _without(flow, broadcast(values, (1,) * rank), range(first, first + made), _REASON)
    before, after = (slice(None),) * first, (slice(None),) * (rank - first - made)
    spread = (*before, *(0,) * made, *(None,) * len(dims), *after)
    shape = (*values.shape[:first], *(1,) * len(dims), *values.shape[first + made :])
    rest = Labels(shape, tuple(plane[spread] for plane in values.planes))
    kept = _without(flow, x, dims, _REASON)
    met = flow.meet([kept, rest], kept.shape)
    return Labels(x.shape, tuple(plane.expand(x.shape) for plane in met.planes))


def _within(x: Labels, first: int, rank: int) -> Labels:
    """A tensor as one of rank ``rank`` whose dimension ``first`` is the first of its own."""
    after = rank - first - len(x.shape)
    index = (*(None,) * first, ..., *(None,) * after)
    return Labels((*(1,) * first, *x.shape, *(1,) * after), tuple(plane[index] for plane in x.planes))


def _without(flow: Flow, x: Labels, dims: Iterable[int], reason: str) -> Labels:
    """``x`` with size 1 along ``dims``, which must stay as they are."""
    gone = set(dims)
    index = tuple(slice(0, 1) if dim in gone else slice(None) for dim in range(len(x.shape)))
    shape = tuple(1 if dim in gone else size for dim, size in enumerate(x.shape))
    return Labels(shape, tuple(plane[index] for plane in flow.freeze(x, gone, reason).planes))


def _met(flow: Flow, call: Call, operands: list[Labels], shape: tuple[int, ...], free: int) -> Labels:
    """The operands as one, if they have equal sizes beside dimension ``free``; else all of them are pinned."""
    if len({(*operand.shape[:free], *operand.shape[free + 1 :]) for operand in operands}) > 1:
        for operand in operands:
            flow.pin_all(operand, f"goes into {call.node.target} beside a tensor of other sizes")
        return Labels(shape)
    widest = max((operand.shape for operand in operands), key=lambda sizes: sizes[free])
    met = flow.meet(operands, widest)
    return Labels(shape, tuple(plane.expand(shape) for plane in met.planes))


_SCATTERS = (
    aten.scatter.src, aten.scatter.value, aten.scatter_.src, aten.scatter_.value, aten.scatter_add.default,
    aten.scatter_add_.default, aten.scatter_reduce.two, aten.scatter_reduce_.two, aten.index_add.default,
    aten.index_add_.default, aten.index_copy.default, aten.index_copy_.default, aten.index_fill.int_Scalar,
    aten.index_fill_.int_Scalar,
)  # fmt: skip

RULES: dict[object, Rule] = {
    aten.gather.default: Rule("index", gather),
    **dict.fromkeys(_SCATTERS, Rule("index", scatter)),
    **dict.fromkeys((aten.index_put.default, aten.index_put_.default), Rule("index", index_put)),
}

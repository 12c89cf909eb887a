"""Operators that take parts of a tensor or put tensors together: split, slice, index, cat, stack, pad."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speedup.flow import SHARED, Flow
from speedup.labels import Labels, Plane, narrowed, settle, support
from speedup.rules.call import Call, Rule
from speedup.rules.movement import along

aten = torch.ops.aten


def split(flow: Flow, call: Call) -> list[Labels]:
    """y_k = the k-th part of x along ``dim``; parts of equal size stay equal."""
    x = call["self"]
    dim = call.dim(len(x.shape))
    starts = [0]
    for shape in call.outputs:
        starts.append(starts[-1] + shape[dim])
    equal = len({shape[dim] for shape in call.outputs}) == 1 and len(call.outputs) > 1
    for plane in x.along(dim):
        if equal and call.node.target in _EQUAL_SPLITS and starts[1] > 1:
            parts = plane.unflatten(dim, (len(call.outputs), -1))
            flow.block(parts, [d for d in support(parts) if d <= dim or d != support(parts)[-1]])
    return [_cut(flow, x, dim, start, shape) for start, shape in zip(starts, call.outputs, strict=False)]


def glu(flow: Flow, call: Call) -> Labels:
    """y = a * sigmoid(b) for the two halves a, b of x along ``dim``."""
    x: Labels = call["self"]
    dim = call.dim(len(x.shape))
    return flow.meet([_cut(flow, x, dim, start, call.shape) for start in (0, call.shape[dim])], call.shape)


def _cut(flow: Flow, x: Labels, dim: int, start: int, shape: tuple[int, ...]) -> Labels:
    """The part of a tensor that begins at ``start`` along ``dim``."""
    planes = []
    for plane in x.planes if shape[dim] else ():  # nothing has no labels
        part = plane.narrow(dim, start, shape[dim])
        if dim in support(plane) and shape[dim] < plane.shape[dim]:
            flow.part(part, dim)
        planes.append(part)
    return Labels(shape, tuple(planes))


def cat(flow: Flow, call: Call) -> Labels:
    """y = x_0, x_1, ... along ``dim``; across the other dimensions the operands are one."""
    dim = call.dim(len(call.shape))
    operands = [operand for operand in call["tensors"] if operand.shape != (0,) and operand.shape[dim]]
    joint = {d for operand in operands for plane in operand.along(dim) for d in support(plane)}
    pieces = [_refined(flow, operand, dim, joint) for operand in operands]
    others = [across for _, across in pieces]
    carried = [plane.expand(call.shape) for plane in flow.meet(others, others[0].shape).planes]
    if joint:
        joined = settle(torch.cat([narrowed(fine, joint) for fine, _ in pieces], dim).expand(call.shape))
        rows = joint - {dim}
        for plane in (plane for operand in operands if not operand.along(dim) for plane in operand.planes):
            if rows and {*support(plane)} == rows:  # a part of each row is fixed: rows go whole, or not at all
                flow.block(joined, sorted(rows), slabs=narrowed(plane.narrow(dim, 0, 1)).expand(call.shape))
        carried.append(joined)
    return Labels(call.shape, tuple(carried))


def _refined(flow: Flow, operand: Labels, dim: int, joint: set[int]) -> tuple[Plane, Labels]:
    """The plane that ``operand`` brings along ``dim`` (fixed atoms where it has none), and its labels across ``dim``.

    Beside operands whose plane varies along more dimensions (the features of each head) the plane is made as fine, if
    the operand has labels there: what it had counts slabs of it.
    """
    brought = piece(flow, operand, dim) if joint else flow.mint(operand.shape, [dim])
    across = [plane for plane in operand.planes if dim not in support(plane)]
    nested = [plane for plane in across if {*support(plane)} < joint]
    if {*support(brought), dim} != joint == {dim, *support(brought), *(d for plane in nested for d in support(plane))}:
        fine = flow.mint(operand.shape, sorted(joint))
        for plane in (brought, *nested):
            if support(plane):
                flow.block(fine, support(plane), slabs=plane)
        brought, across = fine, [plane for plane in across if not {*support(plane)} < joint]
    shape = tuple(1 if d == dim else size for d, size in enumerate(operand.shape))
    return brought, Labels(shape, tuple(plane.narrow(dim, 0, 1) for plane in across))


def piece(flow: Flow, operand: Labels, dim: int) -> Plane:
    """The plane that ``operand`` brings along ``dim``; fixed atoms where it has none."""
    planes = operand.along(dim)
    for extra in planes[1:]:
        flow.pin(extra, SHARED)
    if planes:
        return planes[0]
    minted = flow.mint(operand.shape, [dim])
    flow.pin(minted, "is concatenated with a tensor whose size is fixed")
    return minted


def stack(flow: Flow, call: Call) -> Labels:
    """y[k] = x_k: a new dimension of fixed size."""
    operands: Sequence[Labels] = call["tensors"]
    dim = call.dim(len(call.shape))
    united = flow.meet(operands, operands[0].shape)
    return Labels(call.shape, tuple(plane.unsqueeze(dim).expand(call.shape) for plane in united.planes))


def pad(flow: Flow, call: Call) -> Labels:
    """y = x with constant borders: along a labelled dimension the border brings atoms of its own."""
    x: Labels = call["self"]
    amounts: list[int] = list(call["pad"])
    rank = len(x.shape)
    borders = {rank - 1 - i: (amounts[2 * i], amounts[2 * i + 1]) for i in range(len(amounts) // 2)}
    borders = {dim: border for dim, border in borders.items() if border != (0, 0)}
    if call.get("mode", "constant") != "constant":
        x = flow.freeze(x, borders, "is padded by reflection or repetition")
    planes = []
    for plane in x.planes:
        padded, shape = plane, list(plane.shape)
        for dim, border in borders.items():
            if dim in support(padded):
                padded = _bordered(flow, padded, dim, border)
            shape[dim] = call.shape[dim]
            padded = padded.expand(shape) if padded.shape[dim] == shape[dim] else narrowed(padded).expand(shape)
        planes.append(padded)
    return Labels(call.shape, tuple(planes))


def _bordered(flow: Flow, plane: Plane, dim: int, border: tuple[int, int]) -> Plane:
    """``plane`` with new atoms before and after it along ``dim``; a negative amount cuts."""
    before, after = border
    inner = narrowed(plane).narrow(dim, max(-before, 0), plane.shape[dim] + min(before, 0) + min(after, 0))

    def filler(amount: int) -> Plane:
        return flow.mint([max(amount, 0) if d == dim else size for d, size in enumerate(inner.shape)], [dim])

    joined = torch.cat([filler(before), inner, filler(after)], dim)
    return joined.expand([joined.shape[dim] if d == dim else size for d, size in enumerate(plane.shape)])


def index_select(flow: Flow, call: Call) -> Labels:
    """y[..., i, ...] = x[..., index[i], ...]: literal where the index is a constant, else ``dim`` is frozen."""
    x = call["self"]
    dim = call.dim(len(x.shape))
    if "index" in call.constants:
        _note_parts(flow, x, dim, call.constants["index"])
        return along(flow, call)
    frozen = flow.freeze(x, [dim], "is indexed by a tensor that depends on the input")
    return Labels(call.shape, tuple(narrowed(plane).expand(call.shape) for plane in frozen.planes))


def _note_parts(flow: Flow, x: Labels, dim: int, index: Tensor) -> None:
    """Notes that the indices taken along ``dim`` are a tensor of their own."""
    for plane in x.along(dim):
        flow.part(settle(narrowed(plane, [dim]).index_select(dim, index)), dim)


def index(flow: Flow, call: Call) -> Labels:
    """y = x[..., index, ...]: indexed dimensions are frozen, the others are carried.

    A single one-dimensional constant index moves the planes literally.
    """
    x: Labels = call["self"]
    indices: list[Any] = list(call["indices"])
    places = [dim for dim, value in enumerate(indices) if value is not None]
    values = call.constants.get("indices", {})
    if (
        len(places) == 1
        and places[0] in values
        and values[places[0]].dim() == 1
        and values[places[0]].dtype == torch.int64
    ):
        dim = places[0]
        _note_parts(flow, x, dim, values[dim] % x.shape[dim])
        planes = [
            settle(narrowed(plane, [dim]).index_select(dim, values[dim] % x.shape[dim]).expand(call.shape))
            if dim in support(plane)
            else narrowed(plane).expand(call.shape)
            for plane in x.planes
        ]
        return Labels(call.shape, tuple(planes))
    frozen = flow.freeze(x, places, "is indexed by a table", structural=True)
    masked = call.is_masked("indices")
    if masked or places != list(range(places[0], places[-1] + 1)):
        why = "by a mask" if masked else "along dimensions that are not neighbours"
        flow.pin_all(frozen, f"is indexed {why}")
        return Labels(call.shape)
    after = len(x.shape) - 1 - places[-1]
    planes = []
    for plane in frozen.planes:
        kept = plane[tuple(0 if dim in places else slice(None) for dim in range(plane.dim()))]
        middle = (None,) * (len(call.shape) - places[0] - after)
        planes.append(kept[(slice(None),) * places[0] + middle].expand(call.shape))
    return Labels(call.shape, tuple(planes))


def scalar_index(flow: Flow, call: Call) -> Labels:
    """y = x[..., index, ...]: one index of a dimension is taken and the dimension is gone."""
    x = call["self"]
    dim = call.dim(len(x.shape))
    place = int(call["index"]) % x.shape[dim]
    single = tuple(1 if d == dim else size for d, size in enumerate(x.shape))
    part = _cut(flow, x, dim, place, single)
    return Labels(call.shape, tuple(plane.select(dim, 0) for plane in part.planes))


def unbind(flow: Flow, call: Call) -> list[Labels]:
    """y_k = x[..., k, ...] for every index of a dimension, which is gone."""
    x = call["self"]
    dim = call.dim(len(x.shape))
    single = tuple(1 if d == dim else size for d, size in enumerate(x.shape))
    parts = [_cut(flow, x, dim, place, single) for place in range(x.shape[dim])]
    return [
        Labels(shape, tuple(p.select(dim, 0) for p in part.planes))
        for shape, part in zip(call.outputs, parts, strict=True)
    ]


def sliced(flow: Flow, call: Call) -> Labels:
    """y = x[..., start:end:step, ...]; in steps, what is left of x must take turns as all of it did."""
    x = call["self"]
    dim = call.dim(len(x.shape))
    start, _, step = slice(call.get("start", 0), call.get("end"), call["step"]).indices(x.shape[dim])
    if step == 1:
        return _cut(flow, x, dim, start, call.shape)
    if x.shape[dim] % step or any(len(support(plane)) > 1 for plane in x.along(dim)):
        x = flow.freeze(x, [dim], "is taken in steps")
    places = torch.arange(start, start + step * call.shape[dim], step)
    for plane in x.along(dim):
        flow.turns(plane, dim, step)
        flow.part(plane.index_select(dim, places), dim)
    taken = (narrowed(p).index_select(dim, places) if dim in support(p) else narrowed(p) for p in x.planes)
    return Labels(call.shape, tuple(settle(plane.expand(call.shape)) for plane in taken))


def embedding(flow: Flow, call: Call) -> Labels:
    """y[i, :] = W[index[i], :]: the vocabulary stays, the width is carried."""
    weight = flow.freeze(call["weight"], [0], "is looked up by index", structural=True)
    return Labels(call.shape, tuple(plane[0].expand(call.shape) for plane in weight.planes))


def embedding_bag(flow: Flow, call: Call) -> list[Labels]:
    """y[b, :] = the sum, mean or maximum of W[index[i], :] over the i of bag b; the width is carried."""
    weight = flow.freeze(call["weight"], [0], "is looked up by index", structural=True)
    for other in call.tensors()[1:]:
        flow.pin_all(other, "goes with the indices of a bag")
    width = weight.shape[1]
    return [
        Labels(shape, tuple(p[0].expand(shape) for p in weight.planes) if len(shape) == 2 and shape[1] == width else ())
        for shape in call.outputs
    ]


def renormed(flow: Flow, call: Call) -> Labels:
    """W[index[i], :] made no longer than ``max_norm``, in place: what is masked counts for nothing."""
    return flow.freeze(call["self"], [0], "is looked up by index", structural=True)


_SPLITS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes,
    aten.tensor_split.sections, aten.tensor_split.indices,
)  # fmt: skip
_EQUAL_SPLITS = (aten.split.Tensor, aten.chunk.default, aten.tensor_split.sections)

RULES = {
    **dict.fromkeys(_SPLITS, Rule("split", split, moves=True)),
    aten.glu.default: Rule("elementwise", glu),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), Rule("pad", pad)),
    aten.index_select.default: Rule("index", index_select, moves=True),
    aten.cat.default: Rule("concat", cat, moves=True),
    aten.concat.default: Rule("concat", cat, moves=True),
    aten.stack.default: Rule("concat", stack, moves=True),
    aten.embedding.default: Rule("index", embedding),
    **dict.fromkeys((aten.embedding_bag.default, aten.embedding_bag.padding_idx), Rule("index", embedding_bag)),
    aten.embedding_renorm_.default: Rule("norm", renormed),
    aten.index.Tensor: Rule("index", index, moves=True),
    aten.unbind.int: Rule("split", unbind, moves=True),
    aten.select.int: Rule("slice", scalar_index, moves=True),
    aten.slice.Tensor: Rule("slice", sliced, moves=True),
}

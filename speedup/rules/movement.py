"""Operators that give the elements of a tensor other places: they are executed on the planes literally."""

import torch
from torch import Tensor

from speedup.flow import Flow
from speedup.labels import Labels, Plane, core, narrowed, settle, support
from speedup.rules.call import Call, Rule, numel

aten = torch.ops.aten


def reshape(flow: Flow, call: Call) -> Labels:
    """y = x in row-major order under another shape."""
    return _like_other(flow, call, flow.reshape(call.tensors()[0], call.shape))


def literal(flow: Flow, call: Call) -> Labels | list[Labels]:
    """y = op(x) for an operator that reorders or drops whole dimensions: the planes go through the operator itself."""
    x = call.tensors()[0]
    arguments = {name: value for name, value in call.values.items() if not isinstance(value, Labels)}
    moved = [call.node.target(plane, **arguments) for plane in x.planes]  # type: ignore[operator]  # an OpOverload
    if len(call.outputs) == 1 and not isinstance(call.node.meta["val"], list | tuple):
        return Labels(call.shape, tuple(moved))
    return [Labels(shape, tuple(parts[position] for parts in moved)) for position, shape in enumerate(call.outputs)]


def along(flow: Flow, call: Call) -> Labels:
    """y = op(x) for an operator that acts along a few dimensions (roll, flip, slice, select by constant index)."""
    x = call.tensors()[0]
    touched = set(call.dims(len(x.shape), "dims" if "dims" in call.values else "dim"))
    return Labels(call.shape, tuple(_executed(call, plane, touched) for plane in x.planes))


def _executed(call: Call, plane: Plane, touched: set[int]) -> Plane:
    if not touched.intersection(support(plane)):
        touched = set()
    arguments = {name: value for name, value in call.values.items() if not isinstance(value, Labels)}
    arguments |= {name: value for name, value in call.constants.items() if name != "self"}
    if not touched:
        return narrowed(plane).expand(call.shape)
    moved: Tensor = call.node.target(narrowed(plane, touched), **arguments)  # type: ignore[operator]  # an OpOverload
    return settle(moved.expand(call.shape))


def expand(flow: Flow, call: Call) -> Labels:
    """y = x repeated along dimensions of size 1: what is repeated can shrink, so it brings atoms of its own."""
    x = call.tensors()[0]
    missing = len(call.shape) - len(x.shape)
    old = (1,) * missing + x.shape
    grown = [dim for dim, size in enumerate(call.shape) if size > 1 and old[dim] == 1 and dim not in call.batch_dims[0]]
    planes = [plane[(None,) * missing].expand(call.shape) for plane in x.planes]
    return _like_other(flow, call, Labels(call.shape, (*planes, *(flow.copy(call.shape, dim) for dim in grown))))


def _like_other(flow: Flow, call: Call, labels: Labels) -> Labels:
    """``labels``, tied to the tensor whose shape they take where the operator has one."""
    return flow.meet([labels, call["other"]], call.shape) if call.get("other") else labels


def repeat(flow: Flow, call: Call) -> Labels:
    """y = x tiled: literal, and atoms of its own where a dimension of size 1 is repeated."""
    x = call["self"]
    missing = len(call.shape) - len(x.shape)
    old = (1,) * missing + x.shape
    repeats = list(call["repeats"])
    planes = []
    for plane in x.planes:
        wide = plane[(None,) * missing]
        tiled = narrowed(wide).repeat([n if dim in support(wide) else 1 for dim, n in enumerate(repeats)])
        planes.append(tiled.expand(call.shape))
    grown = [dim for dim, n in enumerate(repeats) if n > 1 and old[dim] == 1 and dim not in call.batch_dims[0]]
    return Labels(call.shape, (*planes, *(flow.mint(call.shape, [dim]) for dim in grown)))


def repeat_interleave(flow: Flow, call: Call) -> Labels:
    """y[i * n + j] = x[i] along ``dim``."""
    x = call["self"]
    if call.get("dim") is None:
        x = flow.reshape(x, (numel(x.shape),))
    dim = 0 if call.get("dim") is None else call.dim(len(x.shape))
    planes = [
        settle(narrowed(plane).repeat_interleave(call["repeats"], dim).expand(call.shape))
        if dim in support(plane)
        else narrowed(plane).expand(call.shape)
        for plane in x.planes
    ]
    return Labels(call.shape, tuple(planes))


def constant(flow: Flow, call: Call) -> Labels:
    """y[i] = c: content that is the same everywhere can shrink anywhere, so each dimension brings its own atoms."""
    dims = [dim for dim, size in enumerate(call.shape) if size > 1 and dim not in call.batch_dims[0]]
    planes = tuple(flow.mint(call.shape, [dim]) for dim in dims)
    for plane in planes:
        flow.keep_some(plane)
    return Labels(call.shape, planes)


def squeeze(flow: Flow, call: Call) -> Labels:
    """y = x without dimensions of size 1."""
    x = call["self"]
    return Labels(call.shape, tuple(core_shape(plane, call.shape) for plane in x.planes))


def core_shape(plane: Plane, shape: tuple[int, ...]) -> Plane:
    """``plane`` under a shape that differs in dimensions of size 1 only."""
    return plane.reshape(shape) if plane.numel() < 2 else core(plane).reshape(_ones(plane, shape)).expand(shape)


def _ones(plane: Plane, shape: tuple[int, ...]) -> list[int]:
    varying = [dim in support(plane) for dim, size in enumerate(plane.shape) if size > 1]
    flags = iter(varying)
    return [size if size > 1 and next(flags) else 1 for size in shape]


_RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
_LITERAL = (
    aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default,
    aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default, aten.unsqueeze.default,
    aten.adjoint.default,
)  # fmt: skip
_ALONG = (aten.roll.default, aten.flip.default)
_EXPANDS = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
_CONSTANTS = (
    aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
)  # fmt: skip

RULES = {
    **dict.fromkeys(_RESHAPES, Rule("reshape", reshape, moves=True)),
    **dict.fromkeys(_LITERAL, Rule("permute", literal, moves=True)),
    **dict.fromkeys(_ALONG, Rule("permute", along, moves=True)),
    **dict.fromkeys(_EXPANDS, Rule("expand", expand)),
    **dict.fromkeys(_CONSTANTS, Rule("constant", constant)),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims), Rule("reshape", squeeze, moves=True)),
    aten.repeat.default: Rule("expand", repeat),
    aten.repeat_interleave.self_int: Rule("expand", repeat_interleave, moves=True),
}

"""Operators that move elements between space and channels, or cut space into windows: space itself never shrinks."""

import torch

from speedup.flow import Flow
from speedup.labels import Labels, Plane, narrowed, settle, support
from speedup.rules.call import Call, Rule

aten = torch.ops.aten
_MOVED = "is moved between space and channels"


def pixel_shuffle(flow: Flow, call: Call) -> Labels:
    """y[c, h * r + i, w * r + j] = x[(c * r + i) * r + j, h, w]: the r * r channels behind one of y go together."""
    x: Labels = call["self"]
    dim = len(x.shape) - 3
    x = flow.freeze(x, [dim + 1, dim + 2], _MOVED)
    planes = _together(flow, x, dim, x.shape[dim] // call.shape[dim])
    return Labels(call.shape, tuple(narrowed(plane).expand(call.shape) for plane in planes))


def pixel_unshuffle(flow: Flow, call: Call) -> Labels:
    """y[(c * r + i) * r + j, h, w] = x[c, h * r + i, w * r + j]: one channel of x becomes r * r of y."""
    x: Labels = call["self"]
    dim = len(x.shape) - 3
    x = flow.freeze(x, [dim + 1, dim + 2], _MOVED)
    planes = [_spread(plane, dim, call.shape[dim] // x.shape[dim]) for plane in x.planes]
    return Labels(call.shape, tuple(plane.expand(call.shape) for plane in planes))


def windows(flow: Flow, call: Call) -> Labels:
    """y[(c, i, j), l] = x[c, row l + i, column l + j]: one channel of x becomes one for each place in a window."""
    x: Labels = call["self"]
    dim = len(x.shape) - 3
    x = flow.freeze(x, [dim + 1, dim + 2], _MOVED)
    planes = [_spread(plane, dim, call.shape[dim] // x.shape[dim])[..., 0] for plane in x.planes]
    return Labels(call.shape, tuple(plane.expand(call.shape) for plane in planes))


def folded(flow: Flow, call: Call) -> Labels:
    """y[c, row l + i, column l + j] = the sum of x[(c, i, j), l]: the channels behind one of y go together."""
    x: Labels = call["self"]
    dim = len(x.shape) - 2
    x = flow.freeze(x, [dim + 1], _MOVED)
    planes = _together(flow, x, dim, x.shape[dim] // call.shape[dim])
    return Labels(call.shape, tuple(narrowed(plane)[..., None].expand(call.shape) for plane in planes))


def sliding(flow: Flow, call: Call) -> Labels:
    """y[..., l, ..., i] = x[..., l * step + i, ...]: the dimension that is cut into windows stays."""
    x: Labels = call["self"]
    dim = call.dim(len(x.shape), "dimension")
    x = flow.freeze(x, [dim], "is cut into windows")
    return Labels(call.shape, tuple(narrowed(plane)[..., None].expand(call.shape) for plane in x.planes))


def unpooled(flow: Flow, call: Call) -> Labels:
    """y[b, c, place[b, c, l]] = x[b, c, l], places in space as max pooling gives them, zero elsewhere."""
    rank = 3 if call.node.target is aten.max_unpool3d.default else 2
    x, places = (
        flow.freeze(tensor, range(len(tensor.shape) - rank, len(tensor.shape)), "varies over a space that is unpooled")
        for tensor in call.tensors()
    )
    planes = flow.meet([x, places], x.shape).planes
    return Labels(call.shape, tuple(narrowed(plane).expand(call.shape) for plane in planes))


def channel_shuffle(flow: Flow, call: Call) -> Labels:
    """y[b, (k, g), ...] = x[b, (g, k), ...]: the groups take turns."""
    x: Labels = call["self"]
    batch, channels, *space = x.shape
    groups = int(call["groups"])
    rows = flow.reshape(x, (batch, groups, channels // groups, *space))
    turned = Labels((batch, channels // groups, groups, *space), tuple(plane.transpose(1, 2) for plane in rows.planes))
    return flow.reshape(turned, call.shape)


def _together(flow: Flow, x: Labels, dim: int, area: int) -> list[Plane]:
    """The planes of ``x`` with every ``area`` channels along ``dim`` made one."""
    planes = []
    for plane in x.planes:
        if dim not in support(plane):
            planes.append(narrowed(plane))
            continue
        squares = settle(torch.unflatten(plane, dim, (-1, area)))
        whole = flow.freeze(Labels(tuple(squares.shape), (squares,)), [dim + 1], _MOVED)
        planes += [part.select(dim + 1, 0) for part in whole.planes]
    return planes


def _spread(plane: Plane, dim: int, area: int) -> Plane:
    """``plane`` with every channel along ``dim`` ``area`` times, size 1 where it does not vary."""
    return narrowed(plane).repeat_interleave(area, dim) if dim in support(plane) else narrowed(plane)


RULES = {
    aten.pixel_shuffle.default: Rule("reshape", pixel_shuffle, moves=True),
    aten.pixel_unshuffle.default: Rule("reshape", pixel_unshuffle, moves=True),
    aten.channel_shuffle.default: Rule("reshape", channel_shuffle, moves=True),
    aten.im2col.default: Rule("reshape", windows),
    aten.col2im.default: Rule("reshape", folded),
    aten.unfold.default: Rule("reshape", sliding, moves=True),
    **dict.fromkeys((aten.max_unpool2d.default, aten.max_unpool3d.default), Rule("pooling", unpooled)),
}

"""Recurrent layers and cells: G gates of H hidden units each, whose state feeds back, and goes up to the next layer.

A weight of shape (G * H, I) is seen as (G, H, I): unit h is row h of every gate, of the bias, of the state and, where
the state is projected, column h of the projection. A unit whose weights are zero and that starts from zero stays zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from speedup.flow import Flow
from speedup.labels import Labels, settle, support
from speedup.rules.call import Call, Rule, RuleFunction
from speedup.rules.contraction import contract
from speedup.rules.indexing import piece

aten = torch.ops.aten
_PLACES = "is a step or an example of a recurrent layer"
_START = "meets a first state whose size is fixed"


def layers(gates: int, states: int) -> RuleFunction:
    """The rule of stacked recurrent layers with so many gates and states (hidden, and the cell of an LSTM)."""

    def rule(flow: Flow, call: Call) -> list[Labels]:
        """s[t, h] = f(sum_i x[t, i] W[(g, h), i] + sum_k y[t - 1, k] U[(g, h), k] + b[(g, h)], s[t - 1, h]), y = s.

        An LSTM may project it: y[t, p] = sum_h s[t, h] R[p, h]. Both directions of a layer are joined, y = (y>, y<),
        and are x of the next layer. First and last states are stacked, shape (layers * directions, batch, H or P): all
        layers and directions keep the same number of units, each its own. Zeros to start from follow in number only.
        """
        if call.get("train") and call.get("dropout") and not flow.training:
            for tensor in call.tensors():
                flow.pin_all(tensor, "goes through a dropout that is random in evaluation too")
            return [Labels(shape) for shape in call.outputs]
        first = call["hx"] if states > 1 else [call["hx"]]
        rows = first[0].shape[0]
        directions = 2 if call["bidirectional"] else 1
        every = call["params"]
        cells = [every[len(every) * row // rows : len(every) * (row + 1) // rows] for row in range(rows)]
        starts = [_start(flow, state, zero and rows > 1) for state, zero in zip(first, _zeros(call), strict=True)]
        steps = _last(flow, call["input"])
        ends: list[list[Labels]] = []
        for layer in range(rows // directions):
            beside = range(layer * directions, (layer + 1) * directions)
            for row in beside:
                start = [[state[row]] if state else [] for state in starts]
                ends.append(_cell(flow, steps, cells[row], start, gates, biased=bool(call["has_biases"])))
            steps = _joined(flow, [ends[row][0] for row in beside])
        outputs = [Labels(call.outputs[0], tuple(plane.expand(call.outputs[0]) for plane in steps.planes))]
        for place, state in enumerate(first):
            outputs.append(_stacked(flow, [end[place] for end in ends], state.shape))
            if not starts[place]:
                _follow(flow, state, outputs[-1])
        return outputs

    return rule


def cell(gates: int, states: int) -> RuleFunction:
    """The rule of one step of a recurrent layer with so many gates and states."""

    def rule(flow: Flow, call: Call) -> Labels | list[Labels]:
        """s'[h] = f(sum_i x[i] W[(g, h), i] + sum_k s[k] U[(g, h), k] + b[(g, h)], s[h])."""
        first = call["hx"] if states > 1 else [call["hx"]]
        weights = [call["w_ih"], call["w_hh"], *(call[name] for name in ("b_ih", "b_hh") if call.get(name))]
        start = [[_last(flow, state)] for state in first]
        ends = _cell(flow, _last(flow, call["input"]), weights, start, gates, biased=len(weights) > 2)
        outputs = [
            Labels(shape, tuple(plane.expand(shape) for plane in end.planes))
            for shape, end in zip(call.outputs, ends[:states], strict=True)
        ]
        return outputs if states > 1 else outputs[0]

    return rule


def _cell(
    flow: Flow, x: Labels, weights: Sequence[Labels], start: Sequence[Sequence[Labels]], gates: int, biased: bool
) -> list[Labels]:
    """The labels of what one layer in one direction gives out, shape (H or P,), and of its units, shape (H,)."""
    inputs, feedback, *rest = weights
    from_x, from_y = (_units(flow, weight, gates) for weight in (inputs, feedback))
    biases = [_units(flow, bias, gates) for bias in (rest[:2] if biased else [])]
    projection = rest[2 * biased :]
    size = from_x.shape[:1]
    units = flow.meet([contract(flow, [(x, "i"), (from_x, "hi")], "h"), *biases], size)
    given = units
    if projection:
        _outnumber(flow, units, projection[0].shape[0])
        given = contract(flow, [(units, "h"), (projection[0], "ph")], "p")
    units = flow.meet([units, contract(flow, [(given, "k"), (from_y, "hk")], "h")], size)
    ends = [given if projection else units, units]
    return [flow.meet([end, *first], end.shape, _START) for end, first in zip(ends, (start[0], start[-1]), strict=True)]


def _outnumber(flow: Flow, units: Labels, projected: int) -> None:
    """Keeps more units than they are projected to: by the two numbers PyTorch tells whether there is a projection."""
    for plane in units.planes:
        if units.shape[0] > projected + 1:
            flow.keep_some(plane, projected + 1)
        else:
            flow.pin(plane, "is projected to one channel less")


def _units(flow: Flow, weight: Labels, gates: int) -> Labels:
    """A weight of shape (G * H, ...) as one of shape (H, ...): the gates of a unit go together."""
    shape = (gates, weight.shape[0] // gates, *weight.shape[1:])
    parts = Labels(shape, tuple(settle(plane.reshape(shape)) for plane in weight.planes))
    return _without(flow, parts, 1, "is a gate of a recurrent layer")


def _last(flow: Flow, tensor: Labels) -> Labels:
    """The last dimension of a tensor; along the others, time and batch, nothing may go."""
    return _without(flow, tensor, len(tensor.shape) - 1, _PLACES)


def _without(flow: Flow, tensor: Labels, count: int, reason: str) -> Labels:
    """A tensor without its first ``count`` dimensions, which must stay as they are."""
    whole = flow.freeze(tensor, range(count), reason, structural=True)
    return Labels(tensor.shape[count:], tuple(plane[(0,) * count] for plane in whole.planes))


def _start(flow: Flow, state: Labels, zero: bool) -> list[Labels]:
    """The rows of a first state, each of shape (H,); none where it is zero everywhere, so that any number will do."""
    whole = flow.freeze(state, [1], _PLACES, structural=True)
    for plane in whole.planes:
        if support(plane) == (0,):
            flow.pin(plane, "is a layer or a direction", structural=True)
    planes = [plane for plane in whole.planes if support(plane) != (0,)]
    return [] if zero else [Labels(state.shape[2:], tuple(p[row, 0] for p in planes)) for row in range(state.shape[0])]


def _zeros(call: Call) -> list[bool]:
    """For each first state whether it is zeros that nothing else can change or read."""
    raw: Any = call.raw("hx")
    nodes: Sequence[fx.Node] = raw if isinstance(raw, list | tuple) else [raw]
    return [node.target in _FILLED and all(user.target in RULES for user in node.users) for node in nodes]


def _joined(flow: Flow, parts: Sequence[Labels]) -> Labels:
    """What the directions of a layer give out, one after the other."""
    if not any(part.planes for part in parts):
        return Labels((sum(part.shape[0] for part in parts),))
    plane = torch.cat([piece(flow, part, 0) for part in parts])
    return Labels(tuple(plane.shape), (plane,))


def _stacked(flow: Flow, parts: Sequence[Labels], shape: tuple[int, ...]) -> Labels:
    """The states of all layers and directions, each a row; all rows keep the same number."""
    if not any(part.planes for part in parts):
        return Labels(shape)
    plane = settle(torch.stack([piece(flow, part, 0) for part in parts])[:, None].expand(shape))
    if 0 in support(plane):
        flow.block(plane, [0], every=True)
    return Labels(shape, (plane,))


def _follow(flow: Flow, zeros: Labels, states: Labels) -> None:
    """Gives zeros to start from as many units as each row of the states has."""
    for plane in zeros.planes:
        if support(plane) == (2,) and states.planes:
            flow.unite(plane[0, 0], states.planes[0][0, 0])
        else:
            flow.pin(plane, _START)


_FILLED = (aten.zeros.default, aten.new_zeros.default)

RULES = {
    aten.lstm.input: Rule("recurrent", layers(4, 2)),
    aten.gru.input: Rule("recurrent", layers(3, 1)),
    **dict.fromkeys((aten.rnn_tanh.input, aten.rnn_relu.input), Rule("recurrent", layers(1, 1))),
    aten.lstm_cell.default: Rule("recurrent", cell(4, 2)),
    aten.gru_cell.default: Rule("recurrent", cell(3, 1)),
    **dict.fromkeys((aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default), Rule("recurrent", cell(1, 1))),
}

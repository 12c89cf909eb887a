"""How what varies spreads through each operator: the masks of its operands -> the mask of what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from speedup.masked import execute
from speedup.rules import contraction, indexing, movement, norm, placing, pointwise, reduction, rule_for, space
from speedup.rules.call import RuleFunction, present, raw_argument

aten = torch.ops.aten
CLOSE = 1e-9
"""How far apart, relative to their size, numbers in double precision may be that are one."""


@dataclass(frozen=True)
class Seen:
    """A call, what its operands hold, and what of that varies."""

    node: fx.Node
    values: Mapping[str, Any]
    varies: Mapping[str, Any]

    @property
    def sources(self) -> list[fx.Node]:
        """The operands that are tensors, each once."""
        return [source for source in self.node.all_input_nodes if isinstance(self.values[source.name], Tensor)]

    def raw(self, name: str) -> Any:
        """Argument ``name`` as it stands in the graph."""
        return raw_argument(self.node, name)

    @property
    def first(self) -> Any:
        """The first argument as it stands in the graph."""
        return self.raw(self.node.target._schema.arguments[0].name)  # type: ignore[union-attr]  # an OpOverload

    def again(self, changed: Mapping[str, Any]) -> Any:
        """What the call gives where some of its operands hold something else."""
        return execute(self.node, {**self.values, **changed})

    def open(self, source: fx.Node) -> Tensor:
        """Which elements of an operand vary."""
        mask: Tensor = self.varies[source.name]
        return mask

    def number(self, source: fx.Node) -> Tensor:
        """What an operand holds."""
        value: Tensor = self.values[source.name]
        return value

    def beside(self, *data: fx.Node) -> bool:
        """Whether an operand other than ``data`` varies; what only lends its shape does not count."""
        shape = self.raw("other") if rule_of(self.node) in _SHAPED else None
        return any(
            bool(self.open(source).any()) for source in self.sources if source not in data and source is not shape
        )


def rule_of(node: fx.Node) -> RuleFunction | None:
    """The rule of the labels of a call."""
    rule = rule_for(node.target)
    return None if rule is None else rule.flow


def _elementwise(call: Seen, result: Any) -> Any:
    """y[i] = f(a[i], b[i], ...) varies with any of its operands; zero times what varies is zero."""
    if not isinstance(result, Tensor):
        return None
    if call.node.target in _MULTIPLICATIONS and len(call.sources) == 2:
        a, b = call.sources
        one, other = call.open(a), call.open(b)
        return (one & (other | (call.number(b) != 0))) | (other & (call.number(a) != 0))
    if any(call.varies[n.name] is True for n in call.node.all_input_nodes):  # a size of the batch
        return None
    found = torch.zeros((), dtype=torch.bool)
    for source in call.sources:
        found = found | call.open(source)
    return found


def _first(call: Seen, result: Any) -> Any:
    """y[i] = f(x[i])."""
    return filled(result, False) if call.node.target in _FILLS else call.open(call.sources[0])


def _constant(call: Seen, result: Any) -> Any:
    """y[i] = c."""
    return None if isinstance(call.raw("fill_value"), fx.Node) else filled(result, False)


def _along_channels(call: Seen, result: Any) -> Any:
    """y[b, c, ...] = f(x[b, c, ...]; what belongs to c), the statistics of the batch among it where they are taken."""
    if not isinstance(result, Tensor) or call.beside(call.first):
        return None
    mask = call.open(call.first)
    if not call.raw("training"):
        return mask
    return mask.transpose(0, 1).flatten(1).any(1).reshape(1, -1, *(1,) * (mask.dim() - 2))


def _normalised(call: Seen, result: Any) -> Any:
    """y = x less its mean, over its spread: varies with any element that these are taken over."""
    if call.beside(call.first):
        return None
    mask = call.open(call.first)
    shape = call.raw("normalized_shape")
    if shape is not None:
        return mask.any(-1, keepdim=True) if len(shape) == 1 else mask.any()
    if not call.raw("num_groups") and not call.raw("use_input_stats"):
        return _along_channels(call, result)
    groups = call.raw("num_groups") or mask.shape[1]
    rows = mask.reshape(mask.shape[0], groups, -1)
    return rows.any(-1, keepdim=True).expand(rows.shape).reshape(mask.shape)


def _gated(call: Seen, result: Any) -> Any:
    """y = a * sigmoid(b) for the two halves a, b of x along ``dim``."""
    halves = call.open(call.first).chunk(2, call.raw("dim"))
    zero = call.number(call.first).chunk(2, call.raw("dim"))[0] == 0
    return halves[0] | (halves[1] & ~zero)


def _moved(call: Seen, result: Any) -> Any:
    """y = the elements of x at other places: so are the masks."""
    data = call.first if isinstance(call.first, list | tuple) else [call.first]
    if call.beside(*data) or any(call.number(source).is_complex() for source in data):
        return None
    moved = call.again({source.name: call.open(source).double() for source in data})
    return pytree.tree_map(lambda mask: mask != 0, moved)


def _looked_up(call: Seen, result: Any) -> Any:
    """y[i, :] = W[index[i], :]: a column that holds one number holds it for every index."""
    weight = call.raw("weight")
    if call.open(weight).any():
        return None
    table = call.number(weight)
    return (table != table[:1]).any(0)


def _product(call: Seen, result: Any) -> Any:
    """y[.., o] = sum_i x[.., i] W[o, i] + b[o] varies with x[.., i] where W[o, i] is not zero, and with W likewise."""
    pair = operands(call)
    if pair is None or call.beside(*pair):
        return None
    one, other = pair
    rest = {n.name: torch.zeros_like(call.number(n)) for n in call.sources if n not in pair}
    terms = torch.zeros_like(result)
    for first, second in ((one, other), (other, one)):
        if bool(call.open(first).any()):
            felt = call.open(second) | (call.number(second) != 0)
            terms = terms + call.again(rest | {first.name: call.open(first).double(), second.name: felt.double()})
    return terms != 0


def operands(call: Seen) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of a product that sums over a dimension; None for what is none."""
    names = _OPERANDS.get(rule_of(call.node))
    if names is None:
        return None
    found = [call.raw(name) for name in names]
    if found == [None, None]:
        found = call.sources
    elif len(names) == 1:
        found = list(found[0])
    return (found[0], found[1]) if len(found) == 2 and found[0] is not found[1] else None


def _convolved(call: Seen, result: Any) -> Any:
    """As a product; and what is padded is not the same at the borders."""
    mask = _product(call, result)
    return None if mask is None else mask | ~same_anywhere(call, result, ~mask)


def _pooled(call: Seen, result: Any) -> Any:
    """y[b, c, ...] = f(x[b, c, :]) of what lies in a window; indices vary."""
    if len(call.sources) != 1:
        return None
    mask = call.open(call.first)
    weights = 0.5 + torch.rand(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    felt = call.again({call.first.name: mask * weights})
    if isinstance(result, Tensor):
        felt = felt != 0
        return felt | ~same_anywhere(call, result, ~felt)
    felt = felt[0] != 0
    return [felt | ~same_anywhere(call, result[0], ~felt), *(filled(other, True) for other in result[1:])]


def same_anywhere(call: Seen, result: Tensor, known: Tensor) -> Tensor:
    """Which of the ``known`` elements of a ``result`` are the same all over its space, whatever size that has.

    What is the same all over x is given more space, with zeros for all that varies.
    """
    x, mask, rank = call.number(call.first), call.open(call.first), spaces(call.node)
    if not bool((~mask & (x != 0)).any()):
        return torch.ones_like(known)
    y = wider(call, x.masked_fill(mask, 0), rank)
    if y is None:
        return torch.zeros_like(known)
    point = _first_place(y, rank)
    steady = ~unlike(y, point, torch.zeros_like(y, dtype=torch.bool)).flatten(-rank).any(-1)
    return steady[(..., *(None,) * rank)] & ~unlike(result, point, ~known)


def wider(call: Seen, x: Tensor, rank: int) -> Tensor | None:
    """What a call gives for one example of ``x`` with its first place all over a larger space; None if it cannot."""
    reach = _reach(call, rank)
    one = _first_place(x, rank)
    one = one[:1] if x.dim() == rank + 2 else one
    sizes = [size + 2 * width for size, width in zip(x.shape[x.dim() - rank :], reach, strict=True)]
    try:
        found = call.again({call.first.name: one.expand(*one.shape[: one.dim() - rank], *sizes).contiguous()})
    except (RuntimeError, ValueError):  # an operator that takes this size only
        return None
    y: Tensor = found if isinstance(found, Tensor) else found[0]
    return y


def _first_place(x: Tensor, rank: int) -> Tensor:
    for dim in range(-rank, 0):
        x = x.narrow(dim, 0, 1)
    return x


def unlike(x: Tensor, other: Tensor, apart: Tensor) -> Tensor:
    """Returns where two tensors hold different numbers, by the size of those that are not ``apart``."""
    sizes = x[~apart & x.isfinite()].abs()
    near = CLOSE * (float(sizes.max()) if sizes.numel() else 0.0)
    return ~((x - other).abs() <= near)


def spaces(node: fx.Node) -> int:
    """How many dimensions of space a convolution or a pooling has."""
    return _POOLINGS[node.target] if node.target in _POOLINGS else raw_argument(node, "weight").meta["val"].dim() - 2


def _reach(call: Seen, rank: int) -> list[int]:
    """How far apart in space what goes in and what it acts on can be."""
    weight, kernel = call.raw("weight"), call.raw("kernel_size")
    sizes = call.number(weight).shape[2:] if weight is not None else kernel or 1
    steps = call.raw("dilation")
    return [size * step for size, step in zip(_each(sizes, rank), _each(steps or 1, rank), strict=True)]


def _each(value: Any, rank: int) -> Sequence[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found if len(found) == rank else found[:1] * rank


def _reduced(call: Seen, result: Any) -> Any:
    """y over ``dim``: a mean or a maximum of one number is that number, and a sum of zeros is zero."""
    x, mask = call.number(call.first), call.open(call.first)
    dims = call.raw("dim")
    dims = [dims] if isinstance(dims, int) else dims or list(range(x.dim()))
    keep = bool(call.raw("keepdim"))
    start = x
    for dim in dims:
        start = start.narrow(dim, 0, 1)
    felt = mask | (unlike(x, start, mask) if call.node.target in _AVERAGES else x != 0)
    for dim in dims:
        felt = felt.any(dim, keepdim=True)
    felt = felt if keep else felt.squeeze(tuple(dims))
    return felt if isinstance(result, Tensor) else [felt, *(filled(value, True) for value in result[1:])]


def _attended(call: Seen, result: Any) -> Any:
    """y[.., m, o] = sum_n p[.., m, n] v[.., n, o] with weights p that add up to one."""
    v, mask = call.number(call.raw("value")), call.open(call.raw("value"))
    felt = (mask | unlike(v, v[..., :1, :], mask)).any(-2, keepdim=True)
    heads = result.shape[-3] if result.dim() > 2 else 1
    if call.raw("enable_gqa") and felt.shape[-3] != heads:
        felt = felt.repeat_interleave(heads // felt.shape[-3], -3)
    return felt


def _repeated(call: Seen, result: Any) -> Any:
    """A unit of a recurrent layer whose weights are zero and that starts from zero stays zero."""
    given, params = call.raw("hx"), call.raw("params")
    starts = list(given) if isinstance(given, list | tuple) else [given]
    if any(bool(call.open(source).any()) for source in params):
        return None
    rows, gates = call.number(starts[0]).shape[0], _GATES[call.node.target]  # type: ignore[index]  # an OpOverload
    ends = []
    for row in range(rows):
        tensors = [call.number(n) for n in params[len(params) * row // rows : len(params) * (row + 1) // rows]]
        weights = tensors[: 4 if call.raw("has_biases") else 2]
        felt = torch.stack([(t.reshape(gates, len(t) // gates, -1) != 0).any(-1).any(0) for t in weights]).any(0)
        for start in starts[-1:] if len(tensors) > len(weights) else starts:
            felt = felt | ((call.number(start)[row] != 0) | call.open(start)[row]).any(0)
        projected = [(projection[:, felt] != 0).any(1) for projection in tensors[len(weights) :]]
        ends.append([*projected, felt])
    beside = ends[-2:] if call.raw("bidirectional") else ends[-1:]
    last = [torch.stack([end[place] for end in ends])[:, None] for place in (0, -1)]
    return [torch.cat([end[0] for end in beside]), *last[: len(starts)]]


def filled(value: Any, varies: bool) -> Any:
    """A mask like ``value``, a tensor or a list of them, that is the same everywhere."""
    return pytree.tree_map(
        lambda leaf: torch.full(leaf.shape, varies) if isinstance(leaf, Tensor) else varies,
        list(value) if isinstance(value, tuple) else value,
    )


Spread = Callable[[Seen, Any], Any]

_MULTIPLICATIONS = (aten.mul.Tensor, aten.mul_.Tensor, aten.multiply.Tensor, aten.multiply_.Tensor)
_FILLS = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.zero_.default,
    aten.fill_.Scalar,
)
_SHAPED = (movement.reshape, movement.expand)
"""Rules of operators that may take a shape from ``other``."""

_POOLINGS = {
    **dict.fromkeys(present(reduction.LINEAR), 1),
    **dict.fromkeys(present(reduction.PLANAR), 2),
    **dict.fromkeys(present(reduction.VOLUME), 3),
}
"""Operators on space, and how many dimensions that has."""

_AVERAGES = (
    aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim,
    aten.max.default, aten.min.default,
)  # fmt: skip
_SUMS = (
    aten.sum.default, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
    aten.frobenius_norm.dim, aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim,
)  # fmt: skip

_OPERANDS: Mapping[Any, tuple[str, ...]] = {
    contraction.linear: ("input", "weight"),
    contraction.convolution: ("input", "weight"),
    contraction.transposed_convolution: ("input", "weight"),
    contraction.matmul: ("", ""),
    contraction.addmm: ("mat1", "mat2"),
    contraction.einsum: ("tensors",),
}
"""Rules of products of two operands, and the names of those."""

_BY_RULE: Mapping[Any, Spread] = {
    pointwise.pointwise: _elementwise,
    pointwise.overwrite: _elementwise,
    pointwise.unchanged: _first,
    pointwise.dropout: _first,
    movement.constant: _constant,
    pointwise.prelu: _along_channels,
    indexing.glu: _gated,
    norm.batch_norm: _along_channels,
    norm.instance_norm: _normalised,
    norm.group_norm: _normalised,
    norm.layer_norm: _normalised,
    **dict.fromkeys(
        (
            movement.reshape, movement.literal, movement.along, movement.expand, movement.repeat,
            movement.repeat_interleave, movement.squeeze, indexing.split, indexing.cat, indexing.stack, indexing.pad,
            indexing.index_select, indexing.index, indexing.scalar_index, indexing.unbind, indexing.sliced,
            space.pixel_shuffle, space.pixel_unshuffle, space.channel_shuffle, space.sliding, placing.gather,
        ),
        _moved,
    ),
    indexing.embedding: _looked_up,
    **dict.fromkeys(_OPERANDS, _product),
    contraction.convolution: _convolved,
    contraction.transposed_convolution: _convolved,
    contraction.attention: _attended,
}  # fmt: skip
"""How the constants of the operands of an operator go on, by the rule of its labels: the same index equation."""

_GATES = {aten.lstm.input: 4, aten.gru.input: 3, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}

_BY_OPERATOR: Mapping[Any, Spread] = {
    **dict.fromkeys(_POOLINGS, _pooled),
    **dict.fromkeys((*_AVERAGES, *_SUMS), _reduced),
    **dict.fromkeys(_GATES, _repeated),
}


def spread_for(target: Any) -> Spread | None:
    """Returns how what varies spreads through an operator; None where that is not known."""
    rule = rule_for(target)
    return _BY_OPERATOR.get(target) or (None if rule is None else _BY_RULE.get(rule.flow))

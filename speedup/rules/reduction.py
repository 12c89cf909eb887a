"""Operators that sum over dimensions, and operators that need some dimensions whole."""

import torch

from speedup.flow import Flow
from speedup.labels import Labels, narrowed, support
from speedup.rules.call import Call, Outcome, Rule, RuleFunction, present

aten = torch.ops.aten


def _only(flow: Flow, call: Call) -> Labels:
    """The first tensor; any other (a grid to sample at, say) is pinned."""
    x, *others = call.tensors()
    for other in others:
        flow.pin_all(other, f"steers {call.node.target}")
    return x


def reduced(flow: Flow, call: Call) -> Outcome:
    """y = sum (or mean, or norm) of x over ``dim``: channels may go, the masked reference counts what is left.

    A variance needs one more than its correction.
    """
    order = next((call[name] for name in ("ord", "p") if name in call.values), None)
    if isinstance(order, int | float) and order < 0:
        return chosen(flow, call)  # the smallest magnitude, or close to it: a removed zero would win
    x = _only(flow, call)
    dims = call.dims(len(x.shape))
    if call.node.target in _SPREADS and all(x.shape[dim] == 1 or dim in x.covered for dim in dims):
        for plane in x.planes:
            if dims and {*support(plane)} <= {*dims}:
                flow.keep_some(plane, int(call.get("correction", 1)) + 1)
    outcome = flow.reduce(x, dims, bool(call.get("keepdim", False)))
    return outcome if len(call.outputs) == 1 else [outcome for _ in call.outputs]


def chosen(flow: Flow, call: Call) -> Outcome:
    """y = max (or argmax, median, ...) of x over ``dim``, which must stay whole."""
    x = _only(flow, call)
    dims = call.dims(len(x.shape))
    frozen = flow.freeze(x, dims, f"goes through {call.node.target} over its channels")
    outcome = flow.reduce(frozen, dims, bool(call.get("keepdim", False)))
    return outcome if len(call.outputs) == 1 else [outcome for _ in call.outputs]


def whole(flow: Flow, call: Call) -> Outcome:
    """y = op(x) along ``dim``, which must stay whole (softmax, cumsum, sort, ...)."""
    x = _only(flow, call)
    frozen = flow.freeze(x, call.dims(len(x.shape)), f"goes through {call.node.target} over its channels")
    planes = tuple(narrowed(plane) for plane in frozen.planes)
    outcomes = [Labels(shape, tuple(plane.expand(shape) for plane in planes)) for shape in call.outputs]
    return outcomes if len(outcomes) > 1 else outcomes[0]


def over_space(first: int) -> RuleFunction:
    """The rule of operators that mix the dimensions from ``first`` on, counted from the end if negative."""

    def rule(flow: Flow, call: Call) -> Outcome:
        """y[b, c, ...] = op(x[b, c, :]): pooling, resampling."""
        x = _only(flow, call)
        rank = len(x.shape)
        frozen = flow.freeze(x, range(first % rank, rank), "varies over a space that is pooled or resampled")
        planes = tuple(narrowed(plane) for plane in frozen.planes)
        outcomes = [Labels(shape, tuple(plane.expand(shape) for plane in planes)) for shape in call.outputs]
        return outcomes if len(outcomes) > 1 else outcomes[0]

    return rule


def drawn(flow: Flow, call: Call) -> Outcome:
    """y = x pooled over windows that are drawn for each channel: fewer channels would get other ones."""
    for tensor in call.tensors():
        flow.pin_all(tensor, "is pooled over windows that are drawn for each channel")
    return fixed(flow, call)


def fixed(flow: Flow, call: Call) -> Outcome:
    """Content that depends on no parameter and does not shrink."""
    outcomes: list[Labels] = [Labels(shape) for shape in call.outputs]
    return outcomes if len(outcomes) != 1 else outcomes[0]


_SUMS = (
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim, aten.frobenius_norm.dim, aten.var.correction, aten.std.correction,
    aten.var_mean.correction, aten.std_mean.correction, aten.var.dim, aten.std.dim, aten.count_nonzero.dim_IntList,
)  # fmt: skip
_SPREADS = (
    aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction, aten.var.dim,
    aten.std.dim,
)  # fmt: skip
_CHOICES = (
    aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default,
    aten.max.default, aten.min.default, aten.logsumexp.default, aten.prod.dim_int, aten.any.dim, aten.all.dim,
)  # fmt: skip
_WHOLE = (
    aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default, aten.cumsum.default,
    aten.cumprod.default, aten.sort.default, aten.topk.default, aten.logcumsumexp.default,
)  # fmt: skip
PLANAR = (
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d_with_indices",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "lp_pool2d", "reflection_pad2d",
    "replication_pad2d", "grid_sampler_2d", "tril", "triu",
)  # fmt: skip
LINEAR = (
    "max_pool1d", "max_pool1d_with_indices", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d",
    "upsample_nearest1d", "upsample_linear1d", "reflection_pad1d", "replication_pad1d",
)  # fmt: skip
VOLUME = (
    "max_pool3d", "max_pool3d_with_indices", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d",
    "upsample_nearest3d", "upsample_trilinear3d", "reflection_pad3d", "replication_pad3d",
)  # fmt: skip
_FIXED = (
    "arange", "linspace", "eye", "scalar_tensor", "rand", "randn", "randint", "tril_indices", "triu_indices",
    "_assert_tensor_metadata", "sym_constrain_range_for_size",
)  # fmt: skip

RULES: dict[object, Rule] = {
    **dict.fromkeys(_SUMS, Rule("reduction", reduced)),
    **dict.fromkeys(_CHOICES, Rule("reduction", chosen)),
    **dict.fromkeys(_WHOLE, Rule("mixing", whole)),
    **dict.fromkeys(present(LINEAR), Rule("pooling", over_space(-1))),
    **dict.fromkeys(present(PLANAR), Rule("pooling", over_space(-2))),
    **dict.fromkeys(present(VOLUME), Rule("pooling", over_space(-3))),
    **dict.fromkeys((aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default), Rule("pooling", drawn)),
    **dict.fromkeys(present(_FIXED), Rule("constant", fixed)),
}

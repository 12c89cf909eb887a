"""Elementwise operators: y[i] = f(a[i], b[i], ...), under broadcasting."""

import torch

from speedup.flow import Flow
from speedup.labels import Labels
from speedup.rules.call import Call, Rule

aten = torch.ops.aten


def pointwise(flow: Flow, call: Call) -> Labels:
    """y[i] = f(a[i], b[i], ...): the atoms of the operands become one, element by element."""
    return flow.meet(call.tensors(), call.shape)


def unchanged(flow: Flow, call: Call) -> Labels:
    """y[i] = f(x[i]): the labels of the first tensor pass."""
    return flow.meet(call.tensors()[:1], call.shape)


def dropout(flow: Flow, call: Call) -> Labels:
    """y[i] = x[i] in evaluation; where it is random even then, what is drawn depends on every size."""
    if call.get("train") and call.get("p") and not flow.training:
        flow.pin_all(call["input"], "goes through a dropout that is random in evaluation too")
    return unchanged(flow, call)


def overwrite(flow: Flow, call: Call) -> Labels:
    """x[i] = y[i]: the content is replaced, its place is not."""
    return flow.meet(call.tensors(), call.tensors()[0].shape)


def prelu(flow: Flow, call: Call) -> Labels:
    """y[b, c, ...] = max(x, 0) + w[c] * min(x, 0)."""
    x, weight = call["self"], call["weight"]
    return flow.meet([x, along_channels(weight, len(x.shape))], call.shape)


def along_channels(vector: Labels, rank: int, dim: int = 1) -> Labels:
    """A tensor of shape (C,) seen as (1, C, 1, ...) of rank ``rank``; one of size 1 stays a scalar."""
    if len(vector.shape) != 1 or vector.shape[0] == 1 or rank == 1:
        return vector
    shape = tuple(vector.shape[0] if d == dim else 1 for d in range(rank))
    return Labels(shape, tuple(plane.reshape(shape) for plane in vector.planes))


_PASS = (
    aten.contiguous.default, aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten.to.other, aten.type_as.default, aten.lift_fresh_copy.default, aten.clone.default, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.empty_like.default, aten.fill_.Scalar, aten.zero_.default,
    aten.requires_grad_.default,
)  # fmt: skip
_ALIASES = (aten.detach.default, aten.detach_.default, aten.alias.default)
_ELEMENTWISE = (
    aten.hardswish_.default, aten.relu6.default, aten.relu6_.default, aten.__and__.Tensor, aten.__or__.Tensor,
    aten.floor_divide.default, aten.negative.default, aten.subtract.Tensor, aten.multiply.Tensor,
    aten.multiply.Scalar, aten.subtract.Scalar, aten.hardswish.default, aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.Scalar,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.log_sigmoid.default,
)  # fmt: skip
_UNTAGGED = (
    aten.abs_.default, aten.mish_.default, aten.gelu_.default, aten.threshold_.default, aten.negative_.default,
    aten.multiply_.Tensor, aten.multiply_.Scalar, aten.subtract_.Tensor, aten.subtract_.Scalar,
    aten.true_divide_.Tensor, aten.divide.Tensor, aten.divide.Scalar, aten.divide.Tensor_mode, aten.absolute.default,
    aten.arctan2.default, aten.greater.Tensor, aten.greater.Scalar, aten.greater_equal.Tensor,
    aten.greater_equal.Scalar, aten.less.Tensor, aten.less.Scalar, aten.less_equal.Tensor, aten.less_equal.Scalar,
    aten.not_equal.Tensor, aten.not_equal.Scalar, aten.special_expit.default, aten.special_erf.default,
)  # fmt: skip
"""In-place forms and other names, which PyTorch does not tag as pointwise."""

_ADD = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
_MUL = (aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor)

_DROPOUTS = (
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
)  # fmt: skip

RULES = {
    **dict.fromkeys(_DROPOUTS, Rule("elementwise", dropout)),
    aten.dropout_.default: Rule("elementwise", unchanged),
    **dict.fromkeys(_PASS, Rule("elementwise", unchanged)),
    **dict.fromkeys(_ALIASES, Rule("elementwise", unchanged, moves=True)),  # what is written to them stays written
    **dict.fromkeys((*_ELEMENTWISE, *_UNTAGGED), Rule("elementwise", pointwise)),
    **dict.fromkeys(_ADD, Rule("add", pointwise)),
    **dict.fromkeys(_MUL, Rule("mul", pointwise)),
    aten.copy_.default: Rule("elementwise", overwrite),
    aten.fill_.Tensor: Rule("elementwise", unchanged),
    aten.prelu.default: Rule("elementwise", prelu),
}

TAGGED = Rule("elementwise", pointwise)
"""The rule of every operator that PyTorch itself tags as pointwise."""

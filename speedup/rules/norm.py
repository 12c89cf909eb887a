"""Normalisations: allowed to change their statistics when channels go, which the masked reference does too."""

import torch

from speedup.flow import Flow
from speedup.labels import Labels
from speedup.rules.call import Call, Rule
from speedup.rules.pointwise import along_channels

aten = torch.ops.aten


def batch_norm(flow: Flow, call: Call) -> Labels:
    """y[b, c, ...] = (x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c]."""
    x, *vectors = call.tensors()
    return flow.meet([x, *(along_channels(vector, len(x.shape)) for vector in vectors)], call.shape)


def instance_norm(flow: Flow, call: Call) -> Labels:
    """As batch norm, with the statistics of each example over its space."""
    x, *vectors = call.tensors()
    x = flow.freeze(x, range(2, len(x.shape)), "is normalised over space")
    return flow.meet([x, *(along_channels(vector, len(x.shape)) for vector in vectors)], call.shape)


def layer_norm(flow: Flow, call: Call) -> Labels:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, statistics over the last dimensions."""
    return flow.meet(call.tensors(), call.shape)


def group_norm(flow: Flow, call: Call) -> Labels:
    """y[b, (g, k), ...]: statistics over k and space, so every group keeps the same number of channels."""
    x, *vectors = call.tensors()
    x = flow.freeze(x, range(2, len(x.shape)), "is normalised over space")
    groups = int(call["num_groups"])
    if groups > 1:
        for plane in x.along(1):
            rows = torch.unflatten(plane, 1, (groups, -1))
            flow.block(rows, [1], slabs=flow.mint(rows.shape, [1]))
    return flow.meet([x, *(along_channels(vector, len(x.shape)) for vector in vectors)], call.shape)


def weight_norm(flow: Flow, call: Call) -> Labels:
    """w = v * g / |v|, the norm over all dimensions but ``dim``: what is masked counts for nothing."""
    return flow.meet([call["v"], call["g"]], call.shape)


RULES = {
    aten._weight_norm.default: Rule("norm", weight_norm),
    aten.batch_norm.default: Rule("norm", batch_norm),
    aten._native_batch_norm_legit_no_training.default: Rule("norm", batch_norm),
    aten.instance_norm.default: Rule("norm", instance_norm),
    aten.layer_norm.default: Rule("norm", layer_norm),
    aten.rms_norm.default: Rule("norm", layer_norm),
    aten.group_norm.default: Rule("group norm", group_norm),
}

"""Masked twins: what a layer computes when the channels that are gone do not count.

Zeros in the place of removed weights are enough for most layers. Those that take a mean over channels or weights would
count the zeros in; for the oracle they are replaced by the modules here, which know nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.operations.computed_weights import StandardisedConv
from random_nets.operations.norms import HandmadeLayerNorm, HandmadeRms

Live = Callable[[Tensor], Tensor]
"""For a parameter the mask of what is left of it, of its shape."""


def masked_twin(module: nn.Module, live: Live) -> nn.Module | None:
    """The module that computes what `module` would if the channels that are gone did not count; None for itself."""
    twin = TWINS.get(type(module))
    return None if twin is None else twin(module, live)


class MaskedNorm(nn.Module):
    """A norm over channels that counts those which are left.

    Its kind says over what: the last dimension, with the mean ("last") or without ("rms"), dimension 1 ("channels"),
    or dimension 1 in groups and all that follows it ("groups").
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        live: Tensor,
        eps: float | None,
        groups: int,
        kind: Literal["last", "rms", "channels", "groups"],
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.live, self.eps, self.groups, self.kind = weight, bias, live, eps, groups, kind

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        last = self.kind in ("last", "rms")
        y = x.movedim(-1, 1) if last else x
        live = self.live.to(y.dtype).view(1, -1, *(1,) * (y.dim() - 2)).expand(y.shape)
        if self.kind == "groups":
            shape = (y.shape[0], self.groups, -1)
            parts, count = (y * live).reshape(shape), live.reshape(shape).sum(-1, keepdim=True).clamp(min=1)
            mean = parts.sum(-1, keepdim=True) / count
            var = ((parts - mean).square() * live.reshape(shape)).sum(-1, keepdim=True) / count
            y = ((parts - mean) / (var + eps).sqrt()).reshape(y.shape)
        else:
            count = live.sum(1, keepdim=True)
            mean = 0.0 if self.kind == "rms" else (y * live).sum(1, keepdim=True) / count
            var = ((y - mean).square() * live).sum(1, keepdim=True) / count
            y = (y - mean) / (var + eps).sqrt()
        y = y * self.weight.view(1, -1, *(1,) * (y.dim() - 2))
        if self.bias is not None:
            y = y + self.bias.view(1, -1, *(1,) * (y.dim() - 2))
        return y.movedim(1, -1) if last else y


class MaskedStandardisedConv(nn.Module):
    """Weight standardisation over the weights that are left."""

    def __init__(self, original: StandardisedConv, live: Live) -> None:
        super().__init__()
        self.original = original
        self.mask = live(original.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight, mask = self.original.weight, self.mask
        count = mask.sum((1, 2, 3), keepdim=True).clamp(min=1)
        centred = (weight - (weight * mask).sum((1, 2, 3), keepdim=True) / count) * mask
        var = (centred * centred).sum((1, 2, 3), keepdim=True) / count
        kernel = centred / torch.sqrt(var + 1e-5) * self.original.gain
        return F.conv2d(x, kernel, padding=1, groups=self.original.groups)


def _layer_norm(norm: nn.LayerNorm, live: Live) -> nn.Module | None:
    if len(norm.normalized_shape) > 1 or not norm.elementwise_affine:
        return None
    return MaskedNorm(norm.weight, norm.bias, live(norm.weight), norm.eps, 1, "last")


def _rms_norm(norm: nn.RMSNorm, live: Live) -> nn.Module | None:
    if len(norm.normalized_shape) > 1 or not norm.elementwise_affine:
        return None
    return MaskedNorm(norm.weight, None, live(norm.weight), norm.eps, 1, "rms")


def _group_norm(norm: nn.GroupNorm, live: Live) -> nn.Module | None:
    if not norm.affine:
        return None
    return MaskedNorm(norm.weight, norm.bias, live(norm.weight), norm.eps, norm.num_groups, "groups")


def _handmade_layer_norm(norm: HandmadeLayerNorm, live: Live) -> nn.Module:
    return MaskedNorm(norm.weight, norm.bias, live(norm.weight), 1e-6, 1, "channels")


def _handmade_rms(norm: HandmadeRms, live: Live) -> nn.Module:
    return MaskedNorm(norm.weight, None, live(norm.weight), 1e-5, 1, "rms")


TWINS: Mapping[type[nn.Module], Callable[[Any, Live], nn.Module | None]] = {
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    HandmadeLayerNorm: _handmade_layer_norm,
    HandmadeRms: _handmade_rms,
    StandardisedConv: MaskedStandardisedConv,
}

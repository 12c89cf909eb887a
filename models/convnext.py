"""ConvNeXt-T (Liu et al. 2022, arXiv:2201.03545), 3x224x224 -> 1000 classes.

For pruning: layer norms over channels moved last by `permute`, and a layer scale that is a bare parameter (dim, 1, 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (b, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, dim: int, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dwconv(x).permute(0, 2, 3, 1)
        out = self.pwconv2(self.act(self.pwconv1(self.norm(out))))
        return x + self.gamma * out.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        layer_scale: float = 1e-6,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), LayerNorm2d(dims[0], eps=1e-6)))
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            if i > 0:
                before = dims[i - 1]
                self.stages.append(nn.Sequential(LayerNorm2d(before, eps=1e-6), nn.Conv2d(before, dim, 2, 2)))
            self.stages.append(nn.Sequential(*(Block(dim, layer_scale) for _ in range(depth))))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(x).mean([-2, -1])))


def build_model() -> ConvNeXt:
    # The paper starts at 1e-6, which would leave the blocks of an untrained network below rounding error.
    return ConvNeXt(layer_scale=0.1)


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

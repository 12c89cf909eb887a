"""EDSR baseline x2 (Lim et al. 2017, arXiv:1707.02921), 3x48x48 -> 3x96x96, with ESPCN's upscaling (arXiv:1609.05158).

For pruning: no norms at all; `PixelShuffle` makes one channel of four, so four of its input's channels go together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SuperResolver(nn.Module):
    def __init__(self, scale: int = 2, width: int = 64, depth: int = 16) -> None:
        super().__init__()
        # Mean colour of the DIV2K training images.
        self.mean: Tensor
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)), nn.Conv2d(width, width, 3, padding=1))
        self.upscale = nn.Sequential(nn.Conv2d(width, width * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - self.mean)
        x = x + self.body(x)
        return self.tail(self.upscale(x)) + self.mean


def build_model() -> SuperResolver:
    return SuperResolver()


def example_inputs() -> Tensor:
    return torch.rand(2, 3, 48, 48)

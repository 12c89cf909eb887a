"""SE-ResNet-50 (Hu et al. 2018, arXiv:1709.01507), 3x224x224 -> 1000 classes.

For pruning: each block's output is multiplied by gates computed from it, so their last layer joins the stage's group.
"""

from __future__ import annotations

import torch
from resnet import Bottleneck, ResNet
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Channel gates in (0, 1) from the channels' means."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.shape
        gates = self.fc(self.pool(x).view(b, c))
        return x * gates.view(b, c, 1, 1)


class SEBottleneck(Bottleneck):
    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__(in_channels, planes, stride)
        self.se = SqueezeExcite(self.out_channels)

    def residual(self, x: Tensor) -> Tensor:
        return self.se(super().residual(x))


def build_model() -> ResNet:
    return ResNet(SEBottleneck, (3, 4, 6, 3))


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

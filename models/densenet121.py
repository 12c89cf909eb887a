"""DenseNet-121 (Huang et al. 2017, arXiv:1608.06993), 3x224x224 -> 1000 classes.

For pruning: no sums at all; every layer's few channels are concatenated into the input of all later ones of its block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Bottleneck of 4 * growth channels, then `growth` new channels behind the input's own."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        new = self.conv2(F.relu(self.norm2(new)))
        return torch.cat([x, new], 1)


def transition(channels: int) -> nn.Sequential:
    """Half the channels at half the resolution."""
    conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv, nn.AvgPool2d(2))


class DenseNet(nn.Module):
    def __init__(
        self, depths: tuple[int, ...] = (6, 12, 24, 16), growth: int = 32, stem: int = 64, num_classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 7, 2, 3, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        channels = stem
        self.blocks = nn.Sequential()
        for number, depth in enumerate(depths):
            if number > 0:
                self.blocks.append(transition(channels))
                channels //= 2
            self.blocks.append(nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(depth))))
            channels += depth * growth
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def build_model() -> DenseNet:
    return DenseNet()


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

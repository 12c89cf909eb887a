"""CIFAR residual networks with shortcuts of option A (He et al. 2016, arXiv:1512.03385, section 4.2).

For pruning: where the width doubles, the shortcut is every second pixel padded with zero channels; a padded channel can
go without asking anything of the stage before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from resnet import BasicBlock
from torch import Tensor, nn


class PaddedShortcut(nn.Module):
    """Half the resolution and twice the channels, the new ones zero, a quarter of `planes` on each side."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes // 4, self.planes // 4))


def padded_shortcut(in_channels: int, planes: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Identity() if in_channels == planes else PaddedShortcut(planes)


class CifarResNet(nn.Module):
    """3x3 stem and three stages of `depth` basic blocks with 16, 32 and 64 channels: 6 * depth + 2 layers."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, depth, 1)
        self.layer2 = self._stage(16, 32, depth, 2)
        self.layer3 = self._stage(32, 64, depth, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def _stage(self, in_channels: int, planes: int, depth: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, planes, stride, shortcut=padded_shortcut)
        rest = (BasicBlock(planes, planes, shortcut=padded_shortcut) for _ in range(depth - 1))
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size(3))
        return self.linear(x.view(x.size(0), -1))

"""Residual networks (He et al. 2016, arXiv:1512.03385): the blocks and the ImageNet network its files share.

`resnet18`, `resnet50`, `resnext50`, `se_resnet` and `groupnorm_net` build from here; `resnet_cifar` takes a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def projection(in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    """Shortcut of option B: identity where the shapes agree, otherwise a 1x1 convolution."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        shortcut: Callable[[int, int, int, Callable[[int], nn.Module]], nn.Module] = projection,
    ) -> None:
        super().__init__()
        self.out_channels = planes
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = shortcut(in_channels, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt) and 1x1 convolutions; the stride is on the 3x3."""

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        groups: int = 1,
        width_per_group: int = 64,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        width = planes * width_per_group // 64 * groups
        self.out_channels = planes * 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, self.out_channels, 1, bias=False)
        self.bn3 = norm(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, self.out_channels, stride, norm)

    def residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        out += self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, four stages of `block`, average pool and classifier."""

    def __init__(
        self,
        block: Callable[[int, int, int], BasicBlock | Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.channels = 64
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(block, 64, depths[0], 1)
        self.layer2 = self._stage(block, 128, depths[1], 2)
        self.layer3 = self._stage(block, 256, depths[2], 2)
        self.layer4 = self._stage(block, 512, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, block: Callable[[int, int, int], BasicBlock | Bottleneck], planes: int, depth: int, stride: int
    ) -> nn.Sequential:
        blocks = []
        for index in range(depth):
            blocks.append(block(self.channels, planes, stride if index == 0 else 1))
            self.channels = blocks[-1].out_channels
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))

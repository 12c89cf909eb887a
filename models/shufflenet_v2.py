"""ShuffleNetV2 x1.0 (Ma et al. 2018, arXiv:1807.11164), 3x224x224 -> 1000 classes.

For pruning: `chunk` halves the channels, half of them pass untouched, concatenation and a channel shuffle interleave
the halves again: all through views whose sizes are written into the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.size()
    x = x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous()
    return x.view(b, c, h, w)


def pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]


class ShuffleUnit(nn.Module):
    """At stride 1 half of the channels pass by; at stride 2 both branches see all of them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.stride = stride
        if stride == 2:
            self.branch1 = nn.Sequential(*depthwise(in_channels, stride), *pointwise(in_channels, half))
        self.branch2 = nn.Sequential(
            *pointwise(half if stride == 1 else in_channels, half),
            *depthwise(half, stride),
            *pointwise(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            passed, worked = x.chunk(2, dim=1)
            out = torch.cat((passed, self.branch2(worked)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2 = self._stage(24, 116, 4)
        self.stage3 = self._stage(116, 232, 8)
        self.stage4 = self._stage(232, 464, 4)
        self.conv5 = nn.Sequential(*pointwise(464, 1024))
        self.fc = nn.Linear(1024, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, repeats: int) -> nn.Sequential:
        rest = (ShuffleUnit(out_channels, out_channels, 1) for _ in range(repeats - 1))
        return nn.Sequential(ShuffleUnit(in_channels, out_channels, 2), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.stage4(self.stage3(self.stage2(x)))
        x = self.conv5(x).mean([2, 3])
        return self.fc(x)


def build_model() -> ShuffleNetV2:
    return ShuffleNetV2()


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

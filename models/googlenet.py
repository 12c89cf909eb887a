"""GoogLeNet with batch norm, without auxiliary heads (Szegedy et al. 2015, arXiv:1409.4842), 3x224x224 -> 1000 classes.

For pruning: each module concatenates four branches of different widths; the next one's first layers read all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Table 1 of the paper: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
STAGE_3 = ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64))
STAGE_4 = (
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
)
STAGE_5 = ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))


class Conv(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels, eps=0.001),
            nn.ReLU(inplace=True),
        )


class Inception(nn.Module):
    def __init__(self, in_channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        point, reduce3, conv3, reduce5, conv5, pooled = widths
        self.out_channels = point + conv3 + conv5 + pooled
        self.branch1 = Conv(in_channels, point, 1)
        self.branch2 = nn.Sequential(Conv(in_channels, reduce3, 1), Conv(reduce3, conv3, 3))
        self.branch3 = nn.Sequential(Conv(in_channels, reduce5, 1), Conv(reduce5, conv5, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), Conv(in_channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), dim=1)


class GoogLeNet(nn.Module):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            Conv(3, 64, 7, stride=2),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Conv(64, 64, 1),
            Conv(64, 192, 3),
        ]
        channels = 192
        for stage in (STAGE_3, STAGE_4, STAGE_5):
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            for widths in stage:
                inception = Inception(channels, widths)
                channels = inception.out_channels
                layers.append(inception)
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(channels, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def build_model() -> GoogLeNet:
    return GoogLeNet()


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

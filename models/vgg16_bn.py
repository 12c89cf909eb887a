"""VGG-16 with batch norm (Simonyan & Zisserman 2015, arXiv:1409.1556), 3x224x224 -> 1000 classes.

For pruning: a plain chain; flattening 512x7x7 makes each channel 49 columns of the first linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Configuration D of the paper: convolutions per stage and their channels.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class VGG(nn.Module):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for depth, width in STAGES:
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


def build_model() -> VGG:
    return VGG()


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

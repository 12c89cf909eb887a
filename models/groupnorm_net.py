"""ResNet-50 with group normalisation (Wu & He 2018, arXiv:1803.08494), 3x224x224 -> 1000 classes.

For pruning: every norm splits its channels into 32 groups, each of which must keep the same number of channels.
"""

from __future__ import annotations

from functools import partial

import torch
from resnet import Bottleneck, ResNet
from torch import Tensor, nn


def build_model() -> ResNet:
    group_norm = partial(nn.GroupNorm, 32)
    return ResNet(partial(Bottleneck, norm=group_norm), (3, 4, 6, 3), norm=group_norm)


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

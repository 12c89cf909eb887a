"""ResNeXt-50 32x4d (Xie et al. 2017, arXiv:1611.05431), 3x224x224 -> 1000 classes.

For pruning: 3x3 convolutions of 32 groups; whole groups go, or the same number of channels from each.
"""

from __future__ import annotations

from functools import partial

import torch
from resnet import Bottleneck, ResNet
from torch import Tensor


def build_model() -> ResNet:
    return ResNet(partial(Bottleneck, groups=32, width_per_group=4), (3, 4, 6, 3))


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

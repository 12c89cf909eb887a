"""ResNet-50 (He et al. 2016, arXiv:1512.03385), 3x224x224 -> 1000 classes.

For pruning: two free widths in each bottleneck, one tied width in each stage.
"""

from __future__ import annotations

import torch
from resnet import Bottleneck, ResNet
from torch import Tensor


def build_model() -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3))


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

"""ResNet-18 (He et al. 2016, arXiv:1512.03385), 3x224x224 -> 1000 classes.

For pruning: each stage's residual sums tie its blocks' outputs into one group; the inner convolutions are free.
"""

from __future__ import annotations

import torch
from resnet import BasicBlock, ResNet
from torch import Tensor


def build_model() -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2))


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)

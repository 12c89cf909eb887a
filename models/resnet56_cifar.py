"""ResNet-56 for CIFAR-10 (He et al. 2016, arXiv:1512.03385), 3x32x32 -> 10 classes; see `resnet_cifar`."""

from __future__ import annotations

import torch
from resnet_cifar import CifarResNet
from torch import Tensor


def build_model() -> CifarResNet:
    return CifarResNet(9)


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 32, 32)

"""VGG-16 for CIFAR-10 with one hidden linear layer (Li et al. 2017, arXiv:1608.08710, section 4.1); see `vgg_cifar`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vgg_cifar import CifarVGG, stages

WIDTHS = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


def build_model() -> CifarVGG:
    hidden = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 10))
    return CifarVGG(stages(WIDTHS, bias=True), hidden)


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 32, 32)

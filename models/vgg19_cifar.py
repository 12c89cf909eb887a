"""VGG-19 for CIFAR-10 with a linear classifier (Liu et al. 2017, arXiv:1708.06519, section 4.2); see `vgg_cifar`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vgg_cifar import CifarVGG, stages

WIDTHS = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)


def build_model() -> CifarVGG:
    return CifarVGG(stages(WIDTHS, bias=False), nn.Linear(512, 10))


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 32, 32)

"""How a network ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from random_nets.op import Op, OverSpace
from random_nets.program import Settings
from random_nets.shapes import Shape, channels


class Head(Op):
    """What is left over, of any shapes, to a few numbers: the end of a network."""

    arity = -1
    makes_silence = True

    def __init__(self, shapes: Sequence[Shape], flatten: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(sum(math.prod(s) if flatten else channels(s) for s in shapes), 5)
        self.flatten = flatten

    @classmethod
    def over_space(cls, settings: Settings) -> OverSpace:
        return "closes" if settings["flatten"] else "mixes"

    def forward(self, *xs: Tensor) -> Tensor:
        if self.flatten:
            return self.fc(torch.cat([x.flatten(1) for x in xs], 1))
        return self.fc(torch.cat([_pooled(x) for x in xs], 1))


def _pooled(x: Tensor) -> Tensor:
    """The mean of each channel."""
    if x.dim() == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.dim() == 3 else x


class ImageHead(Op):
    """A convolution or linear layer to three channels."""

    space = "closes"
    makes_silence = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.out = nn.Conv2d(shape[0], 3, 1) if len(shape) == 3 else nn.Linear(shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)

"""A value times a gate made of itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import IMAGE, Shape


class SqueezeExcite(Op):
    """A gate for each channel, made of the mean over space."""

    takes = IMAGE

    def __init__(self, width: int, hidden: int, linear: bool, gate: str) -> None:
        super().__init__()
        self.linear, self.gate = linear, gate
        if linear:
            self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        else:
            self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "width": shapes[0][0],
            "hidden": choose((2, 4, 6)),
            "linear": choose([True, False]),
            "gate": choose(["sigmoid", "hard", "softmax"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            b, c, _, _ = x.shape
            s = x.mean((2, 3)).view(b, c)
            s = self.fc2(F.relu(self.fc1(s)))
            s = s.view(b, c, 1, 1)
        else:
            s = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        gates = {"sigmoid": torch.sigmoid, "hard": F.hardsigmoid, "softmax": lambda t: t.softmax(1)}
        return x * gates[self.gate](s)


class EfficientChannelAttention(Op):
    """ECA: a one-dimensional convolution over the channels as positions, which fixes them."""

    takes = IMAGE

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y)


class SpatialGate(Op):
    """CBAM: mean and maximum over channels decide where to look."""

    takes = IMAGE
    exact = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * torch.sigmoid(self.conv(both))

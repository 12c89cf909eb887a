"""Layers whose weight is computed in forward, or used both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import IMAGE, WIDTHS, Shape, channels, divisors, is_image


class StandardisedConv(Op):
    """Weight standardisation: w = (w - mean) / std for each output."""

    takes = IMAGE
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cout, cin // groups, 3, 3))
        self.gain = nn.Parameter(torch.empty(cout, 1, 1, 1))
        self.groups = groups

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cin, cout = shapes[0][0], choose(WIDTHS)
        return {"cin": cin, "cout": cout, "groups": choose([1, 1, *divisors(math.gcd(cin, cout))])}

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        centred = self.weight - mean
        var = (centred * centred).mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred / torch.sqrt(var + 1e-5) * self.gain, padding=1, groups=self.groups)


class WeightNormConv(Op):
    """w = g * v / |v| for each output."""

    takes = IMAGE
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, library: bool) -> None:
        super().__init__()
        self.library = library
        if library:
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(cin, cout, 1, bias=False))
        else:
            self.v = nn.Parameter(torch.empty(cout, cin, 1, 1))
            self.g = nn.Parameter(torch.empty(cout, 1, 1, 1))

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[0][0], "cout": choose(WIDTHS), "library": choose([False, True])}

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return not settings["library"]  # 0 / 0 where an output is gone

    def forward(self, x: Tensor) -> Tensor:
        if self.library:
            return self.conv(x)
        norm = (self.v * self.v).sum((1, 2, 3), keepdim=True)
        return F.conv2d(x, self.g * self.v * torch.rsqrt(norm + 1e-6))


class TiedAutoencoder(Op):
    """y = act(x W^T) W: one weight used both ways, by linear, by matrix product or by convolution."""

    def __init__(self, width: int, hidden: int, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, width))
        self.how = how

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        how = choose(["conv", "einsum"] if is_image(shapes[0]) else ["linear", "matmul"])
        return {"width": channels(shapes[0]), "hidden": choose(WIDTHS), "how": how}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.how == "linear":
            return F.linear(torch.tanh(F.linear(x, w)), w.t())
        if self.how == "matmul":
            return torch.tanh(x @ w.transpose(0, 1)) @ w
        if self.how == "einsum":
            return torch.einsum("bohw,oc->bchw", torch.einsum("bchw,oc->bohw", x, w).relu(), w)
        kernel = w[:, :, None, None]
        return F.conv_transpose2d(F.conv2d(x, kernel).relu(), kernel)


class Experts(Op):
    """A convolution whose weight is a learned mixture of several."""

    takes = IMAGE
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, count: int, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, cout, cin, 1, 1))
        self.mixture = nn.Parameter(torch.empty(count))
        self.how = how

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[0][0], "cout": choose(WIDTHS), "count": choose([2, 3]), "how": choose(["einsum", "sum"])}

    def forward(self, x: Tensor) -> Tensor:
        share = self.mixture.softmax(0)
        if self.how == "einsum":
            return F.conv2d(x, torch.einsum("k,koihw->oihw", share, self.weight))
        return F.conv2d(x, (share.view(-1, 1, 1, 1, 1) * self.weight).sum(0))

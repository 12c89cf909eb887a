"""Convolutions as one module of the library, alone or in a block."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import IMAGE, SEQUENCE, WIDTHS, Shape, divisors, is_image


class Conv(Op):
    """Any convolution: kernel, stride, groups, bias."""

    takes = IMAGE
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cin, height, _ = shapes[0]
        cout = choose(WIDTHS)
        groups = choose([1, 1, 1, *divisors(math.gcd(cin, cout))])
        stride = choose([1, 1, 2]) if height > 2 else 1
        return {
            "cin": cin,
            "cout": cout,
            "kernel": choose([1, 3]),
            "stride": stride,
            "groups": groups,
            "bias": choose([True, False]),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvBlock(Op):
    """Convolution, batch norm, activation: what most networks are made of."""

    takes = IMAGE
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, kernel: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
        )

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[0][0], "cout": choose(WIDTHS), "kernel": choose([1, 3])}

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Depthwise(Op):
    """A convolution of each channel alone, to one or several."""

    space = "closes"
    makes_silence = True

    def __init__(self, width: int, multiplier: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * multiplier, 3, padding=1, groups=width, bias=bias)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and 2 <= shapes[0][0] <= 12

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0], "multiplier": choose([1, 1, 2, 3]), "bias": choose([True, False])}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvTranspose(Op):
    """A transposed convolution whose kernels do not overlap."""

    takes = IMAGE
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, stride: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(cin, cout, stride, stride, groups=groups, bias=bias)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cin, height, _ = shapes[0]
        cout = choose(WIDTHS)
        groups = choose([1, 1, *divisors(math.gcd(cin, cout))])
        return {
            "cin": cin,
            "cout": cout,
            "stride": choose([1, 2]) if height <= 4 else 1,
            "groups": groups,
            "bias": choose([True, False]),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class ConvOverTime(Op):
    """One-dimensional convolution over the positions of a sequence."""

    takes = SEQUENCE
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, 3, padding="same", groups=groups)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cin, cout = shapes[0][1], choose(WIDTHS)
        return {"cin": cin, "cout": cout, "groups": choose([1, *divisors(math.gcd(cin, cout))])}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Residual(Op):
    """y = x + conv(act(conv(x)))."""

    takes = IMAGE
    space = "closes"

    def __init__(self, width: int, hidden: int, groups: int, inplace: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, hidden, 1)
        self.middle = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.restore = nn.Conv2d(hidden, width, 1, bias=False)
        self.inplace = inplace

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        hidden = choose(WIDTHS)
        return {
            "width": shapes[0][0],
            "hidden": hidden,
            "groups": choose([1, *divisors(hidden)]),
            "inplace": choose([False, True]),
        }

    def forward(self, x: Tensor) -> Tensor:
        y = self.restore(F.relu(self.bn(self.middle(self.reduce(x)))))
        if self.inplace:
            y += x
            return y.relu_()
        return x + y


class PaddedShortcut(Op):
    """The shortcut of CIFAR ResNets: every second pixel, channels padded with zeros; then the branch is added."""

    def __init__(self, cin: int, before: int, after: int, how: str) -> None:
        super().__init__()
        cout = cin + before + after
        self.conv = nn.Conv2d(cin, cout, 3, 2, 1)
        self.bn = nn.BatchNorm2d(cout)
        self.before, self.after, self.how = before, after, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] <= 12 and shapes[0][1] > 1 and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "cin": shapes[0][0],
            "before": choose([0, 1, 2, 4]),
            "after": choose([1, 2, 4]),
            "how": choose(["stride", "pool"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        small = x[:, :, ::2, ::2] if self.how == "stride" else F.avg_pool2d(x, 2)
        return F.relu(self.bn(self.conv(x)) + F.pad(small, (0, 0, 0, 0, self.before, self.after)))

"""Products of one value with another, summed over space, channels or positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from random_nets.op import Op, Variant
from random_nets.program import Choose, Settings
from random_nets.shapes import SEQUENCE, VECTOR, WIDTHS, Shape, channels, is_image, is_sequence, is_vector


class Gram(Variant):
    """The products of the channels of two images, summed over space: channels become positions."""

    hows = ("matmul", "einsum", "bmm")
    space = "opens"
    arity = 2

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and is_image(shapes[1]) and shapes[0][1:] == shapes[1][1:] and shapes[0][0] <= 16

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "einsum":
            return torch.einsum("bchw,bdhw->bcd", x, y)
        a, b = x.flatten(2), y.flatten(2).transpose(1, 2)
        return torch.bmm(a, b) if self.how == "bmm" else a @ b


class Correlation(Variant):
    """The products of positions, summed over channels: what is gone must be zero to count for nothing."""

    hows = ("matmul", "einsum", "sum")
    arity = 2
    needs_silence = True

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return shapes[0] == shapes[1] and is_sequence(shapes[0]) and shapes[0][0] <= 20

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "einsum":
            scores = torch.einsum("bnc,bmc->bnm", x, y)
        elif self.how == "sum":
            scores = (x[:, :, None] * y[:, None]).sum(-1)
        else:
            scores = x @ y.transpose(1, 2)
        return scores.softmax(-1)


class Mixing(Op):
    """Positions mixed by weights that the input decides: y = a v."""

    arity = 2
    needs_silence = True

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and is_sequence(shapes[1]) and shapes[0][1] == shapes[1][0]

    def forward(self, a: Tensor, v: Tensor) -> Tensor:
        return a @ v


class Outer(Op):
    """The products of two vectors, flattened into a linear layer."""

    arity = 2
    makes_silence = True

    def __init__(self, first: int, second: int, cout: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "bilinear":
            self.fc = nn.Bilinear(first, second, cout)
        else:
            self.fc = nn.Linear(first * second, cout)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_vector(shapes[0]) and is_vector(shapes[1]) and shapes[0][0] * shapes[1][0] <= 150

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "first": shapes[0][0],
            "second": shapes[1][0],
            "cout": choose(WIDTHS),
            "how": choose(["einsum", "mul", "bilinear"]),
        }

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "bilinear":
            return self.fc(x, y)
        z = torch.einsum("bi,bj->bij", x, y) if self.how == "einsum" else x[:, :, None] * y[:, None, :]
        return self.fc(z.flatten(1))


class Form(Op):
    """A bilinear form of two values for each output, as a layer or written as an einsum with an ellipsis."""

    takes = VECTOR | SEQUENCE
    arity = 2
    makes_silence = True

    def __init__(self, first: int, second: int, cout: int, how: str) -> None:
        super().__init__()
        self.form = nn.Bilinear(first, second, cout, bias=how == "layer")
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return super().fits(*shapes) and shapes[0][:-1] == shapes[1][:-1]

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        first, second = (channels(shape) for shape in shapes)
        return {"first": first, "second": second, "cout": choose(WIDTHS), "how": choose(["layer", "einsum"])}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "layer":
            return self.form(x, y)
        return torch.einsum("...i,oij,...j->...o", x, self.form.weight, y)

"""One value changed, number by number: activations, scales and shifts, part of it in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import Shape, channel_axis, channels, is_image, is_sequence

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "relu6": F.relu6,
    "relu_": lambda x: x.clone().relu_(),
    "square": lambda x: x * x,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-1, 1),
    "neg": lambda x: -x,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardsigmoid": F.hardsigmoid,
    "cos": torch.cos,
    "shift": lambda x: x + 0.3,
    "rsub": lambda x: 1 - x,
    "shift_": lambda x: x.clone().add_(0.5),
    "where": lambda x: torch.where(x > 0, x, torch.full_like(x, 0.25)),
    "where_scalar": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.2),
    "ones": lambda x: x + torch.ones_like(x),
    "dropout": lambda x: F.dropout(x, 0.1, training=False),
    "float": lambda x: x.to(x.dtype),
    "clone": lambda x: x.clone().contiguous(),
}
LOUD = frozenset(
    {"sigmoid", "softplus", "hardsigmoid", "cos", "shift", "rsub", "shift_", "where", "masked_fill", "ones"}
)
"""Activations with f(0) other than 0."""


class Activation(Op):
    """An activation, or other arithmetic with constants, as a function."""

    space = "keeps"

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"name": choose(list(ACTIVATIONS))}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags) and settings["name"] not in LOUD

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


class ActivationModule(Op):
    """Activations and dropout as modules, some with parameters."""

    space = "keeps"

    def __init__(self, width: int, name: str) -> None:
        super().__init__()
        modules = {
            "relu_": nn.ReLU(inplace=True),
            "dropout": nn.Dropout(0.2),
            "dropout2d": nn.Dropout2d(0.2),
            "prelu": nn.PReLU(width),
            "prelu1": nn.PReLU(),
            "identity": nn.Identity(),
        }
        self.act = modules[name]
        self.name = name

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        names = ["relu_", "dropout", "prelu1", "identity"]
        if not is_sequence(shapes[0]):
            names.append("prelu")
        if is_image(shapes[0]):
            names.append("dropout2d")
        return {"width": channels(shapes[0]), "name": choose(names)}

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x.clone() if self.name == "relu_" else x)


class LayerScale(Op):
    """A parameter or buffer of channel size multiplied, added or subtracted, or one scalar."""

    space = "keeps"

    def __init__(self, shape: list[int], how: str, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("scale", torch.empty(shape))
        else:
            self.scale = nn.Parameter(torch.empty(shape))
        self.how = how

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        shape = shapes[0]
        width = channels(shape)
        if is_image(shape):
            options = [[width, 1, 1], [1, width, 1, 1], [], [1], list(shape), [1, *shape[1:]]]
        elif is_sequence(shape):
            options = [[width], [1, 1, width], [], [1], list(shape), [shape[0], 1]]
        else:
            options = [[width], [1, width], [], [1]]
        hows = ["mul", "add", "sub", "rsub", "mul_", "div"]
        return {"shape": choose(options), "how": choose(hows), "buffer": choose([False, False, True])}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        per_channel = math.prod(settings["shape"]) > 1 and not _is_spatial(settings["shape"])
        if settings["how"] in ("mul", "mul_"):
            return all(flags) or per_channel
        return all(flags) and (per_channel or settings["how"] == "div")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mul":
            return x * self.scale
        if self.how == "mul_":
            x = x.clone()
            x *= self.scale
            return x
        if self.how == "add":
            return x + self.scale
        if self.how == "sub":
            return x - self.scale
        if self.how == "div":
            return x / (self.scale.abs() + 0.5)
        return self.scale - x


def _is_spatial(shape: Sequence[int]) -> bool:
    """Whether a parameter varies over space only."""
    return (len(shape) == 3 and shape[0] == 1 and shape[1] > 1) or (len(shape) == 2 and shape[1] == 1)


class InPlaceSlice(Op):
    """Part of the channels changed in place."""

    space = "keeps"

    def __init__(self, cut: int, how: str, image: bool) -> None:
        super().__init__()
        self.cut, self.how, self.image = cut, how, image

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return channels(shapes[0]) > 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cut = choose(list(range(1, channels(shapes[0]))))
        return {"cut": cut, "how": choose(["zero", "scale", "assign", "relu_"]), "image": is_image(shapes[0])}

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        second = self.image or y.dim() == 2
        part = y[:, : self.cut] if second else y[..., : self.cut]
        if self.how == "zero":
            part.zero_()
        elif self.how == "scale":
            part.mul_(2.0)
        elif self.how == "relu_":
            part.relu_()
        elif second:
            y[:, : self.cut] = x[:, : self.cut] * 0.5
        else:
            y[..., : self.cut] = x[..., : self.cut] * 0.5
        return y


class Glu(Op):
    """One half of the channels times a gate made of the other."""

    space = "keeps"

    def __init__(self, axis: int, how: str) -> None:
        super().__init__()
        self.axis, self.how = axis, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return channels(shapes[0]) % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"axis": channel_axis(shapes[0]), "how": choose(["glu", "chunk", "simple", "tanh"])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "glu":
            return F.glu(x, self.axis)
        a, b = x.chunk(2, self.axis)
        if self.how == "simple":
            return a * b
        return a * (torch.sigmoid(b) if self.how == "chunk" else b.tanh())

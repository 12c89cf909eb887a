"""From one kind of value to another: images, sequences, vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op, OverSpace, Variant
from random_nets.program import Choose, Settings
from random_nets.shapes import IMAGE, SEQUENCE, VECTOR, WIDTHS, Shape, channels, is_image, is_sequence, is_vector


class SpatialToVector(Op):
    """An image or a sequence flattened or pooled, then a linear layer."""

    makes_silence = True

    def __init__(self, shape: Shape, cout: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.size = math.prod(shape)
        self.fc = nn.Linear(self.size if how != "pool" else channels(shape), cout)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return not is_vector(shapes[0]) and math.prod(shapes[0]) <= 256

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"shape": shapes[0], "cout": choose(WIDTHS), "how": choose(["flatten", "view", "reshape", "pool"])}

    @classmethod
    def over_space(cls, settings: Settings) -> OverSpace:
        return "mixes" if settings["how"] == "pool" else "closes"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "pool":
            x = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
        elif self.how == "flatten":
            x = torch.flatten(x, 1)
        elif self.how == "view":
            x = x.contiguous().view(-1, self.size)
        else:
            x = x.reshape(x.shape[0], -1)
        return self.fc(x)


class VectorToImage(Op):
    """Linear, then view to an image, as generators do."""

    takes = VECTOR
    space = "opens"
    makes_silence = True

    def __init__(self, cin: int, width: int, side: int, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(cin, width * side * side)
        self.width, self.side, self.how = width, side, how

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "cin": shapes[0][0],
            "width": choose(WIDTHS),
            "side": choose([1, 2]),
            "how": choose(["view", "unflatten", "infer"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.how == "view":
            return x.view(x.size(0), self.width, self.side, self.side)
        if self.how == "infer":
            return x.reshape(-1, self.width, self.side, self.side)
        return x.unflatten(1, (-1, self.side, self.side))


class VectorToImageChannelsLast(Op):
    """Linear, then view to an image whose channels are last."""

    takes = VECTOR
    space = "opens"
    makes_silence = True

    def __init__(self, cin: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(cin, width * 4)
        self.width = width

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[0][0], "width": choose(WIDTHS)}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(-1, 2, 2, self.width).permute(0, 3, 1, 2)


class ExpandPixel(Variant):
    """One pixel expanded to an image, as in the pooling branch of DeepLab."""

    hows = ("expand", "interpolate", "repeat")
    space = "opens"

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_vector(shapes[0]) or (is_image(shapes[0]) and shapes[0][1] == 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None, None] if x.dim() == 2 else x
        if self.how == "expand":
            return x.expand(x.shape[0], x.shape[1], 4, 4)
        if self.how == "repeat":
            return x.repeat(1, 1, 4, 4)
        return F.interpolate(x, (4, 4), mode="bilinear")


class Sequence_(Variant):  # noqa: N801  # the name of the abstract class is taken
    """An image as a sequence of its pixels."""

    hows = ("flatten", "view", "permute")
    space = "keeps"

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] <= 4

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flatten":
            return x.flatten(2).transpose(1, 2)
        b, c, h, w = x.shape
        if self.how == "view":
            return x.reshape(b, c, h * w).permute(0, 2, 1)
        return x.permute(0, 2, 3, 1).reshape(b, -1, c)


class Image(Op):
    """A sequence as an image."""

    space = "keeps"

    def __init__(self, side: int, how: str) -> None:
        super().__init__()
        self.side, self.how = side, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and math.isqrt(shapes[0][0]) ** 2 == shapes[0][0]

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"side": math.isqrt(shapes[0][0]), "how": choose(["transpose", "permute"])}

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        if self.how == "transpose":
            return x.transpose(1, 2).reshape(b, c, self.side, self.side)
        return x.reshape(b, self.side, self.side, -1).permute(0, 3, 1, 2)


class Vector(Variant):
    """Pooling of an image to a vector."""

    takes = IMAGE
    hows = ("mean", "adaptive", "max", "flatten", "squeeze")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mean":
            return x.mean((2, 3))
        if self.how == "max":
            return x.amax((2, 3))
        if self.how == "flatten":
            return x.flatten(1) if x.shape[1] * x.shape[2] <= 24 and x.shape[2] == 1 else x.flatten(2).mean(2)
        pooled = F.adaptive_avg_pool2d(x, 1)
        return pooled.squeeze(-1).squeeze(-1) if self.how == "squeeze" else torch.flatten(pooled, 1)


class FirstToken(Variant):
    """A sequence as a vector: its first position, or all of them together."""

    takes = SEQUENCE
    hows = ("first", "mean", "max", "sum")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "first":
            return x[:, 0]
        if self.how == "mean":
            return x.mean(1)
        return x.amax(1) if self.how == "max" else x.sum(1)

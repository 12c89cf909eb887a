"""What takes all channels together, or neighbours: statistics, softmax, maxout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from random_nets.op import Variant
from random_nets.program import Settings
from random_nets.shapes import IMAGE, Shape, is_image

STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: x.sum(dim=1, keepdim=True),
    "max": lambda x: x.max(dim=1, keepdim=True)[0],
    "amax": lambda x: x.amax(1, keepdim=True),
    "var": lambda x: x.var(1, keepdim=True),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "argmax": lambda x: x.argmax(1, keepdim=True).to(x.dtype),
}


class ChannelStatistic(Variant):
    """One channel made of all: mean, sum, maximum, variance."""

    hows = tuple(STATISTICS)
    space = "keeps"

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] > 1

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        if settings["how"] in ("mean", "var"):
            return False
        return all(flags) or settings["how"] in ("max", "amax", "argmax")

    def forward(self, x: Tensor) -> Tensor:
        return STATISTICS[self.how](x)


class Softmax(Variant):
    """Softmax over space or channels, and other operations that need a dimension whole."""

    takes = IMAGE
    hows = ("space", "channels", "flat_channels", "cumsum", "sort", "log_channels")
    breaks_silence = True

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "space":
            return x.flatten(2).softmax(-1).view_as(x)
        if self.how == "channels":
            return F.softmax(x, dim=1)
        if self.how == "log_channels":
            return F.log_softmax(x, dim=1)
        if self.how == "cumsum":
            return x.cumsum(1)
        if self.how == "sort":
            return x.sort(1).values
        return x.flatten(2).softmax(1).reshape(x.shape)


class MaxOut(Variant):
    """Maxout, and sums, over neighbouring channels."""

    hows = ("max", "sum", "crelu")
    space = "keeps"

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] % 2 == 0

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags) or settings["how"] != "sum"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "crelu":
            return torch.cat([F.relu(x), F.relu(-x)], 1)
        b, c, h, w = x.shape
        y = x.view(b, c // 2, 2, h, w)
        return y.amax(2) if self.how == "max" else y.sum(2)

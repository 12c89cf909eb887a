"""Values and constants side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from random_nets.op import Op, OverSpace
from random_nets.program import Choose, Settings
from random_nets.shapes import Shape, besides_channels, channel_axis, channels, is_image, is_sequence


class Cat(Op):
    """Concatenation over channels of two to four values of one size."""

    space = "keeps"
    arity = -1

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        alike = len({(len(s), besides_channels(s)) for s in shapes}) == 1
        return alike and sum(channels(s) for s in shapes) <= 24

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"axis": channel_axis(shapes[0])}

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, dim=self.axis)


class CatPositions(Op):
    """Concatenation over positions or rows: channels meet."""

    arity = 2

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        x, y = shapes
        if is_sequence(x) and is_sequence(y):
            return x[1] == y[1] and x[0] + y[0] <= 20
        return is_image(x) and x == y and x[1] <= 4

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], 1) if x.dim() == 3 else torch.cat([x, y], 2)[:, :, ::2]


class CatConstant(Op):
    """Constants made in forward: coordinates, zeros, ones."""

    breaks_silence = True

    def __init__(self, how: str, count: int) -> None:
        super().__init__()
        self.how, self.count = how, count

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] <= 12

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "how": choose(["coordinates", "ones", "zeros", "ramp_add", "zeros_add", "table"]),
            "count": choose([1, 3]),
        }

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.how == "coordinates":
            rows = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(b, 1, h, w)
            return torch.cat([x, rows], 1)
        if self.how == "ramp_add":
            return x + torch.arange(c, dtype=x.dtype).view(1, c, 1, 1)
        if self.how == "zeros_add":
            return x + torch.zeros(1, c, 1, 1, dtype=x.dtype)
        if self.how == "table":
            return x * torch.tensor([1.0 + i for i in range(c)], dtype=x.dtype)[:, None, None]
        fill = torch.ones if self.how == "ones" else torch.zeros
        return torch.cat([x, fill(b, self.count, h, w, dtype=x.dtype)], 1)


class ChannelPad(Op):
    """Padding of channels, of space, or of both; negative amounts crop."""

    def __init__(self, before: int, after: int, space: int, value: float, how: str) -> None:
        super().__init__()
        self.before, self.after, self.space, self.value, self.how = before, after, space, value, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and 3 < shapes[0][0] <= 12

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        how = choose(["pad", "pad", "cat", "new"])
        space = choose([0, 0, 1]) if shapes[0][1] <= 4 and how == "pad" else 0
        low = [-1] if how == "pad" else []
        before, after = choose([0, 1, 2, 4, *low]), choose([0, 1, 2, 4, *low])
        return {"before": before, "after": after, "space": space, "value": choose([0.0, 0.0, 0.0, 0.7]), "how": how}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags) and settings["value"] == 0

    @classmethod
    def over_space(cls, settings: Settings) -> OverSpace:
        return "mixes" if settings["space"] else "keeps"

    def forward(self, x: Tensor) -> Tensor:
        s = self.space
        if self.how == "pad":
            return F.pad(x, (s, s, s, s, self.before, self.after), value=self.value)
        b, _, h, w = x.shape
        parts = [x]
        if self.how == "cat":
            if self.before:
                parts.insert(0, torch.full((b, self.before, h, w), self.value, dtype=x.dtype))
            parts.append(torch.full((b, max(self.after, 1), h, w), self.value, dtype=x.dtype))
        else:
            if self.before:
                parts.insert(0, x.new_full((b, self.before, h, w), self.value))
            parts.append(x.new_zeros(b, max(self.after, 1), h, w) + self.value)
        return torch.cat(parts, dim=1)

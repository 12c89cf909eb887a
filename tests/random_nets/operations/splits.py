"""A value in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import Shape, channel_axis, channels, is_image


class Split(Op):
    """The channels in parts, each of which is a value of its own."""

    space = "keeps"

    def __init__(self, how: str, sizes: list[int], axis: int) -> None:
        super().__init__()
        self.how, self.sizes, self.axis = how, sizes, axis

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return channels(shapes[0]) > 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        width = channels(shapes[0])
        parts = choose([n for n in (2, 3, 4) if n <= width])
        even = [width // parts] * parts if width % parts == 0 else None
        uneven = [1] * (parts - 1) + [width - parts + 1]
        if parts == 2:
            cut = choose(list(range(1, width)))
            uneven = [cut, width - cut]
        sizes = even if even is not None and choose([True, False]) else uneven
        hows = ["sizes", "slice", "narrow", "tensor_split"] + (
            ["chunk", "split", "unbind", "stepped"] if sizes == even else []
        )
        return {"how": choose(hows), "sizes": sizes, "axis": channel_axis(shapes[0])}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        axis, sizes, parts = self.axis, self.sizes, len(self.sizes)
        starts = [sum(sizes[:i]) for i in range(parts)]
        if self.how == "chunk":
            return x.chunk(parts, axis)
        if self.how == "split":
            return torch.split(x, sizes[0], dim=axis)
        if self.how == "unbind":
            return x.unflatten(axis, (parts, -1)).unbind(axis)
        if self.how == "stepped":
            return tuple(x[:, i::parts] if axis == 1 else x[:, :, i::parts] for i in range(parts))
        if self.how == "sizes":
            return torch.split(x, sizes, axis)
        if self.how == "narrow":
            return tuple(x.narrow(axis, start, size) for start, size in zip(starts, sizes, strict=True))
        if self.how == "tensor_split":
            return torch.tensor_split(x, starts[1:], dim=axis)
        ends = [*starts[1:], None]
        if axis == 1:
            return tuple(x[:, a:b] for a, b in zip(starts, ends, strict=True))
        return tuple(x[..., a:b] for a, b in zip(starts, ends, strict=True))


class TakeOne(Op):
    """One channel, with its dimension."""

    space = "keeps"

    def __init__(self, place: int, how: str) -> None:
        super().__init__()
        self.place, self.how = place, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] > 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"place": choose(list(range(shapes[0][0]))), "how": choose(["select", "slice", "unbind"])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "select":
            return x[:, self.place].unsqueeze(1)
        if self.how == "unbind":
            return x.unbind(1)[self.place][:, None]
        return x[:, self.place : self.place + 1]

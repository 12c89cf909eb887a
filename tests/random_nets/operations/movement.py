"""Channels that change places or are repeated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import WIDTHS, Shape, channel_axis, channels, is_image


class ChannelShuffle(Op):
    """The channels of several groups by turns, as in ShuffleNet."""

    space = "keeps"

    def __init__(self, groups: int, how: str) -> None:
        super().__init__()
        self.groups, self.how = groups, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and any(shapes[0][0] % g == 0 and shapes[0][0] > g for g in (2, 3, 4))

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        width = shapes[0][0]
        groups = choose([g for g in (2, 3, 4) if width % g == 0 and width > g])
        return {"groups": groups, "how": choose(["view", "flatten", "module"])}

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.how == "module":
            return F.channel_shuffle(x, self.groups)
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2)
        return x.contiguous().view(b, -1, h, w) if self.how == "view" else x.flatten(1, 2)


class Reorder(Op):
    """Roll, flip, and choice of channels by a constant index."""

    space = "keeps"

    def __init__(self, how: str, amount: int, index: list[int], axis: int) -> None:
        super().__init__()
        self.how, self.amount, self.axis = how, amount, axis
        if how in ("index_select", "advanced"):
            self.register_buffer("index", torch.tensor(index))
        self.order = index

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return channels(shapes[0]) > 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        width = channels(shapes[0])
        kind = choose(["backwards", "evens_first", "subset", "twice", "first_again"])
        index = {
            "backwards": list(range(width))[::-1],
            "evens_first": [*range(0, width, 2), *range(1, width, 2)],
            "subset": list(range(1, width)),
            "twice": [i // 2 for i in range(2 * min(width, 8))],
            "first_again": [*range(width), 0],
        }[kind]
        how = choose(["roll", "roll", "flip", "flip", "index_select", "advanced", "constant", "list"])
        return {"how": how, "amount": choose([1, 2, -1, -3]), "index": index, "axis": channel_axis(shapes[0])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "roll":
            return torch.roll(x, self.amount, self.axis)
        if self.how == "flip":
            return x.flip(self.axis)
        if self.how == "index_select":
            return x.index_select(self.axis, self.index)
        if self.how == "advanced":
            return x[:, self.index] if self.axis == 1 else x[:, :, self.index]
        if self.how == "list":
            return x[:, self.order] if self.axis == 1 else x[:, :, self.order]
        return x.index_select(self.axis, torch.tensor(self.order))


class Repeat(Op):
    """All channels several times, one after the other or each in place."""

    space = "keeps"

    def __init__(self, how: str, times: int, axis: int) -> None:
        super().__init__()
        self.how, self.times, self.axis = how, times, axis

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return channels(shapes[0]) <= 8

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "how": choose(["repeat", "interleave", "expand", "expand_inner", "cat"]),
            "times": choose([2, 3]),
            "axis": channel_axis(shapes[0]),
        }

    def forward(self, x: Tensor) -> Tensor:
        n = self.times
        if self.how == "repeat":
            return x.repeat(*(n if d == self.axis else 1 for d in range(x.dim())))
        if self.how == "interleave":
            return x.repeat_interleave(n, dim=self.axis)
        if self.how == "cat":
            return torch.cat([x] * n, self.axis)
        inner = self.axis + (self.how == "expand_inner")
        wide = x.unsqueeze(inner).expand(*(n if d == inner else -1 for d in range(x.dim() + 1)))
        return wide.reshape(*(-1 if d == self.axis else s for d, s in enumerate(x.shape)))


class ExpandOne(Op):
    """One channel expanded to several, then weighed."""

    space = "keeps"
    breaks_silence = True

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.width, self.how = width, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] == 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": choose(WIDTHS), "how": choose(["expand", "repeat", "interleave", "broadcast"])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "expand":
            return x.expand(-1, self.width, -1, -1)
        if self.how == "repeat":
            return x.repeat(1, self.width, 1, 1)
        if self.how == "interleave":
            return x.repeat_interleave(self.width, 1)
        return torch.broadcast_to(x, (x.shape[0], self.width, *x.shape[2:]))

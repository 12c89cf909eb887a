"""The channels seen as heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import Shape, channels, divisors, is_image


class HeadsView(Op):
    """The channels as (heads, width), something done there, and back."""

    space = "keeps"

    def __init__(self, heads: int, width: int, how: str, dynamic: bool, sequence: bool) -> None:
        super().__init__()
        self.heads, self.width, self.how, self.dynamic, self.sequence = heads, width, how, dynamic, sequence
        if how in ("scale_heads", "add_heads"):
            self.scale = nn.Parameter(torch.empty(heads, 1))
        elif how == "scale_width":
            self.scale = nn.Parameter(torch.empty(width))
        elif how == "scale_both":
            self.scale = nn.Parameter(torch.empty(heads, width))
        elif how == "linear_width":
            self.fc = nn.Linear(width, width)
        elif how == "linear_heads":
            self.fc = nn.Linear(heads, heads)
        elif how == "blockdiagonal":
            self.weight = nn.Parameter(torch.empty(heads, width, width))

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return bool([d for d in divisors(channels(shapes[0])) if d < channels(shapes[0])])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        width = channels(shapes[0])
        heads = choose([d for d in divisors(width) if d < width])
        hows = [
            "nothing", "scale_heads", "add_heads", "scale_width", "scale_both", "linear_width", "linear_heads",
            "blockdiagonal", "normalise", "softmax_width", "softmax_heads", "gate_heads", "roll_heads", "max_heads",
            "sum_heads", "sum_width", "transpose",
        ]  # fmt: skip
        return {
            "heads": heads,
            "width": width // heads,
            "how": choose(hows),
            "dynamic": choose([False, True]),
            "sequence": not is_image(shapes[0]),
        }

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        how = settings["how"]
        if how in ("scale_heads", "scale_width", "scale_both"):
            return all(flags)
        return all(flags) and how not in ("softmax_width", "softmax_heads", "add_heads", "linear_width", "linear_heads")

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags) or settings["how"] not in ("normalise", "gate_heads", "sum_heads", "sum_width", "max_heads")

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.sequence else x.permute(0, 2, 3, 1)
        shape = y.shape
        if self.dynamic:
            y = y.reshape(*shape[:-1], self.heads, -1)
        else:
            y = y.reshape(*shape[:-1], self.heads, self.width)
        y = self._inside(y)
        if self.dynamic:
            y = y.flatten(-2)
        else:
            y = y.reshape(*shape[:-1], self.heads * self.width)
        return y if self.sequence else y.permute(0, 3, 1, 2)

    def _inside(self, y: Tensor) -> Tensor:  # one return for each way
        how = self.how
        if how in ("scale_heads", "scale_width", "scale_both"):
            return y * self.scale
        if how == "add_heads":
            return y + self.scale
        if how == "linear_width":
            return self.fc(y)
        if how == "linear_heads":
            return self.fc(y.transpose(-1, -2)).transpose(-1, -2)
        if how == "blockdiagonal":
            return (
                torch.einsum("...hi,hio->...ho", y, self.weight)
                if y.dim() > 4
                else (y.unsqueeze(-2) @ self.weight).squeeze(-2)
            )
        if how == "normalise":
            return F.normalize(y, dim=-1)
        if how == "softmax_width":
            return y.softmax(-1)
        if how == "softmax_heads":
            return y.softmax(-2)
        if how == "gate_heads":
            return y * torch.sigmoid(y.sum(-1, keepdim=True))
        if how == "roll_heads":
            return torch.roll(y, 1, -2)
        if how == "max_heads":
            return y + y.amax(-2, keepdim=True)
        if how == "sum_heads":
            return y + y.sum(-2, keepdim=True)
        if how == "sum_width":
            return y + y.sum(-1, keepdim=True)
        if how == "transpose":
            return y.transpose(-1, -2)
        return y

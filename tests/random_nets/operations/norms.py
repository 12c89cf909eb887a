"""Norms, of the library and written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op, OverSpace
from random_nets.program import Choose, Settings
from random_nets.shapes import IMAGE, SEQUENCE, VECTOR, Shape, channel_axis, channels, divisors, is_image


class BatchNorm(Op):
    """Batch norm over any kind of value."""

    def __init__(self, width: int, rank: int, affine: bool, track: bool) -> None:
        super().__init__()
        kind = nn.BatchNorm2d if rank == 3 else nn.BatchNorm1d
        self.bn = kind(width, affine=affine, track_running_stats=track)
        self.rank = rank

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        rank = len(shapes[0])
        track = choose([True, True, True, False]) if rank == 3 and shapes[0][1] > 1 else True
        return {"width": channels(shapes[0]), "rank": rank, "affine": choose([True, True, False]), "track": track}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return settings["affine"] or all(flags)

    @classmethod
    def over_space(cls, settings: Settings) -> OverSpace:
        return "keeps" if settings["track"] else "mixes"

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 2:
            return self.bn(x.transpose(1, 2)).transpose(1, 2)
        return self.bn(x)


class GroupNorm(Op):
    """Group norm of an image."""

    def __init__(self, width: int, groups: int, affine: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, affine=affine)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] > 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "width": shapes[0][0],
            "groups": choose(divisors(shapes[0][0], 1)),
            "affine": choose([True, True, False]),
        }

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return settings["affine"]

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return settings["affine"]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class InstanceNorm(Op):
    """Instance norm of an image."""

    def __init__(self, width: int, affine: bool, track: bool) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(width, affine=affine, track_running_stats=track)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] > 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0], "affine": choose([True, False]), "track": choose([False, True])}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return settings["affine"] or all(flags)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class LayerNorm(Op):
    """Layer norm or RMS norm over channels."""

    space = "keeps"

    def __init__(self, width: int, rank: int, rms: bool, affine: bool) -> None:
        super().__init__()
        self.norm = (
            nn.RMSNorm(width, elementwise_affine=affine) if rms else nn.LayerNorm(width, elementwise_affine=affine)
        )
        self.rank = rank

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "width": channels(shapes[0]),
            "rank": len(shapes[0]),
            "rms": choose([False, True]),
            "affine": choose([True, True, False]),
        }

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return settings["affine"]

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return settings["affine"]

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 3:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm(x)


class LayerNormAll(Op):
    """Statistics over channels and space together."""

    takes = IMAGE | SEQUENCE
    exact = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(list(shape))

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"shape": shapes[0]}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class HandmadeLayerNorm(Op):
    """The layer norm over channels that ConvNeXt writes by hand."""

    takes = IMAGE
    space = "keeps"
    makes_silence = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0]}

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class HandmadeRms(Op):
    """The RMS norm over channels that language models write by hand."""

    takes = SEQUENCE | VECTOR
    space = "keeps"
    makes_silence = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": channels(shapes[0])}

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class GlobalResponseNorm(Op):
    """ConvNeXt V2: the norm of each channel over space against their mean."""

    takes = IMAGE
    exact = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, width, 1, 1))
        self.beta = nn.Parameter(torch.empty(1, width, 1, 1))

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0]}

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        share = energy / (energy.mean(dim=1, keepdim=True) + 1e-6)
        return self.gamma * (x * share) + self.beta + x


class NormaliseChannels(Op):
    """F.normalize over the channels: what is gone must be zero to count for nothing."""

    space = "keeps"
    needs_silence = True

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"axis": choose([channel_axis(shapes[0]), -3 if is_image(shapes[0]) else -1])}

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=self.axis)


class BatchRenormByHand(Op):
    """Buffers of channel size used in a formula."""

    takes = IMAGE
    space = "keeps"
    makes_silence = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(width))
        self.register_buffer("deviation", torch.empty(width))
        self.scale = nn.Parameter(torch.empty(width))

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0]}

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean.view(1, -1, 1, 1)) * self.deviation.reshape(1, -1, 1, 1)
        return x * self.scale.view(1, -1, 1, 1)

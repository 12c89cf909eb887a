"""Space made smaller or larger: pooling, resampling, pixel shuffles."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from random_nets.op import OverSpace, Variant
from random_nets.program import Choose, Settings
from random_nets.shapes import Shape, is_image

SPATIAL: Mapping[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool2d(x, 2),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1),
    "same_max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "reflect": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: torch.roll(x, (1, 1), (2, 3)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
}
ENLARGING = ("nearest", "bilinear")


class Spatial(Variant):
    """Pooling, resampling, padding and rolling of space."""

    hows = tuple(SPATIAL)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose([how for how in cls.hows if how not in ENLARGING or shapes[0][1] <= 4])}

    def forward(self, x: Tensor) -> Tensor:
        return SPATIAL[self.how](x)


class PixelShuffle(Variant):
    """Four channels become one image of twice the size."""

    hows = ("library", "view")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] % 4 == 0 and shapes[0][1] <= 4

    @classmethod
    def over_space(cls, settings: Settings) -> OverSpace:
        return "opens" if settings["how"] == "view" else "mixes"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "library":
            return F.pixel_shuffle(x, 2)
        b, c, h, w = x.shape
        x = x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(b, c // 4, 2 * h, 2 * w)


class PixelUnshuffle(Variant):
    """Blocks of four pixels become four channels."""

    hows = ("library", "view", "slices")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] <= 6 and shapes[0][1] % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "library":
            return F.pixel_unshuffle(x, 2)
        if self.how == "slices":
            corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            return torch.cat(corners, 1)
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(b, 4 * c, h // 2, w // 2)


class Windows(Variant):
    """Windows of two by two as tokens, put together again or unpooled: fold, unfold, max_unpool."""

    hows = ("tokens", "together", "overlapping", "sliding", "unpooled")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] % 2 == shapes[0][2] % 2 == 0 and shapes[0][0] <= 8

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "tokens":
            return F.unfold(x, 2, stride=2).transpose(1, 2)
        if self.how == "sliding":
            return x.unfold(2, 2, 2).unfold(3, 2, 1).mean((4, 5))
        if self.how == "unpooled":
            pooled, places = F.max_pool2d(x, 2, return_indices=True)
            return F.max_unpool2d(pooled, places, 2)
        step = 2 if self.how == "together" else 1
        return F.fold(F.unfold(x, 2, stride=step), x.shape[2:], 2, stride=step)

"""One-stage detector with cross-stage partial blocks (Wang et al. 2020, arXiv:1911.11929) in the manner of YOLOv8.

3x320x320 -> a list of three maps (b, 4 * 16 + 80, h, w) at strides 8, 16 and 32: for each cell the box's four sides as
distributions over 16 bins (Li et al. 2020, arXiv:2006.04388), then 80 class scores. The neck joins the scales top down
(Lin et al. 2017, arXiv:1612.03144) and bottom up (Liu et al. 2018, arXiv:1803.01534).

For pruning: channels split in two and concatenated with all that the blocks make of them, maps read by several layers,
and concatenations across resolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, channels: int, add: bool) -> None:
        super().__init__()
        self.convs = nn.Sequential(Conv(channels, channels, 3), Conv(channels, channels, 3))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x) if self.add else self.convs(x)


class CSPBlock(nn.Module):
    """Half of the channels go through the blocks; both halves and every intermediate map are concatenated."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, add: bool = False) -> None:
        super().__init__()
        self.hidden = out_channels // 2
        self.enter = Conv(in_channels, 2 * self.hidden)
        self.blocks = nn.ModuleList(Residual(self.hidden, add) for _ in range(depth))
        self.leave = Conv((2 + depth) * self.hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = self.enter(x).split((self.hidden, self.hidden), dim=1)
        maps = [passed, worked]
        for block in self.blocks:
            worked = block(worked)
            maps.append(worked)
        return self.leave(torch.cat(maps, dim=1))


class PyramidPool(nn.Module):
    """Max pools of growing windows side by side, each made from the last (SPPF)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = Conv(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.leave = Conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        once = self.pool(x)
        twice = self.pool(once)
        return self.leave(torch.cat((x, once, twice, self.pool(twice)), 1))


class Backbone(nn.Module):
    def __init__(self, w: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, w, 3, 2), Conv(w, 2 * w, 3, 2), CSPBlock(2 * w, 2 * w, 1, add=True))
        self.stage3 = nn.Sequential(Conv(2 * w, 4 * w, 3, 2), CSPBlock(4 * w, 4 * w, 2, add=True))
        self.stage4 = nn.Sequential(Conv(4 * w, 8 * w, 3, 2), CSPBlock(8 * w, 8 * w, 2, add=True))
        self.stage5 = nn.Sequential(
            Conv(8 * w, 16 * w, 3, 2), CSPBlock(16 * w, 16 * w, 1, add=True), PyramidPool(16 * w)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c3 = self.stage3(self.stem(x))
        c4 = self.stage4(c3)
        return c3, c4, self.stage5(c4)


class Neck(nn.Module):
    def __init__(self, w: int) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.top_down4 = CSPBlock(24 * w, 8 * w, 1)
        self.top_down3 = CSPBlock(12 * w, 4 * w, 1)
        self.down3 = Conv(4 * w, 4 * w, 3, 2)
        self.bottom_up4 = CSPBlock(12 * w, 8 * w, 1)
        self.down4 = Conv(8 * w, 8 * w, 3, 2)
        self.bottom_up5 = CSPBlock(24 * w, 16 * w, 1)

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p4 = self.top_down4(torch.cat((self.upsample(c5), c4), 1))
        p3 = self.top_down3(torch.cat((self.upsample(p4), c3), 1))
        p4 = self.bottom_up4(torch.cat((self.down3(p3), p4), 1))
        p5 = self.bottom_up5(torch.cat((self.down4(p4), c5), 1))
        return p3, p4, p5


class Head(nn.Module):
    """Separate branches for boxes and classes."""

    def __init__(self, channels: int, box_width: int, class_width: int, bins: int, num_classes: int) -> None:
        super().__init__()
        self.box = nn.Sequential(
            Conv(channels, box_width, 3), Conv(box_width, box_width, 3), nn.Conv2d(box_width, 4 * bins, 1)
        )
        self.classes = nn.Sequential(
            Conv(channels, class_width, 3), Conv(class_width, class_width, 3), nn.Conv2d(class_width, num_classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.box(x), self.classes(x)), dim=1)


class Detector(nn.Module):
    def __init__(self, width: int = 16, bins: int = 16, num_classes: int = 80) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.neck = Neck(width)
        self.heads = nn.ModuleList(
            Head(scale * width, 4 * bins, num_classes, bins, num_classes) for scale in (4, 8, 16)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.neck(*self.backbone(x))
        return [head(p) for head, p in zip(self.heads, maps, strict=True)]


def build_model() -> Detector:
    return Detector()


def example_inputs() -> Tensor:
    return torch.rand(2, 3, 320, 320)

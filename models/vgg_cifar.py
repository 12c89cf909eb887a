"""VGG networks for images of 32x32 pixels, with batch norm after every convolution.

For pruning: plain chains; the last average leaves one pixel, so that a channel is one column of the first linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def stages(widths: Sequence[Sequence[int]], *, bias: bool) -> nn.Sequential:
    """3x3 convolutions of these widths, each with batch norm and ReLU; the resolution is halved between stages."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in widths:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in stage:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=bias),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
    return nn.Sequential(*layers)


class CifarVGG(nn.Module):
    """Five stages of convolutions, an average over the 2x2 pixels that are left, and a classifier."""

    def __init__(self, feature: nn.Sequential, classifier: nn.Module) -> None:
        super().__init__()
        self.feature = feature
        self.pool = nn.AvgPool2d(2)
        self.classifier = classifier
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.feature(x)).flatten(1))

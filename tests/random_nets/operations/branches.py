"""Where two branches meet: sums, products, scales that one decides for the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from random_nets.op import Op, Variant
from random_nets.program import Choose, Settings
from random_nets.shapes import Shape, besides_channels, channels, is_image, is_vector

WITHOUT_WEIGHTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "maximum": torch.maximum,
    "div": lambda x, y: x / (1 + y * y),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "where": lambda x, y: torch.where(x > y, x, y),
    "stack": lambda x, y: torch.stack([x, y], dim=1).sum(dim=1),
    "mean": lambda x, y: torch.stack([x, y], dim=-1).mean(dim=-1),
}


class Binary(Op):
    """Two branches of one shape."""

    space = "keeps"
    arity = 2

    def __init__(self, how: str, width: int, axis: int) -> None:
        super().__init__()
        self.how = how
        if how == "lerp":
            self.weight = nn.Parameter(torch.empty(width if axis == -1 else (width, 1, 1)))
        if how == "select":
            self.fc = nn.Parameter(torch.empty(2, width))
        self.axis = axis

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return shapes[0] == shapes[1]

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        hows = [
            "add", "add", "add", "mul", "sub", "add_", "div", "maximum", "lerp", "stack", "addcmul", "where", "mean",
            "select",
        ]  # fmt: skip
        return {"how": choose(hows), "width": channels(shapes[0]), "axis": -3 if is_image(shapes[0]) else -1}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        if settings["how"] == "mul":
            return any(flags)
        if settings["how"] == "div":
            return flags[0]
        return all(flags)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "add_":
            z = x.clone()
            z += y
            return z
        if self.how == "lerp":
            return x + self.weight * (y - x)
        if self.how == "select":
            gate = self.fc.softmax(0)
            gate = gate[:, :, None, None] if self.axis == -3 else gate
            both = torch.stack([x, y], 1) * (gate[:, None] if x.dim() == 3 else gate)
            return both.sum(1)
        return WITHOUT_WEIGHTS[self.how](x, y)


class ProjectedAdd(Op):
    """y = x + conv(z): a shortcut with a projection, between branches of different widths."""

    arity = 2

    def __init__(self, cin: int, cout: int, rank: int, norm: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(cin, cout, 1, bias=False) if rank == 3 else nn.Linear(cin, cout)
        self.bn = nn.BatchNorm2d(cout) if norm else nn.Identity()

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(shapes[0]) == len(shapes[1]) and besides_channels(shapes[0]) == besides_channels(shapes[1])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        norm = choose([False, True]) if is_image(shapes[0]) else False
        return {"cin": channels(shapes[1]), "cout": channels(shapes[0]), "rank": len(shapes[0]), "norm": norm}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return flags[0]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return x + self.bn(self.shortcut(z))


class BroadcastMul(Variant):
    """An image times an image of one channel or of one pixel."""

    hows = ("mul", "add", "gate")
    space = "keeps"
    arity = 2

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        x, y = shapes
        if not is_image(x):
            return False
        one_channel = is_image(y) and y[0] == 1 and x[1:] == y[1:] and x[0] > 1
        one_pixel = is_image(y) and y[1] == 1 and x[0] == y[0] and x[1] > 1
        return one_channel or one_pixel or y == (x[0],)

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return flags[0] and (flags[1] or settings["how"] != "add")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = y[:, :, None, None] if y.dim() == 2 else y
        if self.how == "add":
            return x + y
        return x * (torch.sigmoid(y) if self.how == "gate" else y)


class Film(Op):
    """A vector decides scale and shift of the channels of an image."""

    space = "keeps"
    arity = 2

    def __init__(self, cin: int, width: int, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(cin, 2 * width)
        self.width, self.how = width, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and is_vector(shapes[1])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[1][0], "width": shapes[0][0], "how": choose(["chunk", "slice", "view"])}

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        table = self.fc(z)
        if self.how == "chunk":
            gamma, beta = table[:, :, None, None].chunk(2, 1)
        elif self.how == "slice":
            gamma, beta = table[:, : self.width, None, None], table[:, self.width :, None, None]
        else:
            gamma, beta = table.view(-1, 2, self.width, 1, 1).unbind(1)
        return (1 + gamma) * x + beta

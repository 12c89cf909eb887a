"""Random networks: small programs of tensor operations, drawn one choice at a time, and the module that runs one.

A program is plain data. `draw_program` builds it from any source of choices: hypothesis in the tests, a random
generator in a hunt for bugs. Each operation is written the way users write it: with sizes in attributes or taken from
the shapes of tensors, with submodules or functions.

For the masked-weights oracle an operation says what becomes of channels that are gone. A value is *silent* when its
removed entries are exactly zero as soon as the removed slices of all parameters are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]  # without the batch: (C, H, W), (N, C) or (C,)
Choose = Callable[[Sequence[Any]], Any]
Settings = dict[str, Any]

WIDTHS = (4, 6, 8, 12)
OPS: dict[str, type[Op]] = {}
WEIGHTS: dict[str, int] = {}

EXCLUDED: dict[str, str] = {}
"""Operations left out of the generator, by name, each with the reproducer of the bug that it waits for."""


@dataclass(frozen=True)
class Step:
    """One operation: what it is, on which values, with which settings; or the module of an earlier step again."""

    op: str
    operands: tuple[int, ...]
    settings: Settings
    again: int | None = None


@dataclass(frozen=True)
class Program:
    """A network as data.

    Attributes:
        inputs: Shape of each input without the batch; an input of rank 1 named by a negative size holds token ids.
        steps: What is done, in order; values are numbered: inputs first, then the outputs of each step.
        outputs: The values that the network returns.
        container: How it returns them: tensor, list, tuple, dict.
        ties: Pairs of parameter names of which the second is the first.
        unused: Whether the network has parameters that it never uses.
        training: The mode it is in.
        seed: Of its parameters and inputs.
        exact: Whether masked weights compute the same as a smaller network.
    """

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    container: str
    ties: tuple[tuple[str, str], ...]
    unused: bool
    training: bool
    seed: int
    exact: bool


class Op(nn.Module):
    """An operation on values; subclasses are registered under their own name."""

    arity: ClassVar[int] = 1
    exact: ClassVar[bool] = True  # False: counts the channels that are left, so masked weights compute something else
    needs_silence: ClassVar[bool] = False  # True: what is removed must be zero, or it is counted in
    makes_silence: ClassVar[bool] = False  # True: its own weights make what is removed zero
    breaks_silence: ClassVar[bool] = False  # True: f(0) is not 0
    space: ClassVar[str] = "mixes"  # what it does where space itself can shrink: keeps it so, closes, opens, mixes it

    def __init_subclass__(cls, weight: int = 1, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if weight:
            OPS[cls.__name__] = cls
            WEIGHTS[cls.__name__] = weight

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        """Whether it can be applied to values of these shapes."""
        raise NotImplementedError

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        """Its constructor arguments."""
        return {}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        """Whether its output is silent."""
        return cls.makes_silence or (all(flags) and not cls.breaks_silence)

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        """Whether masked weights still compute the same as the smaller network."""
        return cls.exact and (all(flags) or not cls.needs_silence)

    @classmethod
    def over_space(cls, settings: Settings) -> str:
        """What it does to space (or positions) that can shrink; mixing it counts what is left."""
        return cls.space


def is_image(shape: Shape) -> bool:
    return len(shape) == 3


def is_sequence(shape: Shape) -> bool:
    return len(shape) == 2


def is_vector(shape: Shape) -> bool:
    return len(shape) == 1


def channel_axis(shape: Shape) -> int:
    """The dimension of the channels, with the batch."""
    return 2 if is_sequence(shape) else 1


def channels(shape: Shape) -> int:
    return shape[channel_axis(shape) - 1]


def divisors(number: int, low: int = 2) -> list[int]:
    return [n for n in range(low, number + 1) if number % n == 0]


# ---------------------------------------------------------------------------------------------------- convolutions


class Conv(Op, weight=8):
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cin, height, _ = shapes[0]
        cout = choose(WIDTHS)
        groups = choose([1, 1, 1, *(g for g in divisors(math.gcd(cin, cout)))])
        stride = choose([1, 1, 2]) if height > 2 else 1
        return {
            "cin": cin,
            "cout": cout,
            "kernel": choose([1, 3]),
            "stride": stride,
            "groups": groups,
            "bias": choose([True, False]),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvBlock(Op, weight=4):
    """Convolution, batch norm, activation: what most networks are made of."""

    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, kernel: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
        )

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[0][0], "cout": choose(WIDTHS), "kernel": choose([1, 3])}

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Residual(Op, weight=3):
    """y = x + conv(act(conv(x)))."""

    space = "closes"

    def __init__(self, width: int, hidden: int, groups: int, inplace: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, hidden, 1)
        self.middle = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.restore = nn.Conv2d(hidden, width, 1, bias=False)
        self.inplace = inplace

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        hidden = choose(WIDTHS)
        return {
            "width": shapes[0][0],
            "hidden": hidden,
            "groups": choose([1, *divisors(hidden)]),
            "inplace": choose([False, True]),
        }

    def forward(self, x: Tensor) -> Tensor:
        y = self.restore(F.relu(self.bn(self.middle(self.reduce(x)))))
        if self.inplace:
            y += x
            return y.relu_()
        return x + y


class Depthwise(Op, weight=3):
    space = "closes"
    makes_silence = True

    def __init__(self, width: int, multiplier: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * multiplier, 3, padding=1, groups=width, bias=bias)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and 2 <= shapes[0][0] <= 12

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0], "multiplier": choose([1, 1, 2, 3]), "bias": choose([True, False])}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvTranspose(Op, weight=3):
    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, stride: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(cin, cout, stride, stride, groups=groups, bias=bias)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cin, height, _ = shapes[0]
        cout = choose(WIDTHS)
        groups = choose([1, 1, *(g for g in divisors(math.gcd(cin, cout)))])
        return {
            "cin": cin,
            "cout": cout,
            "stride": choose([1, 2]) if height <= 4 else 1,
            "groups": groups,
            "bias": choose([True, False]),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class ConvOverTime(Op):
    """One-dimensional convolution over the positions of a sequence."""

    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, 3, padding="same", groups=groups)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cin, cout = shapes[0][1], choose(WIDTHS)
        return {"cin": cin, "cout": cout, "groups": choose([1, *(g for g in divisors(math.gcd(cin, cout)))])}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class StandardisedConv(Op, weight=2):
    """Weight standardisation: w = (w - mean) / std for each output."""

    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cout, cin // groups, 3, 3))
        self.gain = nn.Parameter(torch.empty(cout, 1, 1, 1))
        self.groups = groups

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cin, cout = shapes[0][0], choose(WIDTHS)
        return {"cin": cin, "cout": cout, "groups": choose([1, 1, *(g for g in divisors(math.gcd(cin, cout)))])}

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        centred = self.weight - mean
        var = (centred * centred).mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred / torch.sqrt(var + 1e-5) * self.gain, padding=1, groups=self.groups)

    def masked(self, live: Live) -> nn.Module:
        return _MaskedStandardisedConv(self, live)


class _MaskedStandardisedConv(nn.Module):
    def __init__(self, original: StandardisedConv, live: Live) -> None:
        super().__init__()
        self.original = original
        self.mask = live(original.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight, mask = self.original.weight, self.mask
        count = mask.sum((1, 2, 3), keepdim=True).clamp(min=1)
        centred = (weight - (weight * mask).sum((1, 2, 3), keepdim=True) / count) * mask
        var = (centred * centred).sum((1, 2, 3), keepdim=True) / count
        kernel = centred / torch.sqrt(var + 1e-5) * self.original.gain
        return F.conv2d(x, kernel, padding=1, groups=self.original.groups)


class WeightNormConv(Op):
    """w = g * v / |v| for each output."""

    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, library: bool) -> None:
        super().__init__()
        self.library = library
        if library:
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(cin, cout, 1, bias=False))
        else:
            self.v = nn.Parameter(torch.empty(cout, cin, 1, 1))
            self.g = nn.Parameter(torch.empty(cout, 1, 1, 1))

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[0][0], "cout": choose(WIDTHS), "library": choose([False, True])}

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return not settings["library"]  # 0 / 0 where an output is gone

    def forward(self, x: Tensor) -> Tensor:
        if self.library:
            return self.conv(x)
        norm = (self.v * self.v).sum((1, 2, 3), keepdim=True)
        return F.conv2d(x, self.g * self.v * torch.rsqrt(norm + 1e-6))


class TiedAutoencoder(Op):
    """y = act(x W^T) W: one weight used both ways, by linear, by matrix product or by convolution."""

    makes_silence = False

    def __init__(self, width: int, hidden: int, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, width))
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return True

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        how = choose(["conv", "einsum"] if is_image(shapes[0]) else ["linear", "matmul"])
        return {"width": channels(shapes[0]), "hidden": choose(WIDTHS), "how": how}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.how == "linear":
            return F.linear(torch.tanh(F.linear(x, w)), w.t())
        if self.how == "matmul":
            return torch.tanh(x @ w.transpose(0, 1)) @ w
        if self.how == "einsum":
            return torch.einsum("bohw,oc->bchw", torch.einsum("bchw,oc->bohw", x, w).relu(), w)
        kernel = w[:, :, None, None]
        return F.conv_transpose2d(F.conv2d(x, kernel).relu(), kernel)


class Experts(Op):
    """A convolution whose weight is a learned mixture of several."""

    space = "closes"
    makes_silence = True

    def __init__(self, cin: int, cout: int, count: int, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, cout, cin, 1, 1))
        self.mixture = nn.Parameter(torch.empty(count))
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[0][0], "cout": choose(WIDTHS), "count": choose([2, 3]), "how": choose(["einsum", "sum"])}

    def forward(self, x: Tensor) -> Tensor:
        share = self.mixture.softmax(0)
        if self.how == "einsum":
            return F.conv2d(x, torch.einsum("k,koihw->oihw", share, self.weight))
        return F.conv2d(x, (share.view(-1, 1, 1, 1, 1) * self.weight).sum(0))


# ---------------------------------------------------------------------------------------------------------- linear


class Linear(Op, weight=5):
    space = "keeps"
    makes_silence = True

    def __init__(self, cin: int, cout: int, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(cin, cout, bias)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return not is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": channels(shapes[0]), "cout": choose(WIDTHS), "bias": choose([True, False])}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class ChannelsLastMlp(Op, weight=2):
    """ConvNeXt: permute, layer norm, linear, gelu, linear, scale, permute, add."""

    space = "keeps"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.empty(width))

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0], "hidden": choose(WIDTHS)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return x + y.permute(0, 3, 1, 2)


class Mlp(Op, weight=2):
    space = "keeps"

    def __init__(self, width: int, hidden: int, gated: str) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(width, hidden if gated in ("no", "separate") else 2 * hidden)
        self.gate = nn.Linear(width, hidden) if gated == "separate" else None
        self.fc2 = nn.Linear(hidden, width)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return not is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "width": channels(shapes[0]),
            "hidden": choose(WIDTHS),
            "gated": choose(["no", "separate", "chunk", "glu"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if self.gate is not None:
            y = F.silu(self.gate(x)) * y
        elif self.gated == "chunk":
            a, b = y.chunk(2, dim=-1)
            y = a * F.gelu(b)
        elif self.gated == "glu":
            y = F.glu(y, -1)
        else:
            y = F.gelu(y)
        return x + self.fc2(y)


class TokenMixing(Op, weight=2):
    """MLP mixer: linear over the positions."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(tokens, hidden)
        self.fc2 = nn.Linear(hidden, tokens)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"tokens": shapes[0][0], "hidden": choose(WIDTHS)}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return False  # the biases of positions reach every channel

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)


class SpatialToVector(Op, weight=3):
    makes_silence = True

    def __init__(self, shape: Shape, cout: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.size = math.prod(shape)
        self.fc = nn.Linear(self.size if how != "pool" else channels(shape), cout)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return not is_vector(shapes[0]) and math.prod(shapes[0]) <= 256

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"shape": shapes[0], "cout": choose(WIDTHS), "how": choose(["flatten", "view", "reshape", "pool"])}

    @classmethod
    def over_space(cls, settings: Settings) -> str:
        return "mixes" if settings["how"] == "pool" else "closes"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "pool":
            x = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
        elif self.how == "flatten":
            x = torch.flatten(x, 1)
        elif self.how == "view":
            x = x.contiguous().view(-1, self.size)
        else:
            x = x.reshape(x.shape[0], -1)
        return self.fc(x)


class VectorToImage(Op, weight=3):
    """linear, then view to an image, as generators do."""

    space = "opens"
    makes_silence = True

    def __init__(self, cin: int, width: int, side: int, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(cin, width * side * side)
        self.width, self.side, self.how = width, side, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_vector(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "cin": shapes[0][0],
            "width": choose(WIDTHS),
            "side": choose([1, 2]),
            "how": choose(["view", "unflatten", "infer"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.how == "view":
            return x.view(x.size(0), self.width, self.side, self.side)
        if self.how == "infer":
            return x.reshape(-1, self.width, self.side, self.side)
        return x.unflatten(1, (-1, self.side, self.side))


class VectorToImageChannelsLast(Op):
    """As above, the channels last."""

    space = "opens"
    makes_silence = True

    def __init__(self, cin: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(cin, width * 4)
        self.width = width

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_vector(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": shapes[0][0], "width": choose(WIDTHS)}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(-1, 2, 2, self.width).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------------- norms


class BatchNorm(Op, weight=4):
    def __init__(self, width: int, rank: int, affine: bool, track: bool) -> None:
        super().__init__()
        kind = nn.BatchNorm2d if rank == 3 else nn.BatchNorm1d
        self.bn = kind(width, affine=affine, track_running_stats=track)
        self.rank = rank

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return True

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        rank = len(shapes[0])
        track = choose([True, True, True, False]) if rank == 3 and shapes[0][1] > 1 else True
        return {"width": channels(shapes[0]), "rank": rank, "affine": choose([True, True, False]), "track": track}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return settings["affine"] or all(flags)

    @classmethod
    def over_space(cls, settings: Settings) -> str:
        return "keeps" if settings["track"] else "mixes"

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 2:
            return self.bn(x.transpose(1, 2)).transpose(1, 2)
        return self.bn(x)


class GroupNorm(Op, weight=3):
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


class LayerNorm(Op, weight=3):
    space = "keeps"

    def __init__(self, width: int, rank: int, rms: bool, affine: bool) -> None:
        super().__init__()
        self.norm = (
            nn.RMSNorm(width, elementwise_affine=affine) if rms else nn.LayerNorm(width, elementwise_affine=affine)
        )
        self.rank = rank

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return True

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

    exact = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(list(shape))

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return not is_vector(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"shape": shapes[0]}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class HandmadeLayerNorm(Op, weight=2):
    """The layer norm over channels that ConvNeXt writes by hand."""

    space = "keeps"
    makes_silence = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0]}

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]

    def masked(self, live: Live) -> nn.Module:
        return MaskedNorm(self.weight, self.bias, live(self.weight), 1e-6, 1, "channels")


class HandmadeRms(Op):
    space = "keeps"
    makes_silence = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return not is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": channels(shapes[0])}

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight

    def masked(self, live: Live) -> nn.Module:
        return MaskedNorm(self.weight, None, live(self.weight), 1e-5, 1, "rms")


class GlobalResponseNorm(Op):
    """ConvNeXt V2: the norm of each channel over space against their mean."""

    exact = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, width, 1, 1))
        self.beta = nn.Parameter(torch.empty(1, width, 1, 1))

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

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

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return True

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"axis": choose([channel_axis(shapes[0]), -1 if not is_image(shapes[0]) else -3])}

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=self.axis)


class BatchRenormByHand(Op):
    """Buffers of channel size used in a formula."""

    space = "keeps"
    makes_silence = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(width))
        self.register_buffer("deviation", torch.empty(width))
        self.scale = nn.Parameter(torch.empty(width))

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0]}

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean.view(1, -1, 1, 1)) * self.deviation.reshape(1, -1, 1, 1)
        return x * self.scale.view(1, -1, 1, 1)


# ------------------------------------------------------------------------------------------------------- pointwise

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "relu6": F.relu6,
    "relu_": lambda x: x.clone().relu_(),
    "square": lambda x: x * x,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-1, 1),
    "neg": lambda x: -x,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardsigmoid": F.hardsigmoid,
    "cos": torch.cos,
    "shift": lambda x: x + 0.3,
    "rsub": lambda x: 1 - x,
    "shift_": lambda x: x.clone().add_(0.5),
    "where": lambda x: torch.where(x > 0, x, torch.full_like(x, 0.25)),
    "where_scalar": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.2),
    "ones": lambda x: x + torch.ones_like(x),
    "dropout": lambda x: F.dropout(x, 0.1, training=False),
    "float": lambda x: x.to(x.dtype),
    "clone": lambda x: x.clone().contiguous(),
}
LOUD = frozenset(
    {"sigmoid", "softplus", "hardsigmoid", "cos", "shift", "rsub", "shift_", "where", "masked_fill", "ones"}
)


class Activation(Op, weight=5):
    space = "keeps"

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return True

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"name": choose(list(ACTIVATIONS))}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags) and settings["name"] not in LOUD

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


class ActivationModule(Op):
    """Activations and dropout as modules, some with parameters."""

    space = "keeps"

    def __init__(self, width: int, name: str) -> None:
        super().__init__()
        modules = {
            "relu_": nn.ReLU(inplace=True),
            "dropout": nn.Dropout(0.2),
            "dropout2d": nn.Dropout2d(0.2),
            "prelu": nn.PReLU(width),
            "prelu1": nn.PReLU(),
            "identity": nn.Identity(),
        }
        self.act = modules[name]
        self.name = name

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return True

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        names = ["relu_", "dropout", "prelu1", "identity"]
        if not is_sequence(shapes[0]):
            names.append("prelu")
        if is_image(shapes[0]):
            names.append("dropout2d")
        return {"width": channels(shapes[0]), "name": choose(names)}

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x.clone() if self.name == "relu_" else x)


class LayerScale(Op, weight=4):
    """A parameter or buffer of channel size multiplied, added or subtracted, or one scalar."""

    space = "keeps"

    def __init__(self, shape: list[int], how: str, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("scale", torch.empty(shape))
        else:
            self.scale = nn.Parameter(torch.empty(shape))
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return True

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        shape = shapes[0]
        width = channels(shape)
        if is_image(shape):
            options = [[width, 1, 1], [1, width, 1, 1], [], [1], list(shape), [1, *shape[1:]]]
        elif is_sequence(shape):
            options = [[width], [1, 1, width], [], [1], list(shape), [shape[0], 1]]
        else:
            options = [[width], [1, width], [], [1]]
        hows = ["mul", "add", "sub", "rsub", "mul_", "div"]
        return {"shape": choose(options), "how": choose(hows), "buffer": choose([False, False, True])}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        per_channel = math.prod(settings["shape"]) > 1 and not _is_spatial(settings["shape"])
        if settings["how"] in ("mul", "mul_"):
            return all(flags) or per_channel
        return all(flags) and (per_channel or settings["how"] == "div")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mul":
            return x * self.scale
        if self.how == "mul_":
            x = x.clone()
            x *= self.scale
            return x
        if self.how == "add":
            return x + self.scale
        if self.how == "sub":
            return x - self.scale
        if self.how == "div":
            return x / (self.scale.abs() + 0.5)
        return self.scale - x


def _is_spatial(shape: Sequence[int]) -> bool:
    """Whether a parameter varies over space only."""
    return (len(shape) == 3 and shape[0] == 1 and shape[1] > 1) or (len(shape) == 2 and shape[1] == 1)


class Binary(Op, weight=9):
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
            "add",
            "add",
            "add",
            "mul",
            "sub",
            "add_",
            "div",
            "maximum",
            "lerp",
            "stack",
            "addcmul",
            "where",
            "mean",
            "select",
        ]
        return {"how": choose(hows), "width": channels(shapes[0]), "axis": -3 if is_image(shapes[0]) else -1}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        if settings["how"] == "mul":
            return any(flags)
        if settings["how"] == "div":
            return flags[0]
        return all(flags)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # one return for each way
        how = self.how
        if how == "add_":
            z = x.clone()
            z += y
            return z
        if how == "lerp":
            return x + self.weight * (y - x)
        if how == "stack":
            return torch.stack([x, y], dim=1).sum(dim=1)
        if how == "mean":
            return torch.stack([x, y], dim=-1).mean(dim=-1)
        if how == "select":
            gate = self.fc.softmax(0)
            gate = gate[:, :, None, None] if self.axis == -3 else gate
            both = torch.stack([x, y], 1) * (gate[:, None] if x.dim() == 3 else gate)
            return both.sum(1)
        if how == "addcmul":
            return torch.addcmul(x, x, y, value=0.5)
        if how == "where":
            return torch.where(x > y, x, y)
        table = {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "maximum": torch.maximum}
        return x / (1 + y * y) if how == "div" else table[how](x, y)


class ProjectedAdd(Op, weight=5):
    """y = x + conv(z): a shortcut with a projection, between branches of different widths."""

    arity = 2

    def __init__(self, cin: int, cout: int, rank: int, norm: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(cin, cout, 1, bias=False) if rank == 3 else nn.Linear(cin, cout)
        self.bn = nn.BatchNorm2d(cout) if norm else nn.Identity()

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        axis = channel_axis(shapes[0]) - 1
        return len(shapes[0]) == len(shapes[1]) and _without(shapes[0], axis) == _without(shapes[1], axis)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        norm = choose([False, True]) if is_image(shapes[0]) else False
        return {"cin": channels(shapes[1]), "cout": channels(shapes[0]), "rank": len(shapes[0]), "norm": norm}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return flags[0]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return x + self.bn(self.shortcut(z))


def _without(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis + 1 :]


class BroadcastMul(Op, weight=2):
    """An image times an image of one channel or of one pixel."""

    space = "keeps"
    arity = 2

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        x, y = shapes
        if not is_image(x):
            return False
        one_channel = is_image(y) and y[0] == 1 and x[1:] == y[1:] and x[0] > 1
        one_pixel = is_image(y) and y[1] == 1 and x[0] == y[0] and x[1] > 1
        return one_channel or one_pixel or y == (x[0],)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["mul", "add", "gate"])}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return flags[0] and (flags[1] or settings["how"] != "add")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = y[:, :, None, None] if y.dim() == 2 else y
        if self.how == "add":
            return x + y
        return x * (torch.sigmoid(y) if self.how == "gate" else y)


class Film(Op, weight=2):
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


class SqueezeExcite(Op, weight=4):
    def __init__(self, width: int, hidden: int, linear: bool, gate: str) -> None:
        super().__init__()
        self.linear, self.gate = linear, gate
        if linear:
            self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        else:
            self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "width": shapes[0][0],
            "hidden": choose((2, 4, 6)),
            "linear": choose([True, False]),
            "gate": choose(["sigmoid", "hard", "softmax"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            b, c, _, _ = x.shape
            s = x.mean((2, 3)).view(b, c)
            s = self.fc2(F.relu(self.fc1(s)))
            s = s.view(b, c, 1, 1)
        else:
            s = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        gates = {"sigmoid": torch.sigmoid, "hard": F.hardsigmoid, "softmax": lambda t: t.softmax(1)}
        return x * gates[self.gate](s)


class EfficientChannelAttention(Op):
    """ECA: a one-dimensional convolution over the channels as positions, which fixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y)


class InPlaceSlice(Op, weight=2):
    """Part of the channels changed in place."""

    space = "keeps"

    def __init__(self, cut: int, how: str, image: bool) -> None:
        super().__init__()
        self.cut, self.how, self.image = cut, how, image

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return channels(shapes[0]) > 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        cut = choose(list(range(1, channels(shapes[0]))))
        return {"cut": cut, "how": choose(["zero", "scale", "assign", "relu_"]), "image": is_image(shapes[0])}

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        part = y[:, : self.cut] if self.image or y.dim() == 2 else y[..., : self.cut]
        if self.how == "zero":
            part.zero_()
        elif self.how == "scale":
            part.mul_(2.0)
        elif self.how == "relu_":
            part.relu_()
        elif self.image or y.dim() == 2:
            y[:, : self.cut] = x[:, : self.cut] * 0.5
        else:
            y[..., : self.cut] = x[..., : self.cut] * 0.5
        return y


# -------------------------------------------------------------------------------------------------------- movement


class Cat(Op, weight=6):
    """Concatenation over channels of two to four values of one size."""

    space = "keeps"
    arity = -1

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        axis = channel_axis(shapes[0]) - 1
        alike = len({(len(s), _without(s, axis)) for s in shapes}) == 1
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


class Split(Op, weight=7):
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


class ChannelShuffle(Op, weight=5):
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


class HeadsView(Op, weight=5):
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


class PixelShuffle(Op, weight=3):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] % 4 == 0 and shapes[0][1] <= 4

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["library", "view"])}

    @classmethod
    def over_space(cls, settings: Settings) -> str:
        return "opens" if settings["how"] == "view" else "mixes"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "library":
            return F.pixel_shuffle(x, 2)
        b, c, h, w = x.shape
        x = x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(b, c // 4, 2 * h, 2 * w)


class PixelUnshuffle(Op, weight=3):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] <= 6 and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["library", "view", "slices"])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "library":
            return F.pixel_unshuffle(x, 2)
        if self.how == "slices":
            corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            return torch.cat(corners, 1)
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(b, 4 * c, h // 2, w // 2)


class ChannelPad(Op, weight=4):
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
    def over_space(cls, settings: Settings) -> str:
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


class PaddedShortcut(Op, weight=3):
    """The shortcut of CIFAR ResNets: every second pixel, channels padded with zeros; then the branch is added."""

    def __init__(self, cin: int, before: int, after: int, how: str) -> None:
        super().__init__()
        cout = cin + before + after
        self.conv = nn.Conv2d(cin, cout, 3, 2, 1)
        self.bn = nn.BatchNorm2d(cout)
        self.before, self.after, self.how = before, after, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] <= 12 and shapes[0][1] > 1 and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "cin": shapes[0][0],
            "before": choose([0, 1, 2, 4]),
            "after": choose([1, 2, 4]),
            "how": choose(["stride", "pool"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        small = x[:, :, ::2, ::2] if self.how == "stride" else F.avg_pool2d(x, 2)
        return F.relu(self.bn(self.conv(x)) + F.pad(small, (0, 0, 0, 0, self.before, self.after)))


class Reorder(Op, weight=5):
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


class Repeat(Op, weight=4):
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


class ExpandOne(Op, weight=2):
    """One channel expanded to several, then weighed."""

    space = "keeps"
    makes_silence = False
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


class ExpandPixel(Op, weight=2):
    """One pixel expanded to an image, as in the pooling branch of DeepLab."""

    space = "opens"

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_vector(shapes[0]) or (is_image(shapes[0]) and shapes[0][1] == 1)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["expand", "interpolate", "repeat"])}

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None, None] if x.dim() == 2 else x
        if self.how == "expand":
            return x.expand(x.shape[0], x.shape[1], 4, 4)
        if self.how == "repeat":
            return x.repeat(1, 1, 4, 4)
        return F.interpolate(x, (4, 4), mode="bilinear")


class CatConstant(Op, weight=2):
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


class Sequence_(Op, weight=4):  # noqa: N801  # the name of the abstract class is taken
    """An image as a sequence of its pixels."""

    space = "keeps"

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] <= 4

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["flatten", "view", "permute"])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flatten":
            return x.flatten(2).transpose(1, 2)
        b, c, h, w = x.shape
        if self.how == "view":
            return x.reshape(b, c, h * w).permute(0, 2, 1)
        return x.permute(0, 2, 3, 1).reshape(b, -1, c)


class Image(Op, weight=4):
    """A sequence as an image."""

    space = "keeps"

    def __init__(self, side: int, how: str) -> None:
        super().__init__()
        self.side, self.how = side, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and math.isqrt(shapes[0][0]) ** 2 == shapes[0][0]

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"side": math.isqrt(shapes[0][0]), "how": choose(["transpose", "permute"])}

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        if self.how == "transpose":
            return x.transpose(1, 2).reshape(b, c, self.side, self.side)
        return x.reshape(b, self.side, self.side, -1).permute(0, 3, 1, 2)


class Tokens(Op, weight=3):
    """Class token, position embedding, or a choice of positions."""

    def __init__(self, count: int, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "class":
            self.token = nn.Parameter(torch.empty(1, 1, width))
        if how == "positions":
            self.embedding = nn.Parameter(torch.empty(1, count, width))
        if how == "lookup":
            self.embedding = nn.Embedding(count + 1, width)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and 1 < shapes[0][0] <= 16

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        how = choose(["class", "positions", "lookup", "tail", "reverse"])
        return {"count": shapes[0][0], "width": shapes[0][1], "how": how}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "class":
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.how == "positions":
            return x + self.embedding
        if self.how == "lookup":
            return x + self.embedding(torch.arange(x.shape[1]))
        return x[:, 1:] if self.how == "tail" else x.flip(1)


class FirstToken(Op, weight=2):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["first", "mean", "max", "sum"])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "max":
            return x.amax(1)
        return x[:, 0] if self.how == "first" else x.mean(1) if self.how == "mean" else x.sum(1)


class Vector(Op, weight=2):
    """Pooling of an image to a vector."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["mean", "adaptive", "max", "flatten", "squeeze"])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mean":
            return x.mean((2, 3))
        if self.how == "max":
            return x.amax((2, 3))
        if self.how == "flatten":
            return x.flatten(1) if x.shape[1] * x.shape[2] <= 24 and x.shape[2] == 1 else x.flatten(2).mean(2)
        pooled = F.adaptive_avg_pool2d(x, 1)
        return pooled.squeeze(-1).squeeze(-1) if self.how == "squeeze" else torch.flatten(pooled, 1)


# ------------------------------------------------------------------------------------------------ pooling and mixing


class Spatial(Op, weight=3):
    """Pooling, resampling and padding of space."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        options = ["max", "avg", "adaptive", "same_max", "reflect", "flip", "roll"]
        return {"how": choose(options + (["nearest", "bilinear"] if shapes[0][1] <= 4 else []))}

    def forward(self, x: Tensor) -> Tensor:
        operations: Mapping[str, Callable[[], Tensor]] = {
            "max": lambda: F.max_pool2d(x, 2),
            "avg": lambda: F.avg_pool2d(x, 2),
            "adaptive": lambda: F.adaptive_avg_pool2d(x, 1),
            "same_max": lambda: F.max_pool2d(x, 3, 1, 1),
            "reflect": lambda: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
            "nearest": lambda: F.interpolate(x, scale_factor=2, mode="nearest"),
            "bilinear": lambda: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
            "flip": lambda: x.flip(3),
            "roll": lambda: torch.roll(x, (1, 1), (2, 3)),
        }
        return operations[self.how]()


class ChannelStatistic(Op, weight=3):
    """One channel made of all: mean, sum, maximum, variance."""

    space = "keeps"

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] > 1

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["mean", "sum", "max", "amax", "var", "norm", "argmax"])}

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        if settings["how"] in ("mean", "var"):
            return False
        return all(flags) or settings["how"] in ("max", "amax", "argmax")

    def forward(self, x: Tensor) -> Tensor:
        operations: Mapping[str, Callable[[], Tensor]] = {
            "mean": lambda: x.mean(1, keepdim=True),
            "sum": lambda: x.sum(dim=1, keepdim=True),
            "max": lambda: x.max(dim=1, keepdim=True)[0],
            "amax": lambda: x.amax(1, keepdim=True),
            "var": lambda: x.var(1, keepdim=True),
            "norm": lambda: torch.linalg.vector_norm(x, dim=1, keepdim=True),
            "argmax": lambda: x.argmax(1, keepdim=True).to(x.dtype),
        }
        return operations[self.how]()


class SpatialGate(Op):
    """CBAM: mean and maximum over channels decide where to look."""

    exact = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * torch.sigmoid(self.conv(both))


class Softmax(Op, weight=2):
    """Softmax over space or channels, and other operations that need a dimension whole."""

    breaks_silence = True

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0])

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["space", "channels", "flat_channels", "cumsum", "sort", "log_channels"])}

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


class Glu(Op, weight=2):
    space = "keeps"

    def __init__(self, axis: int, how: str) -> None:
        super().__init__()
        self.axis, self.how = axis, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return channels(shapes[0]) % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"axis": channel_axis(shapes[0]), "how": choose(["glu", "chunk", "simple", "tanh"])}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "glu":
            return F.glu(x, self.axis)
        a, b = x.chunk(2, self.axis)
        return a * b if self.how == "simple" else a * (torch.sigmoid(b) if self.how == "chunk" else b.tanh())


class MaxOut(Op):
    """Maxout, and sums, over neighbouring channels."""

    space = "keeps"

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][0] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["max", "sum", "crelu"])}

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags) or settings["how"] != "sum"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "crelu":
            return torch.cat([F.relu(x), F.relu(-x)], 1)
        b, c, h, w = x.shape
        y = x.view(b, c // 2, 2, h, w)
        return y.amax(2) if self.how == "max" else y.sum(2)


# ------------------------------------------------------------------------------------- products of activations


class Gram(Op, weight=2):
    """The products of the channels of two images, summed over space: channels become positions."""

    space = "opens"
    arity = 2

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and is_image(shapes[1]) and shapes[0][1:] == shapes[1][1:] and shapes[0][0] <= 16

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["matmul", "einsum", "bmm"])}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "einsum":
            return torch.einsum("bchw,bdhw->bcd", x, y)
        a, b = x.flatten(2), y.flatten(2).transpose(1, 2)
        return torch.bmm(a, b) if self.how == "bmm" else a @ b


class Correlation(Op, weight=2):
    """The products of positions, summed over channels: what is gone must be zero to count for nothing."""

    arity = 2
    needs_silence = True

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return shapes[0] == shapes[1] and is_sequence(shapes[0]) and shapes[0][0] <= 20

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"how": choose(["matmul", "einsum", "sum"])}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "einsum":
            scores = torch.einsum("bnc,bmc->bnm", x, y)
        elif self.how == "sum":
            scores = (x[:, :, None] * y[:, None]).sum(-1)
        else:
            scores = x @ y.transpose(1, 2)
        return scores.softmax(-1)


class Mixing(Op, weight=2):
    """Positions mixed by weights that the input decides: y = a v."""

    arity = 2

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and is_sequence(shapes[1]) and shapes[0][1] == shapes[1][0]

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags)

    def forward(self, a: Tensor, v: Tensor) -> Tensor:
        return a @ v


class Outer(Op):
    """The products of two vectors, flattened into a linear layer."""

    arity = 2
    makes_silence = True

    def __init__(self, first: int, second: int, cout: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "bilinear":
            self.fc = nn.Bilinear(first, second, cout)
        else:
            self.fc = nn.Linear(first * second, cout)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_vector(shapes[0]) and is_vector(shapes[1]) and shapes[0][0] * shapes[1][0] <= 150

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "first": shapes[0][0],
            "second": shapes[1][0],
            "cout": choose(WIDTHS),
            "how": choose(["einsum", "mul", "bilinear"]),
        }

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "bilinear":
            return self.fc(x, y)
        z = torch.einsum("bi,bj->bij", x, y) if self.how == "einsum" else x[:, :, None] * y[:, None, :]
        return self.fc(z.flatten(1))


class NonLocal(Op, weight=2):
    """Self-attention over pixels with 1x1 convolutions."""

    def __init__(self, width: int, inner: int, how: str) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, width, 1)
        self.gamma = nn.Parameter(torch.empty(1))
        self.inner, self.how = inner, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] <= 4

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0], "inner": choose(WIDTHS), "how": choose(["view", "flatten", "einsum", "channel"])}

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if self.how == "view":
            q, k, v = (f(x).view(b, self.inner, h * w) for f in (self.query, self.key, self.value))
        else:
            q, k, v = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        if self.how == "einsum":
            scores = torch.einsum("bcn,bcm->bnm", q, k).softmax(-1)
            y = torch.einsum("bnm,bcm->bcn", scores, v)
        elif self.how == "channel":
            y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        else:
            scores = (q.transpose(1, 2) @ k).softmax(-1)
            y = v @ scores.transpose(1, 2)
        y = y.view(b, self.inner, h, w) if self.how == "view" else y.unflatten(2, (h, w))
        return x + self.gamma * self.out(y)


class Attention(Op, weight=10):
    """Multi-head attention in the ways people write it."""

    makes_silence = True

    def __init__(
        self,
        width: int,
        tokens: int,
        heads: int,
        shared: int,
        inner: int,
        kind: str,
        core: str,
        bias: str,
        norm: str,
        dynamic: bool,
        residual: bool,
    ) -> None:
        super().__init__()
        self.heads, self.shared, self.inner, self.scale = heads, shared, inner, inner**-0.5
        self.kind, self.core, self.bias, self.norm, self.dynamic, self.residual = (
            kind,
            core,
            bias,
            norm,
            dynamic,
            residual,
        )
        if kind in ("fused", "chunk", "packed"):
            self.qkv = nn.Linear(width, 3 * heads * inner)
        else:
            self.q = nn.Linear(width, heads * inner)
            if kind == "kv":
                self.kv = nn.Linear(width, 2 * heads * inner)
            else:
                self.k, self.v = nn.Linear(width, shared * inner), nn.Linear(width, shared * inner, bias=False)
        if bias == "table":
            self.table = nn.Parameter(torch.empty(heads, tokens, tokens))
        if bias == "lookup":
            self.table = nn.Parameter(torch.empty(2 * tokens - 1, heads))
            places = torch.arange(tokens)
            self.register_buffer("index", places[:, None] - places[None] + tokens - 1)
        if norm in ("layer", "rms"):
            self.norm_q, self.norm_k = ((nn.LayerNorm if norm == "layer" else nn.RMSNorm)(inner) for _ in range(2))
        if norm == "temperature":
            self.temperature = nn.Parameter(torch.empty(heads, 1, 1))
        self.proj = nn.Linear(heads * inner, width)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and shapes[0][0] <= 20

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        tokens, width = shapes[0]
        kind = choose(["fused", "chunk", "packed", "separate", "kv", "multiquery", "grouped"])
        heads = choose([4, 6] if kind == "grouped" else [2, 3, 4])
        shared = {"multiquery": 1, "grouped": heads // 2}.get(kind, heads)
        core = choose(["sdpa", "manual", "einsum", "linear", "channels", "causal"])
        bias = choose(["no", "table", "lookup"]) if core in ("sdpa", "manual") else "no"
        norm = choose(["no", "no", "layer", "rms", "cosine", "temperature"])
        return {
            "width": width,
            "tokens": tokens,
            "heads": heads,
            "shared": shared,
            "inner": choose([2, 3, 4]),
            "kind": kind,
            "core": core,
            "bias": bias,
            "norm": norm,
            "dynamic": choose([False, True]),
            "residual": choose([False, True]),
        }

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags) or not settings["residual"]

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self._project(x)
        if self.norm in ("layer", "rms"):
            q, k = self.norm_q(q), self.norm_k(k)
        elif self.norm == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        elif self.norm == "temperature":
            q = q * self.temperature
        y = self._attend(q, k, v)
        y = y.transpose(1, 2)
        y = y.reshape(b, n, -1) if self.dynamic else y.reshape(b, n, self.heads * self.inner)
        y = self.proj(y)
        return x + y if self.residual else y

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        h, d = self.heads, self.inner
        if self.kind == "fused":
            q, k, v = self.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.kind == "packed":
            q, k, v = self.qkv(x).reshape(b, n, h, 3 * d).transpose(1, 2).chunk(3, -1)
            return q, k, v
        if self.kind == "chunk":
            parts = self.qkv(x).chunk(3, dim=-1)
        elif self.kind == "kv":
            parts = (self.q(x), *self.kv(x).split(h * d, -1))
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (
            part.view(b, n, -1, d).transpose(1, 2)
            if self.dynamic
            else part.view(b, n, h if i == 0 else self.shared, d).transpose(1, 2)
            for i, part in enumerate(parts)
        )
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "grouped" and not (self.core == "sdpa" and self.dynamic):
            if self.dynamic:
                k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
            else:
                b, s, n, d = k.shape
                times = self.heads // self.shared
                k, v = (t[:, :, None].expand(b, s, times, n, d).reshape(b, s * times, n, d) for t in (k, v))
        bias = None
        if self.bias == "table":
            bias = self.table.unsqueeze(0)
        elif self.bias == "lookup":
            n = q.shape[2]
            bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        return self._combine(q, k, v, bias)

    def _combine(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.core == "sdpa":
            if self.kind == "multiquery":
                k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
            gqa = k.shape[1] != q.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
        if self.core == "linear":
            return F.relu(q) @ (F.relu(k).transpose(-1, -2) @ v)
        if self.core == "channels":  # cross-covariance attention
            scores = (q.transpose(-1, -2) @ k).softmax(-1)
            return (scores @ v.transpose(-1, -2)).transpose(-1, -2)
        if self.core == "einsum":
            k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
            scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * self.scale
            return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        if self.core == "causal":
            n = q.shape[2]
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(dim=-1) @ v


class LibraryAttention(Op, weight=3):
    """nn.MultiheadAttention and nn.TransformerEncoderLayer."""

    def __init__(self, width: int, heads: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "encoder":
            self.layer = nn.TransformerEncoderLayer(width, heads, 6, 0.0, batch_first=True)
        else:
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True, bias=how != "no_bias")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        width = shapes[0][1]
        return {
            "width": width,
            "heads": choose([h for h in (2, 3, 4) if width % h == 0]),
            "how": choose(["plain", "weights", "encoder", "no_bias"]),
        }

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return True if settings["how"] == "encoder" else all(flags)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "encoder":
            return self.layer(x)
        y, _ = self.attention(x, x, x, need_weights=self.how == "weights")
        return x + y


class CrossAttention(Op, weight=2):
    """nn.MultiheadAttention between two sequences, its outputs added to the first."""

    arity = 2

    def __init__(self, width: int, other: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, kdim=other, vdim=other)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and is_sequence(shapes[1]) and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][1], "other": shapes[1][1], "heads": 2}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.attention(x, y, y, need_weights=False)[0]


class WindowAttention(Op, weight=2):
    """Swin: attention inside windows of 2x2, cyclic shift."""

    def __init__(self, width: int, heads: int, shift: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv = nn.Linear(width, 3 * width)
        self.table = nn.Parameter(torch.empty(9, heads))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None] + 1
        self.register_buffer("index", apart[0] * 3 + apart[1])
        self.proj = nn.Linear(width, width)
        self.heads, self.shift, self.scale = heads, shift, (width // heads) ** -0.5

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] == 4 and shapes[0][0] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        width = shapes[0][0]
        heads = choose([h for h in (2, 3, 4) if width % h == 0])
        return {"width": width, "heads": heads, "shift": choose([0, 1]), "norm": choose([False, True])}

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x.permute(0, 2, 3, 1))
        if self.shift:
            y = torch.roll(y, (-1, -1), (1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(y.shape[0], 4, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q * self.scale @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).unsqueeze(0)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c)
        y = self.proj(y).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if self.shift:
            y = torch.roll(y, (1, 1), (1, 2))
        return x + y.permute(0, 3, 1, 2)


class Embedding(Op, weight=0):
    """Token ids to a sequence: only ever the first step."""

    makes_silence = True

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids)


class Head(Op, weight=0):
    """What is left over, of any shapes, to a few numbers: the end of a network."""

    arity = -1
    makes_silence = True

    def __init__(self, shapes: Sequence[Shape], flatten: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(sum(math.prod(s) if flatten else channels(s) for s in shapes), 5)
        self.flatten = flatten

    @classmethod
    def over_space(cls, settings: Settings) -> str:
        return "closes" if settings["flatten"] else "mixes"

    def forward(self, *xs: Tensor) -> Tensor:
        if self.flatten:
            return self.fc(torch.cat([x.flatten(1) for x in xs], 1))
        return self.fc(torch.cat([x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x for x in xs], 1))


class ImageHead(Op, weight=0):
    """A convolution or linear layer to three channels."""

    space = "closes"
    makes_silence = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.out = nn.Conv2d(shape[0], 3, 1) if len(shape) == 3 else nn.Linear(shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


# ------------------------------------------------------------------------------------------------------- masked twins

Live = Callable[[Tensor], Tensor]
"""For a parameter the mask of what is left of it, of its shape."""


class MaskedNorm(nn.Module):
    """A norm over channels that counts those which are left: layer norm, RMS norm or group norm."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, live: Tensor, eps: float | None, groups: int, kind: str
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.live, self.eps, self.groups, self.kind = weight, bias, live, eps, groups, kind

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        last = self.kind in ("last", "rms")
        y = x.movedim(-1, 1) if last else x
        live = self.live.to(y.dtype).view(1, -1, *(1,) * (y.dim() - 2)).expand(y.shape)
        if self.kind == "groups":
            shape = (y.shape[0], self.groups, -1)
            parts, count = (y * live).reshape(shape), live.reshape(shape).sum(-1, keepdim=True).clamp(min=1)
            mean = parts.sum(-1, keepdim=True) / count
            var = ((parts - mean).square() * live.reshape(shape)).sum(-1, keepdim=True) / count
            y = ((parts - mean) / (var + eps).sqrt()).reshape(y.shape)
        else:
            count = live.sum(1, keepdim=True)
            mean = 0.0 if self.kind == "rms" else (y * live).sum(1, keepdim=True) / count
            var = ((y - mean).square() * live).sum(1, keepdim=True) / count
            y = (y - mean) / (var + eps).sqrt()
        y = y * self.weight.view(1, -1, *(1,) * (y.dim() - 2))
        if self.bias is not None:
            y = y + self.bias.view(1, -1, *(1,) * (y.dim() - 2))
        return y.movedim(1, -1) if last else y


def masked_twin(module: nn.Module, live: Live) -> nn.Module | None:
    """The module that computes what `module` would if the channels that are gone did not count; None for itself."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.elementwise_affine:
        return MaskedNorm(module.weight, module.bias, live(module.weight), module.eps, 1, "last")
    if isinstance(module, nn.RMSNorm) and len(module.normalized_shape) == 1 and module.elementwise_affine:
        return MaskedNorm(module.weight, None, live(module.weight), module.eps, 1, "rms")
    if isinstance(module, nn.GroupNorm) and module.affine:
        return MaskedNorm(module.weight, module.bias, live(module.weight), module.eps, module.num_groups, "groups")
    masked = getattr(module, "masked", None)
    return masked(live) if masked is not None else None


# ---------------------------------------------------------------------------------------------------------- networks


class Net(nn.Module):
    """The network of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.ops = nn.ModuleList()
        self.places = []
        for step in program.steps:
            if step.again is not None:
                self.places.append(self.places[step.again])
            else:
                self.places.append(len(self.ops))
                self.ops.append(OPS_BY_NAME[step.op](**step.settings))
        if program.unused:
            self.never = nn.Linear(3, 4)
        for first, second in program.ties:
            owner, _, name = second.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(first))
        randomise(self, program.seed)
        self.train(program.training)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        values: list[Tensor] = [x] if y is None else [x, y]
        for step, place in zip(self.program.steps, self.places, strict=True):
            result = self.ops[place](*(values[i] for i in step.operands))
            values += result if isinstance(result, tuple | list) else [result]
        outputs = [values[i] for i in self.program.outputs]
        if self.program.container == "tensor":
            return outputs[0]
        if self.program.container == "dict":
            return {f"out{i}": out for i, out in enumerate(outputs)}
        return outputs if self.program.container == "list" else tuple(outputs)


def randomise(module: nn.Module, seed: int) -> None:
    """Gives every parameter and every floating buffer values among which nothing can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() < 2:
                tensor.copy_(noise.sign() * (0.5 + 0.5 * torch.rand(tensor.shape, generator=generator)))
            else:
                fan = max(tensor.numel() // tensor.shape[0], 1)
                tensor.copy_(noise * (1.0 if fan == 1 else fan**-0.5))


def example_inputs(program: Program, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs for a network: normal numbers, or token ids."""
    generator = torch.Generator().manual_seed(1000 + program.seed + seed)
    return tuple(
        torch.randint(0, 7, (batch, -shape[0]), generator=generator)
        if shape[0] < 0
        else torch.randn(batch, *shape, generator=generator)
        for shape in program.inputs
    )


OPS_BY_NAME: Mapping[str, type[Op]] = {**OPS, "Embedding": Embedding, "Head": Head, "ImageHead": ImageHead}


class _Builder:
    """A program in the making: the values so far, as tensors, whether each is silent, and whether its space can shrink."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.steps: list[Step] = []
        self.inputs: list[Shape] = []
        self.values: list[Tensor] = []
        self.silent: list[bool] = []
        self.open: list[bool] = []
        self.used: set[int] = set()
        self.exact = True

    def shape(self, value: int) -> Shape:
        return tuple(self.values[value].shape[1:])

    def start(self, shape: Shape) -> None:
        """Adds an input."""
        self.inputs.append(shape)
        ids = shape[0] < 0
        self.values.append(torch.zeros(2, -shape[0], dtype=torch.long) if ids else torch.randn(2, *shape))
        self.silent.append(True)
        self.open.append(False)

    def apply(self, op: str, operands: tuple[int, ...], settings: Settings, again: int | None = None) -> None:
        """Adds a step and its outputs, unless they are too large."""
        kind = OPS_BY_NAME[op]
        module = kind(**settings)
        randomise(module, 0)
        with torch.no_grad():
            result = module.eval()(*(self.values[i] for i in operands))
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        if any(out[0].numel() > 1500 or channels(tuple(out.shape[1:])) > 32 for out in outputs):
            return
        flags = [self.silent[i] for i in operands]
        opened, over_space = any(self.open[i] for i in operands), kind.over_space(settings)
        self.exact = self.exact and kind.valid(flags, settings) and not (opened and over_space == "mixes")
        self.steps.append(Step(op, operands, settings, again))
        self.values += outputs
        self.silent += [kind.silent(flags, settings)] * len(outputs)
        self.open += [over_space == "opens" or (opened and over_space != "closes")] * len(outputs)
        self.used.update(operands)

    def candidates(self, op: type[Op]) -> list[tuple[int, ...]]:
        """The operands that an operation could take, the latest first."""
        recent = [i for i in range(len(self.values) - 1, -1, -1) if i >= len(self.values) - 5 or i == 0]
        recent = [i for i in recent if self.values[i].is_floating_point()]
        if op.arity == 1:
            return [(i,) for i in recent if op.fits(self.shape(i))]
        return [(i, j) for i in recent for j in recent if op.fits(self.shape(i), self.shape(j))]

    def step(self, names: Sequence[str]) -> None:
        """Adds one drawn step, or none where the drawn operation fits nowhere."""
        name = self.choose(names)
        op = OPS_BY_NAME[name]
        found = self.candidates(op)
        if not found:
            return
        operands = self.choose(found)
        if op.arity == -1:
            for _ in range(self.choose([0, 0, 1, 2])):
                more = [i for i in range(len(self.values)) if self._joins(op, (*operands, i))]
                operands = (*operands, self.choose(more)) if more else operands
        settings = op.draw(self.choose, *(self.shape(i) for i in operands))
        self.apply(name, operands, settings)

    def _joins(self, op: type[Op], operands: tuple[int, ...]) -> bool:
        return self.values[operands[-1]].is_floating_point() and op.fits(*(self.shape(i) for i in operands))

    def again(self) -> None:
        """Calls the module of an earlier step a second time, where a later value has the shape it takes."""
        pairs = [
            (k, operands)
            for k, step in enumerate(self.steps)
            if step.again is None and step.op != "Embedding"
            for operands in self._like(step.operands)
        ]
        if pairs:
            k, operands = self.choose(pairs)
            self.apply(self.steps[k].op, operands, self.steps[k].settings, k)

    def _like(self, operands: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Other operands of the same shapes: the first one replaced."""
        first = self.shape(operands[0])
        return [
            (i, *operands[1:])
            for i in range(len(self.values) - 1, 0, -1)
            if self.shape(i) == first and i != operands[0]
        ]


def operation_names() -> list[str]:
    """The operations to draw from, each as often as it weighs."""
    return [name for name, weight in WEIGHTS.items() if name not in EXCLUDED for _ in range(weight)]


def draw_program(choose: Choose, *, most: int = 9) -> Program:
    """A random program; `choose` picks one of a sequence."""
    builder = _Builder(choose)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _draw_inputs(builder, choose)
        names = operation_names()
        for _ in range(choose(list(range(2, most + 1)))):
            builder.step(names)
            if len(builder.steps) > 2 and choose([False] * 9 + [True]):
                builder.again()
        outputs = _draw_outputs(builder, choose)
    ties = _draw_ties(builder, choose)
    container = choose(["tuple", "list", "dict", *(["tensor"] * 3 if len(outputs) == 1 else [])])
    return Program(
        inputs=tuple(builder.inputs),
        steps=tuple(builder.steps),
        outputs=outputs,
        container=container,
        ties=ties,
        unused=choose([False, False, False, True]),
        training=choose([False, True]),
        seed=choose([0, 1, 2]),
        exact=builder.exact,
    )


def _draw_inputs(builder: _Builder, choose: Choose) -> None:
    kind = choose(["image", "image", "image", "image", "sequence", "vector", "ids"])
    width = choose([3, 4, 8])
    shapes: Mapping[str, Shape] = {
        "image": (width, 4, 4),
        "sequence": (choose([4, 5]), width),
        "vector": (width,),
        "ids": (-choose([4, 5]),),
    }
    builder.start(shapes[kind])
    if choose([False] * 5 + [True]):
        second = choose(["image", "sequence", "vector"])
        builder.start({"image": (4, 4, 4), "sequence": (4, 6), "vector": (5,)}[second])
    first: Settings = {"cin": width, "cout": choose(WIDTHS), "bias": True}  # the channels of the input are fixed
    if kind == "ids":
        builder.apply("Embedding", (0,), {"words": 7, "width": choose(WIDTHS)})
    elif kind == "image":
        builder.apply("Conv", (0,), {**first, "kernel": 3, "stride": 1, "groups": 1})
    else:
        builder.apply("Linear", (0,), first)


def _draw_outputs(builder: _Builder, choose: Choose) -> tuple[int, ...]:
    """Ends the network: everything unused into one head, or the last value through a head or as it is."""
    last = len(builder.values) - 1
    end = choose(["head", "head", "head", "flat", "image", "image", "raw"])
    ends = [i for i in range(len(builder.values)) if i not in builder.used and builder.values[i].is_floating_point()]
    if end in ("head", "flat"):
        flatten = end == "flat" and sum(math.prod(builder.shape(i)) for i in ends) <= 1000
        builder.apply("Head", tuple(ends), {"shapes": [builder.shape(i) for i in ends], "flatten": flatten})
    elif end == "image":
        builder.apply("ImageHead", (last,), {"shape": builder.shape(last)})
    outputs = [len(builder.values) - 1]
    if choose([False] * 4 + [True]):
        outputs.append(choose(list(range(len(builder.inputs), len(builder.values)))))
    return tuple(dict.fromkeys(outputs))


def _draw_ties(builder: _Builder, choose: Choose) -> tuple[tuple[str, str], ...]:
    """Sometimes two parameters of equal shape are one."""
    if not choose([False] * 5 + [True]):
        return ()
    ops = nn.ModuleList(OPS_BY_NAME[step.op](**step.settings) for step in builder.steps if step.again is None)
    shapes: dict[Shape, list[str]] = {}
    for name, parameter in ops.named_parameters(prefix="ops"):
        if parameter.dim() and "parametrizations" not in name:
            shapes.setdefault(tuple(parameter.shape), []).append(name)
    pairs = [(a, b) for names in shapes.values() for i, a in enumerate(names) for b in names[i + 1 :]]
    return (choose(pairs),) if pairs else ()

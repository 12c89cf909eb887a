"""What masks leave behind: constants that are folded where that is exact, and told where it is not."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from test_rules import Net
from torch import Tensor, nn
from torch.nn import functional as F

from speedup import ModelSpeedup
from speedup.cut import ShrunkGraph


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in evaluation with weights, shifts and statistics among which nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator) + 0.5
                signs = torch.randn(tensor.shape, generator=generator).sign() if tensor.dim() > 1 else 1
                tensor.copy_(noise * signs if "var" not in name else noise)
    return model.eval()


def half_of(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """Masks without every other row of the tensors ``names``."""
    masks = {name: torch.ones_like(model.get_parameter(name)) for name in names}
    for mask in masks.values():
        mask[::2] = 0
    return masks


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask.to(model.get_parameter(name)))
    return model


def shrunk(model: nn.Module, x: Tensor, masks: Mapping[str, Tensor]) -> tuple[ModelSpeedup, nn.Module]:
    speedup = ModelSpeedup(model, x, masks)
    small = speedup.speedup_model()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return speedup, small


def gap(model: nn.Module, small: nn.Module, x: Tensor, masks: Mapping[str, Tensor]) -> float:
    """How far the shrunk model is from the masked one on other inputs, at other batches."""
    expected, worst = masked(model, masks), 0.0
    for batch in (1, 3, 5):
        if x.is_floating_point():
            given = torch.randn(batch, *x.shape[1:], generator=torch.Generator().manual_seed(batch)).to(x)
        else:
            given = torch.arange(batch * x[0].numel()).reshape(batch, *x.shape[1:]) % 5
        with torch.no_grad():
            one, other = expected(given).double(), small(given).double()
        worst = max(worst, float((one - other).abs().max() / one.abs().max()))
    return worst


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
WORDS = torch.tensor([[0, 1, 2], [3, 4, 0]])
conv = nn.Conv2d


def test_the_constant_goes_into_the_next_bias() -> None:
    model = drawn(nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), conv(4, 2, 3)))
    masks = half_of(model, "0.weight", "0.bias")
    norm: Any = model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    after = F.softplus(norm.bias - norm.running_mean * scale)
    added = (model[3].weight.sum((2, 3)) * after)[:, ::2].sum(1).detach()
    speedup, small = shrunk(model, IMAGE, masks)
    torch.testing.assert_close(small[3].bias, model[3].bias + added)
    assert speedup.folded == {"3.bias": pytest.approx(float(added.abs().max()))} and not speedup.left_behind
    assert speedup.difference is not None and speedup.difference < 1e-5
    assert gap(model, small, IMAGE, masks) < 1e-5


def gate(net: Any, x: Tensor) -> Tensor:
    y = torch.relu(net.n(net.a(x)))
    return net.o(y * torch.sigmoid(net.g(y.mean((2, 3), keepdim=True))))


def attention(net: Any, x: Tensor) -> Tensor:
    q, k, v = net.q(x), net.k(x), net.v(x)
    return net.o(F.scaled_dot_product_attention(q, k, v))


def flat(width: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(width, 2)]


def start() -> list[nn.Module]:
    return [conv(3, 8, 3), nn.BatchNorm2d(8), nn.Softplus()]


FOLDED: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[str, ...], set[str]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), ROWS, ("0.weight",), {"2.bias"},
    ),
    "sigmoid": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 2)), ROWS, ("0.weight", "0.bias"), {"2.bias"},
    ),
    "flatten": (lambda: nn.Sequential(*start(), *flat(288)), IMAGE, ("0.weight",), {"4.bias"}),
    "max pool": (lambda: nn.Sequential(*start(), nn.MaxPool2d(2), conv(8, 2, 3)), IMAGE, ("0.weight",), {"4.bias"}),
    "average pool": (
        lambda: nn.Sequential(*start(), nn.AvgPool2d(2), conv(8, 2, 3)), IMAGE, ("0.weight",), {"4.bias"},
    ),
    "global pool": (
        lambda: nn.Sequential(*start(), nn.AdaptiveAvgPool2d(1), *flat(8)), IMAGE, ("0.weight",), {"5.bias"},
    ),
    "mean": (
        lambda: Net(lambda n, x: n.o(n.a(x).relu().mean((2, 3))), a=conv(3, 8, 3), o=nn.Linear(8, 2)),
        IMAGE, ("a.weight",), {"o.bias"},
    ),
    "pointwise": (lambda: nn.Sequential(*start(), conv(8, 2, 1)), IMAGE, ("0.weight",), {"3.bias"}),
    "no bias before a norm": (
        lambda: nn.Sequential(*start(), conv(8, 4, 3, bias=False), nn.BatchNorm2d(4)),
        IMAGE, ("0.weight",), {"4.running_mean"},
    ),
    "norm with statistics of its own": (
        lambda: nn.Sequential(*start(), conv(8, 4, 3, bias=False), nn.InstanceNorm2d(4), conv(4, 2, 1)),
        IMAGE, ("0.weight",), set(),
    ),
    "depthwise": (
        lambda: nn.Sequential(*start(), conv(8, 8, 3, groups=8), nn.ReLU(), conv(8, 2, 1)),
        IMAGE, ("0.weight", "3.weight"), {"5.bias"},
    ),
    "padded depthwise": (
        lambda: nn.Sequential(*start(), conv(8, 8, 3, groups=8, padding=1), nn.ReLU(), conv(8, 2, 1)),
        IMAGE, ("0.weight", "3.weight"), {"5.bias"},
    ),
    "in place": (
        lambda: nn.Sequential(conv(3, 8, 3), nn.ReLU(inplace=True), nn.Hardswish(inplace=True), conv(8, 2, 3)),
        IMAGE, ("0.weight",), {"3.bias"},
    ),
    "prelu": (lambda: nn.Sequential(conv(3, 8, 3), nn.PReLU(8), conv(8, 2, 3)), IMAGE, ("0.weight",), {"2.bias"}),
    "upsampled": (
        lambda: nn.Sequential(*start(), nn.Upsample(scale_factor=2, mode="bilinear"), conv(8, 2, 3)),
        IMAGE, ("0.weight",), {"4.bias"},
    ),
    "reflected": (
        lambda: nn.Sequential(*start(), nn.ReflectionPad2d(1), conv(8, 2, 3)), IMAGE, ("0.weight",), {"4.bias"},
    ),
    "residual": (
        lambda: Net(lambda n, x: n.o(n.a(x).relu() + n.b(x).sigmoid()), a=conv(3, 8, 3), b=conv(3, 8, 3), o=conv(8, 2, 1)),
        IMAGE, ("a.weight", "b.weight"), {"o.bias"},
    ),
    "concat": (
        lambda: Net(lambda n, x: n.o(torch.cat([n.a(x), n.b(x)], 1)), a=conv(3, 8, 3), b=conv(3, 4, 3), o=conv(12, 2, 1)),
        IMAGE, ("a.weight", "b.weight"), {"o.bias"},
    ),
    "gate": (
        lambda: Net(gate, a=conv(3, 8, 3), n=nn.BatchNorm2d(8), g=conv(8, 8, 1), o=conv(8, 2, 1)),
        IMAGE, ("a.weight", "n.weight", "n.bias", "g.weight"), set(),
    ),
    "addmm": (
        lambda: Net(
            lambda n, x: torch.addmm(n.c, n.a(x[:, 0]).relu(), n.w),
            a=nn.Linear(6, 8), w=nn.Parameter(torch.ones(8, 2)), c=nn.Parameter(torch.ones(2)),
        ),
        ROWS, ("a.weight",), {"c"},
    ),
    "matmul and sum": (
        lambda: Net(
            lambda n, x: n.a(x).relu() @ n.w + n.c,
            a=nn.Linear(6, 8), w=nn.Parameter(torch.ones(8, 2)), c=nn.Parameter(torch.ones(2)),
        ),
        ROWS, ("a.weight",), {"c"},
    ),
    "attention": (
        lambda: Net(attention, q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 8), o=nn.Linear(8, 2)),
        ROWS, ("v.weight",), {"o.bias"},
    ),
    "embedding": (
        lambda: Net(lambda n, x: n.o(n.e(x) + n.c), e=nn.Embedding(5, 8), c=nn.Parameter(torch.ones(8)), o=nn.Linear(8, 2)),
        WORDS, (), {"o.bias"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_the_same_everywhere_is_folded(name: str) -> None:
    build, x, names, places = FOLDED[name]
    model = drawn(build())
    masks = half_of(model, *names)
    if name == "embedding":
        masks = {"e.weight": torch.ones(5, 8)}
        masks["e.weight"][:, ::2] = 0
    speedup, small = shrunk(model, x, masks)
    assert speedup.folded.keys() == places and not speedup.left_behind
    assert gap(model, small, x, masks) < 1e-5


def test_a_small_place_is_no_space() -> None:
    """A convolution that pads sees one place only here, but would see borders in a larger image."""
    model = drawn(nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 2, 3, padding=1)))
    speedup, _ = shrunk(model, IMAGE[..., :3, :3], half_of(model, "0.weight"))
    assert not speedup.folded and "at every place" in speedup.left_behind["2.weight"]


LEFT: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[str, ...], dict[str, str]]] = {
    "padding": (
        lambda: nn.Sequential(*start(), conv(8, 2, 3, padding=1)),
        IMAGE, ("0.weight",), {"3.weight": "not the same at every place"},
    ),
    "shuffle": (
        lambda: nn.Sequential(*start(), nn.PixelShuffle(2), conv(2, 2, 3)),
        IMAGE, (), {"4.weight": "not the same at every place"},
    ),
    "no bias": (
        lambda: nn.Sequential(*start(), conv(8, 2, 3, bias=False)),
        IMAGE, ("0.weight",), {"3.weight": "there is no bias"},
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
        ROWS, ("0.weight",), {"layer_norm": "mixes", "2.weight": "not known for all inputs"},
    ),
    "mean over channels": (
        lambda: Net(lambda n, x: n.a(x).mean(1, keepdim=True) * x, a=conv(3, 8, 1)),
        IMAGE, ("a.weight",), {"mean": "mixes"},
    ),
    "units": (
        lambda: Net(lambda n, x: n.o(n.r(x)[0]), r=nn.GRU(6, 8, batch_first=True), o=nn.Linear(8, 2)),
        ROWS, (), {"r.weight_ih_l0": "mixes", "o.weight": "not known for all inputs"},
    ),
    "computed bias": (
        lambda: Net(
            lambda n, x: F.linear(n.a(x).relu(), n.w, n.c * 2),
            a=nn.Linear(6, 8), w=nn.Parameter(torch.ones(2, 8)), c=nn.Parameter(torch.ones(2)),
        ),
        ROWS, ("a.weight",), {"w": "there is no bias"},
    ),
    "a bias of two": (
        lambda: Net(
            lambda n, x: F.linear(n.a(x).relu(), n.w, n.c) + F.linear(x, n.v, n.c),
            a=nn.Linear(6, 8), w=nn.Parameter(torch.ones(2, 8)), v=nn.Parameter(torch.ones(2, 6)),
            c=nn.Parameter(torch.ones(2)),
        ),
        ROWS, ("a.weight",), {"w": "used elsewhere"},
    ),
    "a bias that training uses": (
        lambda: Net(
            lambda n, x: (n.o(n.a(x).relu()) * n.e * n.o.bias if n.training else n.o(n.a(x).relu())),
            a=nn.Linear(6, 8), o=nn.Linear(8, 2), e=nn.Parameter(torch.ones(2)),
        ),
        ROWS, ("a.weight",), {"o.weight": "used elsewhere"},
    ),
    "called twice": (
        lambda: Net(lambda n, x: n.o(n.a(x)) + n.o(n.a(x).relu() * 2), a=nn.Linear(6, 8), o=nn.Linear(8, 2)),
        ROWS, ("a.weight",), {"o.weight": "used elsewhere"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_is_told(name: str) -> None:
    build, x, names, reasons = LEFT[name]
    model = drawn(build())
    masks = half_of(model, *names)
    if name == "shuffle":
        masks = {"0.weight": torch.ones(8, 3, 3, 3)}
        masks["0.weight"][:4] = 0
    if name == "units":
        masks = {f"r.{n}": torch.ones_like(p) for n, p in model.r.named_parameters() if "weight" in n}
        for mask in masks.values():
            mask.unflatten(0, (3, 8))[:, ::2] = 0
    speedup, small = shrunk(model, x, masks)
    assert not speedup.folded and speedup.left_behind.keys() == reasons.keys()
    assert all(reason in speedup.left_behind[where] for where, reason in reasons.items())
    assert speedup.difference is not None and speedup.difference > 1e-3
    assert gap(model, small, x, masks) > 1e-3


def test_calls_that_get_the_same_share_a_bias() -> None:
    model = drawn(Net(lambda n, x: n.o(n.a(x).relu()) * n.o(n.a(x * 2).relu()), a=nn.Linear(6, 8), o=nn.Linear(8, 2)))
    masks = half_of(model, "a.weight")
    speedup, small = shrunk(model, ROWS, masks)
    assert speedup.folded.keys() == {"o.bias"} and not speedup.left_behind
    assert gap(model, small, ROWS, masks) < 1e-5


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_precisions(dtype: torch.dtype, near: float) -> None:
    model = drawn(nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 2, 3))).to(dtype)
    masks = half_of(model, "0.weight")
    speedup, small = shrunk(model, IMAGE.to(dtype), masks)
    assert small[2].bias.dtype == dtype and speedup.folded.keys() == {"2.bias"}
    assert gap(model, small, IMAGE.to(dtype), masks) < near


def test_the_rewritten_graph_gets_it_too() -> None:
    def function(n: Any, x: Tensor) -> Tensor:
        return n.o(n.a(x).relu().reshape(-1, 2, 4, 5).transpose(2, 3).flatten(1))

    model = drawn(Net(function, a=conv(3, 8, (8, 4)), o=nn.Linear(40, 2)))
    masks = {"a.weight": torch.ones(8, 3, 8, 4)}
    masks["a.weight"][[0, 4]] = 0
    speedup, small = shrunk(model, IMAGE, masks)
    assert isinstance(small, ShrunkGraph) and speedup.folded.keys() == {"o.bias"} and not speedup.left_behind
    assert gap(model, small, IMAGE, masks) < 1e-5


def test_a_symmetric_kernel_over_the_batch() -> None:
    """With two examples every place of the batch is a border, and both see the same; not so with three."""

    def function(n: Any, x: Tensor) -> Tensor:
        return n.o(n.a(x).relu().t()[None])[0].t()

    model = drawn(Net(function, a=nn.Linear(6, 8), o=nn.Conv1d(8, 2, 3, padding=1)))
    with torch.no_grad():
        model.o.weight.copy_(model.o.weight[..., :1].expand(-1, -1, 3))
    speedup, _ = shrunk(model, ROWS[:, 0], half_of(model, "a.weight"))
    assert not speedup.folded and "at every place" in speedup.left_behind["o.weight"]


class Branching(nn.Module):
    """A model that is captured in parts: its code depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 1e6 else self.body(-x)


def test_parts() -> None:
    model = drawn(Branching())
    masks = half_of(model, "body.0.weight")
    speedup, small = shrunk(model, IMAGE, masks)
    assert speedup.folded.keys() == {"body.3.bias"} and not speedup.left_behind
    assert gap(model, small, IMAGE, masks) < 1e-5


def test_nothing_is_left_of_units_without_weights() -> None:
    model = drawn(Net(lambda n, x: n.o(n.r(x)[0]), r=nn.LSTM(6, 8, batch_first=True), o=nn.Linear(8, 2)))
    masks = {f"r.{name}": torch.ones_like(p) for name, p in model.r.named_parameters()}
    for mask in masks.values():
        mask.unflatten(0, (4, 8))[:, ::2] = 0
    speedup, small = shrunk(model, ROWS, masks)
    assert not speedup.folded and not speedup.left_behind and gap(model, small, ROWS, masks) < 1e-5

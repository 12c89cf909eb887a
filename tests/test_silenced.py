"""Masks on norms alone: a channel of which scale and shift are masked out goes from the layers before, if all read that."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image, tokens
from torch import Tensor, nn

from speedup import ModelSpeedup

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

GONE = (1, 4)


def shrunk(model: nn.Module, x: Tensor, *norms: str, gone: Sequence[int] = GONE) -> tuple[ModelSpeedup, Any]:
    """The model without what masks on norms leave nobody to read; it computes what the masked one does."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.5, 1.5)
    masks = {name: torch.ones_like(model.get_parameter(name)) for name in norms}
    for mask in masks.values():
        mask[list(gone)] = 0
    speedup = ModelSpeedup(model.eval(), x, masks)
    small = speedup.speedup_model()
    assert speedup.difference is not None and speedup.difference < 1e-5
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    return speedup, small


def chain(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(conv(3, 6), norm(6), nn.ReLU(), conv(6, 2))


def test_a_layer_before_a_norm() -> None:
    speedup, small = shrunk(chain(), image(), "1.weight", "1.bias")
    assert small[0].weight.shape[0] == small[1].num_features == small[3].weight.shape[1] == 4
    assert speedup.reconciled == {"1.weight": 0, "1.bias": 0}


@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_a_scale_or_a_shift_alone_silences_nothing(name: str) -> None:
    speedup, small = shrunk(chain(), image(), name)
    assert small[0].weight.shape[0] == 6 and speedup.reconciled == {name: 2}


def test_a_norm_without_a_scale_silences_nothing() -> None:
    model = Net(lambda n, x: n.o(F.batch_norm(n.a(x), n.m, n.v, None, n.b)), a=conv(3, 6), o=conv(6, 2),
                m=torch.zeros(6), v=torch.ones(6), b=nn.Parameter(torch.ones(6)))  # fmt: skip
    _, small = shrunk(model, image(), "b")
    assert small.a.weight.shape[0] == 6


def test_a_norm_over_channels_silences_nothing() -> None:
    """Without the channel its mean is another one."""
    model = nn.Sequential(nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    _, small = shrunk(model, tokens(), "1.weight", "1.bias")
    assert small[0].weight.shape[0] == 6


def test_movement_and_elementwise_operators_between() -> None:
    model = Net(
        lambda n, x: n.o(n.n((n.a(x).relu() * 2).permute(0, 2, 1)).flatten(1)),
        a=nn.Linear(12, 6), n=nn.BatchNorm1d(6), o=nn.Linear(30, 2),
    )  # fmt: skip
    _, small = shrunk(model, tokens(), "n.weight", "n.bias")
    assert small.a.weight.shape == (4, 12) and small.o.weight.shape == (2, 20)


def joined() -> Net:
    return Net(
        lambda n, x: n.o((n.m(n.a(x)) + n.n(n.b(x))).relu()),
        a=conv(3, 6), b=conv(3, 6), m=nn.BatchNorm2d(6), n=nn.BatchNorm2d(6), o=conv(6, 2),
    )  # fmt: skip


def test_of_layers_that_are_added_every_norm_has_to_be_masked() -> None:
    _, small = shrunk(joined(), image(), "m.weight", "m.bias", "n.weight", "n.bias")
    assert small.a.weight.shape[0] == small.b.weight.shape[0] == 4
    speedup, small = shrunk(joined(), image(), "m.weight", "m.bias")
    assert small.a.weight.shape[0] == 6 and speedup.reconciled == {"m.weight": 2, "m.bias": 2}


def test_a_norm_after_the_sum_speaks_for_both() -> None:
    model = Net(lambda n, x: n.o(n.n(n.a(x) + n.b(x))), a=conv(3, 6), b=conv(3, 6), n=nn.BatchNorm2d(6), o=conv(6, 2))
    _, small = shrunk(model, image(), "n.weight", "n.bias")
    assert small.a.weight.shape[0] == small.b.weight.shape[0] == 4


@pytest.mark.parametrize(
    "function",
    [
        lambda n, x: n.o(n.n(n.a(x))) + n.p(n.a(x)),
        lambda n, x: n.o(n.n(y := n.a(x))) + n.p(y.relu()),
        lambda n, x: n.o(n.n(y := n.a(x))) + y.mean((1, 2, 3), keepdim=True),
        lambda n, x: n.o(n.n((y := n.b(x)).add_(n.a(x)))) + n.p(y),
    ],
)
def test_what_is_used_elsewhere_stays(function: Callable[..., Any]) -> None:
    model = Net(function, a=conv(3, 6), b=conv(3, 6), n=nn.BatchNorm2d(6), o=conv(6, 2), p=conv(6, 2))
    _, small = shrunk(model, image(), "n.weight", "n.bias")
    assert small.a.weight.shape[0] == 6


def test_a_mask_on_the_weight_of_one_and_the_norm_of_the_other() -> None:
    model = joined()
    names = ("a.weight", "a.bias", "m.weight", "m.bias", "n.weight", "n.bias")
    masks = {name: torch.ones_like(model.get_parameter(name)) for name in names}
    for name, mask in masks.items():
        if name != "m.weight":
            mask[list(GONE)] = 0
    speedup = ModelSpeedup(model.eval(), image(), masks)
    small: Any = speedup.speedup_model()
    assert small.a.weight.shape[0] == small.b.weight.shape[0] == 4 and speedup.difference < 1e-5

"""Operators that give all elements another place: reshape, permute, flip, roll, pixel shuffle."""

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

aten = torch.ops.aten

A8 = "8: a.weight/0 a.bias/0 o.weight/1"


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


RESHAPES = (
    Case(
        "flatten_then_linear",
        lambda: Net(lambda n, x: n.o(n.a(x).flatten(1)), a=conv(3, 8), o=nn.Linear(288, 2)),
        image(),
        (A8,),
        {"a.weight/1": "multiplied by a tensor whose size is fixed", "o.weight/0": "output"},
    ),
    Case(
        "linear_then_view_then_transposed_conv",
        lambda: Net(lambda n, x: n.o(n.a(x).view(-1, 8, 3, 3)), a=nn.Linear(5, 72), o=nn.ConvTranspose2d(8, 2, 3)),
        torch.randn(2, 5),
        ("8: a.weight/0 a.bias/0 o.weight/0",),
    ),
    Case(
        "view_splits_a_channel_into_rows_that_are_summed",
        lambda: Net(lambda n, x: n.o(n.a(x).unflatten(1, (2, 4)).sum(1)), a=conv(3, 8), o=conv(4, 2)),
        image(),
        ("4: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "view_of_a_weight_with_two_prunable_dimensions",
        lambda: Net(
            lambda n, x: n.o((n.a(x) @ n.w.view(8, 2, 3).transpose(1, 2).reshape(8, 6)).relu()),
            a=nn.Linear(12, 8), w=weight(8, 6), o=nn.Linear(6, 2),
        ),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/0", "6: w/1 o.weight/1"),
    ),
    Case(
        "merge_of_two_prunable_dimensions",
        lambda: Net(
            lambda n, x: n.p(n.o((n.a(x).transpose(1, 2) @ n.b(x)).reshape(-1, 48))),
            a=nn.Linear(12, 8), b=nn.Linear(12, 6), o=nn.Linear(48, 4), p=nn.Linear(4, 2),
        ),
        tokens(),
        ("8: a.weight/0 a.bias/0 o.weight/1", "4: o.weight/0 o.bias/0 p.weight/1"),  # o has one label an input
        {"b.weight/0": "shares a dimension with other channels"},
    ),
    Case(
        "channel_shuffle_then_grouped_conv",
        lambda: Net(lambda n, x: n.o(n.g(shuffled(n.a(x), 2))), a=conv(3, 8), g=conv(8, 8, groups=2), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 g.weight/01", "8: g.weight/0 g.bias/0 o.weight/1"),
    ),
    Case(
        "channel_shuffle_then_conv",
        lambda: Net(lambda n, x: n.o(shuffled(n.a(x), 4)), a=conv(3, 8), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "squeeze_and_unsqueeze",
        lambda: Net(
            lambda n, x: n.o(n.a(x).mean((2, 3), keepdim=True).squeeze(3).squeeze((2,)).unsqueeze(1).squeeze()),
            a=conv(3, 8), o=nn.Linear(8, 2),
        ),
        image(),
        (A8,),
    ),
    Case(
        "every_name_of_a_reshape",
        lambda: Net(
            lambda n, x: n.o(
                aten._unsafe_view.default(n.a(x).view(-1, 8, 36), [-1, 8, 4, 9]).view_as(n.a(x)).reshape(-1, 8, 36)
                .reshape_as(n.a(x)).unflatten(1, (4, 2)).flatten(1, 2)
            ),
            a=conv(3, 8), o=conv(8, 2),
        ),
        image(),
        (A8,),
    ),
)  # fmt: skip
PERMUTES = (
    Case(
        "every_name_of_a_permutation",
        lambda: Net(
            lambda n, x: n.o(
                n.a(x).permute(0, 2, 3, 1).transpose(1, 3).swapaxes(2, 3).movedim(1, -1).movedim((3, 1), (1, 3)).mT.adjoint()
            ),
            a=conv(3, 8), o=conv(8, 2),
        ),
        image(),
        (A8,),
    ),
    Case(
        "weight_transposed_by_hand",
        lambda: Net(
            lambda n, x: n.o(n.a(x) @ n.w.t() + n.a(x) @ n.v.T), a=nn.Linear(12, 8), w=weight(6, 8), v=weight(6, 8), o=nn.Linear(6, 2)
        ),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/1 v/1", "6: w/0 v/0 o.weight/1"),
    ),
    Case(
        "transposed_in_place_pins",
        lambda: Net(lambda n, x: n.p(n.o(n.a(x).clone().transpose_(1, 2).transpose(1, 2))), a=conv(3, 8), o=conv(8, 6), p=conv(6, 2)),
        image(),
        ("6: o.weight/0 o.bias/0 p.weight/1",),
        {"a.weight/0": "goes into aten.transpose_.default, an operator without a rule"},
    ),
    Case(
        "unbind_over_rows",
        lambda: Net(
            lambda n, x: n.o(torch.cat([part.relu() for part in n.a(x).unflatten(1, (2, 4)).unbind(1)], 1)), a=conv(3, 8), o=conv(8, 2)
        ),
        image(),
        (A8,),
    ),
    Case("roll_over_channels", lambda: Net(lambda n, x: n.o(n.a(x).roll(3, 1)), a=conv(3, 8), o=conv(8, 2)), image(), (A8,)),
    Case("roll_back_over_channels", lambda: Net(lambda n, x: n.o(n.a(x).roll((-3, 2), (1, 2))), a=conv(3, 8), o=conv(8, 2)), image(), (A8,)),
    Case("roll_over_space", lambda: Net(lambda n, x: n.o(n.a(x).roll((1, 2), (2, 3))), a=conv(3, 8), o=conv(8, 2)), image(), (A8,)),
    Case("flip_over_channels", lambda: Net(lambda n, x: n.o(n.a(x).flip(1, 2)), a=conv(3, 8), o=conv(8, 2)), image(), (A8,)),
    Case(
        "pixel_shuffle",
        lambda: Net(lambda n, x: n.o(F.pixel_shuffle(n.a(x), 2)), a=conv(3, 32), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "pixel_unshuffle",
        lambda: Net(lambda n, x: n.o(F.pixel_unshuffle(n.a(x), 2)), a=conv(3, 4), o=conv(16, 2)),
        image(),
        ("4: a.weight/0 a.bias/0 o.weight/1",),
    ),
)  # fmt: skip

CASES = RESHAPES + PERMUTES


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

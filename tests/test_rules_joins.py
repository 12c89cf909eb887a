"""Operators that put elements beside others: concat, stack, pad, expand, repeat, slices filled in."""

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

aten = torch.ops.aten

A8 = "8: a.weight/0 a.bias/0 o.weight/1"


def filled_slices(net: Net, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 8, 6, 6)
    out[:, :4] = net.a(x)
    out[:, 4:] = net.b(x)
    return net.o(out)


CASES = (
    Case(
        "cat_of_cat",
        lambda: Net(
            lambda n, x: n.o(torch.cat([torch.cat([n.a(x), n.b(x)], 1), n.c(x)], 1)), a=conv(3, 4), b=conv(3, 6), c=conv(3, 2), o=conv(12, 2)
        ),
        image(),
        ("4: a.weight/0 a.bias/0 o.weight/1*4", "6: b.weight/0 b.bias/0 o.weight/1*6", "2: c.weight/0 c.bias/0 o.weight/1*2"),
    ),
    Case(
        "add_after_cat",
        lambda: Net(lambda n, x: n.o(torch.cat([n.a(x), n.b(x)], 1) + n.c(x)), a=conv(3, 4), b=conv(3, 6), c=conv(3, 10), o=conv(10, 2)),
        image(),
        (
            "4: a.weight/0 a.bias/0 c.weight/0*4 c.bias/0*4 o.weight/1*4",
            "6: b.weight/0 b.bias/0 c.weight/0*6 c.bias/0*6 o.weight/1*6",
        ),
    ),
    Case(
        "concat_with_the_input",
        lambda: Net(lambda n, x: n.o(aten.concat.default([x, n.a(x)], 1)), a=conv(3, 8), o=conv(11, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 o.weight/1*8",),
        {"o.weight/1*3": "concatenated with a tensor whose size is fixed"},
    ),
    Case(
        "cat_over_space_ties_channels",
        lambda: Net(lambda n, x: n.o(torch.cat([n.a(x), n.b(x)], 3)), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 o.weight/1",),
    ),
    Case(
        "stack_then_sum",
        lambda: Net(lambda n, x: n.o(torch.stack([n.a(x), n.b(x)], 1).softmax(1).sum(1)), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 o.weight/1",),
        mixes=True,  # a softmax of two zeros is a half
    ),
    Case(
        "stack_interleaves",
        lambda: Net(lambda n, x: n.o(torch.stack([n.a(x), n.b(x)], 2).flatten(1, 2)), a=conv(3, 4), b=conv(3, 4), o=conv(8, 2)),
        image(),
        ("4: a.weight/0 a.bias/0 b.weight/0 b.bias/0 o.weight/1",),
    ),
    Case(
        "padded_shortcut",
        lambda: Net(lambda n, x: n.o(F.pad(n.a(x), (0, 0, 0, 0, 2, 2)) + n.b(x)), a=conv(3, 4), b=conv(3, 8), o=conv(8, 2)),
        image(),
        (
            "4: a.weight/0 a.bias/0 b.weight/0*4 b.bias/0*4 o.weight/1*4",
            "4: b.weight/0*4 b.bias/0*4 o.weight/1*4",
        ),
    ),
    Case(
        "pad_that_cuts_and_fills",
        lambda: Net(lambda n, x: n.o(aten.constant_pad_nd.default(n.a(x), [1, 1, 0, 0, -2, 3], 1.5)), a=conv(3, 8), o=conv(9, 2)),
        image(),
        ("6: a.weight/0*6 a.bias/0*6 o.weight/1*6", "2: a.weight/0*2 a.bias/0*2", "3: o.weight/1*3"),
    ),
    Case(
        "pad_over_space_by_reflection",
        lambda: Net(lambda n, x: n.o(F.pad(n.a(x), (1, 1, 1, 1), mode="reflect")), a=conv(3, 8), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "expand_over_channels",
        lambda: Net(lambda n, x: n.o(n.a(x) * n.b(x).expand(-1, 8, -1, -1)), a=conv(3, 8), b=conv(3, 1), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "expand_that_is_summed_as_well",
        lambda: Net(
            lambda n, x: (lambda e: n.o(n.a(x) + e) + e.sum(1, keepdim=True))(n.b(x).expand(-1, 8, -1, -1)), a=conv(3, 8), b=conv(3, 1), o=conv(8, 2)
        ),
        image(),
        (A8,),
        mixes=True,  # the sum counts copies
    ),
    Case(
        "expand_to_another_tensor",
        lambda: Net(lambda n, x: n.o(n.b(x).expand_as(n.a(x)) + n.v.broadcast_to(8, 6, 6)), a=conv(3, 8), b=conv(3, 1), v=weight(8, 1, 1), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 o.weight/1 v/0",),
    ),
    Case(
        "class_token_expanded_over_the_batch",
        lambda: Net(
            lambda n, x: n.o((torch.cat([n.c.expand(x.shape[0], -1, -1), n.a(x)], 1) + n.p)[:, 0]),
            a=nn.Linear(12, 8), c=weight(1, 1, 8), p=weight(1, 6, 8), o=nn.Linear(8, 2),
        ),
        tokens(),
        ("8: a.weight/0 a.bias/0 c/2 p/2 o.weight/1",),
        {"p/1": "meets a tensor whose size is fixed"},
    ),
    Case(
        "repeat_of_channels",
        lambda: Net(lambda n, x: n.o(n.a(x).repeat(1, 2, 1, 1)), a=conv(3, 4), o=conv(8, 2)),
        image(),
        ("4: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "repeat_of_one_channel",
        lambda: Net(lambda n, x: n.o(n.a(x) + n.b(x).repeat(1, 8, 1, 1)), a=conv(3, 8), b=conv(3, 1), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "repeat_interleave",
        lambda: Net(lambda n, x: n.o(n.a(x).repeat_interleave(2, 1)), a=conv(3, 4), o=conv(8, 2)),
        image(),
        ("4: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "zeros_filled_by_slices",
        lambda: Net(filled_slices, a=conv(3, 4), b=conv(3, 4), o=conv(8, 2)),
        image(),
        ("4: a.weight/0 a.bias/0 o.weight/1*4", "4: b.weight/0 b.bias/0 o.weight/1*4"),
    ),
    Case(
        "every_constant",
        lambda: Net(
            lambda n, x: n.o(
                n.a(x) + torch.zeros(8, 1, 1) + torch.ones(8, 1, 1) + torch.full((8, 1, 1), 2.0) + x.new_zeros(8, 1, 1) + x.new_ones(8, 1, 1)
                + x.new_full((8, 1, 1), 3.0) + torch.empty(8, 1, 1).fill_(1.0) + x.new_empty(8, 1, 1).zero_()
            ),
            a=conv(3, 8), o=conv(8, 2),
        ),
        image(),
        (A8,),
    ),
)  # fmt: skip


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

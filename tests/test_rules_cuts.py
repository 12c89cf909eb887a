"""Operators that take some of the elements: split, slice, select, gather, index, embedding."""

import torch
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

aten = torch.ops.aten

A8 = "8: a.weight/0 a.bias/0 o.weight/1"


def parts(net: Net, *pieces: Tensor) -> Tensor:
    """The sum of the heads `o0`, `o1`, ... of each piece."""
    return sum(getattr(net, f"o{i}")(piece) for i, piece in enumerate(pieces))


def heads(*widths: int) -> dict[str, nn.Conv2d]:
    return {f"o{i}": conv(width, 2, 1) for i, width in enumerate(widths)}


def gathered(net: Net, x: Tensor) -> Tensor:
    places = x.abs().sum(1, keepdim=True).argsort(-1)
    return net.o(net.a(x).gather(3, places.expand(-1, 8, -1, -1)))


def half_rotated(net: Net, x: Tensor) -> Tensor:
    heads = net.a(x).unflatten(-1, (3, 4))
    turned = torch.cat([heads[..., :2] * torch.arange(1.0, 3.0), heads[..., 2:]], -1)
    return net.o(turned.flatten(-2))


CASES = (
    Case(
        "gather_over_space",
        lambda: Net(gathered, a=conv(3, 8), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "gather_over_channels_pins",
        lambda: Net(lambda n, x: n.o(n.a(x).gather(1, x.argsort(1))), a=conv(3, 8), o=conv(3, 2)),
        image(),
        (),
        {"a.weight/0": "is gathered by an index", "o.weight/1": ""},
    ),
    Case(
        "positions_beyond_the_example",
        lambda: Net(lambda n, x: n.o(n.a(x) + n.p[: x.shape[1]]), a=nn.Linear(12, 8), p=weight(9, 8), o=nn.Linear(8, 2)),
        tokens(),
        ("8: p/1 a.weight/0 a.bias/0 o.weight/1",),
        {"p/0": "is not used by inputs like the example"},
    ),
    Case(
        "heads_of_which_a_part_is_fixed",
        lambda: Net(half_rotated, a=nn.Linear(12, 12), o=nn.Linear(12, 2)),
        tokens(),
        ("3: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "nothing_is_cut_off",
        lambda: Net(lambda n, x: n.o(torch.cat([n.a(x)[:, :8], n.a(x)[:, 8:]], 1)), a=conv(3, 8), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "split_then_add",
        lambda: Net(lambda n, x: n.o(sum(n.a(x).split(4, 1))), a=conv(3, 8), o=conv(4, 2)),
        image(),
        ("4: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "chunk_in_two",
        lambda: Net(lambda n, x: parts(n, *n.a(x).chunk(2, 1)), a=conv(3, 8), **heads(4, 4)),
        image(),
        ("8: a.weight/0 a.bias/0 o0.weight/1 o1.weight/1",),
    ),
    Case(
        "chunk_with_unequal_parts",
        lambda: Net(lambda n, x: parts(n, *n.a(x).chunk(3, 1)), a=conv(3, 10), **heads(4, 4, 2)),
        image(),
        ("4: a.weight/0*4 a.bias/0*4 o0.weight/1", "4: a.weight/0*4 a.bias/0*4 o1.weight/1", "2: a.weight/0*2 a.bias/0*2 o2.weight/1"),
    ),
    Case(
        "split_by_sizes",
        lambda: Net(lambda n, x: parts(n, *n.a(x).split([3, 7], 1)), a=conv(3, 10), **heads(3, 7)),
        image(),
        ("3: a.weight/0*3 a.bias/0*3 o0.weight/1", "7: a.weight/0*7 a.bias/0*7 o1.weight/1"),
    ),
    Case(
        "split_by_sizes_under_its_old_name",
        lambda: Net(lambda n, x: parts(n, *aten.split.sizes(n.a(x), [3, 7], 1)), a=conv(3, 10), **heads(3, 7)),
        image(),
        ("3: a.weight/0*3 a.bias/0*3 o0.weight/1", "7: a.weight/0*7 a.bias/0*7 o1.weight/1"),
    ),
    Case(
        "split_of_which_a_part_is_dropped",
        lambda: Net(lambda n, x: parts(n, *n.a(x).split(3, 1)[1:]), a=conv(3, 8), **heads(3, 2)),
        image(),
        ("3: a.weight/0*3 a.bias/0*3", "3: a.weight/0*3 a.bias/0*3 o0.weight/1", "2: a.weight/0*2 a.bias/0*2 o1.weight/1"),
    ),
    Case(
        "tensor_split",
        lambda: Net(lambda n, x: parts(n, n.a(x).tensor_split(3, 1)[0]), a=conv(3, 8), **heads(3)),
        image(),
        ("3: a.weight/0*3 a.bias/0*3 o0.weight/1", "5: a.weight/0*5 a.bias/0*5"),
    ),
    Case(
        "tensor_split_at_places",
        lambda: Net(lambda n, x: parts(n, *n.a(x).tensor_split((3, 5), 1)), a=conv(3, 8), **heads(3, 2, 3)),
        image(),
        ("3: a.weight/0*3 a.bias/0*3 o0.weight/1", "2: a.weight/0*2 a.bias/0*2 o1.weight/1", "3: a.weight/0*3 a.bias/0*3 o2.weight/1"),
    ),
    Case(
        "chunk_of_a_joint_plane",
        lambda: Net(
            lambda n, x: n.o(torch.cat([part.flatten(1, 2) for part in n.a(x).unflatten(1, (2, 8)).chunk(2, 2)], 1)),
            a=conv(3, 16), o=conv(16, 2),
        ),
        image(),
        ("16: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "slice_of_channels",
        lambda: Net(lambda n, x: n.o(n.a(x)[:, 2:7]), a=conv(3, 8), o=conv(5, 2)),
        image(),
        ("5: a.weight/0*5 a.bias/0*5 o.weight/1", "3: a.weight/0*3 a.bias/0*3"),
    ),
    Case(
        "slice_counted_from_the_end",
        lambda: Net(lambda n, x: n.o(n.a(x)[:, -6:-1, 1:]), a=conv(3, 8), o=conv(5, 2)),
        image(),
        ("5: a.weight/0*5 a.bias/0*5 o.weight/1", "3: a.weight/0*3 a.bias/0*3"),
    ),
    Case(
        "slice_in_steps_of_an_odd_number_pins",
        lambda: Net(lambda n, x: n.o(n.a(x)[:, ::2]), a=conv(3, 7), o=conv(4, 2)),
        image(),
        (),
        {"a.weight/0": "taken in steps"},
    ),
    Case(
        "one_channel_is_a_gate",
        lambda: Net(lambda n, x: n.o(n.a(x) * n.b(x)[:, :1].sigmoid() * n.b(x)[:, 1].unsqueeze(1)), a=conv(3, 8), b=conv(3, 4), o=conv(8, 2)),
        image(),
        (A8, "2: b.weight/0*2 b.bias/0*2"),
        {"b.weight/0*2": ""},
    ),
    Case(
        "select_of_a_row",
        lambda: Net(lambda n, x: n.o(n.a(x).unflatten(1, (2, 4))[:, 1]), a=conv(3, 8), o=conv(4, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "index_select",
        lambda: Net(lambda n, x: n.o(n.a(x).index_select(1, n.i)), a=conv(3, 8), i=torch.tensor([7, 0, 0, 3]), o=conv(4, 2)),
        image(),
        ("5: a.weight/0*5 a.bias/0*5", "2: a.weight/0*2 a.bias/0*2 o.weight/1*2"),
        {"o.weight/1*2": "would have to go all at once"},
    ),
    Case(
        "constant_index",
        lambda: Net(lambda n, x: n.o(n.a(x)[:, n.i]), a=conv(3, 8), i=torch.tensor([7, 0, 5, 3]), o=conv(4, 2)),
        image(),
        ("4: a.weight/0*4 a.bias/0*4", "4: a.weight/0*4 a.bias/0*4 o.weight/1"),
    ),
    Case(
        "constant_index_from_the_end",
        lambda: Net(lambda n, x: n.o(n.a(x)[:, n.i]), a=conv(3, 8), i=torch.tensor([-1, 0, -3, 3]), o=conv(4, 2)),
        image(),
        ("4: a.weight/0*4 a.bias/0*4", "4: a.weight/0*4 a.bias/0*4 o.weight/1"),
    ),
    Case(
        "mask_as_an_index_pins",
        lambda: Net(lambda n, x: n.p(n.o(n.b(n.a(x)[:, n.m]))), a=conv(3, 8), m=torch.arange(8) % 3 > 0, b=conv(5, 8), o=conv(8, 6), p=conv(6, 2)),
        image(),
        ("8: b.weight/0 b.bias/0 o.weight/1", "6: o.weight/0 o.bias/0 p.weight/1"),
        {"a.weight/0": ""},
    ),
    Case(
        "index_from_the_input_pins",
        lambda: Net(lambda n, x: n.p(n.o(n.a(x).index_select(1, x[0, 0, 0, :4].abs().long()))), a=conv(3, 8), o=conv(4, 6), p=conv(6, 2)),
        image(),
        ("6: o.weight/0 o.bias/0 p.weight/1",),
        {"a.weight/0": "indexed by a tensor that depends on the input"},
    ),
    Case(
        "index_by_a_table",
        lambda: Net(lambda n, x: n.o(n.a(x) + n.t[n.i].sum(0)), a=nn.Linear(12, 8), t=weight(9, 8), i=torch.arange(20).view(4, 5) % 9, o=nn.Linear(8, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 t/1 o.weight/1",),
        {"t/0": "indexed by a table"},
    ),
    Case(
        "embedding",
        lambda: Net(lambda n, x: n.o(n.a(n.e(x))), e=nn.Embedding(20, 8, padding_idx=0), a=nn.Linear(8, 6), o=nn.Linear(6, 2)),
        torch.randint(0, 20, (2, 5)),
        ("8: e.weight/1 a.weight/1", "6: a.weight/0 a.bias/0 o.weight/1"),
        {"e.weight/0": "looked up by index"},
    ),
)  # fmt: skip


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

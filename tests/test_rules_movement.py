"""Operators that move elements: reshape, permute, split, concat, slice, index, pad, expand, pixel shuffle."""

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

aten = torch.ops.aten


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


def ends(part: Tensor, net: Net) -> Tensor:
    return net.o(part)


def parts(net: Net, *pieces: Tensor) -> Tensor:
    """The sum of the heads `o0`, `o1`, ... of each piece."""
    return sum(getattr(net, f"o{i}")(piece) for i, piece in enumerate(pieces))


def heads(*widths: int) -> dict[str, nn.Conv2d]:
    return {f"o{i}": conv(width, 2, 1) for i, width in enumerate(widths)}


def filled_slices(net: Net, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 8, 6, 6)
    out[:, :4] = net.a(x)
    out[:, 4:] = net.b(x)
    return net.o(out)


A8 = "8: a.weight/0 a.bias/0 o.weight/1"

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
)  # fmt: skip


def gathered(net: Net, x: Tensor) -> Tensor:
    places = x.abs().sum(1, keepdim=True).argsort(-1)
    return net.o(net.a(x).gather(3, places.expand(-1, 8, -1, -1)))


def half_rotated(net: Net, x: Tensor) -> Tensor:
    heads = net.a(x).unflatten(-1, (3, 4))
    turned = torch.cat([heads[..., :2] * torch.arange(1.0, 3.0), heads[..., 2:]], -1)
    return net.o(turned.flatten(-2))


CUTS = (
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
)  # fmt: skip

JOINS = (
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
    Case(
        "embedding",
        lambda: Net(lambda n, x: n.o(n.a(n.e(x))), e=nn.Embedding(20, 8, padding_idx=0), a=nn.Linear(8, 6), o=nn.Linear(6, 2)),
        torch.randint(0, 20, (2, 5)),
        ("8: e.weight/1 a.weight/1", "6: a.weight/0 a.bias/0 o.weight/1"),
        {"e.weight/0": "looked up by index"},
    ),
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

CASES = RESHAPES + PERMUTES + CUTS + JOINS


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

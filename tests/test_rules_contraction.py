"""Products that sum: linear, matmul, einsum, convolutions with and without groups, attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

aten = torch.ops.aten
A8 = "8: a.weight/0 a.bias/0 o.weight/1"


def linear(*sizes: int, **options: Any) -> nn.Linear:
    return nn.Linear(*sizes, **options)


def experts(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).flatten(0, 1)
    ends = (torch.tensor([1, 3, 5]) * x.shape[0]).to(torch.int32)
    y = torch.ops.aten._grouped_mm.default(y, net.u, ends).relu()
    return net.o(torch.ops.aten._grouped_mm.default(y, net.v, ends).unflatten(0, (x.shape[0], 5)))


EXPERTS = (
    Case(
        "experts",
        lambda: Net(experts, a=linear(12, 8), u=weight(3, 8, 16), v=weight(3, 16, 8), o=linear(8, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 u/1", "16: u/2 v/1", "8: v/2 o.weight/1"),
        {"u/0": "is an expert that the data choose", "v/0": "is an expert that the data choose"},
    ),
)
"""From PyTorch 2.15 on: before, it has grouped products for numbers of 16 bits in multiples of 8 only."""

PRODUCTS = (
    *(EXPERTS if torch.__version__ >= (2, 15) else ()),
    Case(
        "linear_in_a_row",
        lambda: nn.Sequential(linear(12, 8), nn.ReLU(), linear(8, 6, bias=False), linear(6, 2)),
        tokens(),
        ("8: 0.weight/0 0.bias/0 2.weight/1", "6: 2.weight/0 3.weight/1"),
        {"0.weight/1": "multiplied by a tensor whose size is fixed (linear)", "3.weight/0": "is an output of the model"},
    ),
    Case(
        "linear_of_one_vector",
        lambda: Net(lambda n, x: n.o(n.a(x) + F.linear(n.a(x), n.w)[..., None]), a=linear(12, 8), w=weight(8), o=linear(8, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/0 o.weight/1",),
    ),
    Case(
        "matmul_with_both_sides_prunable",
        lambda: Net(lambda n, x: n.o((n.a(x) @ n.b(x).mT) @ n.c(x)), a=linear(12, 8), b=linear(12, 8), c=linear(12, 6), o=linear(6, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0", "6: c.weight/0 c.bias/0 o.weight/1"),
    ),
    Case(
        "linear_attention",
        lambda: Net(
            lambda n, x: n.o(n.a(x) @ (n.b(x).mT @ n.c(x))), a=linear(12, 8), b=linear(12, 8), c=linear(12, 6), o=linear(6, 2)
        ),
        tokens(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0", "6: c.weight/0 c.bias/0 o.weight/1"),
    ),
    Case(
        "every_name_of_a_product",
        lambda: Net(
            lambda n, x: n.o(
                torch.bmm(n.a(x), n.u.expand(x.shape[0], 8, 8)) + torch.mm(n.a(x)[0], n.w) + torch.mv(n.w, n.a(x)[0, 0]) + torch.dot(n.a(x)[1, 0], n.v)
            ),
            a=linear(12, 8), u=weight(1, 8, 8), w=weight(8, 8), v=weight(8), o=linear(8, 2),
        ),
        tokens(),
        ("8: a.weight/0 a.bias/0 u/1 u/2 w/0 w/1 v/0 o.weight/1",),
    ),
    Case(
        "addmm",
        lambda: Net(lambda n, x: n.o(torch.addmm(n.b, x, n.w)), w=weight(5, 8), b=weight(8), o=linear(8, 2)),
        torch.randn(2, 5),
        ("8: w/1 b/0 o.weight/1",),
    ),
    Case(
        "baddbmm",
        lambda: Net(lambda n, x: n.o(torch.baddbmm(n.a(x), n.b(x).mT @ n.b(x), n.b(x).mT).mT), a=linear(5, 4), b=linear(5, 4), o=linear(4, 2)),
        torch.randn(2, 4, 5),
        (),
        {"a.weight/0": ""},
    ),
    Case(
        "einsum_of_a_weight",
        lambda: Net(lambda n, x: n.o(torch.einsum("bnc,cd->bnd", n.a(x), n.w)), a=linear(12, 8), w=weight(8, 6), o=linear(6, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/0", "6: w/1 o.weight/1"),
    ),
    Case(
        "einsum_of_heads",
        lambda: Net(
            lambda n, x: n.o(torch.einsum("bnhc,bnhd->bnh", n.a(x).unflatten(2, (4, 3)), n.b(x).unflatten(2, (4, 2)))),
            a=linear(12, 12), b=linear(12, 8), o=linear(4, 2),
        ),
        tokens(),
        ("4: a.weight/0 a.bias/0 b.weight/0 b.bias/0 o.weight/1",),
    ),
    Case(
        "einsum_with_an_ellipsis",
        lambda: Net(lambda n, x: n.o(torch.einsum("...c,cd->...d", n.a(x), n.w)), a=linear(12, 8), w=weight(8, 6), o=linear(6, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/0", "6: w/1 o.weight/1"),
    ),
    Case(
        "einsum_with_an_ellipsis_that_is_channels",
        lambda: Net(lambda n, x: n.o(torch.einsum("b n ..., ... -> b n ...", n.a(x), n.w)), a=linear(12, 8), w=weight(8), o=linear(8, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/0 o.weight/1",),
    ),
    Case(
        "einsum_with_an_ellipsis_that_is_summed",
        lambda: Net(lambda n, x: n.o(torch.einsum("...c,dc->bd".replace("...", "bn"), n.a(x), n.w) + torch.einsum("b...,d...->bd", n.a(x), n.v)), a=linear(12, 8), w=weight(6, 8), v=weight(6, 5, 8), o=linear(6, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/1 v/2", "6: w/0 v/0 o.weight/1"),
        {"v/1": "multiplied by a tensor whose size is fixed"},
    ),
    Case(
        "einsum_with_ellipses_of_different_length",
        lambda: Net(lambda n, x: n.o(torch.einsum("...c,...cd->...d", n.a(x), n.w)), a=linear(12, 8), w=weight(5, 8, 6), o=linear(6, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/1", "6: w/2 o.weight/1"),
        {"w/0": ""},
    ),
    Case(
        "einsum_without_an_arrow",
        lambda: Net(lambda n, x: n.o(torch.einsum("...c,cA", n.a(x), n.w)), a=linear(12, 8), w=weight(8, 6), o=linear(6, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/0", "6: w/1 o.weight/1"),
    ),
    Case(
        "einsum_with_a_diagonal_pins",
        lambda: Net(lambda n, x: n.p(n.o(torch.einsum("...c,cc->...c", n.a(x), n.w))), a=linear(12, 8), w=weight(8, 8), o=linear(8, 4), p=linear(4, 2)),
        tokens(),
        ("4: o.weight/0 o.bias/0 p.weight/1",),
        {"a.weight/0": "takes a diagonal", "w/1": "takes a diagonal"},
    ),
    Case(
        "bilinear",
        lambda: Net(lambda n, x: n.o(n.c(n.a(x), n.b(x))), a=linear(12, 8), b=linear(12, 6), c=nn.Bilinear(8, 6, 4), o=linear(4, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 c.weight/1", "6: b.weight/0 b.bias/0 c.weight/2", "4: c.weight/0 c.bias/0 o.weight/1"),
    ),
    Case(
        "bilinear_form",
        lambda: Net(lambda n, x: n.o(n.c(n.a(x), n.a(x))), a=linear(12, 8), c=nn.Bilinear(8, 8, 4, bias=False), o=linear(4, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 c.weight/1 c.weight/2", "4: c.weight/0 o.weight/1"),
    ),
    Case(
        "distances",
        lambda: Net(lambda n, x: n.o(torch.cdist(n.a(x), n.b(x)) + torch.cdist(n.a(x), n.w, p=1.0)), a=linear(12, 8), b=linear(12, 8), w=weight(5, 8), o=linear(5, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 w/1",),
    ),
    Case(
        "distances_of_many_points_to_themselves",
        lambda: Net(lambda n, x: n.o(torch.cdist(n.a(x), n.a(x))), a=linear(12, 8), o=linear(30, 2)),
        torch.randn(2, 30, 12),
        ("8: a.weight/0 a.bias/0",),
        mixes=True,  # in single precision they are not zero
    ),
    Case(
        "pairwise_distance",
        lambda: Net(lambda n, x: n.o(n.a(x) * nn.PairwiseDistance(eps=0.1, keepdim=True)(n.a(x), n.b(x))), a=linear(12, 8), b=linear(12, 8), o=linear(8, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 o.weight/1",),
        mixes=True,  # each channel adds its eps
    ),
    Case(
        "pairwise_distance_of_negative_order_pins",
        lambda: Net(lambda n, x: n.p(n.o(n.a(x) * F.pairwise_distance(n.a(x), n.w, -1.0, keepdim=True))), a=linear(12, 8), w=weight(8), o=linear(8, 6), p=linear(6, 2)),
        tokens(),
        ("6: o.weight/0 o.bias/0 p.weight/1",),
        {"a.weight/0": "negative order", "w/0": "negative order"},
    ),
    Case(
        "similarity",
        lambda: Net(lambda n, x: n.o(n.a(x) * F.cosine_similarity(n.a(x), n.w, -1)[..., None]), a=linear(12, 8), w=weight(8), o=linear(8, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/0 o.weight/1",),
    ),
)  # fmt: skip

CONVOLUTIONS = (
    Case("conv1d", lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 2, 3, padding="same")), torch.randn(2, 3, 9), ("8: 0.weight/0 0.bias/0 1.weight/1",)),
    Case("conv2d_same", lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 2, 1)), image(), ("8: 0.weight/0 0.bias/0 1.weight/1",)),
    Case("conv3d", lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 2, 3, padding="same")), torch.randn(2, 3, 4, 4, 4), ("8: 0.weight/0 0.bias/0 1.weight/1",)),
    Case(
        "kernel_sizes_stay",
        lambda: nn.Sequential(conv(3, 8), conv(8, 2)),
        image(),
        ("8: 0.weight/0 0.bias/0 1.weight/1",),
        {"0.weight/2": "is a kernel dimension", "1.weight/3": "is a kernel dimension"},
    ),
    Case("conv_of_one_example", lambda: Net(lambda n, x: n.o(n.a(x[0]))[None] + 0 * x[:, :2], a=conv(3, 8), o=conv(8, 2)), image(), (A8,)),
    Case(
        "depthwise",
        lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 2)),
        image(),
        ("8: 0.weight/0 0.bias/0 1.weight/0 1.bias/0 2.weight/1",),
    ),
    Case(
        "depthwise_with_multiplier",
        lambda: nn.Sequential(conv(3, 8), conv(8, 16, groups=8), conv(16, 2)),
        image(),
        ("8: 0.weight/0 0.bias/0 1.weight/0 1.bias/0 2.weight/1",),
    ),
    Case(
        "grouped_conv_in_both_directions",
        lambda: nn.Sequential(conv(3, 8), conv(8, 12, groups=2), conv(12, 2)),
        image(),
        ("8: 0.weight/0 0.bias/0 1.weight/01", "12: 1.weight/0 1.bias/0 2.weight/1"),
    ),
    Case(
        "grouped_conv_of_the_input",
        lambda: nn.Sequential(conv(4, 8, groups=2), conv(8, 2)),
        image(4),
        ("4: 0.weight/0 0.bias/0 1.weight/1",),
        {"0.weight/01": "multiplied by a tensor whose size is fixed"},
    ),
    Case(
        "grouped_conv_of_many_groups",
        lambda: nn.Sequential(conv(3, 12), conv(12, 12, groups=6), conv(12, 2)),
        image(),
        ("6: 0.weight/0 0.bias/0 1.weight/0 1.weight/01 1.bias/0 2.weight/1",),
    ),
    Case(
        "transposed_conv",
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 2)),
        image(),
        ("8: 0.weight/0 0.bias/0 1.weight/0", "6: 1.weight/1 1.bias/0 2.weight/1"),
    ),
    Case(
        "transposed_conv1d_and_3d",
        lambda: nn.Sequential(
            nn.ConvTranspose1d(3, 8, 2), nn.Unflatten(2, (2, 2, 2)), nn.ConvTranspose3d(8, 4, 2), nn.Conv3d(4, 2, 1)
        ),
        torch.randn(2, 3, 7),
        ("8: 0.weight/1 0.bias/0 2.weight/0", "4: 2.weight/1 2.bias/0 3.weight/1"),
    ),
    Case(
        "transposed_grouped_conv",
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=2), conv(12, 2)),
        image(),
        ("8: 0.weight/0 0.bias/0 1.weight/0", "12: 1.weight/01 1.bias/0 2.weight/1"),
    ),
    Case(
        "transposed_depthwise_with_multiplier",
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 16, 2, 2, groups=8), conv(16, 2)),
        image(),
        ("8: 0.weight/0 0.bias/0 1.weight/0 1.weight/01 1.bias/0 2.weight/1",),
    ),
    Case(
        "conv_whose_weight_is_shared",
        lambda: Net(lambda n, x: n.o(F.conv2d(n.a(x), n.w) + F.conv2d(n.b(x), n.w)), a=conv(3, 8), b=conv(3, 8), w=weight(6, 8, 1, 1), o=conv(6, 2)),
        image(),
        ("8: w/1 a.weight/0 a.bias/0 b.weight/0 b.bias/0", "6: w/0 o.weight/1"),
    ),
    Case(
        "grouped_weight_shared_with_a_dense_conv",
        lambda: Net(
            lambda n, x: n.o(F.conv2d(n.a(x), n.w, groups=2) + F.conv2d(n.b(x), n.w)), a=conv(3, 8), b=conv(3, 4), w=weight(8, 4, 1, 1), o=conv(8, 2)
        ),
        image(),
        ("4: w/01 a.weight/0 a.bias/0 b.weight/0 b.bias/0", "8: w/0 o.weight/1"),
    ),
    Case(
        "grouped_weight_that_is_a_sum",
        lambda: Net(lambda n, x: n.o(F.conv2d(n.a(x), n.v + n.w, groups=2)), a=conv(3, 8), v=weight(8, 4, 1, 1), w=weight(8, 4, 1, 1), o=conv(8, 2)),
        image(),
        ("4: v/01 w/1 a.weight/0 a.bias/0", "8: v/0 w/0 o.weight/1"),  # w has one label an input for both groups
    ),
    Case(
        "groups_that_depend_on_the_batch",
        lambda: Net(
            lambda n, x: n.p(n.o(
                F.conv2d(n.a(x).reshape(1, x.shape[0] * 8, 6, 6), n.k(x.mean((2, 3))).view(x.shape[0] * 8, 1, 3, 3), padding=1, groups=x.shape[0] * 8).view(x.shape[0], 8, 6, 6)
            )),
            a=conv(3, 8), k=linear(3, 72), o=conv(8, 6), p=conv(6, 2),
        ),
        image(),
        ("6: o.weight/0 o.bias/0 p.weight/1",),
        {"a.weight/0": ""},
    ),
)  # fmt: skip


class Attention(nn.Module):
    """Self-attention in the ways in which it is written."""

    def __init__(self, how: str = "", heads: int = 3, keys: int = 3, bias: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.how, self.heads, self.keys = how, heads, keys
        self.q, self.k, self.v = linear(12, 4 * heads), linear(12, 4 * keys), linear(12, 4 * keys)
        self.o = linear(4 * heads, 12)
        self.table = weight(9, heads) if bias else None
        self.norm = nn.RMSNorm(4) if norm else nn.Identity()
        index = torch.arange(5)
        self.register_buffer("index", (index[:, None] - index[None] + 4).reshape(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.norm(self.q(x).view(batch, length, self.heads, 4).transpose(1, 2))
        k, v = (layer(x).view(batch, length, self.keys, 4).transpose(1, 2) for layer in (self.k, self.v))
        bias = None
        if self.table is not None:
            bias = self.table[self.index].view(length, length, self.heads).permute(2, 0, 1)[None]
        if self.how == "expanded":
            k, v = k.expand(-1, self.heads, -1, -1), v.expand(-1, self.heads, -1, -1)
        if self.how in ("written out", "broadcast"):
            scores = q @ k.transpose(-1, -2) / math.sqrt(4)
            y = (scores if bias is None else scores + bias).softmax(-1) @ v
        elif self.how == "merged with the batch":
            q, k, v = (t.reshape(batch * self.heads, length, 4) for t in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(batch, self.heads, length, 4)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=self.how == "grouped")
        return self.o(y.transpose(1, 2).reshape(batch, length, 4 * self.heads))


def fused(order: str) -> Net:
    """Attention from one projection, its three parts, heads and widths in any order."""

    def attend(net: Net, x: Tensor) -> Tensor:
        qkv = net.qkv(x)
        if order == "chunk":
            q, k, v = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in qkv.chunk(3, -1))
        else:
            sizes = {"3": 3, "h": 3, "d": 4}
            parts = qkv.unflatten(2, [sizes[letter] for letter in order])
            q, k, v = parts.permute(2 + order.index("3"), 0, 2 + order.index("h"), 1, 2 + order.index("d")).unbind(0)
        return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Net(attend, qkv=linear(12, 36), o=linear(12, 12))


HEADS = "q.weight/0 q.bias/0 k.weight/0 k.bias/0 v.weight/0 v.bias/0 o.weight/1"

ATTENTIONS = (
    Case("attention", Attention, tokens(), (f"3: {HEADS}",)),
    Case("attention_written_out", lambda: Attention("written out"), tokens(), (f"3: {HEADS}",)),
    Case("heads_merged_with_the_batch", lambda: Attention("merged with the batch"), tokens(), (f"3: {HEADS}",)),
    Case("heads_merged_with_a_batch_of_three", lambda: Attention("merged with the batch"), torch.randn(3, 5, 12), (f"3: {HEADS}",)),
    Case("attention_with_a_position_table", lambda: Attention(bias=True), tokens(), (f"3: {HEADS} table/1",), {"table/0": ""}),
    Case("attention_with_a_table_written_out", lambda: Attention("written out", bias=True), tokens(), (f"3: {HEADS} table/1",), {"table/0": ""}),
    Case("attention_with_a_norm_of_queries", lambda: Attention(heads=4, keys=4, norm=True), tokens(), (f"4: {HEADS}",), {"norm.weight/0": ""}),
    Case("grouped_query_attention", lambda: Attention("grouped", heads=4, keys=2), tokens(), (f"2: {HEADS}",)),
    Case("multi_query_attention", lambda: Attention("grouped", heads=4, keys=1), tokens(), ("4: q.weight/0 q.bias/0 k.weight/0 k.bias/0", "4: v.weight/0 v.bias/0 o.weight/1")),
    Case("multi_query_attention_expanded", lambda: Attention("expanded", heads=4, keys=1), tokens(), ("4: q.weight/0 q.bias/0 o.weight/1",), {"k.weight/0": "is shared by heads or groups that only go whole", "v.weight/0": "shares a dimension with other channels"}),
    Case("multi_query_attention_broadcast", lambda: Attention("broadcast", heads=4, keys=1), tokens(), ("4: q.weight/0 q.bias/0 k.weight/0 k.bias/0",), {"v.weight/0": "shares a dimension with other channels"}),
    *(
        Case(f"fused_projection_{order}", lambda order=order: fused(order), tokens(), ("3: qkv.weight/0 qkv.bias/0 o.weight/1",))
        for order in ("3hd", "h3d", "hd3", "chunk")
    ),
)  # fmt: skip

CASES = PRODUCTS + CONVOLUTIONS + ATTENTIONS


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

"""Attention as it is written: products by hand, einsum, grouped queries, rotations, biases, latent keys, other kinds."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

HEADS = "q.weight/0 q.bias/0 k.weight/0 k.bias/0 v.weight/0 v.bias/0 o.weight/1"
SHARED = "is shared by heads or groups that only go whole"


def split(y: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * width) -> (batch, heads, length, width)."""
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return (q @ k.mT / math.sqrt(4) + bias).softmax(-1) @ v


def net(function: Callable[..., Any], queries: int = 3, keys: int = 3, **parts: Any) -> Callable[[], Net]:
    """A net whose function gets the module, and its queries, keys and values in heads of width 4."""

    def forward(n: Net, x: Tensor) -> Any:
        q, k, v = (split(layer(x), heads) for layer, heads in ((n.q, queries), (n.k, keys), (n.v, keys)))
        outcome = function(n, q, k, v)
        return (n.o(joined(outcome[0])), *outcome[1:]) if isinstance(outcome, tuple) else n.o(joined(outcome))

    return lambda: Net(
        forward,
        q=nn.Linear(12, 4 * queries),
        k=nn.Linear(12, 4 * keys),
        v=nn.Linear(12, 4 * keys),
        o=nn.Linear(4 * queries, 2),
        **{name: part() for name, part in parts.items()},
    )


def by_einsum(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)


def by_einsum_with_dots(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...ij, ...jd -> ...id", torch.einsum("...id, ...jd", q, k).softmax(-1), v)


def rows_of_queries(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every key serves the queries of its row, by broadcasting."""
    return ((q.unflatten(1, (2, 2)) @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]).flatten(1, 2)


def distances() -> Tensor:
    places = torch.arange(5)
    return (places[None] - places[:, None]).abs()


def turned(y: Tensor) -> Tensor:
    left, right = y.chunk(2, -1)
    return torch.cat([-right, left], -1)


def rotated(kind: str) -> Callable[..., Tensor]:
    """Attention with queries and keys turned by angles that grow with the position."""

    def rotate(n: Net, y: Tensor) -> Tensor:
        f = torch.arange(5)[:, None] * getattr(n, "inv", 1 / torch.arange(1, 3))
        if kind == "halves":
            f = torch.cat([f, f], -1)
            return y * f.cos() + turned(y) * f.sin()
        if kind == "pairs":
            a, b = y[..., ::2], y[..., 1::2]
            return torch.stack([a * f.cos() - b * f.sin(), a * f.sin() + b * f.cos()], -1).flatten(-2)
        if kind == "repeated":
            f = f.repeat_interleave(2, -1)
            return y * f.cos() + torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2) * f.sin()
        if kind == "complex":
            return torch.view_as_real(
                torch.view_as_complex(y.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(f), f)
            ).flatten(-2)
        # a part of each head only, by angles that are not stored
        return torch.cat([y[..., :2] * f.cos() + turned(y[..., :2]) * f.sin(), y[..., 2:]], -1)

    return lambda n, q, k, v: attend(rotate(n, q), rotate(n, k), v)


def latent(n: Net, x: Tensor) -> Tensor:
    """Keys and values from a narrow layer; the positional part of keys is one for all heads."""
    c, q = n.c(x), split(n.q(x), 3)
    k = torch.cat([split(n.k(c), 3), n.r(x)[:, None].expand(-1, 3, -1, -1)], -1)
    return n.o(joined(attend(q, k, split(n.v(c), 3))))


def sunk(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sink = n.s.view(1, 3, 1, 1).expand(q.shape[0], -1, 5, 1)
    return torch.cat([q @ k.mT, sink], -1).softmax(-1)[..., :-1] @ v


def differential(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q0, q1), (k0, k1) = q.chunk(2, -1), k.chunk(2, -1)
    return ((q0 @ k0.mT).softmax(-1) - n.s.view(3, 1, 1) * (q1 @ k1.mT).softmax(-1)) @ v


def over_features(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.normalize(q.mT, dim=-1), F.normalize(k.mT, dim=-1)
    return ((q @ k.mT * n.s.view(3, 1, 1)).softmax(-1) @ v.mT).mT


def linear_and_normalised(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)


def talking(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = n.l((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
    return torch.einsum("bhij,hg->bgij", scores, n.w) @ v


def shifted(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores by distance, moved into place by a pad and two views."""
    scores = q @ n.r(n.e).view(9, 3, 4).permute(1, 2, 0)
    scores = F.pad(scores, (1, 0)).view(-1, 3, 10, 5)[:, :, 1:].view(-1, 3, 5, 9)[..., :5]
    return attend(q, k, v, scores)


def table(n: Net) -> Tensor:
    index = torch.arange(5)
    return n.t[(index[:, None] - index + 4).view(-1)].view(5, 5, 3).permute(2, 0, 1)


def prefixed(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.cat([y.expand(q.shape[0], -1, -1, -1), z], 2) for y, z in ((n.ck, k), (n.cv, v)))
    return F.scaled_dot_product_attention(q, k, v)


def merged_with_the_batch(n: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads are one dimension, along which an index is repeated."""
    scores = q.flatten(0, 1) @ k.flatten(0, 1).mT
    places = (torch.arange(5)[:, None] + torch.arange(5)) % 5
    scores = scores.gather(-1, places.expand(scores.shape[0], 5, 5))
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (q.shape[0], -1))


def gated_unit(n: Net, x: Tensor) -> Tensor:
    u, v, z = n.a(x).split([12, 12, 8], -1)
    q, k = ((z[..., None, :] * n.g) + n.b).unbind(-2)
    return n.o(u * ((q @ k.mT / 5).relu().square() @ v))


def pooled(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    return n.o(((y @ n.q).softmax(1)[..., None] * y).sum(1))


def over_places(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    q, k, v = (layer(y).flatten(2) for layer in (n.q, n.k, n.v))
    return n.o(y + n.w(((q.mT @ k).softmax(-1) @ v.mT).mT.unflatten(2, (6, 6))))


class Multihead(nn.Module):
    """`nn.MultiheadAttention` between two layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        keys, values = (6, 10) if kind == "widths" else (8, 8)
        self.a, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, keys), nn.Linear(12, values)
        self.m = nn.MultiheadAttention(
            8, 2, batch_first=True, kdim=keys, vdim=values, add_bias_kv=kind == "bias", dropout=0.1
        )
        self.o = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        q = self.a(x)
        k, v = (self.k(x), self.v(x)) if self.kind in ("cross", "widths") else (q, q)
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if self.kind == "causal" else None
        y, weights = self.m(q, k, v, need_weights=self.kind == "weights", attn_mask=mask)
        return self.o(y) if weights is None else (self.o(y), weights)


M2 = "2: m.in_proj_weight/0 m.in_proj_bias/0 m.out_proj.weight/1"
M8 = "8: m.out_proj.weight/0 m.out_proj.bias/0 o.weight/1"
SELF = (M2, "8: a.weight/0 a.bias/0 m.in_proj_weight/1", M8)

MODULES = (
    Case("multihead_self", lambda: Multihead("self"), tokens(), SELF),
    Case("multihead_causal", lambda: Multihead("causal"), tokens(), SELF),
    Case("multihead_with_weights", lambda: Multihead("weights"), tokens(), SELF, mixes=True),  # they are a mean over heads
    Case("multihead_with_biases", lambda: Multihead("bias"), tokens(), (f"{M2} m.bias_k/2 m.bias_v/2", *SELF[1:])),
    Case("multihead_cross", lambda: Multihead("cross"), tokens(), (M2, "8: a.weight/0 a.bias/0 k.weight/0 k.bias/0 v.weight/0 v.bias/0 m.in_proj_weight/1", M8)),
    Case(
        "multihead_of_other_widths",
        lambda: Multihead("widths"),
        tokens(),
        (
            "2: m.q_proj_weight/0 m.k_proj_weight/0 m.v_proj_weight/0 m.in_proj_bias/0 m.out_proj.weight/1",
            "8: a.weight/0 a.bias/0 m.q_proj_weight/1", "6: k.weight/0 k.bias/0 m.k_proj_weight/1", "10: v.weight/0 v.bias/0 m.v_proj_weight/1", M8,
        ),
    ),
    Case(
        "encoder_layer",
        lambda: nn.Sequential(nn.Linear(12, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)),
        tokens(),
        (
            "16: 1.linear1.weight/0 1.linear1.bias/0 1.linear2.weight/1",
            "2: 1.self_attn.in_proj_weight/0 1.self_attn.in_proj_bias/0 1.self_attn.out_proj.weight/1",
            "8: 0.weight/0 0.bias/0 1.self_attn.in_proj_weight/1 1.self_attn.out_proj.weight/0 1.self_attn.out_proj.bias/0 1.norm1.weight/0 1.norm1.bias/0 "
            "1.linear1.weight/1 1.linear2.weight/0 1.linear2.bias/0 1.norm2.weight/0 1.norm2.bias/0 2.weight/1",
        ),
        mixes=True,
    ),
)  # fmt: skip

GROUPED = f"2: {HEADS}"

WRITTEN = (
    Case("heads_by_einsum", net(by_einsum), tokens(), (f"3: {HEADS}",)),
    Case("heads_by_einsum_with_dots", net(by_einsum_with_dots), tokens(), (f"3: {HEADS}",)),
    Case("keys_by_repeat_interleave", net(lambda n, q, k, v: attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), 4, 2), tokens(), (GROUPED,)),
    Case("keys_by_repeat", net(lambda n, q, k, v: attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), 4, 2), tokens(), (GROUPED,)),
    Case("keys_for_rows_of_queries", net(rows_of_queries, 4, 2), tokens(), (GROUPED,)),
    Case("attention_maps_as_an_output", net(lambda n, q, k, v: ((q @ k.mT).softmax(-1) @ v, (q @ k.mT).softmax(-1))), tokens(), ("12: q.weight/0 q.bias/0 k.weight/0 k.bias/0", "12: v.weight/0 v.bias/0 o.weight/1")),
    *(
        Case(f"rotation_of_{kind}", net(rotated(kind), inv=lambda: torch.tensor([1.0, 0.1])), tokens(), (f"3: {HEADS}",), {"inv/0": reason})
        for kind, reason in (("halves", SHARED), ("pairs", "size is fixed"), ("repeated", "size is fixed"), ("complex", SHARED))
    ),
    Case("rotation_of_a_part", net(rotated("part")), tokens(), (f"3: {HEADS}",)),
    Case("heads_merged_with_the_batch", net(merged_with_the_batch), tokens(), (f"3: {HEADS}",)),
    Case("slopes_in_a_buffer", net(lambda n, q, k, v: attend(q, k, v, -n.s[:, None, None] * distances()), s=lambda: torch.tensor([0.5, 0.25, 0.125])), tokens(), (f"3: {HEADS} s/0",)),
    Case("slopes_that_are_computed", net(lambda n, q, k, v: attend(q, k, v, -(0.5 ** torch.arange(1, 4))[:, None, None] * distances())), tokens(), ("12: q.weight/0 q.bias/0 k.weight/0 k.bias/0", "4: v.weight/0 v.bias/0 o.weight/1")),
    Case("table_of_positions", net(lambda n, q, k, v: attend(q, k, v, table(n)), t=lambda: weight(9, 3)), tokens(), (f"3: {HEADS} t/1",), {"t/0": "indexed by a table"}),
    Case("scores_by_distance", net(shifted, r=lambda: nn.Linear(6, 12), e=lambda: weight(9, 6)), tokens(), (f"3: {HEADS} r.weight/0 r.bias/0", "6: e/1 r.weight/1", "10: e/0"), {"e/0": "size is fixed"}),
    Case("cosines_with_a_temperature", net(lambda n, q, k, v: (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * n.s.exp()).softmax(-1) @ v, s=lambda: weight(3, 1, 1)), tokens(), (f"3: {HEADS} s/0",)),
    Case("gate_of_each_head", net(lambda n, q, k, v: attend(q, k, v) * n.s.sigmoid(), s=lambda: weight(3, 1, 1)), tokens(), (f"3: {HEADS} s/0",)),
    Case("sink_of_each_head", net(sunk, s=lambda: weight(3)), tokens(), (f"3: {HEADS} s/0",)),
    Case("norm_within_heads", net(lambda n, q, k, v: F.layer_norm(attend(q, k, v), (4,))), tokens(), (f"3: {HEADS}",), mixes=True),
    Case("prefix_of_keys_and_values", net(prefixed, ck=lambda: weight(1, 3, 2, 4), cv=lambda: weight(1, 3, 2, 4)), tokens(), (f"3: {HEADS} ck/1 cv/1",), {"ck/2": "is a position in attention", "ck/3": SHARED}),
    Case("differential_attention", net(differential, s=lambda: weight(3)), tokens(), (f"3: {HEADS} s/0",)),
    Case("talking_heads", net(talking, l=lambda: nn.Linear(3, 3), w=lambda: weight(3, 3)), tokens(), ("3: q.weight/0 q.bias/0 k.weight/0 k.bias/0 l.weight/1", "3: l.weight/0 l.bias/0 w/0", "3: w/1 v.weight/0 v.bias/0 o.weight/1")),
    Case("attention_over_features", net(over_features, s=lambda: weight(3)), tokens(), (f"3: {HEADS} s/0",)),
    Case("softmax_of_features_and_of_places", net(lambda n, q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v)), tokens(), (f"3: {HEADS}",)),
    Case("linear_attention_normalised", net(linear_and_normalised), tokens(), (f"3: {HEADS}",)),
    Case(
        "keys_and_values_from_a_narrow_layer",
        lambda: Net(latent, c=nn.Linear(12, 6), q=nn.Linear(12, 24), k=nn.Linear(6, 12), v=nn.Linear(6, 12), r=nn.Linear(12, 4), o=nn.Linear(12, 2)),
        tokens(),
        (f"3: {HEADS}", "6: c.weight/0 c.bias/0 k.weight/1 v.weight/1"),
        {"r.weight/0": SHARED},
    ),
    Case(
        "gated_attention_unit",
        lambda: Net(gated_unit, a=nn.Linear(12, 32), g=weight(2, 8), b=weight(2, 8), o=nn.Linear(12, 2)),
        tokens(),
        ("12: a.weight/0*24 a.bias/0*24 o.weight/1", "8: a.weight/0*8 a.bias/0*8 g/1 b/1"),
        {"g/0": "is taken alone"},
    ),
    Case("pooling_by_a_query", lambda: Net(pooled, a=nn.Linear(12, 8), q=weight(8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 q/0 o.weight/1",)),
    Case(
        "attention_over_places_of_an_image",
        lambda: Net(over_places, a=conv(3, 8), q=conv(8, 4), k=conv(8, 4), v=conv(8, 6), w=conv(6, 8), o=conv(8, 2)),
        image(),
        (
            "8: a.weight/0 a.bias/0 q.weight/1 k.weight/1 v.weight/1 w.weight/0 w.bias/0 o.weight/1",
            "4: q.weight/0 q.bias/0 k.weight/0 k.bias/0", "6: v.weight/0 v.bias/0 w.weight/1",
        ),
    ),
    Case(
        "attention_over_channels_that_compares_with_a_maximum_pins",
        lambda: Net(lambda n, x: n.o((lambda y, e: ((e.amax(-1, keepdim=True) - e).softmax(-1) @ y).unflatten(2, (6, 6)))(n.a(x).flatten(2), n.a(x).flatten(2) @ n.a(x).flatten(2).mT)), a=conv(3, 8), o=conv(8, 2)),
        image(),
        (),
        {"a.weight/0": "goes through aten.amax.default over its channels"},
    ),
)  # fmt: skip

CASES = MODULES + WRITTEN


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

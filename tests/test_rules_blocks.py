"""Blocks as people build them: weights made of weights, shared layers, gates, experts, scans, cells, norms by hand."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

A8 = "8: a.weight/0 a.bias/0 o.weight/1"
W = ("8: a.weight/0 a.bias/0 w/1", "6: w/0 o.weight/1")


def filtered(function: Callable[[Net], Tensor], **parts: Callable[[], object]) -> Callable[[], Net]:
    """A convolution of eight channels to six whose weight is made by the function."""
    return lambda: Net(
        lambda n, x: n.o(F.conv2d(n.a(x), function(n))),
        a=conv(3, 8),
        o=conv(6, 2),
        **{name: part() for name, part in parts.items()},
    )


def modulated(n: Net, x: Tensor) -> Tensor:
    """The inputs of a convolution are scaled by a style, and its outputs scaled back."""
    y, style = n.a(x), n.s(x.mean((2, 3)))
    scale = (n.w[None] * style[:, None, :, None, None]).pow(2).sum((2, 3, 4)).add(1e-8).rsqrt()
    return n.o(F.conv2d(y * style[:, :, None, None], n.w) * scale[:, :, None, None])


WEIGHTS = (
    Case("mask_of_a_weight", filtered(lambda n: n.w * n.m, w=lambda: weight(6, 8, 3, 3), m=lambda: (torch.rand(6, 8, 3, 3) > 0.5).float()), image(), ("8: a.weight/0 a.bias/0 w/1 m/1", "6: w/0 m/0 o.weight/1")),
    Case("weight_of_low_rank", filtered(lambda n: (n.u @ n.v)[..., None, None], u=lambda: weight(6, 2), v=lambda: weight(2, 8)), image(), ("8: a.weight/0 a.bias/0 v/1", "2: u/1 v/0", "6: u/0 o.weight/1")),
    Case("weight_of_low_rank_with_a_view", filtered(lambda n: (n.u @ n.v).view(6, 8, 3, 3), u=lambda: weight(6, 2), v=lambda: weight(2, 72)), image(), ("8: a.weight/0 a.bias/0 v/1", "2: u/1 v/0", "6: u/0 o.weight/1")),
    Case("weight_made_by_a_layer", filtered(lambda n: n.h(n.z).view(6, 8, 1, 1), h=lambda: nn.Linear(3, 48), z=lambda: weight(3)), image(), ("8: a.weight/0 a.bias/0 h.weight/0 h.bias/0", "3: h.weight/1 z/0"), {"o.weight/1": ""}),
    Case("weight_transposed", filtered(lambda n: n.w.transpose(0, 1), w=lambda: weight(8, 6, 1, 1)), image(), ("8: a.weight/0 a.bias/0 w/0", "6: w/1 o.weight/1")),
    Case("kernels_of_two_sizes", filtered(lambda n: n.w + F.pad(n.v, (1, 1, 1, 1)), w=lambda: weight(6, 8, 3, 3), v=lambda: weight(6, 8, 1, 1)), image(), ("8: a.weight/0 a.bias/0 w/1 v/1", "6: w/0 v/0 o.weight/1")),
    Case("gains_of_outputs_and_inputs", filtered(lambda n: n.w * n.g * n.h, w=lambda: weight(6, 8, 3, 3), g=lambda: weight(6, 1, 1, 1), h=lambda: weight(8, 1, 1)), image(), ("8: a.weight/0 a.bias/0 w/1 h/0", "6: w/0 g/0 o.weight/1")),
    Case("weight_of_signs", filtered(lambda n: n.w.sign() * n.w.abs().mean((1, 2, 3), keepdim=True), w=lambda: weight(6, 8, 3, 3)), image(), W, mixes=True),
    Case("outer_product_of_vectors", lambda: Net(lambda n, x: n.o(F.linear(x, torch.outer(n.u, n.v))), u=weight(8), v=weight(12), o=nn.Linear(8, 2)), tokens(), ("8: u/0 o.weight/1",), {"v/0": "size is fixed"}),
    Case("a_low_rank_step_beside_a_layer", lambda: Net(lambda n, x: n.o(n.a(x) + F.linear(F.linear(x, n.d), n.u)), a=nn.Linear(12, 8), u=weight(8, 3), d=weight(3, 12), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 u/0 o.weight/1", "3: u/1 d/0")),
    Case("spectral_norm_of_a_convolution", lambda: nn.Sequential(conv(3, 8), spectral_norm(conv(8, 6)), conv(6, 2)), image(), ("8: 0.weight/0 0.bias/0 1.parametrizations.weight.original/1 1.parametrizations.weight.0._v/0", "6: 1.parametrizations.weight.original/0 1.parametrizations.weight.0._u/0 1.bias/0 2.weight/1"), mixes=True),  # v has one label for all inputs and places
    Case("modulated_convolution", lambda: Net(modulated, a=conv(3, 8), s=nn.Linear(3, 8), w=weight(6, 8, 1, 1), o=conv(6, 2)), image(), ("8: a.weight/0 a.bias/0 s.weight/0 s.bias/0 w/1", "6: w/0 o.weight/1")),
    Case("symmetric_weight", lambda: Net(lambda n, x: n.o(n.a(x) @ (n.w + n.w.T)), a=nn.Linear(12, 8), w=weight(8, 8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 w/0 w/1 o.weight/1",)),
    Case("weight_beside_the_identity_pins", lambda: Net(lambda n, x: n.o(n.a(x) @ (n.w + torch.eye(8))), a=nn.Linear(12, 8), w=weight(8, 8), o=nn.Linear(8, 2)), tokens(), (), {"w/0": "size is fixed"}),
    Case("blocks_of_a_product_of_quaternions", filtered(lambda n: torch.cat([torch.cat([n.w, -n.v], 1), torch.cat([n.v, n.w], 1)], 0), w=lambda: weight(3, 4, 1, 1), v=lambda: weight(3, 4, 1, 1)), image(), ("4: a.weight/0 a.bias/0 w/1 v/1", "3: w/0 v/0 o.weight/1")),
    Case("bilinear_form_of_vectors", lambda: Net(lambda n, x: n.o(n.m(n.a(x), n.b(x))), a=nn.Linear(5, 4), b=nn.Linear(5, 6), m=nn.Bilinear(4, 6, 8), o=nn.Linear(8, 2)), torch.randn(2, 5), ("4: a.weight/0 a.bias/0 m.weight/1", "6: b.weight/0 b.bias/0 m.weight/2", "8: m.weight/0 m.bias/0 o.weight/1")),
    Case("product_by_its_other_names", lambda: Net(lambda n, x: n.o(torch.inner(torch.tensordot(n.a(x), n.w, dims=1), n.v)), a=nn.Linear(12, 8), w=weight(8, 6), v=weight(4, 6), o=nn.Linear(4, 2)), tokens(), ("8: a.weight/0 a.bias/0 w/0", "6: w/1 v/1", "4: v/0 o.weight/1")),
    Case("outer_product_of_activations", lambda: Net(lambda n, x: n.o((n.a(x)[:, :, None] * n.b(x)[:, None]).flatten(1)), a=nn.Linear(5, 4), b=nn.Linear(5, 3), o=nn.Linear(12, 2)), torch.randn(2, 5), ("4: a.weight/0 a.bias/0 o.weight/1",), {"b.weight/0": "shares a dimension with other channels"}),
)  # fmt: skip


def repeated(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    for _ in range(3):
        y = n.n(y + n.d(F.gelu(n.u(y))))
    return n.o(y)


LAYERS = (
    Case("one_layer_three_times", lambda: Net(repeated, a=nn.Linear(12, 8), u=nn.Linear(8, 16), d=nn.Linear(16, 8), n=nn.LayerNorm(8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 u.weight/1 d.weight/0 d.bias/0 n.weight/0 n.bias/0 o.weight/1", "16: u.weight/0 u.bias/0 d.weight/1"), mixes=True),
    Case("one_convolution_with_two_partners", lambda: Net(lambda n, x: n.o(n.c(n.a(x)) + n.d(x)) + n.p(n.c(n.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 6), d=conv(3, 6), o=conv(6, 2), p=conv(6, 2)), image(), ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 c.weight/1", "6: c.weight/0 c.bias/0 d.weight/0 d.bias/0 o.weight/1 p.weight/1")),
    Case("one_convolution_beside_itself", lambda: Net(lambda n, x: n.o(torch.cat([n.c(n.a(x)), n.c(n.b(x))], 1)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 5), o=conv(10, 2)), image(), ("4: a.weight/0 a.bias/0 b.weight/0 b.bias/0 c.weight/1", "5: c.weight/0 c.bias/0 o.weight/1")),
    Case("encoder_tied_to_its_decoder", lambda: Net(lambda n, x: F.linear(F.linear(x, n.w, n.b).relu(), n.w.t(), n.c), w=weight(8, 12), b=weight(8), c=weight(12)), tokens(), ("8: w/0 b/0",), {"c/0": ""}),
    Case("convolution_tied_to_its_transpose", lambda: Net(lambda n, x: n.o(F.conv_transpose2d(F.conv2d(n.a(x), n.w).relu(), n.w)), a=conv(3, 8), w=weight(6, 8, 3, 3), o=conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 w/1 o.weight/1", "6: w/0")),
    Case("grouped_convolution_of_a_copy", lambda: Net(lambda n, x: n.o(n.g(torch.cat([n.a(x), n.a(x)], 1))), a=conv(3, 4), g=conv(8, 8, groups=2), o=conv(8, 2)), image(), ("4: a.weight/0 a.bias/0 g.weight/01", "8: g.weight/0 g.bias/0 o.weight/1")),
    Case("bias_that_is_a_gate_too", lambda: Net(lambda n, x: n.o(n.a(x) * n.a.bias.sigmoid()[:, None, None]), a=conv(3, 8), o=conv(8, 2)), image(), (A8,)),
    Case("lstm_between_layers", lambda: Net(lambda n, x: n.o(n.r(n.a(x))[0]), a=nn.Linear(12, 8), r=nn.LSTM(8, 6, batch_first=True), o=nn.Linear(6, 2)), tokens(), ("8: a.weight/0 a.bias/0 r.weight_ih_l0/1", "6: r.weight_ih_l0/0 r.weight_hh_l0/0 r.weight_hh_l0/1 r.bias_ih_l0/0 r.bias_hh_l0/0 o.weight/1")),
)  # fmt: skip


class Split(nn.Module):
    """Split attention: a softmax over branches, within groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.a, self.g, self.o = conv(3, 8), conv(8, 16, groups=2 * groups), conv(8, 2)
        self.u, self.v = conv(8, 4, 1, groups=groups), conv(4, 16, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.g(self.a(x))
        branches = y.split(y.shape[1] // 2, 1)
        w = self.v(self.u(sum(branches).mean((2, 3), keepdim=True)).relu())
        w = w.view(y.shape[0], self.groups, 2, -1).transpose(1, 2).softmax(1).reshape(y.shape[0], -1, 1, 1)
        return self.o(sum(a * b for a, b in zip(w.split(w.shape[1] // 2, 1), branches, strict=True)))


def along_and_across(n: Net, x: Tensor) -> Tensor:
    """Two gates, one for each axis of the image, from one layer."""
    y = n.a(x)
    z = n.m(torch.cat([y.mean(3, keepdim=True), y.mean(2, keepdim=True).transpose(2, 3)], 2)).relu()
    return n.o(y * n.h(z[:, :, :6]).sigmoid() * n.w(z[:, :, 6:].transpose(2, 3)).sigmoid())


def two_pools(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    return n.o(y * n.m(torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)).sigmoid()[..., None, None])


def neighbours(n: Net, x: Tensor) -> Tensor:
    """A gate for each channel from its neighbours: channels are a space there."""
    y = n.a(x)
    return n.p(n.o(y * n.e(y.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid()))


def of_a_map(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    seen = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
    return n.p(n.o(y * n.s(seen).sigmoid()))


GATES = (
    Case("split_attention", lambda: Split(1), image(), ("8: a.weight/0 a.bias/0 g.weight/01", "8: g.weight/0 g.bias/0 u.weight/1 v.weight/0 v.bias/0 o.weight/1", "4: u.weight/0 u.bias/0 v.weight/1")),
    Case("split_attention_in_groups", lambda: Split(2), image(), ("2: a.weight/0 a.bias/0 g.weight/0 g.weight/01 g.bias/0 u.weight/01 v.weight/0 v.bias/0 o.weight/1", "4: u.weight/0 u.bias/0 v.weight/01")),
    Case("gates_along_and_across", lambda: Net(along_and_across, a=conv(3, 8), m=conv(8, 4, 1), h=conv(4, 8, 1), w=conv(4, 8, 1), o=conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 m.weight/1 h.weight/0 h.bias/0 w.weight/0 w.bias/0 o.weight/1", "4: m.weight/0 m.bias/0 h.weight/1 w.weight/1")),
    Case("gate_of_two_pools", lambda: Net(two_pools, a=conv(3, 8), m=nn.Linear(16, 8), o=conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 m.weight/0 m.weight/1 m.bias/0 o.weight/1",)),
    Case("gate_of_neighbours_pins", lambda: Net(neighbours, a=conv(3, 8), e=nn.Conv1d(1, 1, 3, padding=1), o=conv(8, 6), p=conv(6, 2)), image(), ("6: o.weight/0 o.bias/0 p.weight/1",), {"a.weight/0": "varies over the space of a convolution"}),
    Case("gate_of_a_maximum_over_channels_pins", lambda: Net(of_a_map, a=conv(3, 8), s=conv(2, 1), o=conv(8, 6), p=conv(6, 2)), image(), ("6: o.weight/0 o.bias/0 p.weight/1",), {"a.weight/0": "goes through aten.amax.default over its channels"}),
    Case("maximum_of_pairs_ties_them", lambda: Net(lambda n, x: n.o(n.a(x).unflatten(1, (4, 2)).amax(2)), a=conv(3, 8), o=conv(4, 2)), image(), ("4: a.weight/0 a.bias/0 o.weight/1",)),
    Case("sign_and_its_opposite", lambda: Net(lambda n, x: n.o(torch.cat([n.a(x), -n.a(x)], 1).relu()), a=conv(3, 4), o=conv(8, 2)), image(), ("4: a.weight/0 a.bias/0 o.weight/1",)),
)  # fmt: skip

EXPERTS8 = "8: a.weight/0 a.bias/0 r.weight/1 e0.weight/1 e1.weight/1"
EXPERTS6 = "6: e0.weight/0 e0.bias/0 e1.weight/0 e1.bias/0 o.weight/1"


def experts(route: Callable[[Tensor], Tensor]) -> Callable[[], Net]:
    """Every expert is computed, and weighed by what the router says."""

    def forward(n: Net, x: Tensor) -> Tensor:
        y = n.a(x)
        w = route(n.r(y))
        return n.o(w[..., :1] * n.e0(y) + w[..., 1:] * n.e1(y))

    return lambda: Net(
        forward, a=nn.Linear(12, 8), r=nn.Linear(8, 2), e0=nn.Linear(8, 6), e1=nn.Linear(8, 6), o=nn.Linear(6, 2)
    )


def best(scores: Tensor) -> Tensor:
    return torch.where(scores >= scores.topk(1, -1).values, scores, torch.full_like(scores, -1e9)).softmax(-1)


def scattered(scores: Tensor) -> Tensor:
    values, index = scores.topk(1, -1)
    return torch.zeros_like(scores).scatter(-1, index, values.sigmoid())


def stacked(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    h = torch.einsum("bnd,edf->bnef", y, n.u).relu()
    return n.o(torch.einsum("bnef,efd,bne->bnd", h, n.d, n.r(y).softmax(-1)))


def states(n: Net, x: Tensor) -> Tensor:
    """A selective scan, step by step."""
    u = n.a(x)
    step, b, c = F.softplus(n.t(u)), n.b(u), n.c(u)
    h, seen = x.new_zeros(x.shape[0], 8, 4), []
    for place in range(3):
        h = h * (-step[:, place, :, None] * n.s.exp()).exp() + (step * u)[:, place, :, None] * b[:, place, None]
        seen.append((h * c[:, place, None]).sum(-1))
    return n.o(torch.stack(seen, 1) + u[:, :3] * n.d)


MIXTURES = (
    Case("experts_all_used", experts(lambda scores: scores.softmax(-1)), tokens(), (EXPERTS8, EXPERTS6), {"r.weight/0": "goes through aten.softmax.int"}),
    Case("experts_by_the_best_score", experts(best), tokens(), (EXPERTS8, EXPERTS6), {"r.weight/0": "goes through aten.topk.default"}),
    Case("experts_by_scattered_scores", experts(scattered), tokens(), (EXPERTS8, EXPERTS6), {"r.weight/0": "goes through aten.topk.default"}),
    Case("experts_in_one_tensor", lambda: Net(stacked, a=nn.Linear(12, 8), r=nn.Linear(8, 3), u=weight(3, 8, 10), d=weight(3, 10, 6), o=nn.Linear(6, 2)), tokens(), ("8: a.weight/0 a.bias/0 r.weight/1 u/1", "10: u/2 d/1", "6: d/2 o.weight/1"), {"u/0": "size is fixed"}),
    Case("selective_scan", lambda: Net(states, a=nn.Linear(12, 8), t=nn.Linear(8, 8), s=weight(8, 4), b=nn.Linear(8, 4), c=nn.Linear(8, 4), d=weight(8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 t.weight/0 t.weight/1 t.bias/0 s/0 b.weight/1 c.weight/1 d/0 o.weight/1", "4: s/1 b.weight/0 b.bias/0 c.weight/0 c.bias/0")),
    Case("decay_summed_so_far", lambda: Net(lambda n, x: n.o((n.a(x) * n.g(x).sigmoid() * n.s).cumsum(1)), a=nn.Linear(12, 8), g=nn.Linear(12, 8), s=weight(8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 g.weight/0 g.bias/0 s/0 o.weight/1",)),
    Case("shift_by_one_token", lambda: Net(lambda n, x: n.o(n.a(x) * n.m + F.pad(n.a(x), (0, 0, 1, -1)) * (1 - n.m)), a=nn.Linear(12, 8), m=weight(8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 m/0 o.weight/1",)),
    Case("causal_depthwise_convolution", lambda: Net(lambda n, x: n.o(F.silu(n.c(n.a(x).mT)[..., :5].mT)), a=nn.Linear(12, 8), c=nn.Conv1d(8, 8, 3, padding=2, groups=8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 c.weight/0 c.bias/0 o.weight/1",)),
)  # fmt: skip


def by_hand(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    y = (y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-5)
    return n.o(n.g * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))


def channels_last(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    return n.o(y + (n.g * n.d(F.gelu(n.u(n.n(y.permute(0, 2, 3, 1)))))).permute(0, 3, 1, 2))


def response(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    size = y.norm(dim=(2, 3), keepdim=True)
    return n.o(y + y * n.g * size / (size.mean(1, keepdim=True) + 1e-6))


def dropped(n: Net, x: Tensor) -> Tensor:
    """A branch that training drops for some examples."""
    y = n.a(x)
    z = F.dropout2d(n.b(y), 0.3, n.training)
    return n.o(y + (z * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.5) if n.training else z))


SCALES = (
    Case("norms_by_hand", lambda: Net(by_hand, a=nn.Linear(12, 8), g=weight(8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 g/0 o.weight/1",), mixes=True),
    Case("sum_divided_by_a_size", lambda: Net(lambda n, x: n.o(n.a(x) / (n.a(x).square().sum(-1, keepdim=True) / n.a(x).shape[-1] + 1e-5).sqrt()), a=nn.Linear(12, 8), o=nn.Linear(8, 2)), tokens(), (A8,)),  # by the size of the dense model
    Case("channels_last_with_layer_scale", lambda: Net(channels_last, a=conv(3, 8), n=nn.LayerNorm(8), u=nn.Linear(8, 16), d=nn.Linear(16, 8), g=weight(8), o=conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 n.weight/0 n.bias/0 u.weight/1 d.weight/0 d.bias/0 g/0 o.weight/1", "16: u.weight/0 u.bias/0 d.weight/1"), mixes=True),
    Case("response_norm", lambda: Net(response, a=conv(3, 8), g=weight(8, 1, 1), o=conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 g/0 o.weight/1",), mixes=True),
    Case("cosine_classifier", lambda: Net(lambda n, x: n.s * F.linear(F.normalize(n.a(x)), F.normalize(n.w)), a=nn.Linear(5, 8), w=weight(4, 8), s=weight(1)), torch.randn(2, 5), ("8: a.weight/0 a.bias/0 w/1",)),
    Case("cosine_of_two_tensors", lambda: Net(lambda n, x: n.o(F.cosine_similarity(n.a(x), n.b(x), dim=-1)), a=nn.Linear(12, 8), b=nn.Linear(12, 8), o=nn.Linear(5, 2)), tokens(), ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0",)),
    Case("distance_to_a_codebook", lambda: Net(lambda n, x: n.o(F.embedding((n.a(x)[:, :, None] - n.c).square().sum(-1).argmin(-1), n.c)), a=nn.Linear(12, 8), c=weight(6, 8), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 c/1 o.weight/1",), {"c/0": "goes through aten.argmin.default"}),
    Case("branch_dropped_in_training", lambda: Net(dropped, a=conv(3, 8), b=conv(8, 8), o=conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 b.weight/0 b.weight/1 b.bias/0 o.weight/1",)),
    Case("local_response_over_channels_pins", lambda: Net(lambda n, x: n.p(n.o(n.n(n.a(x)))), a=conv(3, 8), n=nn.LocalResponseNorm(3), o=conv(8, 6), p=conv(6, 2)), image(), ("6: o.weight/0 o.bias/0 p.weight/1",), {"a.weight/0": "pooled or resampled"}),
)  # fmt: skip

CASES = WEIGHTS + LAYERS + GATES + MIXTURES + SCALES


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

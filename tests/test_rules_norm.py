"""Norms, reductions and operators that need a dimension whole; pooling; content that depends on no parameter."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

aten = torch.ops.aten
A8 = "8: a.weight/0 a.bias/0 o.weight/1"
VECTORS = "a.weight/0 a.bias/0 n.weight/0 n.bias/0 o.weight/1"


def normed(norm: Callable[[], nn.Module], width: int = 8) -> Callable[[], nn.Module]:
    """Convolution, norm, convolution."""
    return lambda: Net(lambda n, x: n.o(n.n(n.a(x))), a=conv(3, width), n=norm(), o=conv(width, 2))


def over_tokens(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda n, x: n.o(n.n(n.a(x))), a=nn.Linear(12, 8), n=norm(), o=nn.Linear(8, 2))


def applied(function: Callable[[Tensor], Tensor], outputs: int = 8, **options: int) -> Callable[[], nn.Module]:
    """Convolution, the function, convolution."""
    return lambda: Net(lambda n, x: n.o(function(n.a(x))), a=conv(3, 8), o=conv(outputs, 2), **options)


def gated(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A map made from all channels scales all channels; a head of its own can always be pruned."""
    return lambda: Net(lambda n, x: n.p(n.o(n.a(x) * function(n.a(x)))), a=conv(3, 8), o=conv(8, 6), p=conv(6, 2))


HEAD = "6: o.weight/0 o.bias/0 p.weight/1"

NORMS = (
    Case("batch_norm", normed(lambda: nn.BatchNorm2d(8)), image(), (f"8: {VECTORS} n.running_mean/0 n.running_var/0",)),
    Case("batch_norm_of_vectors", over_tokens(lambda: nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(8, affine=False))), tokens(), ("8: a.weight/0 a.bias/0 n.1.running_mean/0 n.1.running_var/0 o.weight/1",)),
    Case("batch_norm_without_statistics", normed(lambda: nn.BatchNorm2d(8, track_running_stats=False)), image(), (f"8: {VECTORS}",), mixes=True),
    Case(
        "batch_norm_by_its_inner_name",
        lambda: Net(lambda n, x: n.o(aten._native_batch_norm_legit_no_training.default(n.a(x), n.g, n.b, n.m, n.v, 0.1, 1e-5)[0]), a=conv(3, 8), g=weight(8), b=weight(8), m=torch.zeros(8), v=torch.ones(8), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 g/0 b/0 m/0 v/0 o.weight/1",),
    ),
    Case("instance_norm", normed(lambda: nn.InstanceNorm2d(8)), image(), (A8,)),
    Case("instance_norm_with_all", normed(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), image(), (f"8: {VECTORS} n.running_mean/0 n.running_var/0",)),
    Case("layer_norm", over_tokens(lambda: nn.LayerNorm(8)), tokens(), (f"8: {VECTORS}",), mixes=True),
    Case("layer_norm_without_affine", over_tokens(lambda: nn.LayerNorm(8, elementwise_affine=False)), tokens(), (A8,), mixes=True),
    Case("layer_norm_of_an_image", normed(lambda: nn.LayerNorm([8, 6, 6])), image(), (f"8: {VECTORS}",), {"n.weight/1": ""}, mixes=True),
    Case("rms_norm", over_tokens(lambda: nn.RMSNorm(8)), tokens(), ("8: a.weight/0 a.bias/0 n.weight/0 o.weight/1",), mixes=True),
    Case("group_norm", normed(lambda: nn.GroupNorm(2, 8)), image(), (f"8: {VECTORS}",), mixes=True),
    Case("group_norm_of_one_group", normed(lambda: nn.GroupNorm(1, 8)), image(), (f"8: {VECTORS}",), mixes=True),
    Case("group_norm_of_one_channel_each", normed(lambda: nn.GroupNorm(8, 8)), image(), (f"8: {VECTORS}",), mixes=True),
    Case("group_norm_of_many_groups_goes_by_groups", normed(lambda: nn.GroupNorm(6, 12), 12), image(), (f"6: {VECTORS}",), mixes=True),
    Case(
        "group_norm_after_cat",
        lambda: Net(lambda n, x: n.o(n.n(torch.cat([n.a(x), n.b(x)], 1))), a=conv(3, 8), b=conv(3, 4), n=nn.GroupNorm(3, 12), o=conv(12, 2)),
        image(),
        (f"12: {VECTORS} b.weight/0 b.bias/0",),
        mixes=True,
    ),
    Case(
        "group_norm_that_crosses_a_cat",
        lambda: Net(lambda n, x: n.o(n.n(torch.cat([n.a(x), n.b(x)], 1))), a=conv(3, 8), b=conv(3, 4), n=nn.GroupNorm(2, 12), o=conv(12, 2)),
        image(),
        (f"12: {VECTORS} b.weight/0 b.bias/0",),
        mixes=True,
    ),
    Case(
        "weight_standardised",
        lambda: Net(
            lambda n, x: n.o(F.conv2d(n.a(x), (n.w - n.w.mean((1, 2, 3), keepdim=True)) / n.w.std((1, 2, 3), keepdim=True), padding=1)), a=conv(3, 8), w=weight(6, 8, 3, 3), o=conv(6, 2)
        ),
        image(),
        ("8: a.weight/0 a.bias/0 w/1", "6: w/0 o.weight/1"),
        mixes=True,
    ),
    Case(
        "weight_standardised_flat",
        lambda: Net(
            lambda n, x: n.o(F.conv2d(n.a(x), F.normalize(n.w.flatten(1)).view_as(n.w), padding=1)), a=conv(3, 8), w=weight(6, 8, 3, 3), o=conv(6, 2)
        ),
        image(),
        ("8: a.weight/0 a.bias/0 w/1", "6: w/0 o.weight/1"),
        mixes=True,
    ),
    Case(
        "weight_norm",
        lambda: nn.Sequential(weight_norm(conv(3, 8)), weight_norm(conv(8, 2))),
        image(),
        ("8: 0.parametrizations.weight.original0/0 0.parametrizations.weight.original1/0 0.bias/0 1.parametrizations.weight.original1/1",),
        mixes=True,
    ),
    Case(
        "weight_norm_of_the_old_kind",
        lambda: nn.Sequential(nn.utils.weight_norm(conv(3, 8)), nn.utils.weight_norm(conv(8, 2))),
        image(),
        ("8: 0.weight_g/0 0.weight_v/0 0.bias/0 1.weight_v/1",),
        mixes=True,
    ),
    Case(
        "spectral_norm",
        lambda: nn.Sequential(spectral_norm(nn.Linear(12, 8)), spectral_norm(nn.Linear(8, 2))),
        tokens(),
        (f"8: {' '.join(f'0.parametrizations.weight.{name}/0' for name in ('original', '0._u'))} 0.bias/0 {' '.join(f'1.parametrizations.weight.{name}' for name in ('original/1', '0._v/0'))}",),
        mixes=True,
    ),
    Case(
        "orthogonal_weight_pins",
        lambda: Net(lambda n, x: n.o(n.b(n.a(x))), a=orthogonal(nn.Linear(12, 8)), b=nn.Linear(8, 6), o=nn.Linear(6, 2)),
        tokens(),
        ("6: b.weight/0 b.bias/0 o.weight/1",),
        {"a.parametrizations.weight.original/0": "", "b.weight/1": ""},
    ),
    Case(
        "weight_standardised_by_batch_norm",
        lambda: Net(
            lambda n, x: n.o(F.conv2d(n.a(x), F.batch_norm(n.w.reshape(1, 6, -1), None, None, training=True).reshape_as(n.w), padding=1)), a=conv(3, 8), w=weight(6, 8, 3, 3), o=conv(6, 2)
        ),
        image(),
        ("8: a.weight/0 a.bias/0 w/1", "6: w/0 o.weight/1"),
        mixes=True,
    ),
    Case(
        "grouped_weight_standardised",
        lambda: Net(
            lambda n, x: n.o(F.conv2d(n.a(x), (n.w - n.w.mean((1, 2, 3), keepdim=True)) / n.w.std((1, 2, 3), keepdim=True), padding=1, groups=2)), a=conv(3, 8), w=weight(8, 4, 3, 3), o=conv(8, 2)
        ),
        image(),
        ("8: a.weight/0 a.bias/0 w/01", "8: w/0 o.weight/1"),
        mixes=True,
    ),
    Case(
        "depthwise_weight_standardised",
        lambda: Net(
            lambda n, x: n.o(F.conv2d(n.a(x), n.w / n.w.flatten(1).norm(dim=1).view(8, 1, 1, 1), padding=1, groups=8)), a=conv(3, 8), w=weight(8, 1, 3, 3), o=conv(8, 2)
        ),
        image(),
        ("8: a.weight/0 a.bias/0 w/0 o.weight/1",),
        mixes=True,  # nothing divided by nothing
    ),
)  # fmt: skip


def every_sum(x: Tensor) -> Tensor:
    one = (
        x.sum()
        + x.mean()
        + x.norm()
        + aten.linalg_vector_norm.default(x)
        + aten.count_nonzero.dim_IntList(x, [0, 1])[0, 0]
    )
    maps = (
        x.sum(1)
        + x.mean(1)
        + x.norm(dim=1)
        + x.std(1, correction=1)
        + x.var(1, correction=0)
        + aten.frobenius_norm.dim(x, [1])
    )
    maps = (
        maps
        + aten.var.dim(x, [1], True)
        + aten.std.dim(x, [1], True)
        + sum(torch.var_mean(x, 1, correction=1))
        + sum(torch.std_mean(x, 1, correction=1))
    )
    return x + one + maps.unsqueeze(1) + aten.norm.ScalarOpt_dim(x, 2, [1], True)


def every_whole(x: Tensor) -> Tensor:
    y = x.softmax(2) + x.log_softmax(3) + aten._softmax.default(x, 2, False) + aten._log_softmax.default(x, 3, False)
    return y + x.cumsum(2) + x.cumprod(3) + x.sort(2).values + F.pad(x.topk(3, 2).values, (0, 0, 0, 3))


def every_choice_over_space(x: Tensor) -> Tensor:
    y = x.amax((2, 3)) + x.amin((2, 3)) + x.max(3).values.min(2).values + x.logsumexp((2, 3)) + x.prod(3).prod(2)
    y = y + x.argmax(3).sum(2) + x.argmin(3).sum(2) + (x > 0).any(3).sum(2) + (x > 0).all(3).sum(2)
    return x + y[:, :, None, None]


def every_planar_pool(x: Tensor) -> Tensor:
    size = x.shape[2:]
    y = F.max_pool2d(x, 3, 1, 1) + F.avg_pool2d(x, 3, 1, 1) + F.adaptive_avg_pool2d(x, 6) + F.adaptive_max_pool2d(x, 6)
    y = (
        y
        + F.max_pool2d(x, 3, 1, 1, return_indices=True)[0]
        + F.interpolate(x, size)
        + F.interpolate(x, size, mode="nearest-exact")
    )
    y = y + F.interpolate(x, size, mode="bilinear") + F.interpolate(x, size, mode="bicubic")
    y = (
        y
        + F.interpolate(x, size, mode="bilinear", antialias=True)
        + F.interpolate(x, size, mode="bicubic", antialias=True)
    )
    y = y + aten.upsample_nearest2d.default(x, size) + aten._upsample_nearest_exact2d.default(x, size)
    y = y + aten.upsample_bilinear2d.default(x, size, False) + aten.upsample_bicubic2d.default(x, size, False)
    y = y + aten._upsample_bilinear2d_aa.default(x, size, False) + aten._upsample_bicubic2d_aa.default(x, size, False)
    y = (
        y
        + aten.reflection_pad2d.default(x, [1] * 4)[..., 1:-1, 1:-1]
        + aten.replication_pad2d.default(x, [1] * 4)[..., 1:-1, 1:-1]
    )
    return y + x.tril() + x.triu()


def sampled(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.o(aten.grid_sampler_2d.default(y, x.permute(0, 2, 3, 1)[..., :2].tanh(), 0, 0, False))


def every_linear_pool(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    size = flat.shape[2:]
    y = (
        F.max_pool1d(flat, 3, 1, 1)
        + F.avg_pool1d(flat, 3, 1, 1)
        + F.adaptive_avg_pool1d(flat, 36)
        + F.adaptive_max_pool1d(flat, 36)
    )
    y = y + F.interpolate(flat, size) + F.interpolate(flat, size, mode="linear")
    y = y + aten.upsample_nearest1d.default(flat, size) + aten.upsample_linear1d.default(flat, size, False)
    y = (
        y
        + aten.reflection_pad1d.default(flat, [1, 1])[..., 1:-1]
        + aten.replication_pad1d.default(flat, [1, 1])[..., 1:-1]
    )
    return y.view(x.shape)


def every_volume_pool(x: Tensor) -> Tensor:
    deep = x.unflatten(2, (2, 3))
    size = deep.shape[2:]
    y = (
        F.max_pool3d(deep, (1, 3, 3), 1, (0, 1, 1))
        + F.avg_pool3d(deep, (1, 3, 3), 1, (0, 1, 1))
        + F.adaptive_avg_pool3d(deep, size)
        + F.adaptive_max_pool3d(deep, size)
    )
    y = y + F.interpolate(deep, size) + F.interpolate(deep, size, mode="trilinear")
    y = y + aten.upsample_nearest3d.default(deep, size) + aten.upsample_trilinear3d.default(deep, size, False)
    y = y + aten.reflection_pad3d.default(deep, [1] * 6)[..., 1:-1, 1:-1, 1:-1]
    y = y + aten.replication_pad3d.default(deep, [1] * 6)[..., 1:-1, 1:-1, 1:-1]
    return y.flatten(2, 3)


def every_content(x: Tensor) -> Tensor:
    y = (
        torch.arange(6.0)
        + torch.arange(1, 7)
        + torch.arange(1, 13, 2)
        + torch.linspace(0, 1, 6)
        + torch.scalar_tensor(2.0)
    )
    y = y + torch.eye(6) + torch.eye(6, 6)
    lower, upper = torch.tril_indices(6, 6)[:, :6].float(), torch.triu_indices(6, 6)[:, :6].float()
    return x + y + lower[0] + upper[1]


REDUCTIONS = (
    Case("every_sum", gated(every_sum), image(), ("8: a.weight/0 a.bias/0 o.weight/1", HEAD), mixes=True),
    Case("every_whole_over_space", applied(every_whole), image(), (A8,)),
    Case("every_choice_over_space", applied(every_choice_over_space), image(), (A8,)),
    Case("every_planar_pool", applied(every_planar_pool), image(), (A8,)),
    Case("every_linear_pool", applied(every_linear_pool), image(), (A8,)),
    Case("every_volume_pool", applied(every_volume_pool), image(), (A8,)),
    Case("every_content", applied(every_content), image(), (A8,)),
    Case(
        "sampled_at_places_that_depend_on_the_input",
        lambda: Net(sampled, a=conv(3, 8), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "noise",
        lambda: Net(
            lambda n, x: n.o(n.a(x) + torch.rand(x.shape[0], 1, 6, 6) + torch.randn(6, 6) + torch.randint(9, (6, 6)) + torch.randint(2, 9, (6, 6))), a=conv(3, 8), o=conv(8, 2)
        ),
        image(),
        (A8,),
        mixes=True,  # it is never the same
    ),
    Case(
        "fractional_pooling_pins",
        lambda: Net(lambda n, x: n.p(n.o(F.fractional_max_pool2d(n.a(x), 2, (6, 6)))), a=conv(3, 8, 1), o=conv(8, 6), p=conv(6, 2)),
        torch.randn(2, 3, 9, 9),
        (HEAD,),
        {"a.weight/0": "drawn for each channel"},
        mixes=True,  # it is never the same
    ),
    Case(
        "fractional_pooling_of_volumes_pins",
        lambda: Net(lambda n, x: n.p(n.o(F.fractional_max_pool3d(n.a(x), 2, (3, 3, 3)))), a=nn.Conv3d(3, 8, 1), o=nn.Conv3d(8, 6, 1), p=nn.Conv3d(6, 2, 1)),
        torch.randn(2, 3, 5, 5, 5),
        ("6: o.weight/0 o.bias/0 p.weight/1",),
        {"a.weight/0": "drawn for each channel"},
        mixes=True,  # it is never the same
    ),
    Case("local_response_norm_pins", lambda: Net(lambda n, x: n.p(n.o(n.n(n.a(x)))), a=conv(3, 8), n=nn.LocalResponseNorm(3), o=conv(8, 6), p=conv(6, 2)), image(), (HEAD,), {"a.weight/0": "pooled or resampled"}),
    Case("maximum_of_all_pins", gated(lambda x: x.max() - x.min()), image(), (HEAD,), {"a.weight/0": "goes through aten.m"}),
    Case("mean_over_channels", applied(lambda x: x - x.mean(1, keepdim=True)), image(), (A8,), mixes=True),
    Case("softmax_over_channels_pins", gated(lambda x: x.softmax(1)), image(), (HEAD,), {"a.weight/0": "goes through aten.softmax.int over its channels (softmax)"}),
    Case("log_softmax_over_channels_pins", gated(lambda x: x.log_softmax(1)), image(), (HEAD,), {"a.weight/0": "goes through aten.log_softmax.int over its channels"}),
    Case("maximum_over_channels_pins", gated(lambda x: x.amax(1, keepdim=True)), image(), (HEAD,), {"a.weight/0": "goes through aten.amax.default over its channels"}),
    Case("argmax_over_channels_pins", gated(lambda x: x.argmax(1, keepdim=True) / 8), image(), (HEAD,), {"a.weight/0": "goes through aten.argmax.default"}),
    Case("product_over_channels_pins", gated(lambda x: x.prod(1, keepdim=True)), image(), (HEAD,), {"a.weight/0": "goes through aten.prod.dim_int"}),
    Case("cumsum_over_channels_pins", gated(lambda x: x.cumsum(1)), image(), (HEAD,), {"a.weight/0": "goes through aten.cumsum.default over its channels"}),
    Case("sort_over_channels_pins", gated(lambda x: x.sort(1).values), image(), (HEAD,), {"a.weight/0": "goes through aten.sort.default over its channels"}),
    Case("pooling_over_channels_pins", gated(lambda x: F.avg_pool3d(x[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0]), image(), (HEAD,), {"a.weight/0": "pooled or resampled"}),
    Case("norm_of_order_minus_infinity_pins", gated(lambda x: x.norm(p=float("-inf"), dim=1, keepdim=True)), image(), (HEAD,), {"a.weight/0": ""}),
    Case(
        "mean_over_rows_of_a_joint_plane",
        lambda: Net(lambda n, x: n.o(n.a(x).unflatten(2, (4, 3)).mean(3)), a=nn.Linear(12, 12), o=nn.Linear(4, 2)),
        tokens(),
        ("4: a.weight/0 a.bias/0 o.weight/1",),
        mixes=True,
    ),
)  # fmt: skip

CASES = NORMS + REDUCTIONS


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

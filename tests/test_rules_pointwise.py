"""Elementwise operators: what meets is one; parameters broadcast; constants, casts and in-place forms."""

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

aten = torch.ops.aten
A8 = "8: a.weight/0 a.bias/0 o.weight/1"
AB8 = "8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 o.weight/1"


def every_pass(net: Net, x: Tensor) -> Tensor:
    """All operators of one tensor that leave it as it is, or take its shape only."""
    y = net.a(x)
    y = F.dropout(y, 0.5, False).contiguous().clone().detach().requires_grad_(False)
    y = F.alpha_dropout(F.dropout2d(y, 0.5, False), 0.5, False)
    y = F.feature_alpha_dropout(aten.dropout_.default(y, 0.5, False), 0.5, False)
    y = aten.alias.default(aten.lift_fresh_copy.default(aten.detach_.default(y)))
    y = y + torch.zeros_like(y) + torch.ones_like(y) + torch.full_like(y, 2.0) + torch.empty_like(y).fill_(1.0).zero_()
    return net.o(y + aten.fill_.Tensor(torch.zeros_like(y), torch.tensor(1.0)))


def every_cast(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y = y.to(torch.float32).to(y.device).to(y).type_as(x).to(memory_format=torch.contiguous_format)
    return net.o(aten._to_copy.default(y, dtype=torch.float32))


def every_in_place(net: Net, x: Tensor) -> Tensor:
    y, z = net.a(x), net.b(x)
    y.add_(z).sub_(z).mul_(z).div_(z + 30.0).relu_().clamp_(-1.0, 1.0)
    F.relu6(F.hardswish(y, inplace=True), inplace=True)
    y.masked_fill_(z > 9.0, 0.0).masked_fill_(z > 9.0, torch.tensor(0.0))
    return net.o(y)


def every_pair(net: Net, x: Tensor) -> Tensor:
    y, z = net.a(x), net.b(x)
    y = y + z - z * z / (z.abs() + 3.0)
    y = torch.subtract(torch.multiply(y, z), z)
    y = torch.subtract(torch.multiply(y, 2.0), 1.0).negative()
    y = aten.multiply.Scalar(aten.subtract.Scalar(y, 1.0), 2.0)
    y = y.masked_fill(aten.__or__.Tensor(z > 0, aten.__and__.Tensor(y > 0, z > 0)), 0.0).masked_fill(
        z > 1, torch.tensor(0.0)
    )
    return net.o(F.hardswish(F.relu6(y)) + torch.floor_divide(y, z.abs() + 3.0))


def every_other_name(net: Net, x: Tensor) -> Tensor:
    """In-place forms and aliases that PyTorch does not tag as pointwise."""
    y, z = net.a(x), net.b(x)
    y = F.threshold(F.mish(y.clone().abs_(), inplace=True), 0.1, 0.2, inplace=True).negative_()
    y = aten.subtract_.Scalar(aten.multiply_.Scalar(y.multiply_(z), 2.0).subtract_(z), 1.0)
    y = aten.gelu_.default(y).true_divide_(z.abs() + 3.0)
    y = torch.divide(aten.divide.Scalar(y, 2.0), aten.absolute.default(z) + 3.0)
    y = y + torch.divide(y, z.abs() + 3.0, rounding_mode="floor")
    y = y + torch.arctan2(y, z) + torch.special.expit(y) + torch.special.erf(z)
    over = aten.greater.Tensor(y, z) | aten.greater_equal.Tensor(y, z) | aten.greater.Scalar(y, 9.0)
    under = aten.less.Tensor(y, z) & aten.less_equal.Tensor(y, z) & aten.less.Scalar(y, 9.0)
    others = aten.not_equal.Tensor(y, z) & aten.not_equal.Scalar(y, 0.0) & aten.less_equal.Scalar(y, 9.0)
    return net.o(y.where(over | under & others | aten.greater_equal.Scalar(y, 9.0), z))


def added_into_a_slice(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y[:, :4] += net.b(x)
    return net.o(y)


def scaled_through_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).clone()
    y.view(-1, 2, 4, 6, 6).mul_(net.g)
    return net.o(y)


def copied(net: Net, x: Tensor) -> Tensor:
    return net.o(torch.zeros_like(net.b(x)).copy_(net.a(x)))


CASES = (
    Case("every_pass", lambda: Net(every_pass, a=conv(3, 8), o=conv(8, 2)), image(), (A8,), mixes=True),
    Case("every_cast", lambda: Net(every_cast, a=conv(3, 8), o=conv(8, 2)), image(), (A8,)),
    Case("every_in_place", lambda: Net(every_in_place, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)), image(), (AB8,)),
    Case("every_other_name", lambda: Net(every_other_name, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)), image(), (AB8,)),
    Case("every_pair", lambda: Net(every_pair, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)), image(), (AB8,)),
    Case(
        "tagged_by_pytorch",
        lambda: Net(lambda n, x: n.o(torch.where(n.a(x) > n.b(x), torch.lerp(n.a(x), n.b(x), 0.3), F.gelu(torch.maximum(n.a(x), n.b(x))))), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)),
        image(),
        (AB8,),
    ),
    Case(
        "where_with_numbers",
        lambda: Net(
            lambda n, x: n.o(torch.where(n.a(x) > 0, n.a(x), 0.5) + torch.where(n.a(x) > 0, 2.0, n.a(x)) * torch.where(n.a(x) > 1, 2.0, 3.0)),
            a=conv(3, 8),
            o=conv(8, 2),
        ),
        image(),
        (A8,),
    ),
    Case("copy_into_a_tensor", lambda: Net(copied, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)), image(), (AB8,)),
    Case(
        "add_into_a_slice",
        lambda: Net(added_into_a_slice, a=conv(3, 8), b=conv(3, 4), o=conv(8, 2)),
        image(),
        ("4: a.weight/0*4 a.bias/0*4 b.weight/0 b.bias/0 o.weight/1*4", "4: a.weight/0*4 a.bias/0*4 o.weight/1*4"),
    ),
    Case(
        "scale_through_a_view",
        lambda: Net(scaled_through_a_view, a=conv(3, 8), g=weight(2, 1, 1, 1), o=conv(8, 2)),
        image(),
        ("2: g/0 a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "parameters_of_shape_c11",
        lambda: Net(lambda n, x: n.o(n.a(x) * n.g + n.b), a=conv(3, 8), g=weight(8, 1, 1), b=weight(1, 8, 1, 1), o=conv(8, 2)),
        image(),
        ("8: g/0 b/1 a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "residual",
        lambda: Net(lambda n, x: n.o(n.a(x) + n.b(n.a(x).relu())), a=conv(3, 8), b=conv(8, 8), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.weight/1 b.bias/0 o.weight/1",),
    ),
    Case(
        "residual_from_the_input_pins",
        lambda: Net(lambda n, x: n.o(n.a(x) + x), a=conv(3, 3), o=conv(3, 2)),
        image(),
        (),
        {"a.weight/0": "meets a tensor whose size is fixed", "a.bias/0": "meets a tensor whose size is fixed"},
    ),
    Case(
        "constant_buffer_of_channel_size",
        lambda: Net(lambda n, x: n.o(n.a(x) * n.c), a=conv(3, 8), c=torch.rand(8, 1, 1), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 c/0 o.weight/1",),
    ),
    Case(
        "constant_made_in_forward_pins",
        lambda: Net(lambda n, x: n.o(n.a(x) * torch.arange(8.0).view(8, 1, 1)), a=conv(3, 8), o=conv(8, 2)),
        image(),
        (),
        {"a.weight/0": "meets a tensor whose size is fixed (mul)"},
    ),
    Case(
        "integer_constant_pins",
        lambda: Net(lambda n, x: n.o(n.a(x) * n.c), a=conv(3, 8), c=torch.arange(8).view(8, 1, 1), o=conv(8, 2)),
        image(),
        (),
        {"a.weight/0": "meets a tensor whose size is fixed (mul)"},
    ),
    Case("prelu", lambda: Net(lambda n, x: n.o(n.p(n.a(x))), a=conv(3, 8), p=nn.PReLU(8), o=conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 p.weight/0 o.weight/1",)),
    Case("prelu_of_one_slope", lambda: Net(lambda n, x: n.o(n.p(n.a(x))), a=conv(3, 8), p=nn.PReLU(), o=conv(8, 2)), image(), (A8,)),
    Case("prelu_of_vectors", lambda: Net(lambda n, x: n.o(n.p(n.a(x))), a=nn.Linear(5, 8), p=nn.PReLU(8), o=nn.Linear(8, 2)), torch.randn(2, 5), ("8: a.weight/0 a.bias/0 p.weight/0 o.weight/1",)),
    Case("log_sigmoid", lambda: nn.Sequential(conv(3, 8), nn.LogSigmoid(), conv(8, 2)), image(), ("8: 0.weight/0 0.bias/0 2.weight/1",)),
    Case("glu", lambda: Net(lambda n, x: n.o(F.glu(n.a(x), 1)), a=conv(3, 8), o=conv(4, 2)), image(), ("4: a.weight/0 a.bias/0 o.weight/1",)),
    Case("glu_of_two_channels_pins", lambda: Net(lambda n, x: n.o(F.glu(n.a(x), 1)), a=conv(3, 2), o=conv(1, 2)), image(), (), {"a.weight/0": "is taken alone"}),
    Case("glu_of_a_glu_pins_what_is_left_of_it", lambda: Net(lambda n, x: n.o(F.glu(F.glu(n.a(x), 1), 1)), a=conv(3, 4), o=conv(1, 2)), image(), (), {"a.weight/0": "is taken alone"}),
    Case("glu_over_tokens", lambda: Net(lambda n, x: n.o(F.glu(n.a(x))), a=nn.Linear(12, 16), o=nn.Linear(8, 2)), tokens(), ("8: a.weight/0 a.bias/0 o.weight/1",)),
    Case(
        "gate_for_each_channel",
        lambda: Net(lambda n, x: n.o(n.a(x) * n.b(n.a(x).mean((2, 3))).sigmoid()[:, :, None, None]), a=conv(3, 8), b=nn.Linear(8, 8), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.weight/1 b.bias/0 o.weight/1",),
    ),
    Case(
        "row_table_meets_a_joint_plane",
        lambda: Net(lambda n, x: n.o((n.a(x).unflatten(2, (4, 3)) * n.g).flatten(2)), a=nn.Linear(12, 12), g=weight(4, 1), o=nn.Linear(12, 2)),
        tokens(),
        ("4: g/0 a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "column_table_meets_a_joint_plane",
        lambda: Net(lambda n, x: n.o((n.a(x).unflatten(2, (4, 3)) * n.g).flatten(2)), a=nn.Linear(12, 12), g=weight(3), o=nn.Linear(12, 2)),
        tokens(),
        ("3: g/0 a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "unknown_operator_pins_and_is_named",
        lambda: Net(lambda n, x: n.p(n.o(n.a(x).cummax(1).values)), a=conv(3, 8), o=conv(8, 6), p=conv(6, 2)),
        image(),
        ("6: o.weight/0 o.bias/0 p.weight/1",),
        {"a.weight/0": "goes into aten.cummax.default, an operator without a rule (cummax)"},
    ),
)  # fmt: skip


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)

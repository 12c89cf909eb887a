"""False rules are caught: an entry of the tables is falsified for analysis and proof alike, and the plan does not pass."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image, tokens, weight
from test_rules_contraction import Attention
from test_verify import caught
from torch import Tensor, nn

import speedup.analysis
import speedup.masked
from graphprune.criteria import CRITERIA
from graphprune.dependency import find_dependencies
from graphprune.evidence import Evidence
from graphprune.select import select
from speedup.analysis import analyse
from speedup.capture import capture
from speedup.errors import PlanError
from speedup.flow import Flow
from speedup.labels import Labels, settle
from speedup.planning import make_plan
from speedup.proof import verify
from speedup.rules import Call, Rule, pointwise, rule_for
from speedup.rules.indexing import cat as cat_rule
from speedup.rules.indexing import split as split_rule

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


def unary(which: int) -> Callable[[Flow, Call], Labels]:
    """The labels of one operand pass, the others are forgotten."""
    return lambda flow, call: flow.meet([call.tensors()[which]], call.shape)


def unmoved(flow: Flow, call: Call) -> Labels:
    x = call.tensors()[0]
    assert x.shape == call.shape
    return x


def turned(rule: Callable[[Flow, Call], Any], dim: int) -> Callable[[Flow, Call], Labels]:
    """The right labels in the wrong order."""

    def flow_turned(flow: Flow, call: Call) -> Labels:
        right = rule(flow, call)
        return Labels(right.shape, tuple(settle(plane.flip(dim)) for plane in right.planes))

    return flow_turned


def cat_swapped(flow: Flow, call: Call) -> Labels:
    return cat_rule(flow, replace(call, values={**call.values, "tensors": list(reversed(call["tensors"]))}))


def split_swapped(flow: Flow, call: Call) -> list[Labels]:
    return list(reversed(split_rule(flow, call)))


def linear_that_keeps_its_input(flow: Flow, call: Call) -> Labels:
    return call["input"]


def linear_without_a_sum(flow: Flow, call: Call) -> Labels:
    """Forgets that the inputs of the weight are those of x."""
    plane = next(plane for plane in call["weight"].planes if plane.stride()[0])
    return Labels(call.shape, (plane[:, 0].expand(call.shape),))


def without_bias(flow: Flow, call: Call) -> Labels:
    rule = rule_for(call.node.target)
    assert rule is not None
    return rule.flow(flow, replace(call, values={**call.values, "bias": None}))  # type: ignore[return-value]  # one output


def without_blocks(flow: Flow, call: Call) -> Any:
    rule = rule_for(call.node.target)
    assert rule is not None
    result = rule.flow(flow, call)
    flow.blocks = [block for block in flow.blocks if block.node != flow.node]
    flow.merges.clear()
    return result


def without_pins(flow: Flow, call: Call) -> Any:
    rule = rule_for(call.node.target)
    assert rule is not None
    result = rule.flow(flow, call)
    flow.pins = [(pin, atoms) for pin, atoms in flow.pins if pin.node != flow.node]
    return result


def without_ties(flow: Flow, call: Call) -> Any:
    rule = rule_for(call.node.target)
    assert rule is not None
    count = len(flow.pairs)
    result = rule.flow(flow, call)
    del flow.pairs[count:]
    return result


def one_channel_off(flow: Flow, call: Call) -> Labels:
    x = call["self"]
    return (
        Labels(call.shape, tuple(plane.roll(1, 1).contiguous().expand(plane.shape)[:, 1:6] for plane in x.planes))
        if call["dim"] == 1
        else unmoved(flow, call)
    )


def gated(function: Callable[[Tensor], Tensor]) -> Callable[[], Net]:
    return lambda: Net(lambda n, x: n.o(n.a(x) * function(n.a(x))), a=conv(3, 8), o=conv(8, 2))


def chain(function: Callable[[Net, Tensor], Tensor], width: int = 8, **parts: Any) -> Callable[[], Net]:
    return lambda: Net(lambda n, x: n.o(function(n, n.a(x))), a=conv(3, 8), o=conv(width, 2), **parts)


def pair() -> Net:
    return Net(lambda n, x: n.o(n.a(x) + n.b(x)), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2))


def squares() -> Net:
    return Net(
        lambda n, x: n.o((n.a(x).mT @ n.b(x)).transpose(1, 2)),
        a=nn.Linear(12, 8),
        b=nn.Linear(12, 8),
        o=nn.Linear(8, 2),
    )


def residual_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def joined() -> Net:
    return Net(lambda n, x: n.o(torch.cat([n.a(x), n.b(x)], 1)), a=conv(3, 4), b=conv(3, 4), o=conv(8, 2))


def halves() -> Net:
    return Net(
        lambda n, x: n.o(n.a(x).chunk(2, 1)[0]) + n.p(n.a(x).chunk(2, 1)[1]), a=conv(3, 8), o=conv(4, 2), p=conv(4, 2)
    )


def with_batch_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 2))


SHUFFLED = chain(lambda n, y: n.g(y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)), g=conv(8, 8, groups=2))

FALSE_RULES: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Mapping[Any, Rule]]] = {
    "add takes the first operand only": (pair, image, {aten.add.Tensor: Rule("add", unary(0))}),
    "add takes the second operand only": (pair, image, {aten.add.Tensor: Rule("add", unary(1))}),
    "mul takes the first operand only": (
        chain(lambda n, y: y * n.b(y), b=conv(8, 8)), image, {aten.mul.Tensor: Rule("mul", unary(0))},
    ),
    "softmax over channels is elementwise": (gated(lambda y: y.softmax(1)), image, {aten.softmax.int: pointwise.TAGGED}),
    "log_softmax over channels is elementwise": (gated(lambda y: y.log_softmax(1)), image, {aten.log_softmax.int: pointwise.TAGGED}),
    "cumprod over channels is elementwise": (gated(lambda y: y.cumprod(1)), image, {aten.cumprod.default: pointwise.TAGGED}),
    "sort over channels is elementwise": (gated(lambda y: y.sort(1).values), image, {aten.sort.default: Rule("x", lambda f, c: [c["self"]] * 2)}),
    "a transform over channels is elementwise": (gated(lambda y: torch.fft.fft(y, dim=1).real), image, {aten.fft_fft.default: pointwise.TAGGED, aten.view_as_real.default: rule_for(aten.view_as_real.default)}),
    "the minimum over channels is a sum": (gated(lambda y: y.amin(1, keepdim=True)), image, {aten.amin.default: rule_for(aten.sum.dim_IntList)}),
    "the product over channels is a sum": (gated(lambda y: y.prod(1, keepdim=True)), image, {aten.prod.dim_int: rule_for(aten.sum.dim_IntList)}),
    "cat swaps its operands": (joined, image, {aten.cat.default: Rule("concat", cat_swapped, moves=True)}),
    "cat forgets to pin what is fixed": (
        lambda: Net(lambda n, x: n.o(torch.cat([x, n.a(x)], 1)), a=conv(3, 8), o=conv(11, 2)), image,
        {aten.cat.default: Rule("concat", without_pins, moves=True)},
    ),
    "cat forgets to unite what runs beside": (
        lambda: Net(lambda n, x: n.o(torch.cat([n.a(x), n.b(x)], 2)), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)), image,
        {aten.cat.default: Rule("concat", without_ties, moves=True)},
    ),
    "stack forgets to unite": (
        lambda: Net(lambda n, x: n.o(torch.stack([n.a(x), n.b(x)]).sum(0)), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)), image,
        {aten.stack.default: Rule("concat", without_ties, moves=True)},
    ),
    "chunk swaps its parts": (halves, image, {aten.chunk.default: Rule("split", split_swapped, moves=True)}),
    "transpose forgets to move the labels": (squares, tokens, {aten.transpose.int: Rule("permute", unmoved, moves=True)}),
    "roll forgets to move the labels": (
        chain(lambda n, y: y + y.roll(1, 1)), image, {aten.roll.default: Rule("permute", unmoved, moves=True)},
    ),
    "flip forgets to move the labels": (chain(lambda n, y: y.flip(1)), image, {aten.flip.default: Rule("permute", unmoved, moves=True)}),
    "slice is off by one": (chain(lambda n, y: y[:, 1:6], 5), image, {aten.slice.Tensor: Rule("slice", one_channel_off, moves=True)}),
    "batch norm forgets its vectors": (with_batch_norm, image, {aten.batch_norm.default: Rule("norm", unary(0))}),
    "layer norm forgets its vectors": (
        lambda: nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 2)), tokens, {aten.layer_norm.default: Rule("norm", unary(0))},
    ),
    "prelu forgets its slopes": (chain(lambda n, y: n.p(y), p=nn.PReLU(8)), image, {aten.prelu.default: Rule("x", unary(0))}),
    "glu forgets to tie its halves": (chain(lambda n, y: F.glu(y, 1), 4), image, {aten.glu.default: Rule("x", without_ties)}),
    "linear keeps its input axis": (residual_linear, tokens, {aten.linear.default: Rule("contraction", linear_that_keeps_its_input)}),
    "linear forgets what it sums over": (residual_linear, tokens, {aten.linear.default: Rule("contraction", linear_without_a_sum)}),
    "linear forgets its bias": (residual_linear, tokens, {aten.linear.default: Rule("contraction", without_bias)}),
    "conv forgets its bias": (with_batch_norm, image, {aten.conv2d.default: Rule("convolution", without_bias)}),
    "conv forgets to tie": (with_batch_norm, image, {aten.conv2d.default: Rule("convolution", without_ties)}),
    "conv turns its outputs around": (
        with_batch_norm, image, {aten.conv2d.default: Rule("convolution", turned(rule_for(aten.conv2d.default).flow, 1))},
    ),
    "conv forgets to pin": (with_batch_norm, image, {aten.conv2d.default: Rule("convolution", without_pins)}),
    "grouped conv forgets its blocks": (
        lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=2), conv(8, 2)), image,
        {aten.conv2d.default: Rule("convolution", without_blocks)},
    ),
    "group norm forgets its blocks": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 2)), image, {aten.group_norm.default: Rule("group norm", without_blocks)},
    ),
    "a shuffle forgets that it merges": (SHUFFLED, image, {op: Rule("reshape", without_blocks, moves=True) for op in (aten.unflatten.int, aten.flatten.using_ints)}),
    "pixel shuffle moves channels apart": (
        chain(lambda n, y: F.pixel_shuffle(y, 2), 2), image, {aten.pixel_shuffle.default: Rule("reshape", without_ties, moves=True)},
    ),
    "repeat_interleave is repeat": (
        chain(lambda n, y: y.repeat_interleave(2, 1), 16), image,
        {aten.repeat_interleave.self_int: Rule("expand", lambda f, c: Labels(c.shape, tuple(p.repeat(1, 2, 1, 1) for p in c["self"].planes)), moves=True)},
    ),
    "embedding lets its vocabulary go": (
        lambda: Net(lambda n, x: n.o(n.e(x)), e=nn.Embedding(20, 8), o=nn.Linear(8, 2)), lambda: torch.arange(20).view(4, 5),
        {aten.embedding.default: Rule("index", without_pins)},
    ),
    "attention forgets to tie": (Attention, tokens, {aten.scaled_dot_product_attention.default: Rule("attention", without_ties)}),
    "matmul forgets to tie": (
        lambda: Net(lambda n, x: n.o(n.a(x) @ n.w), a=nn.Linear(12, 8), w=weight(8, 8), o=nn.Linear(8, 2)), tokens, {aten.matmul.default: Rule("contraction", without_ties)}),
    "einsum forgets to tie": (
        lambda: Net(lambda n, x: n.o(torch.einsum("bnc,cd->bnd", n.a(x), n.w)), a=nn.Linear(12, 8), w=weight(8, 8), o=nn.Linear(8, 2)), tokens,
        {aten.einsum.default: Rule("contraction", without_ties)},
    ),
    "output of a view is not rectangular": (
        chain(lambda n, y: y.unflatten(1, (2, 4)).sum(1), 4), image, {aten.sum.dim_IntList: Rule("reduction", without_blocks)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE_RULES)
def test_a_false_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, example, false = FALSE_RULES[name]
    torch.manual_seed(0)
    model, x = build().eval(), example()
    captured = capture(model, x)
    right = {node.target for node in captured.nodes}
    assert right & set(false), "the net does not use the rule"
    catches = 0
    for seed in range(3):
        with monkeypatch.context() as patch:
            for module in (speedup.analysis, speedup.masked):
                patch.setattr(module, "rule_for", lambda target: false.get(target) or rule_for(target))
            analysis = analyse(captured)
            live = select(find_dependencies(analysis), CRITERIA["random"](analysis, Evidence(seed)), 0.5).live
            try:
                plan = make_plan(analysis, live)
            except PlanError as error:
                assert str(error).partition(":")[0] in {node.name for node in captured.nodes} | set(analysis.parameters)
                catches += 1
                continue
            if caught(analysis, live, plan) is not None:
                catches += 1
                continue
        verify(model, plan, x)  # what is let through must be right by the rules as they are
    assert catches, "never caught"

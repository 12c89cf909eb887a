"""The proof: it passes the right plan at any numbers, and catches what the plan does not say."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image, tokens, weight
from test_rules_contraction import Attention
from torch import Tensor, nn

from graphprune.criteria import CRITERIA
from graphprune.dependency import find_dependencies
from graphprune.evidence import Evidence
from graphprune.select import select
from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.cut import shrink_graph
from speedup.errors import PlanError, ProofError
from speedup.labels import Mask
from speedup.numeric import relative_difference
from speedup.plan import ShrinkPlan
from speedup.planning import make_plan
from speedup.proof import Proof, prove

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


def convolutional() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        y = n.b(n.a(x)).relu()
        y = n.n(n.g(y)).relu()
        y = n.d(n.w(y))
        return n.f(n.h(y).flatten(1))

    return Net(
        forward, a=conv(3, 12), b=nn.BatchNorm2d(12), g=conv(12, 12, groups=3), n=nn.GroupNorm(3, 12),
        w=conv(12, 12, groups=6), d=conv(12, 12, groups=12), h=nn.GroupNorm(6, 12), f=nn.Linear(432, 2),
    )  # fmt: skip


def moving() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        p, q, r = n.a(x).chunk(3, 1)
        y = torch.cat([q, r + x, p], 1).roll(3, 1)[:, 1:9]
        y = F.pad(y, (0, 0, 0, 0, 3, 1)) + n.b(x)
        return n.o(y[:, n.i].unflatten(1, (3, 4)).flip(2).flatten(1, 2))

    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    return Net(forward, a=conv(3, 11), b=conv(3, 12), i=order, o=conv(12, 2))


def token_mixing() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        y = n.n(n.a(x))
        y = y + n.c(F.gelu(n.b(y)))
        return n.o((y.view(x.shape[0], 5, 4, 4) * n.g).reshape(x.shape[0], 5, 16)) + n.p(n.r(n.d(y)))

    return Net(
        forward, a=nn.Linear(12, 16), n=nn.LayerNorm(16), b=nn.Linear(16, 10), c=nn.Linear(10, 16), g=weight(4, 1),
        o=nn.Linear(16, 2), d=nn.Linear(16, 8), r=nn.RMSNorm(8), p=nn.Linear(8, 2),
    )  # fmt: skip


def filling() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 8, 6, 6)
        y[:, :4] = n.a(x)
        y[:, 4:] = n.b(x)
        y = y + n.c(x).expand(-1, 8, -1, -1) + n.c(x).repeat(1, 8, 1, 1)
        return n.o(F.pixel_shuffle(n.d(y), 2))

    return Net(forward, a=conv(3, 4), b=conv(3, 4), c=conv(3, 1), d=conv(8, 24), o=conv(6, 2))


def attending() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 12), Attention("grouped", heads=4, keys=1), Attention("merged with the batch"), nn.Linear(12, 2)
    )


NETS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutional": (convolutional, image),
    "moving": (moving, image),
    "token_mixing": (token_mixing, tokens),
    "filling": (filling, image),
    "attending": (attending, tokens),
}
_CASES: dict[str, tuple[Analysis, Mask, ShrinkPlan]] = {}


def planned(name: str) -> tuple[Analysis, Mask, ShrinkPlan]:
    """The net with a right plan at 0.5; made once."""
    if name not in _CASES:
        torch.manual_seed(0)
        build, example = NETS[name]
        _CASES[name] = plan_of(build(), example())
    return _CASES[name]


def plan_of(model: nn.Module, example: Any, seed: int = 0) -> tuple[Analysis, Mask, ShrinkPlan]:
    analysis = analyse(capture(model.eval(), example))
    live = select(find_dependencies(analysis), CRITERIA["random"](analysis, Evidence(seed)), 0.5).live
    return analysis, live, make_plan(analysis, live)


def proven(analysis: Analysis, live: Mask, plan: ShrinkPlan) -> Proof:
    return prove(analysis, live, plan, shrink_graph(analysis.captured, plan))


def caught(analysis: Analysis, live: Mask, plan: ShrinkPlan) -> str | None:
    """What the engine says of a wrong plan, which must begin with a node or a tensor; None if it lets it through."""
    try:
        proven(analysis, live, plan)
    except (PlanError, ProofError) as error:
        subject = str(error).partition(":")[0]
        assert subject in {node.name for node in analysis.captured.nodes} | set(analysis.parameters), str(error)
        return str(error)
    return None


@pytest.mark.parametrize("name", NETS)
def test_the_right_plan_is_proven(name: str) -> None:
    analysis, live, plan = planned(name)
    proof = proven(analysis, live, plan)
    assert proof.difference < 1e-12 and proof.tolerance == 1e-9 and proof.batch == 2
    unused = [node for node in analysis.captured.nodes if node.op == "get_attr" and not node.users]
    assert proof.nodes == len(analysis.captured.nodes) - len(unused) - 1  # of the output the arguments are compared
    assert len(plan.keep) >= 5 and len(plan.literals) >= 2


def test_the_plan_of_another_selection_is_caught() -> None:
    analysis, live, _ = planned("convolutional")
    other = select(find_dependencies(analysis), CRITERIA["random"](analysis, Evidence(5)), 0.5).live
    assert caught(analysis, live, make_plan(analysis, other)) is not None


def test_weights_that_are_not_those_of_the_plan_are_caught() -> None:
    analysis, live, plan = planned("token_mixing")
    graph = shrink_graph(analysis.captured, plan)
    with torch.no_grad():
        graph.get_parameter("c.weight")[0, 0] += 1e-3
    with pytest.raises(ProofError, match="^c_weight: c.weight does not hold what the plan keeps of it"):
        prove(analysis, live, plan, graph)


def test_swapped_outputs_are_caught() -> None:
    torch.manual_seed(0)
    net = Net(lambda n, x: (n.o(n.a(x)), n.p(n.a(x))), a=conv(3, 8), o=conv(8, 2), p=conv(8, 2))
    analysis, live, plan = plan_of(net, image())
    graph = shrink_graph(analysis.captured, plan)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    output.args = (tuple(reversed(output.args[0])),)
    graph.recompile()
    with pytest.raises(ProofError, match="^output: "):
        prove(analysis, live, plan, graph)


def test_a_pinned_channel_cannot_go() -> None:
    analysis, live, _ = planned("convolutional")
    pinned = np.flatnonzero(analysis.classes.pin_of >= 0)[-1]
    with pytest.raises(PlanError, match="channels that must stay would go"):
        make_plan(analysis, live & (np.arange(len(live)) != pinned))


def test_rows_of_different_length_cannot_be_planned() -> None:
    analysis = analyse(capture(convolutional().eval(), image()))
    live = np.ones(analysis.classes.count, dtype=np.bool_)
    live[analysis.classes.plane(analysis.parameters["a.weight"].planes[0])[0]] = False
    with pytest.raises(PlanError, match="^g.weight: groups would keep 3 to 4 inputs"):
        make_plan(analysis, live)


# How far apart is different.


@pytest.mark.parametrize(
    ("expected", "found", "far"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.5, -4.0], 0.125),
        ([0.0, 0.0], [0.0, 0.25], 0.25),
        ([], [], 0.0),
        ([1.0, float("inf")], [1.0, float("inf")], 0.0),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("inf")], [1.0, -float("inf")], float("inf")),
        ([1.0, float("nan")], [1.0, float("inf")], float("inf")),
    ],
)
def test_relative_difference(expected: list[float], found: list[float], far: float) -> None:
    assert relative_difference(torch.tensor(expected), torch.tensor(found)) == far


def test_a_number_that_is_none_is_within_no_tolerance() -> None:
    assert not relative_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])) <= 1e9


def test_complex_numbers_may_be_rounded() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda n, x: n.o(torch.fft.irfft2(torch.fft.rfft2(n.b(n.a(x).relu())), s=(6, 6))),
        a=conv(3, 300),
        b=conv(300, 8),
        o=conv(8, 2),
    )
    assert proven(*plan_of(net, image())).difference < 1e-12

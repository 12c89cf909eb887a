"""The proof has teeth: plans, literals and rules are falsified on purpose, and every falsification is caught and named.

A falsified literal or rule may happen to change nothing. That is never taken on trust: a literal that is let through must
compute what the right one computes, and a plan that is let through must be proven by the engine with its rules intact.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image, one_thread, tokens, weight
from test_rules_contraction import Attention
from torch import Tensor, nn

from graphprune.criteria import CRITERIA
from graphprune.dependency import find_dependencies
from graphprune.select import select
from speedup.analysis import Analysis, analyse
from speedup.capture import Captured, capture
from speedup.cut import shrink_graph
from speedup.errors import PlanError, ProofError
from speedup.labels import Index, Mask
from speedup.numeric import relative_difference
from speedup.plan import Axis, Scaled, ShrinkPlan
from speedup.planning import make_plan
from speedup.proof import Proof, prove, verify

aten = torch.ops.aten
MODELS = Path(__file__).parent.parent / "models"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


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
    live = select(find_dependencies(analysis), CRITERIA["random"](analysis, seed), 0.5).live
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


# Falsified plans.


def drop_first(kept: Index, size: int) -> Index:
    return kept[1:]


def drop_last(kept: Index, size: int) -> Index:
    return kept[:-1]


def one_more(kept: Index, size: int) -> Index:
    return np.sort(np.append(kept, np.setdiff1d(np.arange(size), kept)[0]))


def swap(kept: Index, size: int) -> Index:
    return kept[[1, 0, *range(2, len(kept))]]


def rotate(kept: Index, size: int) -> Index:
    return np.roll(kept, 1)


def shift(kept: Index, size: int) -> Index:
    return (kept + 1) % size


def others(kept: Index, size: int) -> Index:
    """As many as were kept, of those that were not, as far as they reach."""
    gone = np.setdiff1d(np.arange(size), kept)
    return np.sort(np.concatenate([gone, kept])[: len(kept)])


def twice(kept: Index, size: int) -> Index:
    return np.append(kept[:-1], kept[0])


def beyond(kept: Index, size: int) -> Index:
    return np.append(kept[:-1], size)


FALSE_KEEPS = (drop_first, drop_last, one_more, swap, rotate, shift, others, twice, beyond)


def false_plans(analysis: Analysis, plan: ShrinkPlan) -> Iterator[tuple[str, ShrinkPlan]]:
    """Every falsification of every axis and of every table of rows."""
    for axis, kept in plan.keep.items():
        for change in FALSE_KEEPS:
            wrong = change(kept, analysis.parameters[axis.tensor].shape[axis.dim]) if len(kept) > 1 else kept
            if not np.array_equal(wrong, kept):
                yield f"{change.__name__} {axis}", replace(plan, keep={**plan.keep, axis: wrong})
        yield f"forget {axis}", replace(plan, keep={a: k for a, k in plan.keep.items() if a != axis})
    for name, rows in plan.rows.items():
        size = analysis.parameters[name].shape[1]
        for change in (drop_last, swap, shift, others, twice):
            for row in (0, len(rows) - 1):
                wrong = [change(kept, size) if i == row else kept for i, kept in enumerate(rows)]
                wrong = [kept[: min(map(len, wrong))] for kept in wrong]
                if rows.shape[1] > 1:
                    yield (
                        f"{change.__name__} row {row} of {name}",
                        replace(plan, rows={**plan.rows, name: np.stack(wrong)}),
                    )
        if not (rows == rows[::-1]).all():
            yield f"rows of {name} turned", replace(plan, rows={**plan.rows, name: rows[::-1].copy()})
        yield f"forget rows of {name}", replace(plan, rows={n: r for n, r in plan.rows.items() if n != name})


@pytest.mark.parametrize("name", NETS)
def test_a_false_plan_is_caught(name: str) -> None:
    analysis, live, plan = planned(name)
    let_through = [what for what, wrong in false_plans(analysis, plan) if caught(analysis, live, wrong) is None]
    assert not let_through


def test_the_message_names_the_tensor_or_the_node() -> None:
    analysis, live, plan = planned("convolutional")
    axis = Axis("b.running_mean", 0)
    wrong = caught(analysis, live, replace(plan, keep={**plan.keep, axis: swap(plan.keep[axis], 12)}))
    assert wrong is not None and wrong.startswith(
        "b_running_mean: the shrunk graph differs from the masked original by"
    )
    wrong = caught(analysis, live, replace(plan, keep={**plan.keep, axis: drop_last(plan.keep[axis], 12)}))
    assert wrong is not None and wrong.startswith("b_running_mean: the shrunk graph has shape")
    wrong = caught(analysis, live, replace(plan, keep={**plan.keep, axis: beyond(plan.keep[axis], 12)}))
    assert wrong is not None and wrong.startswith("b.running_mean: the plan keeps index 12 of dimension 0")


def test_the_plan_of_another_selection_is_caught() -> None:
    analysis, live, _ = planned("convolutional")
    other = select(find_dependencies(analysis), CRITERIA["random"](analysis, 5), 0.5).live
    assert caught(analysis, live, make_plan(analysis, other)) is not None


def test_weights_that_are_not_those_of_the_plan_are_caught() -> None:
    analysis, live, plan = planned("token_mixing")
    graph = shrink_graph(analysis.captured, plan)
    with torch.no_grad():
        graph.get_parameter("c.weight")[0, 0] += 1e-3
    with pytest.raises(ProofError, match="^c_weight: c.weight does not hold what the plan keeps of it"):
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


# Falsified literals.


def false_values(value: Any) -> Iterator[Any]:
    """Values near the right one."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        yield value + 1
        if value > 0:
            yield value - 1
    elif isinstance(value, float):
        yield value * 1.1
        yield value * 0.5
    elif isinstance(value, Scaled):
        yield Scaled(value.new + value.old, value.old)
        yield Scaled(value.old, value.old)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            for wrong in false_values(entry):
                yield [*value[:i], wrong, *value[i + 1 :]]
        for i in range(1, len(value)):
            if value[i] != value[i - 1] and not isinstance(value[i], list) and not isinstance(value[i - 1], list):
                yield [*value[: i - 1], value[i], value[i - 1], *value[i + 1 :]]
        if value and isinstance(value[0], int):
            yield value[:-1]


def false_literals(plan: ShrinkPlan) -> Iterator[tuple[str, ShrinkPlan]]:
    for node, new in plan.literals.items():
        for argument, value in new.items():
            for wrong in false_values(value):
                yield (
                    f"{node}.{argument} = {wrong} for {value}",
                    replace(plan, literals={**plan.literals, node: {**new, argument: wrong}}),
                )
        yield f"forget {node}", replace(plan, literals={n: v for n, v in plan.literals.items() if n != node})


def computes_the_same(captured: Captured, first: ShrinkPlan, second: ShrinkPlan) -> bool:
    """Whether two graphs agree at several batches, on several inputs."""
    graphs = [shrink_graph(captured, plan).eval() for plan in (first, second)]
    for seed, batch in ((0, 1), (1, 2), (2, 3), (3, 5)):
        x = captured.flat_inputs()[0]
        x = torch.randn(batch, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected, found = (graph(x) for graph in graphs)
        if expected.shape != found.shape or relative_difference(expected, found) > 1e-6:
            return False
    return True


@pytest.mark.parametrize("name", NETS)
def test_a_false_literal_is_caught_or_changes_nothing(name: str) -> None:
    analysis, live, plan = planned(name)
    wrong = list(false_literals(plan))
    let_through = [(what, mutant) for what, mutant in wrong if caught(analysis, live, mutant) is None]
    assert len(wrong) - len(let_through) >= 4
    for what, mutant in let_through:
        assert computes_the_same(analysis.captured, plan, mutant), what
    # Only an end beyond the last channel, or a scale that nothing reads, can change nothing.
    assert all(".end = " in what for what, _ in let_through), [what for what, _ in let_through]


def test_every_kind_of_literal_is_falsified() -> None:
    kinds = {
        (str(node.target), argument)
        for name in NETS
        for node in planned(name)[0].captured.nodes
        for argument in planned(name)[2].literals.get(node.name, ())
    }
    operators = {operator.removeprefix("aten.").partition(".")[0] for operator, _ in kinds}
    assert operators >= {
        "chunk", "conv2d", "expand", "group_norm", "index", "layer_norm", "new_zeros", "pad", "repeat", "reshape",
        "rms_norm", "roll", "scaled_dot_product_attention", "slice", "unflatten",
    }  # fmt: skip
    assert {argument for _, argument in kinds} >= {
        "groups",
        "num_groups",
        "normalized_shape",
        "scale",
        "shifts",
        "split_sizes",
    }


# Networks as people use them.


def random_falsification(
    analysis: Analysis, plan: ShrinkPlan, generator: np.random.Generator
) -> tuple[str, ShrinkPlan]:
    axes: Sequence[Axis] = sorted(plan.keep)
    axis = axes[generator.integers(len(axes))]
    kept, size = plan.keep[axis], analysis.parameters[axis.tensor].shape[axis.dim]
    while True:
        wrong = kept.copy()
        match generator.integers(4):
            case 0:
                wrong[generator.integers(len(kept))] = generator.integers(size)
            case 1:
                wrong = np.delete(wrong, generator.integers(len(kept)))
            case 2:
                wrong = np.insert(wrong, generator.integers(len(kept) + 1), generator.integers(size))
            case _:
                wrong = generator.permutation(wrong)
        if not np.array_equal(wrong, kept):
            return f"{axis}: {wrong.tolist()} for {kept.tolist()}", replace(plan, keep={**plan.keep, axis: wrong})


@pytest.mark.parametrize("name", ["digits", "resnet20_cifar", "pixelshuffle_sr", "tied_lm", "wide_deep"])
def test_random_falsifications_of_real_networks_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(MODELS)
    spec = importlib.util.spec_from_file_location(f"falsified_{name}", MODELS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    analysis, live, plan = plan_of(module.build_model(), module.example_inputs())
    proven(analysis, live, plan)
    generator = np.random.default_rng(0)
    wrong = [random_falsification(analysis, plan, generator) for _ in range(30)]
    assert [what for what, mutant in wrong if caught(analysis, live, mutant) is None] == []


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


@pytest.mark.parametrize("example", [torch.zeros(2, 3, 6, 6), torch.ones(2, 3, 6, 6)])
def test_the_proof_does_not_depend_on_the_example(example: Tensor) -> None:
    torch.manual_seed(0)
    net = Net(lambda n, x: n.o(F.pad(n.a(x), (0, 0, 0, 0, 4, 4))), a=conv(3, 8, bias=False), o=conv(16, 2, bias=False))
    nn.init.zeros_(net.o.weight)
    analysis, live, plan = plan_of(net, example)
    let_through = [
        what
        for what, wrong in (*false_literals(plan), *false_plans(analysis, plan))
        if caught(analysis, live, wrong) is None
    ]
    assert not let_through


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


def test_verify_proves_a_plan_made_elsewhere() -> None:
    torch.manual_seed(0)
    net = convolutional().eval()
    _, _, plan = plan_of(net, image())
    assert verify(net, plan, image()).difference < 1e-12
    axis = Axis("a.weight", 0)
    with pytest.raises((ProofError, PlanError)):
        verify(net, replace(plan, keep={**plan.keep, axis: swap(plan.keep[axis], 12)}), image())
    assert sys.modules  # the model is left as it was: same modes, same weights

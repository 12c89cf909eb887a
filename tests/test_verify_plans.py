"""False plans and false literals are caught and named: whatever they keep and say is falsified, entry by entry."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image
from test_verify import NETS, caught, convolutional, plan_of, planned, proven
from torch import Tensor, nn

from speedup.analysis import Analysis
from speedup.capture import Captured
from speedup.cut import shrink_graph
from speedup.errors import PlanError, ProofError
from speedup.labels import Index
from speedup.numeric import relative_difference
from speedup.plan import Axis, Scaled, ShrinkPlan
from speedup.proof import verify

MODELS = Path(__file__).parent.parent / "models"

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


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


def test_verify_proves_a_plan_made_elsewhere() -> None:
    torch.manual_seed(0)
    net = convolutional()
    _, _, plan = plan_of(net, image())
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert verify(net, plan, image()).difference < 1e-12
    axis = Axis("a.weight", 0)
    with pytest.raises((ProofError, PlanError)):
        verify(net, replace(plan, keep={**plan.keep, axis: swap(plan.keep[axis], 12)}), image())
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


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
    """That it changes nothing is never taken on trust: what is let through must compute what the right one computes."""
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

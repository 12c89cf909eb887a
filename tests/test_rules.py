"""The bench on which every rule is tried: a tiny net, its channel groups written out by hand, and a compression at 0.5.

The cases stand in `test_rules_*.py`, by topic. Each names the groups of which something may go, and the axes that must
stay with words of the reason. Beside the engine's own proof the result is compared with an oracle that knows nothing of
labels: the user's model with every removed entry of every parameter set to zero.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.criteria import CRITERIA
from graphprune.dependency import DependencyGraph
from graphprune.errors import ModelError
from graphprune.evidence import Evidence
from graphprune.groups import ChannelGroup, Member
from graphprune.select import select
from speedup.capture import capture, source_line
from speedup.cut import shrink_graph
from speedup.plan import ShrinkPlan
from speedup.planning import make_plan
from speedup.proof import prove
from speedup.rules import RULES, pointwise, rule_for


class Net(nn.Module):
    """A module from a function of itself and its inputs; tensors among its parts become buffers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass(frozen=True)
class Case:
    """A tiny net and what the engine must find out about it.

    Attributes:
        name: What it shows.
        build: Makes the net; called after seeding.
        x: The example.
        free: The groups of which something may go, as "units: tensor/dimension ...", "*n" after an axis of which only n
            indices belong to the group.
        pinned: Axes that must stay, with words of the reason.
        mixes: Whether an operator mixes over prunable channels (norms, means), so that zeros are no mask.
    """

    name: str
    build: Callable[[], nn.Module]
    x: Tensor
    free: tuple[str, ...]
    pinned: Mapping[str, str] = field(default_factory=dict)
    mixes: bool = False


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(7))


def tokens(width: int = 12) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(7))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def parameters(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    """The decorator that runs a test for each of the cases."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors are faster in one thread, on a busy machine many times so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(case: Case) -> None:
    """Compares the groups with those written out, compresses at 0.5, and compares the result with the oracle."""
    with one_thread():
        _check(case)


def _check(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().eval()
    if not case.free:
        dependencies = trace(case)
        assert described(dependencies) == set()
        check_pins(dependencies, case.pinned)
        with pytest.raises(ModelError, match="nothing can be pruned"):
            graphprune.compress(model, case.x, 0.5, round_to=1)
        return
    before = copy.deepcopy(model.state_dict())
    result = graphprune.compress(model, case.x, 0.5, round_to=1)
    _TRACED[case.name] = result.dependencies
    assert described(result.dependencies) == {_sorted(group) for group in case.free}
    check_pins(result.dependencies, case.pinned)
    assert result.report["params"]["shrunk"] < result.report["params"]["dense"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    check_choices(result.dependencies)
    if not case.mixes:
        check_oracle(model, result.plan, result.model, case.x)


def described(dependencies: DependencyGraph) -> set[str]:
    """The prunable groups as text."""
    return {
        _sorted(f"{group.units}: " + " ".join(_axis(dependencies, member) for member in group.members))
        for group in dependencies.prunable
    }


def _axis(dependencies: DependencyGraph, member: Member) -> str:
    labels = dependencies.analysis.parameters[member.tensor]
    size = int(np.prod([labels.shape[dim] for dim in member.dims]))
    part = "" if member.channels == size else f"*{member.channels}"
    return f"{member.tensor}/{''.join(map(str, member.dims))}{part}"


def _sorted(group: str) -> str:
    units, *axes = group.split()
    return " ".join([units, *sorted(axes)])


def check_pins(dependencies: DependencyGraph, pinned: Mapping[str, str]) -> None:
    """Every named axis must be fixed, for a reason with the given words in it."""
    for axis, words in pinned.items():
        reasons = [
            group.pin or _locked(dependencies, group)
            for group in dependencies.groups
            if group.size < group.units and axis in {_axis(dependencies, member) for member in group.members}
        ]
        assert any(words in reason for reason in reasons), f"{axis}: {reasons} instead of {words!r}"


def _locked(dependencies: DependencyGraph, group: ChannelGroup) -> str:
    classes = dependencies.analysis.classes
    return " ".join({classes.pins[place].reason for place in classes.pin_of[group.classes] if place >= 0})


def check_choices(dependencies: DependencyGraph) -> None:
    """Proves other choices of channels of the same net, too: what falls out by chance must fit as well."""
    analysis = dependencies.analysis
    for seed, sparsity in ((1, 0.5), (2, 0.3)):
        live = select(dependencies, CRITERIA["random"](analysis, Evidence(seed)), sparsity).live
        plan = make_plan(analysis, live)
        prove(analysis, live, plan, shrink_graph(analysis.captured, plan))


def check_oracle(model: nn.Module, plan: ShrinkPlan, shrunk: nn.Module, x: Tensor) -> None:
    """The user's own model with zeros in place of all that is removed computes what the shrunk one does."""
    masked = copy.deepcopy(model)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name in plan.tensors & set(tensors):
            tensors[name].mul_(kept_mask(plan, name, tensors[name]))
        batch = torch.cat([x, x.flip(0)])[:3]
        expected, found = masked(batch), shrunk(batch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def kept_mask(plan: ShrinkPlan, name: str, tensor: Tensor) -> Tensor:
    """Ones where the plan keeps an entry of a tensor, zeros elsewhere."""
    mask = torch.ones(tensor.shape)
    for axis, indices in plan.keep.items():
        if axis.tensor == name:
            along = torch.zeros(tensor.shape[axis.dim])
            along[torch.as_tensor(indices)] = 1
            mask *= along.reshape([-1 if dim == axis.dim else 1 for dim in range(tensor.dim())])
    if name in plan.rows:
        outputs = next((i for axis, i in plan.keep.items() if (axis.tensor, axis.dim) == (name, 0)), None)
        outputs = np.arange(tensor.shape[0]) if outputs is None else outputs
        table = torch.zeros(tensor.shape[:2])
        table[torch.as_tensor(outputs)[:, None], torch.as_tensor(plan.rows[name])] = 1
        mask *= table.reshape(*table.shape, *(1,) * (tensor.dim() - 2))
    return mask


_TRACED: dict[str, DependencyGraph] = {}


def trace(case: Case) -> DependencyGraph:
    """The channel groups of a case; traced once."""
    if case.name not in _TRACED:
        torch.manual_seed(0)
        with one_thread():
            _TRACED[case.name] = graphprune.trace(case.build().eval(), case.x)
    return _TRACED[case.name]


def test_an_operator_without_a_rule_has_none() -> None:
    assert rule_for(torch.ops.aten.cummax.default) is None
    assert rule_for(len) is None


def test_what_pytorch_tags_as_pointwise_needs_no_entry() -> None:
    for operator in (torch.ops.aten.tanh.default, torch.ops.aten.where.self, torch.ops.aten.atan2.default):
        assert operator not in RULES
        assert rule_for(operator) is pointwise.TAGGED


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        RULES[torch.ops.aten.tanh.default] = pointwise.TAGGED  # type: ignore[index]  # that is the point


def test_a_composite_operator_is_what_it_is_made_of() -> None:
    captured = capture(Net(lambda n, x: x.tile((1, 2)).narrow(1, 1, 3)), torch.randn(2, 5))
    called = [node.target for node in captured.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.repeat.default, torch.ops.aten.slice.Tensor]
    assert all(source_line(node) for node in captured.nodes if node.op == "call_function")


def test_a_composite_operator_that_would_fix_the_batch_stays_whole() -> None:
    captured = capture(
        Net(lambda n, x: n.cell(x, n.w.expand(x.shape[0], -1)), cell=nn.GRUCell(5, 4), w=weight(1, 4)),
        torch.randn(2, 5),
    )
    assert torch.ops.aten.gru_cell.default in [node.target for node in captured.nodes]
    assert captured.fixed_batch is None

"""Random networks: what `compress` hands over is right by oracles that know nothing of the engine.

The engine proves its own results with its own labels. Here the user's module itself is the reference: with every
removed slice of every parameter set to zero it must compute what the shrunk model computes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from random_nets import Live, Net, Program, draw_program, example_inputs, masked_twin
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import graphprune
from graphprune.errors import ModelError
from speedup.plan import ShrinkPlan

TOLERANCE = 1e-7


@dataclass(frozen=True)
class Asked:
    """The options of `compress`."""

    sparsity: float
    criterion: str
    scope: str
    round_to: int


class Mismatch(AssertionError):
    """An oracle refutes the result."""


@st.composite
def programs(draw: st.DrawFn) -> Program:
    return draw_program(lambda options: draw(st.sampled_from(options)))


REQUESTS = st.builds(
    Asked,
    sparsity=st.sampled_from([0.5, 0.3, 0.7]),
    criterion=st.sampled_from(["l1", "random"]),
    scope=st.sampled_from(["local", "global"]),
    round_to=st.sampled_from([1, 2, 4]),
)
COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),  # a network takes longer than hypothesis likes
}


@settings(max_examples=200, derandomize=True, **COMMON)
@given(programs(), REQUESTS)
def test_random_network(program: Program, asked: Asked) -> None:
    check(program, asked)


@pytest.mark.slow
@seed(20240607)
@settings(max_examples=1000, database=None, **COMMON)
@given(programs(), REQUESTS)
def test_more_random_networks(program: Program, asked: Asked) -> None:
    check(program, asked)


def check(program: Program, asked: Asked) -> graphprune.Result | None:
    """Compresses the network of `program` and holds the result against every oracle; None if nothing can be pruned."""
    model = Net(program)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    try:
        result = graphprune.compress(model, example_inputs(program), **vars(asked), seed=program.seed)
    except ModelError as error:
        if "nothing can be pruned" not in str(error):
            raise
        return None
    finally:
        check_untouched(model, before, modes)
    check_report(model, result)
    check_runs(model, result, program)
    check_trains(model, result, program)
    if program.exact:
        check_equals_masked_weights(model, result, program)
    return result


def check_untouched(model: nn.Module, before: dict[str, Tensor], modes: list[bool]) -> None:
    """The user's model is what it was."""
    after = model.state_dict()
    if after.keys() != before.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise Mismatch("the user's parameters have changed")
    if modes != [module.training for module in model.modules()]:
        raise Mismatch("the user's model is in another mode")


def check_report(model: nn.Module, result: graphprune.Result) -> None:
    """What was asked is kept, or a note says why not; and something is gone."""
    for group in result.report["groups"]:
        if group["kept"] > group["asked"] and not group["note"]:
            raise Mismatch(f"{group['name']} keeps {group['kept']} of {group['asked']} asked, without a note")
    for choice in result.selection.choices:
        if choice.kept < 1:
            raise Mismatch(f"{choice.group.name} keeps nothing")
    dense = sum(tensor.numel() for tensor in model.parameters())
    small = sum(tensor.numel() for tensor in result.model.parameters())
    if small >= dense:
        raise Mismatch(f"{small} numbers are left of {dense}")
    if (result.plan.keep or result.plan.rows) and result.report["params"]["shrunk"] > result.report["params"]["dense"]:
        raise Mismatch("the report counts more parameters than before")


def check_runs(model: nn.Module, result: graphprune.Result, program: Program) -> None:
    """The shrunk model runs at other batch sizes and gives what the original gives, in the same containers."""
    with evaluated(model) as dense, evaluated(result.model) as small:
        for batch in (1, 3):
            inputs = example_inputs(program, batch)
            expected, found = dense(*inputs), small(*inputs)
            if pytree.tree_structure(expected) != pytree.tree_structure(found):
                raise Mismatch(f"returns {pytree.tree_structure(found)}, not {pytree.tree_structure(expected)}")
            for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
                if a.shape != b.shape:
                    raise Mismatch(f"an output has shape {tuple(b.shape)}, not {tuple(a.shape)}")


def check_trains(model: nn.Module, result: graphprune.Result, program: Program) -> None:
    """A step of training reaches every parameter that it reaches in the original."""
    inputs = example_inputs(program, 3)
    reached = []
    for module in (model, result.model):
        module = copy.deepcopy(module).train()
        leaves = pytree.tree_leaves(module(*inputs))
        losses = [leaf.square().mean() for leaf in leaves if leaf.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]  # torch's own gap
        reached.append({name for name, p in module.named_parameters() if p.grad is not None})
    tied = {name for pair in program.ties for name in pair}
    if missed := reached[0] - reached[1] - tied:  # a graph may know a tied parameter by its other name
        raise Mismatch(f"training no longer reaches {sorted(missed)}")


def check_equals_masked_weights(model: nn.Module, result: graphprune.Result, program: Program) -> None:
    """The original with zeros in the place of what is gone computes the same, in double precision."""
    with evaluated(masked(model, result.plan)) as dense, evaluated(in_double(result.model)) as small:
        for batch in (1, 3):
            inputs = [x.double() if x.is_floating_point() else x for x in example_inputs(program, batch)]
            expected, found = (pytree.tree_leaves(module(*inputs)) for module in (dense, small))
            for number, (a, b) in enumerate(zip(expected, found, strict=True)):
                far = distance(a, b)
                if not far <= TOLERANCE:
                    raise Mismatch(f"output {number} is {far:.2g} away from the original with masked weights")


def in_double(model: nn.Module) -> nn.Module:
    """A copy of `model` in double precision, floating types in the arguments of a graph included."""
    module = copy.deepcopy(model).double()
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            exact = (torch.float64 if value is torch.float32 else value for value in node.args)
            node.args, node.kwargs = (
                tuple(exact),
                {k: torch.float64 if v is torch.float32 else v for k, v in node.kwargs.items()},
            )
        module.recompile()
    return module


def distance(expected: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    scale = float(expected.abs().max())
    gap = float((expected - found).abs().max())
    return gap / scale if scale > 1e-12 else gap


def masked(model: nn.Module, plan: ShrinkPlan) -> nn.Module:
    """A copy of `model` in double precision in which every removed slice of every tensor is zero.

    Norms over channels count what is left: they are replaced by modules written for this test.
    """
    module = copy.deepcopy(model).double()
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    masks = {id(tensor): torch.ones_like(tensor) for tensor in tensors.values() if tensor.is_floating_point()}
    for axis, indices in plan.keep.items():
        if id(tensors.get(axis.tensor)) in masks:
            kept = torch.zeros(tensors[axis.tensor].shape[axis.dim], dtype=torch.float64)
            kept[torch.as_tensor(indices)] = 1
            shape = [-1 if dim == axis.dim else 1 for dim in range(tensors[axis.tensor].dim())]
            masks[id(tensors[axis.tensor])] *= kept.view(shape)
    for name, rows in plan.rows.items():
        tensor = tensors[name]
        outputs = next(
            (torch.as_tensor(i) for a, i in plan.keep.items() if a.tensor == name and a.dim == 0),
            torch.arange(len(tensor)),
        )
        table = torch.zeros(tensor.shape[:2], dtype=torch.float64)
        table[outputs[:, None], torch.as_tensor(rows)] = 1
        masks[id(tensor)] *= table.view(*table.shape, *(1,) * (tensor.dim() - 2))
    live: Live = lambda tensor: masks[id(tensor)]  # noqa: E731  # a closure of one line
    with torch.no_grad():
        for tensor in tensors.values():
            if id(tensor) in masks:
                tensor *= masks[id(tensor)]
    for name, submodule in list(module.named_modules()):
        twin = masked_twin(submodule, live)
        if twin is not None:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, twin)
    return module


@contextmanager
def evaluated(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in eval mode, without gradients and without the fused encoder layer; a copy, so that it stays as it is."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield copy.deepcopy(model).eval()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@pytest.mark.slow
def test_generator_reaches_every_operation() -> None:
    """Two thousand programs hold every operation, most of them in networks that the masked weights can check."""
    import random

    from random_nets import operation_names

    seen: set[str] = set()
    exact = 0
    for number in range(2000):
        program = draw_program(random.Random(number).choice)
        seen.update(step.op for step in program.steps)
        exact += program.exact
    assert set(operation_names()) <= seen
    assert exact > math.floor(0.6 * 2000)

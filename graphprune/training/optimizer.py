"""Optimizers that follow a model: what they remember of a weight goes where the weight goes."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.utils import _pytree as pytree

from graphprune.errors import ConfigError, shown
from speedup.cut import ShrunkGraph
from speedup.plan import ShrinkPlan

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)
SchedulerT = TypeVar("SchedulerT", bound=LRScheduler)


class Shrunken(Protocol):
    """A model that was shrunk, such as :class:`graphprune.Result`, or what has shrunk one by masks."""

    @property
    def model(self) -> nn.Module | None:
        """The shrunk model; None while there is none."""
        ...

    @property
    def plan(self) -> ShrinkPlan:
        """What was kept of each tensor of the dense one."""
        ...


@dataclass(frozen=True)
class Moved:
    """Another model with, so to speak, the same parameters.

    Attributes:
        model: The model.
        plan: What it keeps of each tensor; by default everything.
    """

    model: nn.Module
    plan: ShrinkPlan = field(default_factory=ShrinkPlan)


def follow(optimizer: OptimizerT, model: nn.Module, result: Shrunken) -> OptimizerT:
    """Returns an optimizer for the shrunk model that goes on where ``optimizer`` is with the dense one.

    It is of the same class, with the same groups in their order and all their options. Of what is remembered for a
    parameter

    * tensors of its shape (momentum, averages of gradients and of their squares) are cut as the parameter is,
    * numbers, and tensors of one element (the step), stay what they are,
    * tensors with a size of one in some dimensions of the parameter are cut along the others,
    * pairs of factors whose names differ in ``row`` and ``col`` (Adafactor, Shazeer & Stern 2018, arXiv:1804.04235, of
      PyTorch as of others) give the estimate that they stand for, V = row col / mean(row); it is cut, and the means of
      its rows and columns are the new factors: they stand for the same numbers, for it has rank one.

    Gradients do not follow: call it between ``step()`` and ``backward()``. Neither the old optimizer nor the dense
    model is changed; a schedule follows with :func:`follow_schedule`.

    Args:
        optimizer: The optimizer of ``model``, of any class that keeps its state per parameter.
        model: The dense model.
        result: The shrunk one and its plan: a result of :func:`graphprune.compress`, a :class:`speedup.ModelSpeedup`
            after ``speedup_model()``, or ``Moved(copy)`` for a copy of the same shape.

    Raises:
        ConfigError: The optimizer holds a parameter that ``model`` does not have, remembers something of a parameter
            that cannot be cut with certainty, or wraps another optimizer; or ``result`` is that of another model, or
            none.
    """
    kind = type(optimizer).__name__
    _check_followable(optimizer, kind)
    small = _shrunk(model, result)
    memo: dict[int, Any] = {}
    state: defaultdict[Any, Any] = defaultdict(dict)
    places = _Places.of(model, small, result.plan)
    gone = set()
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        place = places.find(parameter, kind)
        if place is None:
            gone.add(id(parameter))
            continue
        name, new = place
        memo[id(parameter)] = new
        if parameter in optimizer.state:
            entry = optimizer.state[parameter]
            _cut_entry(entry, name, parameter, result.plan, memo)
            state[new] = copy.deepcopy(entry, memo)
    made: OptimizerT = object.__new__(type(optimizer))
    memo[id(optimizer)] = made
    attributes = {name: value for name, value in vars(optimizer).items() if name not in ("state", "step")}
    attributes["param_groups"] = [_without(group, gone) for group in optimizer.param_groups]
    hooks = {name: copy.copy(attributes.pop(name)) for name in list(attributes) if name.endswith("_hooks")}
    made.__setstate__({"state": state, **copy.deepcopy(attributes, memo), **hooks})
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        ConstantLR(made, factor=1.0, total_iters=0)  # a schedule marks the step of its optimizer; this one does no more
    return made


def follow_schedule(schedule: SchedulerT, optimizer: Optimizer, followed: Optimizer) -> SchedulerT:
    """Returns a schedule for ``followed`` that goes on where ``schedule`` is with ``optimizer``; the old one stays.

    Args:
        schedule: The schedule of ``optimizer``; also one that is made of others.
        optimizer: The optimizer of the dense model.
        followed: What :func:`follow` made of it.

    Raises:
        ConfigError: It is the schedule of another optimizer.
    """
    if not isinstance(schedule, LRScheduler):
        raise ConfigError(f"schedule: is {shown(schedule)}. Give the schedule of the optimizer.")
    if schedule.optimizer is not optimizer:
        raise ConfigError(
            f"{type(schedule).__name__}: belongs to another optimizer. Give the one that it was made with."
        )
    return copy.deepcopy(schedule, {id(optimizer): followed})


def _check_followable(optimizer: Optimizer, kind: str) -> None:
    """Refuses optimizers that keep what they know elsewhere than in their groups and their state."""
    own = getattr(optimizer, "__dict__", None)
    if own is None or not hasattr(optimizer, "step"):
        raise ConfigError(f"optimizer: is {shown(optimizer)}. Give the optimizer of the model.")
    if "state" not in own or "param_groups" not in own:
        raise ConfigError(f"{kind}: is a wrapper around another optimizer. Give the one inside.")
    if "step" in own and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            f"{kind}: its step was replaced by a function of someone else. Take that off, and put it back."
        )
    rest = {name: value for name, value in own.items() if name not in ("state", "step", "param_groups")}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, value in rest.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Optimizer):
                raise ConfigError(f"{kind}: holds another optimizer as {name}. Give the one inside.")
            if isinstance(leaf, Tensor) and id(leaf) not in held and leaf.numel() != 1:
                raise ConfigError(f"{kind}: holds a tensor as {name}, outside its state. Make a new optimizer.")


def _shrunk(model: object, result: Any) -> nn.Module:
    """Returns the shrunk model of a result.

    Raises:
        ConfigError: There is none.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: is {shown(model)}. Give the dense model.")
    small, plan = getattr(result, "model", None), getattr(result, "plan", None)
    if not isinstance(plan, ShrinkPlan):
        raise ConfigError(
            f"result: is {shown(result)}, which does not say what is left. Give what compress() returned, or a "
            "ModelSpeedup."
        )
    if not isinstance(small, nn.Module):
        raise ConfigError(f"result: {type(result).__name__} has no smaller model yet. Call its speedup_model() first.")
    return small


@dataclass(frozen=True)
class _Places:
    """Where the parameters of a dense model are in a shrunk one.

    Attributes:
        names: The names of each dense parameter by its identity; of a tied one there are several.
        new: The parameters of the shrunk model by name.
        plan: What is kept.
        graph: Whether the shrunk model is a graph, which has only what it uses.
    """

    names: Mapping[int, Sequence[str]]
    new: Mapping[str, nn.Parameter]
    plan: ShrinkPlan
    graph: bool

    @classmethod
    def of(cls, model: nn.Module, small: nn.Module, plan: ShrinkPlan) -> "_Places":
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        new = dict(small.named_parameters(remove_duplicate=False))
        return cls(names, new, plan, isinstance(small, ShrunkGraph))

    def find(self, parameter: nn.Parameter, kind: str) -> tuple[str, nn.Parameter] | None:
        """The name that the plan has for a parameter, and what became of it; None if a graph does without it."""
        shape = tuple(parameter.shape)
        if id(parameter) not in self.names:
            raise ConfigError(
                f"{kind}: holds a parameter of shape {shape} that the model does not have. "
                "Give the optimizer of this model."
            )
        names = self.names[id(parameter)]
        found = {id(self.new[name]): self.new[name] for name in names if name in self.new}
        if not found and self.graph:
            return None
        name = next((name for name in names if name in self.plan.tensors), names[0])
        if len(found) != 1:
            fact = "is several parameters" if found else "is missing"
            raise ConfigError(f"{name}: {fact} in the shrunk model. Give the result of compressing this model.")
        (new,) = found.values()
        if self.plan.cut(name, parameter.detach()).shape != new.shape:
            raise ConfigError(
                f"{name}: has shape {shape} here and {tuple(new.shape)} in the shrunk model, which the plan does not "
                "explain. Give the result of compressing this model."
            )
        return name, new


def _without(group: Mapping[str, Any], gone: set[int]) -> dict[str, Any]:
    """A group without some parameters, nor their names if it has names."""
    stays = [id(parameter) not in gone for parameter in group["params"]]
    lists = [key for key in ("params", "param_names") if key in group]
    return {**group, **{key: [item for item, stay in zip(group[key], stays, strict=True) if stay] for key in lists}}


def _cut_entry(
    entry: Mapping[Any, Any], name: str, parameter: nn.Parameter, plan: ShrinkPlan, memo: dict[int, Any]
) -> None:
    """Puts into ``memo`` what becomes of each tensor that is remembered for a parameter."""
    for key, row in entry.items() if name in plan.tensors else ():
        col = entry.get(str(key).replace("row", "col"))
        if col is not row and isinstance(row, Tensor) and isinstance(col, Tensor):
            cut = _cut_factors(row.detach(), col.detach(), name, parameter, plan)
            memo.update({} if cut is None else {id(row): cut[0], id(col): cut[1]})
    for key, value in entry.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and id(leaf) not in memo:
                memo[id(leaf)] = _cut(leaf.detach(), str(key), name, parameter, plan)


def _cut(tensor: Tensor, key: str, name: str, parameter: nn.Parameter, plan: ShrinkPlan) -> Tensor:
    """What is kept of a tensor that is remembered for a parameter as ``key``: t' = cut(t), broadcast to the parameter.

    A dimension of size one stands for all indices of the parameter's, so that any of them will do after the cut.
    """
    shape = tuple(parameter.shape)
    if name not in plan.tensors or (tensor.numel() == 1 and tensor.shape != shape):
        return tensor.clone()
    if tensor.dim() == len(shape) and all(size in (1, s) for size, s in zip(tensor.shape, shape, strict=True)):
        whole = cut = plan.cut(name, tensor.expand(shape))
        for dim in (dim for dim, size in enumerate(tensor.shape) if size != shape[dim]):
            cut = cut.narrow(dim, 0, 1)
        if torch.equal(cut.expand_as(whole), whole):  # not where the outputs of a grouped weight keep other inputs
            return cut.clone()
    raise ConfigError(
        f"{name}: {key} of its optimizer has shape {tuple(tensor.shape)}, of which a shrunk {shape} needs an unknown "
        "part. Make a new optimizer for the shrunk model."
    )


def _cut_factors(
    row: Tensor, col: Tensor, name: str, parameter: nn.Parameter, plan: ShrinkPlan
) -> tuple[Tensor, Tensor] | None:
    """The factors of what is kept of V[i, j] = row[i] col[j] / mean(row), if these are factors; else None."""
    *batch, rows, cols = (1, 1, *parameter.shape)
    batch, flat = batch[2:], row.dim() == parameter.dim() - 1
    if flat:
        row, col = row.unsqueeze(-1), col.unsqueeze(-2)
    if row.shape != (*batch, rows, 1) or col.shape != (*batch, 1, cols) or rows * cols == 1:
        return None
    types, tiny = (row.dtype, col.dtype), torch.finfo(torch.float64).tiny
    row, col = row.double(), col.double()
    estimate = plan.cut(name, row * (col / row.mean(-2, keepdim=True).clamp(min=tiny)))
    row, col = estimate.mean(-1, keepdim=True), estimate.mean(-2, keepdim=True)
    if not torch.allclose(row * (col / row.mean(-2, keepdim=True).clamp(min=tiny)), estimate, rtol=1e-6, atol=0.0):
        return None  # the outputs of a grouped weight keep other inputs
    row, col = (factor.to(dtype) for factor, dtype in zip((row, col), types, strict=True))
    return (row.squeeze(-1), col.squeeze(-2)) if flat else (row, col)

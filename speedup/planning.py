"""What lives -> a plan, and a plan -> what lives."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from speedup.analysis import Analysis, bind
from speedup.errors import PlanError
from speedup.labels import Index, Labels, Mask, support
from speedup.literals import LITERALS, Remains
from speedup.plan import Axis, ShrinkPlan


def make_plan(analysis: Analysis, live: Mask) -> ShrinkPlan:
    """Returns the plan that keeps the ``live`` classes, shape (classes,), and nothing else.

    Raises:
        PlanError: What lives is no rectangle at some node, or a pinned class would go.
    """
    classes = analysis.classes
    gone = np.flatnonzero(~live & (classes.pin_of >= 0))
    if len(gone):
        pin = classes.pins[classes.pin_of[gone[0]]]
        raise PlanError(f"{pin.node}: {len(gone)} channels that must stay would go, the first {pin.reason}. Keep them.")
    for weave in classes.weaves:
        if not weave.keeps_turns(live):
            raise PlanError(f"{weave.node}: what stays does not take turns as the shuffle does. Keep channels that do.")
    keep: dict[Axis, Index] = {}
    rows: dict[str, Index] = {}
    for name, labels in analysis.parameters.items():
        keep |= {Axis(name, dim): kept for dim, kept in enumerate(analysis.kept(name, live)) if kept is not None}
        table = _row_table(analysis, name, labels, live, keep)
        if table is not None:
            rows[name] = table
    literals: dict[str, dict[str, Any]] = {}
    for node in analysis.captured.nodes:
        rewrite = LITERALS.get(node.target)
        if rewrite is None:
            continue
        remains = Remains(analysis, live, bind(node, analysis.labels, analysis.captured.known))
        if all(classes.live_mask(labels, live) is None for labels in _around(remains)):
            continue
        new = {name: value for name, value in rewrite(remains).items() if value != _as_list(remains.raw(name))}
        if new:
            literals[node.name] = new
    return ShrinkPlan(keep, rows, literals)


def _around(remains: Remains) -> list[Labels]:
    """The tensors that go into a call and come out of it."""
    output = remains.analysis.labels[remains.call.node.name]
    return [*remains.call.tensors(), *(output if isinstance(output, list) else [output])]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _row_table(analysis: Analysis, name: str, labels: Labels, live: Mask, keep: Mapping[Axis, Index]) -> Index | None:
    """The positions that each kept output of a grouped weight keeps, or None where all stay."""
    for plane in labels.planes:
        alive = live[analysis.classes.plane(plane)]
        if alive.ndim != 2 or alive.all():
            continue
        alive = alive[keep.get(Axis(name, 0), np.arange(len(alive)))]
        counts = alive.sum(axis=1)
        if len(np.unique(counts)) > 1:
            raise PlanError(
                f"{name}: groups would keep {counts.min()} to {counts.max()} inputs. Keep the same number in each."
            )
        return np.nonzero(alive)[1].reshape(len(alive), -1) if counts[0] < alive.shape[1] else None
    return None


def live_from_keep(analysis: Analysis, plan: ShrinkPlan) -> Mask:
    """Returns which classes live, shape (classes,), when exactly what ``plan`` keeps of every axis does.

    A class is gone if any axis dropped any of its indices; a slab is gone if all of its row is.

    Raises:
        PlanError: The plan names a tensor that the model does not have.
    """
    live = np.ones(analysis.classes.count, dtype=np.bool_)
    for name in sorted(plan.tensors - analysis.parameters.keys()):
        raise PlanError(
            f"{name}: the plan keeps channels of it, which the model does not have. Use the model that was compressed."
        )
    for axis, kept in plan.keep.items():
        labels = analysis.parameters[axis.tensor]
        if not 0 <= axis.dim < len(labels.shape):
            raise PlanError(
                f"{axis.tensor}: the plan keeps indices of dimension {axis.dim}, which it does not have. "
                "Use the model that was compressed."
            )
        gone = np.setdiff1d(np.arange(labels.shape[axis.dim]), kept)
        for plane in labels.planes:
            if support(plane) == (axis.dim,):
                live[analysis.classes.plane(plane)[gone]] = False
    for name, rows in plan.rows.items():
        for plane in analysis.parameters[name].planes:
            if len(support(plane)) == 2:
                _drop_positions(live, analysis.classes.plane(plane), rows, _kept(plan, name, plane.shape[0]))
    return analysis.classes.with_slabs(live)


def _kept(plan: ShrinkPlan, name: str, size: int) -> Any:
    return plan.keep.get(Axis(name, 0), np.arange(size))


def _drop_positions(live: Mask, classes: Any, rows: Any, kept: Any) -> None:
    """Lets the classes die that kept outputs of a grouped weight do not keep."""
    stays = np.zeros((len(kept), classes.shape[1]), dtype=np.bool_)
    np.put_along_axis(stays, rows, True, axis=1)
    live[classes[kept][~stays]] = False

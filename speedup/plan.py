"""The contract between deciding and doing: of this dimension of this tensor keep these indices."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from speedup.errors import PlanError
from speedup.labels import Index


@dataclass(frozen=True, order=True)
class Axis:
    """One dimension of one parameter or buffer, by its qualified name."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class Scaled:
    """A size in the graph that depends on the batch: its value times ``new`` over ``old``."""

    new: int
    old: int


@dataclass(frozen=True)
class ShrinkPlan:
    """What is kept, and the literals of the graph that must follow.

    Attributes:
        keep: For each axis that shrinks the indices that stay, in their order.
        rows: For each grouped weight whose second dimension shrinks the positions that stay, one row for each kept
            output, shape (kept outputs, kept inputs): different groups may keep different positions.
        literals: For each node by name the arguments that change and their new values.
    """

    keep: Mapping[Axis, Index] = field(default_factory=dict)
    rows: Mapping[str, Index] = field(default_factory=dict)
    literals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Returns what is kept of ``tensor``, known to the graph as ``name``.

        Raises:
            PlanError: The plan names an index that the tensor does not have.
        """
        for axis, indices in self._by_tensor.get(name, ()):
            if axis.dim >= tensor.dim() or (
                len(indices) and not 0 <= indices.min() <= indices.max() < tensor.shape[axis.dim]
            ):
                raise PlanError(
                    f"{name}: the plan keeps index {indices.max()} of dimension {axis.dim}, but its shape is "
                    f"{tuple(tensor.shape)}. Use the model that the plan was made for."
                )
            tensor = tensor.index_select(axis.dim, torch.as_tensor(indices, device=tensor.device))
        if name in self.rows:
            rows = self.rows[name]
            if len(rows) != len(tensor) or tensor.dim() < 2 or not 0 <= rows.min() <= rows.max() < tensor.shape[1]:
                raise PlanError(
                    f"{name}: the plan keeps inputs of {len(rows)} outputs, up to {rows.max()}, but what "
                    f"is left has shape {tuple(tensor.shape)}. Use the model that the plan was made for."
                )
            where = torch.as_tensor(rows, device=tensor.device)
            where = where.reshape(*where.shape, *(1,) * (tensor.dim() - 2))
            tensor = tensor.gather(1, where.expand(*where.shape[:2], *tensor.shape[2:]))
        return tensor

    @cached_property
    def _by_tensor(self) -> Mapping[str, list[tuple[Axis, Index]]]:
        found: dict[str, list[tuple[Axis, Index]]] = {}
        for axis, indices in self.keep.items():
            found.setdefault(axis.tensor, []).append((axis, indices))
        return found

    def cut_copy(self, name: str, tensor: Tensor) -> Tensor:
        """Returns what is kept of ``tensor`` as a new tensor; of a parameter as a parameter."""
        cut = self.cut(name, tensor.detach()).clone()
        return nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut

    def of(self, names: Container[str]) -> "ShrinkPlan":
        """Returns what it says of the tensors in ``names``, and its literals."""
        keep = {axis: indices for axis, indices in self.keep.items() if axis.tensor in names}
        return ShrinkPlan(keep, {name: rows for name, rows in self.rows.items() if name in names}, self.literals)

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the tensors that shrink."""
        return frozenset({axis.tensor for axis in self.keep} | set(self.rows))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        keep: dict[str, dict[str, list[int]]] = {}
        for axis in sorted(self.keep):
            keep.setdefault(axis.tensor, {})[str(axis.dim)] = self.keep[axis].tolist()
        rows = {name: self.rows[name].tolist() for name in sorted(self.rows)}
        literals = {node: {k: _plain(v) for k, v in new.items()} for node, new in self.literals.items()}
        return {"keep": keep, "rows": rows, "literals": literals}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ShrinkPlan":
        """The plan that :meth:`to_json` wrote.

        Raises:
            PlanError: The data are not those of a plan.
        """
        try:
            keep = {
                Axis(name, int(dim)): np.asarray(indices, dtype=np.int64)
                for name, dims in data["keep"].items()
                for dim, indices in dims.items()
            }
            rows = {name: np.asarray(table, dtype=np.int64) for name, table in data["rows"].items()}
            literals = {node: {k: _literal(v) for k, v in new.items()} for node, new in data["literals"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"plan: is not the plan of a shrunk model ({error!r}). Compress the model again."
            ) from error
        return cls(keep, rows, literals)


def _plain(value: Any) -> Any:
    if isinstance(value, fx.Node):  # a size of the dense graph that stays as it is
        value = Scaled(1, 1)
    if isinstance(value, Scaled):
        return {"new": value.new, "old": value.old}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _literal(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Scaled(int(value["new"]), int(value["old"]))
    return [_literal(item) for item in value] if isinstance(value, list) else value

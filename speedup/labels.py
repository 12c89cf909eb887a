"""Labels instead of numbers: atoms, and the planes that say where in a tensor they stand.

Every index of every parameter dimension is an *atom*, a number. A tensor of the graph carries *planes*: integer
tensors expanded to its shape that say to which atom an element belongs. A plane varies along its *support* only
and has stride 0 elsewhere, so it costs next to nothing. An element goes when any of its atoms goes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Plane = Tensor
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Labels:
    """What is known of one tensor: its shape, and its planes, each expanded to that shape."""

    shape: tuple[int, ...]
    planes: tuple[Plane, ...] = ()

    @property
    def covered(self) -> set[int]:
        """The dimensions along which some plane varies."""
        return {dim for plane in self.planes for dim in support(plane)}

    @property
    def fixed(self) -> set[int]:
        """The dimensions that have size but no plane: their content cannot shrink; an empty tensor has no content."""
        if 0 in self.shape:
            return set()
        return {dim for dim, size in enumerate(self.shape) if size > 1} - self.covered

    def along(self, dim: int) -> tuple[Plane, ...]:
        """The planes that vary along ``dim``."""
        return tuple(plane for plane in self.planes if dim in support(plane))


def support(plane: Plane) -> tuple[int, ...]:
    """The dimensions along which ``plane`` varies."""
    return tuple(
        d for d, (size, stride) in enumerate(zip(plane.shape, plane.stride(), strict=True)) if size > 1 and stride
    )


def core(plane: Plane, dims: Sequence[int] | None = None) -> Tensor:
    """``plane`` restricted to ``dims`` (its support by default): shape = the sizes of those dimensions."""
    dims = support(plane) if dims is None else dims
    return plane[tuple(slice(None) if dim in dims else 0 for dim in range(plane.dim()))]


def settle(plane: Plane) -> Plane:
    """``plane`` with stride 0 along every dimension along which its labels are constant."""
    for dim in support(plane):
        first = plane.narrow(dim, 0, 1)
        if torch.equal(plane, first.expand_as(plane)):
            plane = first.expand_as(plane)
    return narrowed(plane).expand(plane.shape)


def narrowed(plane: Plane, keep: Iterable[int] = ()) -> Plane:
    """``plane`` with size 1 along the dimensions that are neither in its support nor in ``keep``."""
    wanted = {*support(plane), *keep}
    return plane[tuple(slice(None) if dim in wanted else slice(0, 1) for dim in range(plane.dim()))]


def broadcast(labels: Labels, shape: tuple[int, ...]) -> Labels:
    """``labels`` with leading dimensions of size 1 added until its rank is that of ``shape``."""
    missing = len(shape) - len(labels.shape)
    index = (None,) * missing + (...,)
    return Labels((1,) * missing + labels.shape, tuple(plane[index] for plane in labels.planes))


def factor(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Returns the shortest runs of old and new dimensions that hold the same number of elements, in order."""
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        have = old[i] if left else 1
        want = new[j] if right else 1
        i, j = i + len(left), j + len(right)
        while have != want:
            if (have < want and i < len(old)) or j >= len(new):
                have *= old[i]
                left.append(i)
                i += 1
            else:
                want *= new[j]
                right.append(j)
                j += 1
        runs.append((left, right))
    return runs


def rows_first(plane: Plane, rows: Sequence[int]) -> Index:
    """The labels of ``plane`` over its support as a table: its dimensions ``rows`` down, the others across."""
    dims = support(plane)
    order = [dims.index(row) for row in rows] + [i for i, dim in enumerate(dims) if dim not in rows]
    return flat(core(plane).permute(order)).reshape(int(np.prod([plane.shape[row] for row in rows])), -1)


def flat(labels: Tensor) -> Index:
    """The labels of a tensor in row-major order."""
    return labels.reshape(-1).numpy()

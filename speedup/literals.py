"""The operators that carry sizes in their arguments, and the sizes they carry when only some channels are left.

One table: operator -> function of the call and what lives -> the arguments that change. Entries of a size list that
are graph nodes (multiples of the batch) become :class:`~speedup.plan.Scaled`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from speedup.analysis import Analysis
from speedup.errors import PlanError
from speedup.labels import Index, Labels, Mask
from speedup.plan import Scaled
from speedup.rules import Call

aten = torch.ops.aten


@dataclass(frozen=True)
class Remains:
    """A call together with what lives of its tensors."""

    analysis: Analysis
    live: Mask
    call: Call

    @property
    def outputs(self) -> list[tuple[int, ...]]:
        """Shapes of the outputs after the shrink."""
        labels = self.analysis.labels[self.call.node.name]
        return [self.shape(item) for item in (labels if isinstance(labels, list) else [labels])]

    def shape(self, labels: Labels) -> tuple[int, ...]:
        """Shape of a tensor after the shrink."""
        return self.analysis.classes.live_shape(labels, self.live, self.call.node.name)

    def alive(self, labels: Labels, dim: int) -> Mask:
        """Which indices along ``dim`` of a tensor live, shape (size of the dimension,)."""
        mask = self.analysis.classes.live_mask(labels, self.live)
        if mask is None or mask.shape[dim] == 1:
            return np.ones(labels.shape[dim], dtype=np.bool_)
        others = tuple(d for d in range(mask.dim()) if d != dim)
        found: Mask = (mask.any(dim=others) if others else mask).numpy()
        return found

    def raw(self, name: str) -> Any:
        """Argument ``name`` as the graph has it."""
        return self.call.raw(name)


def _resized(entries: Sequence[Any], old: Sequence[int], new: Sequence[int]) -> list[Any]:
    """The entries of a size list after the shrink; -1 stays what it is."""
    result: list[Any] = []
    for entry, before, after in zip(entries, old, new, strict=True):
        if isinstance(entry, fx.Node):
            result.append(entry if before == after else Scaled(after, before))
        else:
            result.append(entry if entry == -1 else after)
    return result


def _sizes(name: str) -> Callable[[Remains], dict[str, Any]]:
    def rewrite(remains: Remains) -> dict[str, Any]:
        return {name: _resized(remains.raw(name), remains.call.shape, remains.outputs[0])}

    return rewrite


def _unflatten(remains: Remains) -> dict[str, Any]:
    entries = remains.raw("sizes")
    dim = remains.call.dim(len(remains.call.tensors()[0].shape))
    part = slice(dim, dim + len(entries))
    return {"sizes": _resized(entries, remains.call.shape[part], remains.outputs[0][part])}


def _normalized_shape(remains: Remains) -> dict[str, Any]:
    count = len(remains.raw("normalized_shape"))
    return {"normalized_shape": list(remains.shape(remains.call.tensors()[0])[-count:])}


def _groups(name: str) -> Callable[[Remains], dict[str, Any]]:
    def rewrite(remains: Remains) -> dict[str, Any]:
        x = remains.call.tensors()[0]
        dim = (
            1 if len(x.shape) > 1 and (name == "num_groups" or len(x.shape) == len(remains.call["weight"].shape)) else 0
        )
        rows = remains.alive(x, dim).reshape(int(remains.call[name]), -1)
        return {name: int(rows.any(axis=1).sum())}

    return rewrite


def _shuffled(remains: Remains) -> dict[str, Any]:
    rows = remains.alive(remains.call["self"], 1).reshape(int(remains.call["groups"]), -1)
    return {"groups": int(rows.any(axis=1).sum())}


def _split(remains: Remains) -> dict[str, Any]:
    """Equal parts stay with the operator; others become explicit sizes."""
    dim = remains.call.dim(len(remains.call.shape))
    parts = [shape[dim] for shape in remains.outputs]
    target = remains.call.node.target
    if target is aten.chunk.default and parts == _chunks(sum(parts), int(remains.call["chunks"])):
        return {}
    if target is aten.tensor_split.sections and parts == _sections(sum(parts), int(remains.call["sections"])):
        return {}
    if target is aten.split.Tensor and parts[:-1] == parts[:1] * (len(parts) - 1) and 0 < parts[-1] <= parts[0]:
        return {"split_size": parts[0]}
    return {"split_size" if target is aten.split.sizes else "split_sizes": parts}


def _chunks(size: int, count: int) -> list[int]:
    """The sizes into which ``chunk`` cuts a dimension."""
    step = max(-(-size // count), 1)
    return [min(step, size - start) for start in range(0, size, step)]


def _sections(size: int, count: int) -> list[int]:
    """The sizes into which ``tensor_split`` cuts a dimension."""
    return [size // count + (place < size % count) for place in range(count)]


def _slice(remains: Remains) -> dict[str, Any]:
    x = remains.call["self"]
    alive = remains.alive(x, remains.call.dim(len(x.shape)))
    if alive.all():
        return {}
    bounds = slice(remains.call.get("start", 0), remains.call.get("end"), remains.call["step"])
    start, end, step = bounds.indices(len(alive))
    if step > 1:  # the first that is left of those taken: others may be left before it and after ``start``
        start += step * int(alive[start:end:step].argmax())
    return {
        "start": _bound(remains.raw("start"), start, alive) if start else remains.raw("start"),
        "end": _bound(remains.raw("end"), end, alive) if end < len(alive) else remains.raw("end"),
    }


def _bound(raw: Any, place: int, alive: Mask) -> Any:
    """Where ``place`` is in what is left; what was counted from the end, or in batches, still is."""
    before = int(alive[:place].sum())
    if isinstance(raw, fx.Node):
        return Scaled(before, place)
    return before - int(alive.sum()) if isinstance(raw, int) and raw < 0 and before < alive.sum() else before


def _select(remains: Remains) -> dict[str, Any]:
    x = remains.call["self"]
    alive = remains.alive(x, remains.call.dim(len(x.shape)))
    place = int(remains.call["index"]) % len(alive)
    if not alive[place]:
        raise PlanError(f"{remains.call.node.name}: the index it takes would be removed. Keep index {place}.")
    return {"index": _bound(remains.raw("index"), place, alive)}


def _chosen(alive: Mask, index: Index) -> list[int]:
    """A constant index into what is left: entries that are gone dropped, the others renumbered."""
    wrapped = index % len(alive)
    return [int(place) for place in (np.cumsum(alive) - 1)[wrapped[alive[wrapped]]]]


def _index_select(remains: Remains) -> dict[str, Any]:
    x = remains.call["self"]
    alive = remains.alive(x, remains.call.dim(len(x.shape)))
    if alive.all() or "index" not in remains.call.constants:
        return {}
    return {"index": _chosen(alive, remains.call.constants["index"].numpy())}


def _index(remains: Remains) -> dict[str, Any]:
    """A single constant index; tables pin what they index and need no change."""
    for dim, values in remains.call.constants.get("indices", {}).items():
        alive = remains.alive(remains.call["self"], dim)
        if not alive.all():
            return {"indices": [None] * dim + [_chosen(alive, values.numpy())]}
    return {}


def _roll(remains: Remains) -> dict[str, Any]:
    x = remains.call["self"]
    shifts = list(remains.call["shifts"])
    dims = remains.call.dims(len(x.shape), "dims")
    if remains.call["dims"]:
        for i, dim in enumerate(dims):
            alive = remains.alive(x, dim)
            if not alive.all():
                shifts[i] = int(alive[len(alive) - shifts[i] % len(alive) :].sum())
    return {"shifts": shifts}


def _repeat(remains: Remains) -> dict[str, Any]:
    """Where a dimension of size 1 is repeated its repeats shrink; elsewhere what is repeated does."""
    repeats = list(remains.raw("repeats"))
    x, out = remains.call["self"], remains.outputs[0]
    missing = len(repeats) - len(x.shape)
    for dim, entry in enumerate(repeats):
        grows = dim < missing or x.shape[dim - missing] == 1
        if grows and not isinstance(entry, fx.Node) and out[dim] != remains.call.shape[dim]:
            repeats[dim] = out[dim]
    return {"repeats": repeats}


def _pad(remains: Remains) -> dict[str, Any]:
    amounts = list(remains.raw("pad"))
    x = remains.call["self"]
    output = remains.analysis.labels[remains.call.node.name]
    assert isinstance(output, Labels)
    for i in range(len(amounts) // 2):
        dim = len(x.shape) - 1 - i
        if not x.along(dim):
            continue
        inside, outside = remains.alive(x, dim), remains.alive(output, dim)
        before, after = amounts[2 * i], amounts[2 * i + 1]
        amounts[2 * i] = int(outside[:before].sum()) if before > 0 else -int(inside[: -before or 0].sum())
        amounts[2 * i + 1] = (
            int(outside[len(outside) - after :].sum()) if after > 0 else -int(inside[len(inside) + after :].sum())
        )
    return {"pad": amounts}


def _scale(remains: Remains) -> dict[str, Any]:
    """The implicit 1 / sqrt(width of a head) stays what it was."""
    width = remains.call["query"].shape[-1]
    if remains.call.get("scale") is not None or remains.shape(remains.call["query"])[-1] == width:
        return {}
    return {"scale": float(width) ** -0.5}


_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip

_SPLITS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default,
    aten.tensor_split.sections, aten.tensor_split.indices,
)  # fmt: skip

LITERALS: Mapping[Any, Callable[[Remains], dict[str, Any]]] = {
    aten.view.default: _sizes("size"),
    aten._unsafe_view.default: _sizes("size"),
    aten.reshape.default: _sizes("shape"),
    aten.unflatten.int: _unflatten,
    aten.expand.default: _sizes("size"),
    aten.broadcast_to.default: _sizes("size"),
    **dict.fromkeys((aten.zeros.default, aten.ones.default, aten.full.default), _sizes("size")),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), _sizes("size")),
    **dict.fromkeys((aten.empty.memory_format, aten.new_empty.default), _sizes("size")),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _normalized_shape),
    **dict.fromkeys(_CONVOLUTIONS, _groups("groups")),
    aten.group_norm.default: _groups("num_groups"),
    aten.channel_shuffle.default: _shuffled,
    **dict.fromkeys(_SPLITS, _split),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.roll.default: _roll,
    aten.repeat.default: _repeat,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    aten.scaled_dot_product_attention.default: _scale,
}

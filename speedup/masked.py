"""Operators in double precision, on whole tensors and on masked ones: norms, means and variances count what is left."""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from speedup.analysis import Analysis
from speedup.inputs import batch_size
from speedup.labels import Labels, Mask
from speedup.rules import rule_for
from speedup.rules.call import raw_argument

aten = torch.ops.aten
UNSET = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default)
"""Operators whose content is whatever memory held; the proof takes zeros."""


def execute(node: fx.Node, values: Mapping[str, Any]) -> Any:
    """Runs one call on exact values: floating types named in its arguments become double, devices the CPU."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
    args, kwargs = pytree.tree_map(_exact, (tuple(args), dict(kwargs)))
    if node.target in _EXACTLY:
        return _EXACTLY[node.target](*args, **kwargs)
    if node.target in UNSET:
        return torch.zeros_like(node.target(*args, **kwargs))
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # both graphs draw the same numbers
            return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function nodes hold callables
    return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function nodes hold callables


def _grouped_product(x: Tensor, weight: Tensor, offs: Tensor, *rest: Any) -> Tensor:
    """y[t] = x[t] @ W[e] for the tokens t of expert e, which end at offs[e]; those after the last one get zeros."""
    result = x.new_zeros(len(x), weight.shape[-1])
    start = 0
    for expert, end in zip(weight, offs.tolist(), strict=True):
        result[start:end] = x[start:end] @ expert
        start = end
    return result


def _distances(x: Tensor, other: Tensor, p: float = 2.0, *rest: Any) -> Tensor:
    """Distances, not by a product of the two: that cancels out."""
    found: Tensor = aten.cdist.default(x, other, p, 2)
    return found


_EXACTLY: Mapping[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped_product,
    aten.cdist.default: _distances,
}
"""In double precision, operators that PyTorch has for coarse types only or computes coarsely."""


def _exact(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.dtype) and value.is_complex:
        return torch.complex128
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _masked_layer_norm(node: fx.Node, values: Mapping[str, Any], mask: Tensor) -> Tensor:
    x, shape = _arguments(node, values, "normalized_shape")
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * mask).sum(dims, keepdim=True) / count
    if node.target is aten.rms_norm.default:
        mean = torch.zeros_like(mean)
    var = ((x - mean) ** 2 * mask).sum(dims, keepdim=True) / count
    eps = raw_argument(node, "eps")
    if eps is None:
        default = next(a.default_value for a in node.target._schema.arguments if a.name == "eps")  # type: ignore[union-attr]  # an OpOverload
        eps = torch.finfo(torch.float64).eps if default is None else default
    return _affine((x - mean) / (var + eps).sqrt(), node, values)


def _masked_group_norm(node: fx.Node, values: Mapping[str, Any], mask: Tensor) -> Tensor:
    x, groups = _arguments(node, values, "num_groups")
    parts, kept = (t.reshape(x.shape[0], groups, -1) for t in (x, mask))
    count = kept.sum(-1, keepdim=True).clamp(min=1)
    mean = (parts * kept).sum(-1, keepdim=True) / count
    var = ((parts - mean) ** 2 * kept).sum(-1, keepdim=True) / count
    eps = raw_argument(node, "eps")
    normal = ((parts - mean) / (var + (1e-5 if eps is None else eps)).sqrt()).reshape(x.shape)
    return _affine(normal, node, values, channels=True)


def _masked_batch_norm(node: fx.Node, values: Mapping[str, Any], mask: Tensor) -> Tensor:
    if not raw_argument(node, "training"):
        result: Tensor = execute(node, values)
        return result
    x, eps = _arguments(node, values, "eps")
    dims = [dim for dim in range(x.dim()) if dim != 1]
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * mask).sum(dims, keepdim=True) / count
    var = ((x - mean) ** 2 * mask).sum(dims, keepdim=True) / count
    return _affine((x - mean) / (var + eps).sqrt(), node, values, channels=True)


def _affine(x: Tensor, node: fx.Node, values: Mapping[str, Any], channels: bool = False) -> Tensor:
    for name, combine in (("weight", operator.mul), ("bias", operator.add)):
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # an OpOverload
        source = raw_argument(node, name) if name in names else None
        if isinstance(source, fx.Node):
            vector = values[source.name]
            x = combine(x, vector.reshape(-1, *(1,) * (x.dim() - 2)) if channels else vector)
    return x


def _arguments(node: fx.Node, values: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return values[source.name], raw_argument(node, name)


def _masked_moments(node: fx.Node, values: Mapping[str, Any], mask: Tensor) -> Any:
    """Mean, variance or standard deviation over what is left."""
    x, dim = _arguments(node, values, "dim") if _has(node, "dim") else (*_arguments(node, values, "self")[:1], None)
    dims = (
        tuple(range(x.dim())) if dim is None or dim == [] else tuple(dim) if isinstance(dim, list | tuple) else (dim,)
    )
    keepdim = bool(raw_argument(node, "keepdim")) if _has(node, "keepdim") else False
    count = mask.sum(dims, keepdim=True)
    mean = (x * mask).sum(dims, keepdim=True) / count.clamp(min=1)
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]  # an OpOverload
    results = [mean]
    if name != "mean":
        correction = raw_argument(node, "correction") if _has(node, "correction") else raw_argument(node, "unbiased")
        correction = 1 if correction is None else int(correction)
        var = ((x - mean) ** 2 * mask).sum(dims, keepdim=True) / (count - correction).clamp(min=1)
        spread = var.sqrt() if name.startswith("std") else var
        results = [spread, mean] if name.endswith("_mean") else [spread]
    results = [result if keepdim else result.squeeze(dims) for result in results]
    return results if len(results) > 1 else results[0]


def _masked_distance(node: fx.Node, values: Mapping[str, Any], mask: Tensor) -> Tensor:
    """The eps that is added to every difference counts for what is left only."""
    first, second = (values[source.name] for source in node.args[:2] if isinstance(source, fx.Node))
    gap = (first - second + raw_argument(node, "eps")) * mask
    result: Tensor = torch.linalg.vector_norm(gap, raw_argument(node, "p"), -1, bool(raw_argument(node, "keepdim")))
    return result


def _has(node: fx.Node, name: str) -> bool:
    return any(argument.name == name for argument in node.target._schema.arguments)  # type: ignore[union-attr]  # an OpOverload


MASKED: Mapping[Any, Callable[[fx.Node, Mapping[str, Any], Tensor], Any]] = {
    aten.layer_norm.default: _masked_layer_norm,
    aten.rms_norm.default: _masked_layer_norm,
    aten.group_norm.default: _masked_group_norm,
    aten.batch_norm.default: _masked_batch_norm,
    aten.pairwise_distance.default: _masked_distance,
    **dict.fromkeys(
        (
            aten.mean.default, aten.mean.dim, aten.var.correction, aten.std.correction, aten.var_mean.correction,
            aten.std_mean.correction, aten.var.dim, aten.std.dim,
        ),
        _masked_moments,
    ),
}  # fmt: skip
"""The operators whose masked form is not the operator on masked values."""


def masked(analysis: Analysis, live: Mask, node: fx.Node, values: Mapping[str, Any]) -> Any:
    """Runs one call of the masked original: what is gone of its operands is zero in ``values``, and is in the result.

    Args:
        analysis: The captured model and its labels.
        live: Which classes live, shape (classes,).
        node: A call of its graph.
        values: What every node before it holds, exact.
    """
    rule = rule_for(node.target)
    special = MASKED.get(node.target)
    source = node.args[0].name if node.args and isinstance(node.args[0], fx.Node) else None
    before = analysis.labels.get(source) if source is not None else None
    inside = None
    if special is not None and isinstance(before, Labels):
        inside = analysis.classes.live_mask(before, live)
    if inside is not None and special is not None and source is not None:
        result = special(
            node, values, at_batch(inside, values[source].shape, batch_size(analysis.captured.flat_inputs()))
        )
    else:
        result = execute(node, values)
    if rule is not None and rule.moves:
        return result
    return silenced(analysis, live, result, analysis.labels[node.name], in_place=is_in_place(node))


def silenced(analysis: Analysis, live: Mask, value: Any, labels: Any, *, in_place: bool = False) -> Any:
    """Returns ``value``, a tensor or a list of them, with zeros where something is gone.

    Args:
        analysis: The captured model and its labels.
        live: Which classes live, shape (classes,).
        value: What a node holds.
        labels: Its labels.
        in_place: Whether the tensor itself gets the zeros, so that what shares its memory has them too.
    """
    if isinstance(value, list | tuple) and isinstance(labels, list):
        return [
            silenced(analysis, live, item, label, in_place=in_place) for item, label in zip(value, labels, strict=False)
        ]
    if not isinstance(value, Tensor) or not isinstance(labels, Labels):
        return value
    mask = analysis.classes.live_mask(labels, live)
    if mask is None:
        return value
    mask = at_batch(mask, value.shape, batch_size(analysis.captured.flat_inputs()))
    return value.masked_fill_(~mask, 0) if in_place else value.masked_fill(~mask, 0)


def at_batch(mask: Tensor, shape: torch.Size, batch: int) -> Tensor:
    """Returns a mask of a tensor at batch size ``batch`` for one of ``shape``, at any other.

    Where the batch is merged with channels, it is their outer dimension or their inner one: whichever fits.

    Raises:
        BatchError: Both fit, and are not the same, or neither does.
    """
    for dim, size in enumerate(shape):
        old = mask.shape[dim]
        if old in (1, size):
            continue
        rows = torch.unflatten(mask, dim, (batch, -1)) if old % batch == 0 and size % (old // batch) == 0 else None
        if rows is None:
            raise BatchError(dim)
        others = [1] * mask.dim()
        others[dim] = size * batch // old
        outer = torch.equal(rows, rows.narrow(dim, 0, 1).expand_as(rows))
        turns = torch.unflatten(mask, dim, (-1, batch))
        inner = torch.equal(turns, turns.narrow(dim + 1, 0, 1).expand_as(turns))
        found = [rows.select(dim, 0).repeat(others)] if outer else []
        found += [turns.select(dim + 1, 0).repeat_interleave(others[dim], dim)] if inner else []
        if not found or not torch.equal(found[0], found[-1]):
            raise BatchError(dim)
        mask = found[0]
    return mask.expand(shape)


class BatchError(Exception):
    """It is not known what lives of a tensor at another batch size."""


def is_in_place(node: fx.Node) -> bool:
    """Whether a call writes to one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


@contextmanager
def exact_defaults() -> Iterator[None]:
    """Makes double the type of tensors that a graph makes without naming one."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)

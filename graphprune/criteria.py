"""Criteria: a score for every channel; the lowest go first.

A criterion looks at the slices of all parameters that carry a channel, summed over everything that is coupled. All
of them are vectorised over the channels of the whole model: they return one number for each label class.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from speedup.analysis import Analysis
from speedup.capture import attribute
from speedup.labels import Index, Plane, support
from speedup.rules.call import raw_argument

Scores = NDArray[np.float64]
CriterionName = Literal["l1", "l2", "fpgm", "bn_scale", "random"]
Criterion = Callable[[Analysis, int], Scores]

_PART = 1 << 24
"""Elements that are worked on at once."""

aten = torch.ops.aten
_NORMS = (
    aten.batch_norm.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.instance_norm.default,
    aten.rms_norm.default,
)


def l1(analysis: Analysis, seed: int) -> Scores:
    """Sum |W_c| over every coupled slice (Li et al., Pruning Filters for Efficient ConvNets, 2017)."""
    return _summed(analysis, partial(_in_parts, Tensor.abs))


def l2(analysis: Analysis, seed: int) -> Scores:
    """sqrt(sum W_c^2) over every coupled slice."""
    return np.sqrt(_summed(analysis, partial(_in_parts, Tensor.square)))


def fpgm(analysis: Analysis, seed: int) -> Scores:
    """sum_j norm2(W_c - W_j): slices close to the geometric median go first (He et al., FPGM, 2019)."""

    def spread(weight: Tensor, dims: list[int]) -> Tensor:
        weight = _single(weight)
        kept = [dim for dim in range(weight.dim()) if dim not in dims]  # two: the inputs of each output of a group
        slices = weight.permute(*kept, *dims).reshape(*(weight.shape[dim] for dim in kept), -1).double()
        norms = slices.square().sum(-1)
        both = norms[..., :, None] + norms[..., None, :]
        squares = both - 2 * slices @ slices.mT
        return squares.where(squares > 1e-12 * both, 0.0).sqrt().sum(-1)  # what is left of equal slices is rounding

    return _summed(analysis, spread)


def bn_scale(analysis: Analysis, seed: int) -> Scores:
    """|gamma| of the norms that scale a channel (Liu et al., Network Slimming, 2017); nan where there is none."""
    scores = np.zeros(analysis.classes.count)
    seen = np.zeros(analysis.classes.count, dtype=np.bool_)
    for node in analysis.captured.nodes:
        weight = raw_argument(node, "weight") if node.target in _NORMS else None
        if not isinstance(weight, torch.fx.Node) or weight.op != "get_attr":
            continue
        name = analysis.aliases[str(weight.target)]
        gamma = analysis.captured.tensor(name).detach().double().abs().cpu()
        for plane in analysis.parameters[name].planes:
            others = [dim for dim in range(gamma.dim()) if dim not in support(plane)]
            where = analysis.classes.plane(plane)
            np.add.at(scores, where, (gamma.sum(others) if others else gamma).numpy())
            seen[where] = True
    return np.where(seen, scores, np.nan)


def random(analysis: Analysis, seed: int) -> Scores:
    """Uniform numbers from ``seed``: the control that every other criterion should beat."""
    return np.random.default_rng(seed).random(analysis.classes.count)


CRITERIA: Mapping[str, Criterion] = {"l1": l1, "l2": l2, "fpgm": fpgm, "bn_scale": bn_scale, "random": random}


def _in_parts(of: Callable[[Tensor], Tensor], weight: Tensor, dims: list[int]) -> Tensor:
    """Sums ``of`` every element over ``dims``, some rows at a time, to need little more memory than the weight."""
    rows = max(1, _PART // max(1, weight[:1].numel()))
    parts = (of(_single(weight[start : start + rows])) for start in range(0, len(weight), rows))
    sums = [part.sum(dims) if dims else part for part in parts]
    return torch.stack(sums).sum(0) if 0 in dims else torch.cat(sums)


def _single(weight: Tensor) -> Tensor:
    """``weight`` in single precision at least."""
    return weight.float() if weight.dtype.itemsize < 4 else weight


def _weights(analysis: Analysis) -> Iterator[tuple[Tensor, Plane]]:
    """Every learned weight of two dimensions or more with each of its planes that is not fixed, one after the other."""
    pinned: Index = analysis.classes.pin_of
    for name, labels in analysis.parameters.items():
        held = attribute(analysis.captured.graph_module, name)
        planes = [plane for plane in labels.planes if (pinned[analysis.classes.plane(plane)] < 0).any()]
        if isinstance(held, nn.Parameter) and held.dim() > 1 and planes:
            weight = analysis.captured.tensor(name).detach()
            for plane in planes:
                yield weight, plane


def _summed(analysis: Analysis, score: Callable[[Tensor, list[int]], Tensor]) -> Scores:
    """Adds up for each class what ``score`` says of a weight after reducing the dimensions it is given."""
    scores = np.zeros(analysis.classes.count)
    for weight, plane in _weights(analysis):
        others = [dim for dim in range(weight.dim()) if dim not in support(plane)]
        np.add.at(scores, analysis.classes.plane(plane), score(weight, others).double().cpu().numpy())
    return scores

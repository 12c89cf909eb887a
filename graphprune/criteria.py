"""Criteria: a score for every channel; the lowest go first.

A criterion looks at the slices of all parameters that carry a channel, summed over everything that is coupled, or at
what evidence says of its activations and gradients. All of them are vectorised over the channels of the whole model:
they return one number for each label class.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphprune.evidence import NOTHING, Evidence, Need
from speedup.analysis import Analysis
from speedup.capture import attribute
from speedup.labels import Index, Plane, support
from speedup.rules.call import raw_argument

Scores = NDArray[np.float64]
CriterionName = Literal["l1", "l2", "fpgm", "bn_scale", "apoz", "mean_activation", "taylor", "random"]

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


@dataclass(frozen=True)
class Criterion:
    """What scores a channel.

    Attributes:
        score: Gives a score for each class from the model and what else is known of it, shape (classes,); nan where it
            has nothing to say. With ``produced`` only the slices count whose operators produce the channels, as in the
            manuals of NNI, instead of all that are coupled.
        need: What it has to know beside the weights.
        absolute: Whether scores of different groups mean the same, so that a ranking of several compares them as they
            are.
    """

    score: Callable[[Analysis, Evidence, bool], Scores]
    need: Need = "weights"
    absolute: bool = False

    def __call__(self, analysis: Analysis, evidence: Evidence = NOTHING, *, produced: bool = False) -> Scores:
        """The score of each class."""
        return self.score(analysis, evidence, produced)


def l1(weight: Tensor, dims: list[int]) -> Tensor:
    """Sum |W_c| (Li et al., Pruning Filters for Efficient ConvNets, 2017)."""
    return _in_parts(Tensor.abs, weight, dims)


def l2(weight: Tensor, dims: list[int]) -> Tensor:
    """Sum W_c^2, whose root is the norm of one slice."""
    return _in_parts(Tensor.square, weight, dims)


def fpgm(weight: Tensor, dims: list[int]) -> Tensor:
    """sum_j norm2(W_c - W_j): slices close to the geometric median go first (He et al., FPGM, 2019)."""
    weight = _single(weight)
    kept = [dim for dim in range(weight.dim()) if dim not in dims]  # two: the inputs of each output of a group
    slices = weight.permute(*kept, *dims).reshape(*(weight.shape[dim] for dim in kept), -1).double()
    norms = slices.square().sum(-1)
    both = norms[..., :, None] + norms[..., None, :]
    squares = both - 2 * slices @ slices.mT
    return squares.where(squares > 1e-12 * both, 0.0).sqrt().sum(-1)  # what is left of equal slices is rounding


SLICES: Mapping[str, tuple[Callable[[Tensor, list[int]], Tensor], Callable[[Scores], Scores]]] = {
    "l1": (l1, np.asarray),
    "l2": (l2, np.sqrt),
    "fpgm": (fpgm, np.asarray),
}
"""Criteria that look at slices of weights: what is summed over the slice of a channel, and what is made of the sum.

The scores of all slices that are coupled are added up.
"""


def bn_scale(analysis: Analysis, evidence: Evidence, produced: bool) -> Scores:
    """|gamma| of the norms that scale a channel (Liu et al., Network Slimming, 2017); nan where there is none."""
    scores = np.zeros(analysis.classes.count)
    seen = np.zeros(analysis.classes.count, dtype=np.bool_)
    for _, where, gamma in norm_scales(analysis):
        np.add.at(scores, where, gamma)
        seen[where] = True
    return np.where(seen, scores, np.nan)


def norm_scales(analysis: Analysis) -> Iterator[tuple[str, Index, Scores]]:
    """For each norm its scale by canonical name, the classes that it scales, and |gamma| for each of them."""
    for node in analysis.captured.nodes:
        weight = raw_argument(node, "weight") if node.target in _NORMS else None
        if not isinstance(weight, torch.fx.Node) or weight.op != "get_attr":
            continue
        name = analysis.aliases[str(weight.target)]
        gamma = analysis.captured.tensor(name).detach().double().abs().cpu()
        for plane in analysis.parameters[name].planes:
            others = [dim for dim in range(gamma.dim()) if dim not in support(plane)]
            yield name, analysis.classes.plane(plane), (gamma.sum(others) if others else gamma).numpy()


def apoz(analysis: Analysis, evidence: Evidence, produced: bool) -> Scores:
    """1 - APoZ, the share of activations that are not zero (Hu et al., Network Trimming, 2016)."""
    assert evidence.active is not None
    return evidence.active


def mean_activation(analysis: Analysis, evidence: Evidence, produced: bool) -> Scores:
    """The mean activation (Molchanov et al., Pruning CNNs for Resource Efficient Inference, 2017, section 2.2)."""
    assert evidence.means is not None
    return evidence.means


def taylor(analysis: Analysis, evidence: Evidence, produced: bool) -> Scores:
    """sum (g * w)^2 over the slices, averaged over batches (Molchanov et al., Importance Estimation, 2019)."""
    return _summed(analysis, partial(_in_parts, Tensor.abs), produced, evidence.saliency)


def learned_scores(scores: Mapping[str, Tensor]) -> Criterion:
    """Returns the criterion that adds up scores of single elements, by qualified name of a weight, over the slices."""

    def score(analysis: Analysis, evidence: Evidence, produced: bool) -> Scores:
        found = {analysis.aliases[name]: tensor for name, tensor in scores.items() if name in analysis.aliases}
        return _summed(analysis, partial(_in_parts, Tensor.detach), produced, found)

    return Criterion(score)


def random(analysis: Analysis, evidence: Evidence, produced: bool) -> Scores:
    """Uniform numbers from the seed: the control that every other criterion should beat."""
    return np.random.default_rng(evidence.seed).random(analysis.classes.count)


def _of_slices(name: str) -> Criterion:
    of_slice, finish = SLICES[name]
    return Criterion(lambda analysis, evidence, produced: _summed(analysis, of_slice, produced, finish=finish))


CRITERIA: Mapping[str, Criterion] = {
    **{name: _of_slices(name) for name in SLICES},
    "bn_scale": Criterion(bn_scale, absolute=True),
    "apoz": Criterion(apoz, "activations", absolute=True),
    "mean_activation": Criterion(mean_activation, "activations"),
    "taylor": Criterion(taylor, "gradients", absolute=True),
    "random": Criterion(random),
}


def _in_parts(of: Callable[[Tensor], Tensor], weight: Tensor, dims: list[int]) -> Tensor:
    """Sums ``of`` every element over ``dims``, some rows at a time, to need little more memory than the weight."""
    rows = max(1, _PART // max(1, weight[:1].numel()))
    parts = (of(_single(weight[start : start + rows])) for start in range(0, len(weight), rows))
    sums = [part.sum(dims) if dims else part for part in parts]
    return torch.stack(sums).sum(0) if 0 in dims else torch.cat(sums)


def _single(weight: Tensor) -> Tensor:
    """``weight`` in single precision at least."""
    return weight.float() if weight.dtype.itemsize < 4 else weight


def _weights(analysis: Analysis, produced: bool) -> Iterator[tuple[str, Tensor, Plane]]:
    """Every learned weight of two dimensions or more with each of its planes that is not fixed, one after the other."""
    pinned: Index = analysis.classes.pin_of
    for name, labels in analysis.parameters.items():
        held = attribute(analysis.captured.graph_module, name)
        planes = [
            plane
            for plane in labels.planes
            if (pinned[classes := analysis.classes.plane(plane)] < 0).any()
            and (not produced or analysis.produces(name, classes))
        ]
        if isinstance(held, nn.Parameter) and held.dim() > 1 and planes:
            weight = analysis.captured.tensor(name).detach()
            for plane in planes:
                yield name, weight, plane


def _summed(
    analysis: Analysis,
    score: Callable[[Tensor, list[int]], Tensor],
    produced: bool,
    instead: Mapping[str, Tensor] | None = None,
    finish: Callable[[Scores], Scores] = np.asarray,
) -> Scores:
    """Adds up for each class what ``score`` says of a weight after reducing the dimensions it is given.

    Args:
        analysis: The model.
        score: The score of each slice of one weight.
        produced: Whether only slices count whose operators produce the channels.
        instead: Tensors that stand for the weights; a weight that has none counts for nothing, and of what has none at
            all the score is nan.
        finish: What is made of the sum over one slice.
    """
    scores = np.zeros(analysis.classes.count)
    known = np.full(analysis.classes.count, instead is None)
    for name, weight, plane in _weights(analysis, produced):
        others = [dim for dim in range(weight.dim()) if dim not in support(plane)]
        seen = weight if instead is None else instead.get(name)
        if seen is not None:
            slices, classes = np.zeros_like(scores), analysis.classes.plane(plane)
            np.add.at(slices, classes, score(seen, others).double().cpu().numpy())
            scores += finish(slices)
            known[classes] = True
    return np.where(known, scores, np.nan)

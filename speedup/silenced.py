"""Channels that a norm silences: masks on its scale and shift count for the weights that nothing else reads."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import fx
from torch._ops import OpOverload

from speedup.analysis import Analysis
from speedup.labels import Index, Labels, Mask
from speedup.rules import rule_for
from speedup.rules.call import raw_argument

aten = torch.ops.aten
_NORMS = (aten.batch_norm.default, aten.instance_norm.default)
"""Norms that look at each channel by itself: without one of them the others are what they were."""

_NONE: Index = np.empty(0, dtype=np.int64)


class Silenced:
    """Which channels come to nothing in all that reads them: ``y = 0 * (x - mean) / std + 0``."""

    def __init__(self, analysis: Analysis, masks: Mapping[str, Mask]) -> None:
        """Goes through the graph once, backwards.

        Args:
            analysis: The model.
            masks: By canonical name of a parameter, False where it is masked out.
        """
        self._analysis, self._masks = analysis, masks
        self._found: dict[str, Index] = {}
        silent = {node.name: self._by_norm(node) for node in analysis.captured.nodes if node.target in _NORMS}
        if not any(len(classes) for classes in silent.values()):
            return
        for node in reversed(analysis.captured.nodes):
            if node.op == "call_function" and node.users:
                first, *rest = (self._in_use(node, user, silent) for user in node.users)
                for other in rest:
                    first = np.intersect1d(first, other)
                self._found[node.name] = first

    def of(self, name: str, classes: Index) -> Mask:
        """Which of the channels ``classes`` that parameter ``name`` produces come to nothing."""
        producers = self._analysis.producers(name, classes)
        silent = np.full(classes.shape, bool(producers))
        for node in producers:
            silent &= np.isin(classes, self._found.get(node.name, _NONE))
        return silent

    def _in_use(self, node: fx.Node, user: fx.Node, silent: Mapping[str, Index]) -> Index:
        """The classes of ``node`` that come to nothing in ``user``, or in all that reads that in turn."""
        if user.name in silent:
            return silent[user.name] if raw_argument(user, "input") is node else _NONE
        if not _keeps_channels_apart(user):
            return _NONE
        return np.intersect1d(self._found.get(user.name, _NONE), self._classes(user))

    def _by_norm(self, norm: fx.Node) -> Index:
        """The classes of which a norm has scale and shift masked out."""
        gone = self._classes(norm)
        vectors = [raw_argument(norm, name) for name in ("weight", "bias")]
        for vector in filter(None, vectors) if vectors[0] is not None else [None]:
            gone = np.intersect1d(gone, _NONE if vector is None else self._masked_out(vector))
        return gone

    def _classes(self, node: fx.Node) -> Index:
        """The classes of a tensor that has them in one place only."""
        labels = self._analysis.labels[node.name]
        if not isinstance(labels, Labels) or len(labels.planes) != 1:
            return _NONE
        return np.unique(self._analysis.classes.plane(labels.planes[0]))

    def _masked_out(self, vector: fx.Node) -> Index:
        """The classes of which every element of a parameter of one dimension is masked out."""
        name = self._analysis.aliases.get(str(vector.target), "") if vector.op == "get_attr" else ""
        planes = self._analysis.parameters[name].planes if name in self._masks else ()
        if len(planes) != 1:
            return _NONE
        classes = self._analysis.classes.plane(planes[0])
        return np.setdiff1d(classes[~self._masks[name]], classes[self._masks[name]])


def _keeps_channels_apart(node: fx.Node) -> bool:
    """Whether a channel that comes out depends on no other, and nothing but the users of ``node`` sees it."""
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    rule = rule_for(node.target)
    return rule is not None and (rule.moves or torch.Tag.pointwise in node.target.tags)

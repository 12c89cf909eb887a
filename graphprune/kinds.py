"""What channels are in a network: heads of attention, dimensions of heads, the residual stream, or what is between."""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
from torch import fx

from speedup.analysis import Analysis
from speedup.labels import Labels, Mask, core
from speedup.rules import rule_for

Kind = Literal["heads", "head_dims", "ffn", "width"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MEANINGS: Mapping[Kind, str] = {
    "heads": "heads of attention",
    "head_dims": "dimensions of heads",
    "ffn": "hidden channels between two layers",
    "width": "the residual stream",
}
"""Kind of channels -> what a user calls them."""

_PRODUCERS = frozenset({"contraction", "convolution", "attention", "recurrent", "index"})
"""Kinds of operators that make new channels of what goes in."""


def residual_stream(analysis: Analysis) -> Mask:
    """Returns which classes are channels that several layers add to, shape (classes,).

    Every tensor has a source: the product that made its channels, or the sum of tensors of different sources. Such sums
    are what the residual stream is made of; a sum with a bias, a table or another function of the same channels is not.
    """
    found = np.zeros(analysis.classes.count, dtype=np.bool_)
    sources: dict[fx.Node, str | None] = {}  # None: depends on no input
    for node in analysis.captured.nodes:
        if node.op == "placeholder":
            sources[node] = node.name
        rule = rule_for(node.target)
        into = {source for n in node.all_input_nodes if (source := sources.get(n)) is not None}
        if not into:
            continue
        made = rule is not None and rule.kind in _PRODUCERS and not rule.moves
        sources[node] = node.name if made or len(into) > 1 else into.pop()
        labels = analysis.labels.get(node.name)
        if rule is not None and rule.kind == "add" and len(into) > 1 and isinstance(labels, Labels):
            for plane in labels.planes:
                found[analysis.classes.of[core(plane).reshape(-1).numpy()]] = True
    return found

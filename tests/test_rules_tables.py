"""Whether the cases of `test_rules_*.py` reach every operator of the tables. Their traces are shared: this file runs last."""

import importlib
from collections.abc import Mapping

import torch
from test_rules import trace

from speedup.rules import RULES

TOPICS = (
    "movement", "cuts", "joins", "pointwise", "contraction", "norm", "recurrent", "space", "meeting", "heads", "places", "blocks",
)  # fmt: skip

UNTRIED: Mapping[str, str] = {
    "aten.view.default": "capture turns it into a reshape",
    "aten.requires_grad_.default": "export leaves it out",
    "aten.to.other": "export names the type instead",
    "aten.sym_constrain_range_for_size.default": "stands at sizes that depend on data",
    "aten.linspace.Scalar_Tensor": "from Python the ends are numbers",
    "aten.linspace.Tensor_Scalar": "from Python the ends are numbers",
    "aten.linspace.Tensor_Tensor": "from Python the ends are numbers",
    **({} if torch.__version__ >= (2, 15) else {"aten._grouped_mm.default": "takes no float32 before PyTorch 2.15"}),
}
"""Entries of the tables that no case reaches, and why. Overloads for `out` and for generators do not come from export."""


def test_every_entry_of_every_table_is_tried() -> None:
    seen = set()
    for topic in TOPICS:
        for case in importlib.import_module(f"test_rules_{topic}").CASES:
            seen |= {node.target for node in trace(case).analysis.captured.nodes}
    missing = {str(operator) for operator in RULES if operator not in seen}
    assert {name for name in missing if not name.endswith(("out", "generator", ".output"))} == set(UNTRIED)

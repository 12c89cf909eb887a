"""How labels flow through each operator: one table from ATen operators to rules."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from speedup.rules import (
    contraction,
    indexing,
    movement,
    norm,
    placing,
    pointwise,
    recurrent,
    reduction,
    space,
    spectral,
)
from speedup.rules.call import Call, Outcome, Rule

__all__ = ["RULES", "Call", "Outcome", "Rule", "rule_for"]

_FAMILIES = (pointwise, movement, indexing, placing, space, contraction, norm, reduction, recurrent, spectral)

RULES: Mapping[Any, Rule] = MappingProxyType(
    {operator: rule for family in _FAMILIES for operator, rule in family.RULES.items()}
)


FOREIGN: Mapping[str, Rule] = MappingProxyType(contraction.FOREIGN)
"""Operators that other libraries register, which exist only once those are imported: by the name in the registry."""


def rule_for(target: Any) -> Rule | None:
    """Returns the rule of an operator, or None: an operator without a rule is never guessed at.

    Operators that PyTorch itself tags as pointwise need no entry of their own.
    """
    found = RULES.get(target) or FOREIGN.get(_registered_name(target))
    if found is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise.TAGGED
    return found


def _registered_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None else ""

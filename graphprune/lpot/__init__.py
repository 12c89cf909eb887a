"""Pruning as users of Intel's LPOT know it: ``from graphprune.lpot import Pruning, common``."""

from graphprune.lpot import common
from graphprune.lpot.pruning import Pruning

__all__ = ["Pruning", "common"]

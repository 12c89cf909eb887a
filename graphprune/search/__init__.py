"""Searches over the widths of a model: how much of each channel group goes.

A :class:`Space` is what can be chosen of one model, :class:`Trials` say how candidates are evaluated, and every search
is a function of trials that gives what it has :class:`Found`.
"""

from graphprune.search.agent import Learning
from graphprune.search.amc import Episodes, amc
from graphprune.search.annealing import Schedule, annealing
from graphprune.search.autocompress import autocompress
from graphprune.search.netadapt import netadapt
from graphprune.search.sensitivity import Sensitivity, prune_by_sensitivity, sensitivity
from graphprune.search.space import Space
from graphprune.search.trials import Evaluation, Found, Trials

__all__ = [
    "Episodes",
    "Evaluation",
    "Found",
    "Learning",
    "Schedule",
    "Sensitivity",
    "Space",
    "Trials",
    "amc",
    "annealing",
    "autocompress",
    "netadapt",
    "prune_by_sensitivity",
    "sensitivity",
]

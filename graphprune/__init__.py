"""Structured pruning on a label engine: ``compress`` a model, ``trace`` its channel groups, ``load`` a result."""

from graphprune.compress import Result, compress
from graphprune.dependency import DependencyGraph, trace
from graphprune.folder import load
from graphprune.groups import ChannelGroup

__all__ = ["ChannelGroup", "DependencyGraph", "Result", "compress", "load", "trace"]
__version__ = "0.1.0"

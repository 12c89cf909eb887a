"""Structured pruning on a label engine: ``compress`` a model, ``trace`` its channel groups, ``load`` a result."""

from graphprune.compress import Result, compress
from graphprune.dependency import ChannelGroup, DependencyGraph, trace
from graphprune.folder import load

__all__ = ["ChannelGroup", "DependencyGraph", "Result", "compress", "load", "trace"]
__version__ = "0.1.0"

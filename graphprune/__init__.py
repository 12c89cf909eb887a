"""Structured pruning on a label engine: ``compress`` a model, ``trace`` its channel groups, ``load`` a result.

``compress_checkpoint`` does the first with a folder of weights that is never in memory as a whole.
"""

from graphprune.compress import Result, compress
from graphprune.dependency import DependencyGraph, trace
from graphprune.folder import load
from graphprune.groups import ChannelGroup
from graphprune.stream import compress_checkpoint

__all__ = ["ChannelGroup", "DependencyGraph", "Result", "compress", "compress_checkpoint", "load", "trace"]
__version__ = "0.1.0"

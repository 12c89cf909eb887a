"""Structured pruning on a label engine: ``compress`` a model, ``trace`` its channel groups, ``load`` a result.

``compress_checkpoint`` does the first with a folder of weights that is never in memory as a whole.
"""

from graphprune.checkpoints.stream import compress_checkpoint
from graphprune.compress import Result, compress
from graphprune.dependency import DependencyGraph, trace
from graphprune.folder import load
from graphprune.groups import ChannelGroup

__all__ = ["ChannelGroup", "DependencyGraph", "Result", "compress", "compress_checkpoint", "load", "trace"]
__version__ = "0.1.0"

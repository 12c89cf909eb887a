"""Every operation, and how often it is drawn."""

from __future__ import annotations

from collections.abc import Mapping

from random_nets.op import Op
from random_nets.operations import (
    attention,
    attention_blocks,
    branches,
    computed_weights,
    concatenation,
    convolutions,
    ends,
    gates,
    heads_view,
    layouts,
    linear,
    movement,
    norms,
    pointwise,
    products,
    recurrent,
    reductions,
    space,
    splits,
    tokens,
)

WEIGHTS: Mapping[type[Op], int] = {
    convolutions.Conv: 8,
    convolutions.ConvBlock: 4,
    convolutions.Residual: 3,
    convolutions.Depthwise: 3,
    convolutions.ConvTranspose: 3,
    convolutions.ConvOverTime: 1,
    computed_weights.StandardisedConv: 2,
    computed_weights.WeightNormConv: 1,
    computed_weights.TiedAutoencoder: 1,
    computed_weights.Experts: 1,
    linear.Linear: 5,
    linear.ChannelsLastMlp: 2,
    linear.Mlp: 2,
    linear.TokenMixing: 2,
    layouts.SpatialToVector: 3,
    layouts.VectorToImage: 3,
    layouts.VectorToImageChannelsLast: 1,
    norms.BatchNorm: 4,
    norms.GroupNorm: 3,
    norms.InstanceNorm: 1,
    norms.LayerNorm: 3,
    norms.LayerNormAll: 1,
    norms.HandmadeLayerNorm: 2,
    norms.HandmadeRms: 1,
    norms.GlobalResponseNorm: 1,
    norms.NormaliseChannels: 1,
    norms.BatchRenormByHand: 1,
    pointwise.Activation: 5,
    pointwise.ActivationModule: 1,
    pointwise.LayerScale: 4,
    branches.Binary: 9,
    branches.ProjectedAdd: 5,
    branches.BroadcastMul: 2,
    branches.Film: 2,
    gates.SqueezeExcite: 4,
    gates.EfficientChannelAttention: 1,
    pointwise.InPlaceSlice: 2,
    concatenation.Cat: 6,
    concatenation.CatPositions: 1,
    splits.Split: 7,
    splits.TakeOne: 1,
    movement.ChannelShuffle: 5,
    heads_view.HeadsView: 5,
    space.PixelShuffle: 3,
    space.PixelUnshuffle: 3,
    concatenation.ChannelPad: 4,
    convolutions.PaddedShortcut: 3,
    movement.Reorder: 5,
    movement.Repeat: 4,
    movement.ExpandOne: 2,
    layouts.ExpandPixel: 2,
    concatenation.CatConstant: 2,
    layouts.Sequence_: 4,
    layouts.Image: 4,
    tokens.Tokens: 3,
    layouts.FirstToken: 2,
    layouts.Vector: 2,
    space.Spatial: 3,
    reductions.ChannelStatistic: 3,
    gates.SpatialGate: 1,
    reductions.Softmax: 2,
    pointwise.Glu: 2,
    reductions.MaxOut: 1,
    products.Gram: 2,
    products.Correlation: 2,
    products.Mixing: 2,
    products.Outer: 1,
    attention_blocks.NonLocal: 2,
    attention.Attention: 10,
    attention_blocks.LibraryAttention: 3,
    attention_blocks.CrossAttention: 2,
    attention_blocks.WindowAttention: 2,
    recurrent.Recurrent: 6,
    recurrent.Steps: 2,
    products.Form: 2,
    space.Windows: 2,
    # the first and the last step of a program, never drawn
    tokens.Embedding: 0,
    ends.Head: 0,
    ends.ImageHead: 0,
}
"""All operations, and how many lots each has in a draw; one that waits for a bug to be mended has none.

The order is part of a seed's meaning: the same choices give the same program only as long as it stays.
"""

BY_NAME: Mapping[str, type[Op]] = {op.__name__: op for op in WEIGHTS}


def operation_names() -> list[str]:
    """The operations to draw from, each as often as it weighs."""
    return [op.__name__ for op, weight in WEIGHTS.items() for _ in range(weight)]

"""Layers of torch.nn between two others: what comes back at 0.5 is the user's class with half of the channels."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from test_shrink import compressed
from torch import Tensor, nn

from graphprune.budget import cost
from graphprune.errors import ModelError
from speedup.capture import capture
from speedup.errors import CaptureError

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

Layer = Callable[[], nn.Module]
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS = {
    1: (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AvgPool1d, nn.MaxPool1d),
    2: (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d),
    3: (nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.AvgPool3d, nn.MaxPool3d),
}
NORMS = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d),
}
EXAMPLES = {1: torch.randn(2, 3, 8), 2: torch.randn(2, 3, 8, 8), 3: torch.randn(2, 3, 6, 6, 6)}

BETWEEN: Mapping[str, tuple[int, Layer]] = {
    **{
        f"{kind.__name__}_{affine}_{statistics}": (
            rank,
            lambda kind=kind, affine=affine, statistics=statistics: kind(
                8, affine=affine, track_running_stats=statistics
            ),
        )
        for rank, kinds in NORMS.items()
        for kind in kinds
        for affine in (False, True)
        for statistics in (False, True)
    },
    **{
        kind.__name__: (rank, lambda kind=kind: kind(2))
        for rank, kinds in POOLS.items()
        for kind in kinds
    },
    **{f"grouped{rank}d": (rank, lambda kind=kind: kind(8, 8, 3, groups=2)) for rank, kind in CONV.items()},
    **{f"depthwise{rank}d": (rank, lambda kind=kind: kind(8, 8, 3, groups=8)) for rank, kind in CONV.items()},
    **{f"transposed{rank}d": (rank, lambda kind=kind: kind(8, 8, 2)) for rank, kind in TRANSPOSED.items()},
    **{f"transposed_grouped{rank}d": (rank, lambda kind=kind: kind(8, 8, 2, groups=2)) for rank, kind in TRANSPOSED.items()},
    **{f"transposed_depthwise{rank}d": (rank, lambda kind=kind: kind(8, 8, 2, groups=8)) for rank, kind in TRANSPOSED.items()},
    **{f"group_norm_{groups}": (2, lambda groups=groups: nn.GroupNorm(groups, 8)) for groups in (1, 2, 8)},
    "sync_batch_norm": (2, lambda: nn.SyncBatchNorm(8)),
    "prelu": (2, lambda: nn.PReLU()),
    "prelu_of_channels": (1, lambda: nn.PReLU(8)),
    "channel_shuffle": (2, lambda: nn.ChannelShuffle(4)),
    "upsample": (2, lambda: nn.Upsample(scale_factor=2.0)),
    "upsample_to_a_size": (3, lambda: nn.Upsample((5, 5, 5), mode="trilinear")),
    "lp_pool": (2, lambda: nn.LPPool2d(2.0, 2)),
    "circular_padding": (2, lambda: nn.CircularPad2d(1)),
    "softmax_over_space": (2, lambda: nn.Softmax(-1)),
    "spectral_norm": (2, lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))),
    "spectral_norm_of_the_old_kind": (2, lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 3))),
    "weight_norm": (1, lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))),
    "weight_norm_of_the_old_kind": (1, lambda: nn.utils.weight_norm(nn.Conv1d(8, 8, 3))),
    "weight_norm_over_all": (1, lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3), dim=None)),
}  # fmt: skip
"""By name the rank of space and a layer that takes and gives eight channels."""

PINNING: Mapping[str, tuple[int, Layer, str]] = {
    "softmax2d": (2, lambda: nn.Softmax2d(), "softmax.int over its channels"),
    "local_response_norm": (2, lambda: nn.LocalResponseNorm(3), "pooled or resampled"),
    "cross_map": (2, lambda: nn.CrossMapLRN2d(3), "without a rule"),
    "fractional_pool": (2, lambda: nn.FractionalMaxPool2d(2, output_size=4), "drawn for each channel"),
    "fractional_pool_of_volumes": (3, lambda: nn.FractionalMaxPool3d(2, output_size=3), "drawn for each channel"),
}
"""The same for layers that need all channels, with words of the reason."""


def between(rank: int, layer: nn.Module, outputs: int = 8) -> nn.Module:
    """A convolution, the layer, a convolution."""
    return nn.Sequential(CONV[rank](3, 8, 3, padding=1), layer, CONV[rank](outputs, 2, 1))


@pytest.mark.parametrize("name", BETWEEN)
def test_a_layer_between_two_others_shrinks(name: str) -> None:
    torch.manual_seed(0)
    rank, layer = BETWEEN[name]
    result = compressed(between(rank, layer()), EXAMPLES[rank])
    small: Any = result.model
    assert type(small) is nn.Sequential
    assert small[0].out_channels <= 4 and small[2].in_channels <= 4
    sizes = {value for key, value in vars(small[1]).items() if key.startswith("num_") and key != "num_groups"}
    assert sizes <= {1, 2, 4, None}


@pytest.mark.parametrize("name", PINNING)
def test_a_layer_that_needs_all_channels_says_why(name: str) -> None:
    torch.manual_seed(0)
    rank, layer, words = PINNING[name]
    with pytest.raises(ModelError, match=f"nothing can be pruned .*{words}"):
        compressed(between(rank, layer()), EXAMPLES[rank])


class Parts(nn.Module):
    """Bare parameters in lists and dictionaries, and a layer that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(6, 8))])
        self.last = nn.ParameterDict({"weight": nn.Parameter(torch.randn(2, 6)), "scale": nn.Parameter(torch.randn(6))})
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.weights[0])
        for block in (*self.blocks, self.blocks[0]):
            x = x + block(x).relu()
        return nn.functional.linear(nn.functional.linear(x, self.weights[1]) * self.last["scale"], self.last["weight"])


def test_bare_parameters_and_shared_layers_in_loops() -> None:
    torch.manual_seed(0)
    small: Any = compressed(Parts(), torch.randn(2, 5, 12)).model
    assert type(small) is Parts
    assert [tuple(weight.shape) for weight in small.weights] == [(4, 12), (3, 4)]
    assert (tuple(small.last["scale"].shape), small.blocks[0].in_features, small.blocks[1].out_features) == ((3,), 4, 4)


def test_a_bilinear_layer_has_its_sizes() -> None:
    class Form(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.o = nn.Linear(5, 8), nn.Linear(5, 6), nn.Bilinear(8, 6, 10), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.c(self.a(x), self.b(x)))

    torch.manual_seed(0)
    small: Any = compressed(Form(), torch.randn(2, 5)).model
    assert type(small) is Form
    assert (small.c.in1_features, small.c.in2_features, small.c.out_features) == (4, 3, 5)


def test_a_table_of_bounded_length_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 8, max_norm=0.5), nn.Linear(8, 2))
    before = model[0].weight.detach().clone()
    small: Any = compressed(model, torch.randint(0, 20, (3, 5))).model
    assert torch.equal(model[0].weight, before) and small[0].embedding_dim == 4


def test_inputs_and_layers_that_cannot_be_captured_end_in_one_line() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(3, 5)])
    with pytest.raises(CaptureError, match="takes no packed sequences. Give padded ones"):
        compressed(nn.LSTM(5, 8), (packed,))
    with pytest.raises(CaptureError, match="lazy layers have no sizes yet. Call it once"):
        compressed(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()), EXAMPLES[2])


@pytest.mark.parametrize(
    ("layer", "steps"),
    [
        (nn.LSTM(5, 8, 2, batch_first=True, bidirectional=True), 4),
        (nn.LSTM(5, 8, batch_first=True, proj_size=3), 4),
        (nn.GRU(5, 8, batch_first=True), 4),
        (nn.RNN(5, 8, batch_first=True), 4),
        (nn.Bilinear(5, 5, 8), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_multiplications_are_counted(layer: nn.Module, steps: int) -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            result = self.layer(x, x) if isinstance(layer, nn.Bilinear) else self.layer(x)[0]
            return result  # type: ignore[no-any-return]  # a module returns anything

    captured = capture(Called().eval(), torch.randn(3, steps, 5))
    weights = sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
    assert cost(captured.graph_module, captured).macs == steps * weights

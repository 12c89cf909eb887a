"""From scores to masks, against a dozen lines of numpy that know nothing of labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_rules import Net, conv, image
from torch import Tensor, nn

from graphprune.config_list import Setting, read_config_list
from graphprune.criteria import CRITERIA
from graphprune.dependency import trace
from graphprune.errors import ConfigError
from graphprune.evidence import Evidence
from graphprune.pruners.finding import MaskFinder
from graphprune.pruners.sparsify import Masks, channel_masks, element_masks, layer_masks
from speedup.masking import flat_masks

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

Numbers = NDArray[np.float64]


def settings(model: nn.Module, **entry: Any) -> dict[str, Setting]:
    return read_config_list(model, [{"op_types": ["Conv2d", "Linear", "ConvTranspose2d", "BatchNorm2d"], **entry}])


def of(model: nn.Module, *entries: Mapping[str, Any]) -> dict[str, Setting]:
    return read_config_list(model, list(entries))


def array(tensor: Tensor) -> Numbers:
    return tensor.detach().double().numpy()


def kept(masks: Masks, layer: str, name: str = "weight", dim: int = 0) -> list[int]:
    """The channels that a mask keeps; a channel goes whole or not at all."""
    rows = (
        masks[layer][name].movedim(dim, 0).flatten(1) if masks[layer][name].dim() > 1 else masks[layer][name][:, None]
    )
    assert bool(((rows == 0).all(1) | (rows == 1).all(1)).all())
    return torch.nonzero(rows.any(1)).flatten().tolist()


def lowest(scores: Numbers, count: int) -> list[int]:
    """What stays without the ``count`` lowest."""
    return sorted(np.argsort(scores, kind="stable")[count:].tolist())


# Single elements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "gone"), [(0.0, 0), (0.25, 24), (0.5, 48), (0.51, 49), (0.999, 95)])
def test_the_smallest_elements_go(sparsity: float, gone: int) -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    mask = element_masks(model, settings(model, sparsity=sparsity))["0"]["weight"]
    size = np.abs(array(model[0].weight)).ravel()
    expected = np.ones(96)
    expected[np.argsort(size)[:gone]] = 0
    np.testing.assert_array_equal(array(mask).ravel(), expected)


def test_a_layer_of_one_weight_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU())
    masks = element_masks(model, of(model, {"op_types": ["default"], "sparsity": 0.5}))
    assert masks["1"]["weight"].tolist() == [1.0] and masks["0"]["weight"].sum() == 6


def test_blocks_go_by_their_mean() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    mask = array(element_masks(model, settings(model, sparsity=0.5), block=(3, 4))["0"]["weight"])
    means = np.abs(array(model[0].weight)).reshape(2, 3, 2, 4).mean((1, 3)).ravel()
    expected = np.ones(4)
    expected[np.argsort(means)[:2]] = 0
    np.testing.assert_array_equal(mask, np.kron(expected.reshape(2, 2), np.ones((3, 4))))


def test_blocks_of_a_convolution_are_those_of_its_last_dimensions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    mask = array(element_masks(model, settings(model, sparsity=0.5), block=(2, 3, 3))["0"]["weight"])
    means = np.abs(array(model[0].weight)).reshape(6, 2, 2, 9).mean((2, 3)).ravel()
    expected = np.ones(12)
    expected[np.argsort(means)[:6]] = 0
    np.testing.assert_array_equal(mask.reshape(12, -1), np.repeat(expected[:, None], 18, 1))


@pytest.mark.parametrize("block", [(5,), (1, 5), (2, 2, 2)])
def test_blocks_that_do_not_fit(block: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(ConfigError, match=r"0\.weight: its shape \(6, 8\) is no multiple of blocks of"):
        element_masks(model, settings(model, sparsity=0.5), block=block)


def ladder() -> nn.Sequential:
    """Weights 1 to 4 in the first layer, 5 to 12 in the second."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4))
    net[0].weight.data = torch.tensor([[1.0, -2], [-3, 4]])
    net[1].weight.data = torch.arange(5.0, 13).reshape(4, 2)
    return net


@pytest.mark.parametrize(
    ("most", "gone"),
    [(1.0, (3, 3)), (0.5, (2, 4))],  # never all of a layer; what one may not lose the other does
)
def test_a_total_is_one_ranking(most: float, gone: tuple[int, int]) -> None:
    model = ladder()
    masks = element_masks(model, settings(model, total_sparsity=0.5, max_sparsity_per_layer=most))
    assert tuple(int((masks[layer]["weight"] == 0).sum()) for layer in "01") == gone
    assert masks["0"]["weight"].flatten().tolist() == [0.0] * gone[0] + [1.0] * (4 - gone[0])


def test_entries_are_ranked_apart() -> None:
    model = ladder()
    entries = [{"op_names": [name], "total_sparsity": 0.5} for name in "01"]
    masks = element_masks(model, of(model, *entries))
    assert [int((masks[layer]["weight"] == 0).sum()) for layer in "01"] == [2, 4]


def test_scores_instead_of_weights() -> None:
    model = ladder()
    scores = {"0.weight": torch.tensor([[0.0, -9], [5, -1]]), "1.weight": torch.arange(8.0).reshape(4, 2)}
    masks = element_masks(model, settings(model, sparsity=0.5), scores=scores)
    assert (
        masks["0"]["weight"].tolist() == [[1, 0], [1, 0]]
        and masks["1"]["weight"].flatten().tolist() == [0] * 4 + [1] * 4
    )


def test_what_is_gone_goes_first() -> None:
    model = ladder()
    gone = {"0.weight": torch.tensor([[1.0, 1], [1, 0]])}
    masks = element_masks(model, settings(model, sparsity=0.5), gone=gone)
    assert masks["0"]["weight"].tolist() == [[0, 1], [1, 0]]


def test_a_tied_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    masks = element_masks(model, settings(model, total_sparsity=0.5))
    assert sum(int((one["weight"] == 0).sum()) for one in masks.values()) == 16 and len(masks) == 2


# Layers by themselves -------------------------------------------------------------------------------------------------


def expected_scores(weight: Numbers, criterion: str) -> Numbers:
    """By channel, from slices of shape (channels, elements)."""
    if criterion == "l1":
        return np.abs(weight).sum(1)
    if criterion == "l2":
        return np.sqrt((weight**2).sum(1))
    return np.array([sum(np.linalg.norm(one - other) for other in weight) for one in weight])


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm"])
@pytest.mark.parametrize(
    ("layer", "dim"), [(nn.Conv2d(3, 8, 3), 0), (nn.Linear(5, 8), 0), (nn.ConvTranspose2d(3, 8, 3), 1)], ids=type
)
def test_channels_of_one_layer(criterion: str, layer: Any, dim: int) -> None:
    nn.init.normal_(layer.weight)
    model = nn.Sequential(layer)
    masks = layer_masks(model, settings(model, sparsity=0.4), criterion)
    slices = np.moveaxis(array(layer.weight), dim, 0).reshape(8, -1)
    assert kept(masks, "0", dim=dim) == kept(masks, "0", "bias") == lowest(expected_scores(slices, criterion), 4)


@pytest.mark.parametrize(("sparsity", "left"), [(0.5, 2), (0.3, 2), (0.2, 3), (0.9, 1)])
def test_of_groups_as_many_go(sparsity: float, left: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    stays = kept(layer_masks(model, settings(model, sparsity=sparsity), "l1"), "0")
    scores = np.abs(array(model[0].weight)).reshape(8, -1).sum(1)
    assert stays == lowest(scores[:4], 4 - left) + [4 + one for one in lowest(scores[4:], 4 - left)]


def test_of_a_depthwise_layer_any_may_go() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
    scores = np.abs(array(model[0].weight)).reshape(8, -1).sum(1)
    assert kept(layer_masks(model, settings(model, sparsity=0.5), "l1"), "0") == lowest(scores, 4)


def test_a_grouped_transposed_convolution() -> None:
    """Output g * 3 + j is made of the inputs of group g alone."""
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
    model = nn.Sequential(layer)
    masks = layer_masks(model, settings(model, sparsity=0.33), "l1")
    scores = np.abs(array(layer.weight)).reshape(2, 2, 3, 4).sum((1, 3))
    gone = [group * 3 + int(scores[group].argmin()) for group in range(2)]
    assert kept(masks, "0", "bias") == [one for one in range(6) if one not in gone]
    with torch.no_grad():
        layer.weight.mul_(masks["0"]["weight"])
        layer.bias.mul_(masks["0"]["bias"])  # type: ignore[union-attr]  # it has one
        assert torch.nonzero(layer(torch.randn(1, 4, 3, 3))[0].flatten(1).abs().sum(1) == 0).flatten().tolist() == gone


def test_norms_are_ranked_together() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4))
    model[1].weight.data = torch.tensor([0.1, -0.9, 0.3, 0.8])
    model[3].weight.data = torch.tensor([0.7, 0.6, -0.2, 1.0])
    asked = of(model, {"op_types": ["BatchNorm2d"], "sparsity": 0.5})
    masks = layer_masks(model, asked, "bn_scale", together=True)
    assert kept(masks, "1") == kept(masks, "1", "bias") == [1, 3] and kept(masks, "3") == [0, 3]


@pytest.mark.parametrize(
    ("layer", "criterion", "fact"),
    [
        (nn.BatchNorm2d(4), "l1", "looks at layers with a weight that are no norms"),
        (nn.Conv2d(4, 4, 1), "bn_scale", "looks at norms with a scale"),
        (nn.LSTM(4, 4), "l1", "looks at layers with a weight"),
    ],
)
def test_layers_that_a_criterion_cannot_look_at(layer: nn.Module, criterion: str, fact: str) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(ConfigError, match=fact):
        layer_masks(model, of(model, {"op_names": ["0"], "sparsity": 0.5}), criterion)


# Channels with what is tied to them -----------------------------------------------------------------------------------


def found(model: nn.Module, asked: dict[str, Setting], criterion: str = "l1", **options: Any) -> Masks:
    dependencies = trace(model, image())
    return channel_masks(dependencies, CRITERIA[criterion](dependencies.analysis, produced=True), asked, **options)[0]


def residual() -> Net:
    return Net(lambda n, x: n.o((n.a(x) + n.b(x)).relu()), a=conv(3, 8), b=conv(3, 8, 1, bias=False), o=conv(8, 2))


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm"])
def test_a_dependency_set_is_scored_by_its_sum(criterion: str) -> None:
    model = residual()
    masks = found(model, of(model, {"op_names": ["a", "b"], "sparsity": 0.5}), criterion)
    a, b = (array(model.get_parameter(f"{name}.weight")).reshape(8, -1) for name in "ab")
    scores = expected_scores(a, criterion) + expected_scores(b, criterion)
    if criterion == "l2":  # the norm of both together
        scores = expected_scores(np.concatenate([a, b], 1), criterion)
    assert kept(masks, "a") == kept(masks, "b") == kept(masks, "a", "bias") == lowest(scores, 4)


def test_of_different_sparsities_the_smallest_counts() -> None:
    model = residual()
    masks = found(model, of(model, {"op_names": ["a"], "sparsity": 0.6}, {"op_names": ["b"], "sparsity": 0.25}))
    scores = sum(np.abs(array(model.get_parameter(f"{name}.weight"))).reshape(8, -1).sum(1) for name in "ab")
    assert kept(masks, "a") == kept(masks, "b") == lowest(np.asarray(scores), 2)


@pytest.mark.parametrize("entries", [[{"op_names": ["a"], "sparsity": 0.5}], [
    {"op_names": ["a", "b"], "sparsity": 0.5}, {"op_names": ["b"], "exclude": True}]])  # fmt: skip
def test_what_is_tied_to_a_layer_that_stays_stays(entries: list[dict[str, Any]]) -> None:
    model = residual()
    finder = MaskFinder(model, "l1", inputs=image())
    with pytest.raises(ConfigError, match=r"config_list: selects only channels that have to stay\. a\.weight: .*\bb\b"):
        finder.channels(of(model, *entries))


def test_of_the_groups_of_a_convolution_as_many_go() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.ReLU(), conv(12, 2))
    masks = found(model, of(model, {"op_names": ["0", "2"], "sparsity": 0.5}))
    first, second = np.array(kept(masks, "0")), np.array(kept(masks, "2"))
    assert (first < 4).sum() == (first >= 4).sum() == 2 and (second < 6).sum() == (second >= 6).sum() == 3


def test_norms_go_with_their_channels_and_inputs_do_not() -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2))
    masks = found(model, of(model, {"op_names": ["0"], "sparsity": 0.5}))
    assert masks.keys() == {"0", "1"}
    assert kept(masks, "0") == kept(masks, "0", "bias") == kept(masks, "1") == kept(masks, "1", "bias")


def test_a_total_counts_weights_and_compares_relative_scores() -> None:
    """Of 5 x 2 and 5 x 10 weights half go: 30 or a little more; a channel weighs what its slice does."""
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 2))
    model[0].weight.data *= 100
    dependencies = trace(model, torch.randn(2, 2))
    scores = CRITERIA["l1"](dependencies.analysis, produced=True)
    entry = {"op_names": ["0", "2"], "total_sparsity": 0.5}
    masks, _ = channel_masks(dependencies, scores, of(model, entry))
    values = [np.abs(array(model[place].weight)).sum(1) for place in (0, 2)]
    relative = np.concatenate([one / one.mean() for one in values])
    weights = np.array([2] * 5 + [5] * 10)
    order = np.argsort(relative)
    gone = order[: int(np.searchsorted(np.cumsum(weights[order]), 30)) + 1]
    assert kept(masks, "0") == [one for one in range(5) if one not in gone]
    assert kept(masks, "2") == [one for one in range(10) if one + 5 not in gone]


def test_with_and_without_example_inputs_a_chain_loses_the_same() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 2))
    asked = of(model, {"op_names": ["0", "2"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.6})
    dependencies = trace(model, torch.randn(2, 2))
    coupled, _ = channel_masks(dependencies, CRITERIA["l1"](dependencies.analysis, produced=True), asked)
    alone = layer_masks(model, asked, "l1")
    for layer in ("0", "2"):
        assert kept(coupled, layer) == kept(alone, layer) and len(kept(alone, layer)) < len(
            model.get_submodule(layer).bias
        )


def test_a_selected_norm_speaks_for_its_channels() -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2))
    nn.init.uniform_(model[1].weight)
    masks = found(
        model, of(model, {"op_types": ["BatchNorm2d"], "sparsity": 0.5}), "bn_scale", together=True, relative=False
    )
    assert kept(masks, "0") == lowest(array(model[1].weight), 4)


def test_activations_and_gradients_are_summed_over_the_set() -> None:
    model = residual()
    dependencies = trace(model, image())
    saliency = {f"{name}.weight": torch.rand_like(model.get_parameter(f"{name}.weight")) for name in "abo"}
    scores = CRITERIA["taylor"](dependencies.analysis, Evidence(saliency=saliency), produced=True)
    masks, _ = channel_masks(dependencies, scores, of(model, {"op_names": ["a", "b"], "sparsity": 0.5}))
    expected = sum(array(saliency[f"{name}.weight"]).reshape(8, -1).sum(1) for name in "ab")
    assert kept(masks, "a") == kept(masks, "b") == lowest(np.asarray(expected), 4)


@pytest.mark.parametrize("exclude", [{"sparsity": 0.2}, {"exclude": True}])
def test_a_tied_weight_of_which_less_is_asked_elsewhere_is_not_ranked(exclude: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    asked = of(model, {"op_names": ["0"], "total_sparsity": 0.5}, {"op_names": ["1"], **exclude})
    for masks in (element_masks(model, asked), layer_masks(model, asked, "l1")):
        flat = dict(flat_masks(masks))
        assert all(0.75 <= mask.mean() < 1 for mask in flat.values()) and bool(flat) == ("sparsity" in exclude)


def test_parameters_of_a_layer_that_have_other_dimensions_have_no_mask() -> None:
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 6)
            self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))

    model = nn.Sequential(LowRank())
    masks = layer_masks(model, settings(model, sparsity=0.5), "l1")["0"]
    assert masks.keys() == {"weight", "bias", "up"}
    assert torch.equal(masks["up"].any(1), masks["weight"].any(1)) and masks["bias"].sum() == 3


def test_a_layer_without_outputs() -> None:
    model = nn.Sequential(nn.Linear(8, 0))
    assert element_masks(model, settings(model, sparsity=0.5))["0"]["weight"].shape == (0, 8)

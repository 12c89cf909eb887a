"""Criteria against numbers worked out by hand, and against a dozen lines of numpy that know nothing of labels."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_rules import Net, conv, image, tokens, weight
from torch import nn

from graphprune.criteria import CRITERIA
from graphprune.evidence import Evidence, gather
from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.labels import support

Numbers = NDArray[np.float64]


def analysed(model: nn.Module, x: torch.Tensor) -> Analysis:
    return analyse(capture(model.eval(), x))


def along(analysis: Analysis, scores: Numbers, axis: str) -> Numbers:
    """The scores of the channels along an axis, "tensor/dimensions"."""
    name, _, dims = axis.partition("/")
    plane = next(p for p in analysis.parameters[name].planes if support(p) == tuple(map(int, dims)))
    return scores[analysis.classes.plane(plane)]


def array(tensor: torch.Tensor) -> Numbers:
    return tensor.detach().double().numpy()


def two_layers() -> nn.Sequential:
    """Channels (1, -2), (3, 4), (0, 0), (2, 0) made of two inputs, read with weights 1, -1, 5, 0 by one output."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    net[0].weight.data = torch.tensor([[1.0, -2], [3, 4], [0, 0], [2, 0]])
    net[1].weight.data = torch.tensor([[1.0, -1, 5, 0]])
    return net


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("l1", [1 + 2 + 1, 3 + 4 + 1, 5, 2]),
        ("l2", [np.sqrt(1 + 4) + 1, np.sqrt(9 + 16) + 1, 5, 2]),
        # distances of (1, -2) to (3, 4), (0, 0), (2, 0), and so on; then those of the weights that read them
        (
            "fpgm",
            [
                np.sqrt(40) + np.sqrt(5) + np.sqrt(5) + (2 + 4 + 1),
                np.sqrt(40) + 5 + np.sqrt(17) + (2 + 6 + 1),
                np.sqrt(5) + 5 + 2 + (4 + 6 + 5),
                np.sqrt(5) + np.sqrt(17) + 2 + (1 + 1 + 5),
            ],
        ),
    ],
)
def test_by_hand(criterion: str, expected: list[float]) -> None:
    analysis = analysed(two_layers(), torch.randn(2, 2))
    np.testing.assert_allclose(along(analysis, CRITERIA[criterion](analysis), "0.weight/0"), expected, rtol=1e-6)
    np.testing.assert_allclose(along(analysis, CRITERIA[criterion](analysis), "1.weight/1"), expected, rtol=1e-6)


def test_scores_are_those_of_the_largest_and_smallest_weights() -> None:
    analysis = analysed(two_layers(), torch.randn(2, 2))
    assert np.argsort(along(analysis, CRITERIA["l1"](analysis), "0.weight/0")).tolist() == [3, 0, 2, 1]
    assert np.argsort(along(analysis, CRITERIA["l2"](analysis), "0.weight/0")).tolist() == [3, 0, 2, 1]


def coupled() -> Net:
    """Two convolutions that are added and read by two: six axes for each channel."""
    return Net(
        lambda n, x: n.o((n.a(x) + n.b(x)).relu()) + n.p(n.a(x)),
        a=conv(3, 6),
        b=conv(3, 6, 1),
        o=conv(6, 2),
        p=conv(6, 2, 1),
    )


def slices(net: nn.Module, axes: list[tuple[str, int]]) -> list[Numbers]:
    """For each axis the slices of the channels, shape (channels, size of a slice)."""
    parameters = {name: array(p) for name, p in net.named_parameters()}
    return [np.moveaxis(parameters[name], dim, 0).reshape(parameters[name].shape[dim], -1) for name, dim in axes]


AXES = [("a.weight", 0), ("b.weight", 0), ("o.weight", 1), ("p.weight", 1)]


def test_l1_sums_every_coupled_slice() -> None:
    net = coupled()
    expected = sum(np.abs(part).sum(1) for part in slices(net, AXES))
    analysis = analysed(net, image())
    np.testing.assert_allclose(along(analysis, CRITERIA["l1"](analysis), "b.weight/0"), expected, rtol=1e-5)


def test_l2_sums_the_norm_of_every_coupled_slice() -> None:
    net = coupled()
    expected = sum(np.linalg.norm(part, axis=1) for part in slices(net, AXES))
    analysis = analysed(net, image())
    np.testing.assert_allclose(along(analysis, CRITERIA["l2"](analysis), "o.weight/1"), expected, rtol=1e-5)


def test_fpgm_sums_the_distances_to_all_others() -> None:
    net = coupled()
    expected = sum(np.linalg.norm(part[:, None] - part[None], axis=2).sum(1) for part in slices(net, AXES))
    analysis = analysed(net, image())
    np.testing.assert_allclose(along(analysis, CRITERIA["fpgm"](analysis), "p.weight/1"), expected, rtol=1e-4)


def test_fpgm_of_many_equal_channels_is_nothing() -> None:
    net = nn.Sequential(nn.Linear(50, 64), nn.Linear(64, 2))
    nn.init.constant_(net[0].weight, 0.3)
    nn.init.constant_(net[1].weight, -0.7)
    analysis = analysed(net, torch.randn(2, 50))
    np.testing.assert_allclose(along(analysis, CRITERIA["fpgm"](analysis), "0.weight/0"), 0, atol=1e-9)


def grouped() -> nn.Sequential:
    return nn.Sequential(conv(3, 6), conv(6, 4, groups=2), conv(4, 2))


def test_the_inputs_of_a_grouped_weight_are_scored_group_by_group() -> None:
    net = grouped()
    first, second, third = (array(layer.weight) for layer in net)
    expected = np.abs(first).sum((1, 2, 3))
    for channel in range(6):
        group, place = divmod(channel, 3)
        expected[channel] += np.abs(second[2 * group : 2 * group + 2, place]).sum()
    analysis = analysed(net, image())
    np.testing.assert_allclose(along(analysis, CRITERIA["l1"](analysis), "0.weight/0"), expected, rtol=1e-5)
    outputs = np.abs(second).sum((1, 2, 3)) + np.abs(third).sum((0, 2, 3))
    np.testing.assert_allclose(along(analysis, CRITERIA["l1"](analysis), "1.weight/0"), outputs, rtol=1e-5)


def test_fpgm_of_a_grouped_weight_compares_the_inputs_of_one_group() -> None:
    net = grouped()
    first, second, _ = (array(layer.weight) for layer in net)
    flat = first.reshape(6, -1)
    expected = np.linalg.norm(flat[:, None] - flat[None], axis=2).sum(1)
    for channel in range(6):
        group, place = divmod(channel, 3)
        for output in range(2 * group, 2 * group + 2):
            expected[channel] += sum(
                np.linalg.norm(second[output, place] - second[output, other]) for other in range(3)
            )
    analysis = analysed(net, image())
    np.testing.assert_allclose(along(analysis, CRITERIA["fpgm"](analysis), "0.weight/0"), expected, rtol=1e-4)


def test_a_channel_that_is_read_many_times_counts_every_reading() -> None:
    net = Net(lambda n, x: n.o(n.a(x).flatten(1)), a=conv(3, 4), o=nn.Linear(144, 2))
    first, second = array(net.a.weight), array(net.o.weight)
    expected = np.abs(first).sum((1, 2, 3)) + np.abs(second).reshape(2, 4, 36).sum((0, 2))
    analysis = analysed(net, image())
    np.testing.assert_allclose(along(analysis, CRITERIA["l1"](analysis), "a.weight/0"), expected, rtol=1e-5)


def test_vectors_and_buffers_are_no_weights() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 2))
    with torch.no_grad():
        net[0].bias.fill_(100.0)
        net[1].weight.fill_(100.0)
        net[1].running_var.fill_(100.0)
    analysis = analysed(net, image())
    expected = np.abs(array(net[0].weight)).sum((1, 2, 3)) + np.abs(array(net[2].weight)).sum((0, 2, 3))
    np.testing.assert_allclose(along(analysis, CRITERIA["l1"](analysis), "0.weight/0"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (lambda: nn.BatchNorm2d(4), image),
        (lambda: nn.GroupNorm(2, 4), image),
        (lambda: nn.InstanceNorm2d(4, affine=True), image),
    ],
)
def test_bn_scale_is_the_size_of_gamma(norm, x) -> None:
    net = nn.Sequential(conv(3, 4), norm(), conv(4, 2))
    net[1].weight.data = torch.tensor([0.5, -2.0, 0.0, 1.0])
    analysis = analysed(net, x())
    assert along(analysis, CRITERIA["bn_scale"](analysis), "0.weight/0").tolist() == [0.5, 2.0, 0.0, 1.0]


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4)])
def test_bn_scale_takes_the_norms_of_tokens(norm) -> None:
    net = nn.Sequential(nn.Linear(12, 4), norm(), nn.Linear(4, 2))
    net[1].weight.data = torch.tensor([0.5, -2.0, 0.0, 1.0])
    analysis = analysed(net, tokens())
    assert along(analysis, CRITERIA["bn_scale"](analysis), "2.weight/1").tolist() == [0.5, 2.0, 0.0, 1.0]


def test_bn_scale_sums_the_norms_of_a_channel_and_the_places_of_a_norm() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.LayerNorm([4, 6, 6]), conv(4, 2))
    net[1].weight.data = torch.tensor([0.5, -2.0, 0.0, 1.0])
    nn.init.normal_(net[3].weight)
    analysis = analysed(net, image())
    expected = np.array([0.5, 2.0, 0.0, 1.0]) + np.abs(array(net[3].weight)).sum((1, 2))
    np.testing.assert_allclose(along(analysis, CRITERIA["bn_scale"](analysis), "0.weight/0"), expected, rtol=1e-6)


def test_bn_scale_has_nothing_to_say_without_a_norm() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 6), conv(6, 2))
    analysis = analysed(net, image())
    assert np.isfinite(along(analysis, CRITERIA["bn_scale"](analysis), "0.weight/0")).all()
    assert np.isnan(along(analysis, CRITERIA["bn_scale"](analysis), "2.weight/0")).all()
    without = analysed(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False), conv(4, 2)), image())
    assert np.isnan(along(without, CRITERIA["bn_scale"](without), "0.weight/0")).all()


def test_random_is_uniform_and_repeats_by_seed() -> None:
    analysis = analysed(nn.Sequential(nn.Linear(12, 400), nn.Linear(400, 2)), tokens())
    scores = along(analysis, CRITERIA["random"](analysis, Evidence(3)), "0.weight/0")
    assert 0 <= scores.min() < 0.02 and 0.98 < scores.max() < 1 and abs(scores.mean() - 0.5) < 0.06
    assert (CRITERIA["random"](analysis, Evidence(3)) == CRITERIA["random"](analysis, Evidence(3))).all()
    assert (CRITERIA["random"](analysis, Evidence(3)) != CRITERIA["random"](analysis, Evidence(4))).all()


def evidence_of(analysis: Analysis, need: str) -> Evidence:
    model = analysis.captured.model
    return (
        gather(analysis, need, lambda: model(image()).sum().backward(), batches=1) if need != "weights" else Evidence()
    )


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_gives_one_number_for_each_class_and_leaves_the_model_alone(name: str) -> None:
    net = Net(lambda n, x: n.o(n.n(n.a(x)) * n.g), a=conv(3, 6), n=nn.BatchNorm2d(6), g=weight(6, 1, 1), o=conv(6, 2))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    analysis = analysed(net, image())
    scores = CRITERIA[name](analysis, evidence_of(analysis, CRITERIA[name].need))
    assert scores.shape == (analysis.classes.count,) and scores.dtype == np.float64
    assert np.isfinite(along(analysis, scores, "a.weight/0")).all()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_only_what_produces_the_channels_counts_where_that_is_wanted() -> None:
    """As in the dependency-aware mode of NNI: the layers whose outputs are added, and not those that read them."""
    net = coupled()
    first, second = slices(net, AXES[:2])
    analysis = analysed(net, image())
    scores = {name: along(analysis, CRITERIA[name](analysis, produced=True), "o.weight/1") for name in ("l1", "l2")}
    np.testing.assert_allclose(scores["l1"], np.abs(first).sum(1) + np.abs(second).sum(1), rtol=1e-5)
    np.testing.assert_allclose(scores["l2"], np.linalg.norm(first, axis=1) + np.linalg.norm(second, axis=1), rtol=1e-5)


def test_half_precision_is_summed_in_more() -> None:
    net = nn.Sequential(nn.Linear(4096, 4), nn.Linear(4, 2)).half()
    nn.init.constant_(net[0].weight, 1.0)
    nn.init.constant_(net[1].weight, 0.0)
    analysis = analysed(net, torch.randn(2, 4096).half())
    assert along(analysis, CRITERIA["l1"](analysis), "0.weight/0").tolist() == [4096.0] * 4
    np.testing.assert_allclose(along(analysis, CRITERIA["l2"](analysis), "0.weight/0"), [64.0] * 4)


def test_a_weight_without_gradients_has_no_saliency() -> None:
    """What is frozen is not worth nothing; nobody knows what it is worth."""
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), conv(5, 2)).eval()
    analysis = analyse(capture(model, image()))
    saliency = {"2.weight": model[2].weight.detach() ** 2}
    scores = CRITERIA["taylor"](analysis, Evidence(saliency=saliency), produced=True)
    assert np.isnan(along(analysis, scores, "0.weight/0")).all()
    expected = array(saliency["2.weight"]).reshape(5, -1).sum(1)
    np.testing.assert_allclose(along(analysis, scores, "2.weight/0"), expected, rtol=1e-6)

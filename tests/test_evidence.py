"""What activations and gradients say of channels, against numpy and against numbers worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_criteria import along, array
from test_rules import Net, conv, image
from torch import Tensor, nn

import graphprune
from graphprune.criteria import CRITERIA
from graphprune.errors import ConfigError
from graphprune.evidence import Evidence, Observer, gather, put_back
from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.masking import attach_masks

BATCHES = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def observed(net: nn.Module, criterion: str, batches: int = 3, **options: object) -> tuple[Analysis, np.ndarray]:
    analysis = analyse(capture(net, image()))
    need = CRITERIA[criterion].need

    def run() -> None:
        for batch in BATCHES:
            result = net(batch)
            if need == "gradients":
                result.square().mean().backward()

    return analysis, CRITERIA[criterion](analysis, gather(analysis, need, run, batches=batches, **options))


def residual() -> Net:
    """Two layers that are added, after a ReLU of one of them and before another one of the sum."""
    torch.manual_seed(0)
    return Net(lambda n, x: n.o((n.a(x).relu() + n.b(x)).relu()), a=conv(3, 6), b=conv(3, 6), o=conv(6, 2)).eval()


def test_activations_by_hand() -> None:
    """Channels of 1, -1 and x: never zero, always zero, zero where x is not positive."""
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    net[0].weight.data, net[0].bias.data = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([1.0, -1.0, 0.0])
    analysis = analyse(capture(net, torch.randn(2, 1)))
    evidence = gather(analysis, "activations", lambda: net(torch.tensor([[2.0], [-3.0], [0.0], [4.0]])), batches=1)
    assert along(analysis, CRITERIA["apoz"](analysis, evidence), "0.weight/0").tolist() == [1.0, 0.0, 0.5]
    assert along(analysis, CRITERIA["mean_activation"](analysis, evidence), "2.weight/1").tolist() == [1.0, 0.0, 1.5]


def test_activations_are_averaged_over_batches_and_places_and_summed_over_functions() -> None:
    net = residual()
    x = torch.cat(BATCHES)
    first = net.a(x).relu()
    found = [array(value) for value in (first, (first + net.b(x)).relu())]
    analysis, scores = observed(net, "apoz")
    np.testing.assert_allclose(along(analysis, scores, "b.weight/0"), sum((v != 0).mean((0, 2, 3)) for v in found))
    analysis, scores = observed(net, "mean_activation")
    np.testing.assert_allclose(along(analysis, scores, "a.weight/0"), sum(v.mean((0, 2, 3)) for v in found), rtol=1e-6)


def test_a_channel_without_a_function_shows_what_its_layer_gives() -> None:
    net = nn.Sequential(conv(3, 6), conv(6, 4), nn.ReLU(), conv(4, 2)).eval()
    analysis, scores = observed(net, "mean_activation")
    x = torch.cat(BATCHES)
    np.testing.assert_allclose(along(analysis, scores, "0.weight/0"), array(net[0](x)).mean((0, 2, 3)), rtol=1e-5)
    expected = array(net[:3](x)).mean((0, 2, 3))
    np.testing.assert_allclose(along(analysis, scores, "1.weight/0"), expected, rtol=1e-5)


def test_only_some_functions_may_be_looked_at() -> None:
    net = Net(lambda n, x: n.o(F.gelu(n.a(x).relu())), a=conv(3, 6), o=conv(6, 2)).eval()
    x = torch.cat(BATCHES)
    analysis, scores = observed(net, "mean_activation", functions=["gelu"])
    expected = array(F.gelu(net.a(x).relu())).mean((0, 2, 3))
    np.testing.assert_allclose(along(analysis, scores, "a.weight/0"), expected, rtol=1e-5)


def test_places_that_become_channels_count_one_by_one() -> None:
    net = Net(lambda n, x: n.o(n.a(x).relu().flatten(1)), a=conv(3, 4), o=nn.Linear(4 * 36, 2)).eval()
    analysis, scores = observed(net, "apoz")
    expected = (array(net.a(torch.cat(BATCHES)).relu()) != 0).mean((0, 2, 3))
    np.testing.assert_allclose(along(analysis, scores, "a.weight/0"), expected)


def test_the_heads_of_attention_have_activations_too() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0).eval()
    x = torch.randn(3, 5, 16)
    analysis = analyse(capture(net, x))
    scores = CRITERIA["mean_activation"](analysis, gather(analysis, "activations", lambda: net(x), batches=1))
    hidden = net.linear1(net.norm1(x + net.self_attn(x, x, x, need_weights=False)[0])).relu()
    np.testing.assert_allclose(along(analysis, scores, "linear1.weight/0"), array(hidden).mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("batches", [2, 3])
def test_saliency_is_the_mean_of_squares_summed_over_slices(batches: int) -> None:
    net = residual()
    total = dict.fromkeys(("a.weight", "b.weight", "o.weight"), 0.0)
    for batch in BATCHES[:batches]:
        net.zero_grad()
        net(batch).square().mean().backward()
        for name in total:
            weight = net.get_parameter(name)
            total[name] = total[name] + (array(weight) * array(weight.grad)) ** 2 / batches
    net.zero_grad()
    analysis, scores = observed(net, "taylor", batches)
    expected = total["a.weight"].sum((1, 2, 3)) + total["b.weight"].sum((1, 2, 3)) + total["o.weight"].sum((0, 2, 3))
    np.testing.assert_allclose(along(analysis, scores, "a.weight/0"), expected, rtol=1e-5)


def test_gradients_that_add_up_are_seen_one_by_one() -> None:
    """A user's loop may let gradients of several batches add up before it takes a step."""
    net = residual()
    analysis, scores = observed(net, "taylor")
    again = analyse(capture(net, image()))

    def run() -> None:
        net.zero_grad()
        for batch in BATCHES:
            net(batch).square().mean().backward()

    other = CRITERIA["taylor"](again, gather(again, "gradients", run, batches=3))
    np.testing.assert_allclose(along(analysis, scores, "a.weight/0"), along(again, other, "a.weight/0"), rtol=1e-12)


def test_a_model_that_was_trained_meanwhile_is_put_back() -> None:
    net = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)).train()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    analysis = analyse(capture(net, image()))

    def run() -> None:
        net.eval()
        net.train()
        for batch in BATCHES:
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
        net.eval()

    gather(analysis, "gradients", run, batches=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training and net[1].training
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight)) and net[3].weight.grad is None
    assert not net._forward_pre_hooks and not net[0].weight._backward_hooks


def test_what_comes_after_the_wanted_batches_does_not_count() -> None:
    net = residual()
    analysis = analyse(capture(net, image()))
    observer = Observer(analysis, net, "activations", 2)
    with observer.watching():
        for batch in BATCHES:
            net(batch)
    assert observer.count == 2
    expected = array(net.a(torch.cat(BATCHES[:2])).relu()).mean((0, 2, 3))
    first = gather(analysis, "activations", lambda: [net(batch) for batch in BATCHES[:2]], batches=5)
    assert (observer.evidence(0).means == first.means).all()
    assert (along(analysis, first.means, "a.weight/0") > expected - 1e-9).all()


@pytest.mark.parametrize("criterion", ["apoz", "mean_activation", "taylor"])
def test_a_model_that_is_not_analysed_yet_is_on_its_first_call(criterion: str) -> None:
    net, need = residual(), CRITERIA[criterion].need
    observer = Observer(lambda inputs: analyse(capture(net, inputs)), net, need, 3)
    with observer.watching():
        for batch in BATCHES:
            net(batch).square().mean().backward()
    assert observer.analysis is not None and observer.count == 3 and not net._forward_pre_hooks
    analysis, scores = observed(net, criterion)
    found = CRITERIA[criterion](observer.analysis, observer.evidence(0))
    assert (along(observer.analysis, found, "a.weight/0") == along(analysis, scores, "a.weight/0")).all()


def test_masks_that_are_attached_show_in_activations() -> None:
    net = residual()
    analysis = analyse(capture(net, image()))
    mask = torch.ones_like(net.a.weight)
    mask[2] = 0
    attach_masks(net, {"a.weight": mask})
    evidence = gather(analysis, "activations", lambda: [net(batch) for batch in BATCHES], batches=3)
    x = torch.cat(BATCHES)
    first = F.conv2d(x, net.a.weight, net.a.bias, padding=1).relu()
    expected = array(first).mean((0, 2, 3)) + array((first + net.b(x)).relu()).mean((0, 2, 3))
    np.testing.assert_allclose(along(analysis, evidence.means, "a.weight/0"), expected, rtol=1e-5)


def test_a_loop_that_does_not_run_the_model_is_refused() -> None:
    analysis = analyse(capture(residual(), image()))
    with pytest.raises(ConfigError, match="^calibrate: the model was not called while it ran. Run the model"):
        gather(analysis, "activations", lambda: None, batches=1)
    with pytest.raises(ConfigError, match="^calibrate: the model received no gradients while it ran. Run the model"):
        gather(analysis, "gradients", lambda: analysis.captured.model(image()), batches=1)


def test_inputs_of_another_form_are_refused() -> None:
    net = Net(lambda n, x, scale=None: n.o(n.a(x).relu()), a=conv(3, 4), o=conv(4, 2))
    net.forward = lambda x, scale=None: net.o(net.a(x).relu())
    analysis = analyse(capture(net, image()))
    with pytest.raises(ConfigError, match="is called in another way than on the example, so that its activations"):
        gather(analysis, "activations", lambda: net(image(), scale=torch.ones(1)), batches=1)


@pytest.mark.parametrize("criterion", ["apoz", "mean_activation", "taylor"])
def test_compress_by_what_is_seen_on_data(criterion: str) -> None:
    net = residual()
    result = graphprune.compress(
        net, image(), 0.5, criterion=criterion, round_to=1,
        calibrate=lambda model: [model(batch).square().mean().backward() for batch in BATCHES],
    )  # fmt: skip
    analysis, scores = observed(net, criterion, 20)
    lowest = np.argsort(along(analysis, scores, "a.weight/0"))[3:]
    assert sorted(lowest) == result.plan.to_json()["keep"]["a.weight"]["0"]


def test_evidence_of_nothing_has_a_seed_only() -> None:
    assert Evidence() == Evidence(0, None, None, None)


def test_a_buffer_that_forward_puts_in_place_of_another_is_put_back() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + x.mean(0)
            self.register_buffer("seen", torch.ones(1))
            return x - self.mean

    model = Average()
    mean = model.mean
    with put_back(model):
        model(torch.ones(2, 3))
        assert model.mean is not mean
    assert model.mean is mean and not mean.any() and list(model.state_dict()) == ["mean"]


def test_a_buffer_that_cannot_be_written_to_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("ones", torch.ones(1).expand(8))
    with put_back(model):
        model(torch.randn(4, 2))
    assert not model[1].running_mean.any() and model.ones.tolist() == [1] * 8

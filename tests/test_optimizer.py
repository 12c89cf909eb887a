"""Optimizers follow their model through a shrink: what they remember of a weight is cut as the weight is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import graphprune
from graphprune.errors import ConfigError
from graphprune.training.optimizer import Moved, follow, follow_schedule
from speedup import ModelSpeedup
from speedup.cut import ShrunkGraph
from speedup.plan import Axis, ShrinkPlan

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


@pytest.fixture
def double() -> Iterator[None]:
    """Where a gradient is zero but for rounding, as that of a bias of keys, adaptive optimizers would amplify that."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class ConvNet(nn.Module):
    """A residual sum, a depthwise and a grouped convolution, batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = x + self.bn2(self.conv(self.depthwise(x)))
        return self.fc(self.grouped(x).relu().mean((2, 3)))


class Attention(nn.Module):
    """Attention over heads, and two layers with a norm before each; the stream keeps its width."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        split = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.fc(x.mean(1))


class Tied(nn.Module):
    """Embedding and output share a weight; between them is a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.project = nn.Linear(6, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.project(self.lstm(self.embedding(tokens))[0]))


class Hidden(nn.Module):
    """A size that no attribute holds, so that the result is a graph; and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 12), nn.Linear(12, 5), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, 12).relu())


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True, weight_decay=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
}
CASES = {
    "conv": (ConvNet, (3, 6, 6), {}),
    "attention": (Attention, (7, 16), {"heads": True, "ffn": True, "width": False}),
}


def batches(shape: tuple[int, ...], number: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        yield (
            torch.randn(4, *shape, generator=generator, dtype=torch.get_default_dtype()),
            torch.randint(5, (4,), generator=generator),
        )


def train(
    model: nn.Module, optimizer: Optimizer, data: Iterator[tuple[Tensor, Tensor]], after=lambda what: None
) -> None:
    for inputs, targets in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        after("gradients")
        optimizer.step()
        after("weights")


def compressed(model: nn.Module, example: Tensor, **options) -> graphprune.Result:
    return graphprune.compress(model, example, 0.5, round_to=1, **options)


def kept(plan: ShrinkPlan, name: str, tensor: Tensor) -> Tensor:
    """One where the plan keeps an element, else zero."""
    positions = plan.cut(name, torch.arange(tensor.numel()).reshape(tensor.shape))
    return torch.zeros(tensor.numel()).index_fill(0, positions.flatten(), 1).reshape(tensor.shape)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("net", "shape", "options"), CASES.values(), ids=CASES)
def test_the_shrunk_model_trains_as_the_masked_one_does(net, shape, options, make) -> None:
    dense = net().eval()
    optimizer = make(dense.parameters())
    train(dense, optimizer, batches(shape, 3))
    result = compressed(dense, torch.randn(2, *shape), **options)
    followed = follow(optimizer, dense, result)
    masks = {name: kept(result.plan, name, p) for name, p in dense.named_parameters()}
    assert any(not mask.all() for mask in masks.values())

    def mask(what: str) -> None:
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                (parameter if what == "weights" else parameter.grad).mul_(masks[name])

    mask("weights")
    train(dense, optimizer, batches(shape, 5), mask)
    train(result.model, followed, batches(shape, 5))
    shrunk = dict(result.model.named_parameters())
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(shrunk[name], result.plan.cut(name, parameter), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop"])
def test_other_optimizers_of_torch(name: str) -> None:
    """Two layers that are cut by hand train as the masked ones do."""
    kept = np.array([1, 2, 4])
    plan = ShrinkPlan({Axis("0.weight", 0): kept, Axis("0.bias", 0): kept, Axis("2.weight", 1): kept})
    dense, shrunk = (nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Linear(size, 5)) for size in (6, 3))
    optimizer = getattr(torch.optim, name)(dense.parameters(), lr=0.01)
    train(dense, optimizer, batches((3,), 3))
    followed = follow(optimizer, dense, Moved(shrunk, plan))

    def mask(what: str) -> None:
        with torch.no_grad():
            for one in (dense[0].weight, dense[0].bias, dense[2].weight.T):
                one.index_fill_(0, torch.tensor([0, 3, 5]), 0.0)

    mask("weights")
    with torch.no_grad():
        for key, parameter in shrunk.named_parameters():
            parameter.copy_(plan.cut(key, dense.get_parameter(key)))
    before = shrunk[0].weight.clone()
    train(dense, optimizer, batches((3,), 5), mask)
    train(shrunk, followed, batches((3,), 5))
    assert not torch.equal(before, shrunk[0].weight)
    for key, parameter in shrunk.named_parameters():
        torch.testing.assert_close(parameter, plan.cut(key, dense.get_parameter(key)), rtol=0, atol=1e-6)


def test_what_is_remembered_of_all_parameters_together_is_refused() -> None:
    dense = square_net()
    optimizer = torch.optim.LBFGS(dense.parameters(), max_iter=2)
    result = compressed(dense, torch.randn(2, 3, 2, 2))
    assert len(follow(optimizer, dense, result).param_groups[0]["params"]) == 8  # there is nothing yet

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = dense(torch.ones(2, 3, 2, 2)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ConfigError, match=r"0\.weight: \w+ of its optimizer has shape"):
        follow(optimizer, dense, result)


def test_a_followed_optimizer_is_another_than_a_new_one() -> None:
    dense = ConvNet().eval()
    optimizer = OPTIMIZERS["AdamW"](dense.parameters())
    train(dense, optimizer, batches((3, 6, 6), 3))
    result = compressed(dense, torch.randn(2, 3, 6, 6))
    again = copy.deepcopy(result.model)
    train(result.model, follow(optimizer, dense, result), batches((3, 6, 6), 5))
    train(again, OPTIMIZERS["AdamW"](again.parameters()), batches((3, 6, 6), 5))
    assert not torch.allclose(result.model.stem.weight, again.stem.weight, atol=1e-4)


def test_momentum_is_cut_and_groups_keep_their_options() -> None:
    dense = ConvNet()
    groups = [
        {"params": [dense.fc.bias, dense.fc.weight], "lr": 0.3, "weight_decay": 0.1},
        {"params": [p for name, p in dense.named_parameters() if not name.startswith("fc.")], "momentum": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    train(dense, optimizer, batches((3, 6, 6), 2))
    before = copy.deepcopy(optimizer.state_dict())
    result = compressed(dense, torch.randn(2, 3, 6, 6))
    followed = follow(optimizer, dense, result)
    assert type(followed) is torch.optim.SGD and followed.defaults == optimizer.defaults
    for old, new in zip(optimizer.param_groups, followed.param_groups, strict=True):
        assert {**old, "params": 0} == {**new, "params": 0}
    names = {id(p): name for name, p in dense.named_parameters()}
    new_names = {id(p): name for name, p in result.model.named_parameters()}
    for old, new in zip(optimizer.param_groups, followed.param_groups, strict=True):
        assert [names[id(p)] for p in old["params"]] == [new_names[id(p)] for p in new["params"]]
    for old, state in optimizer.state.items():
        name = names[id(old)]
        new = result.model.get_parameter(name)
        torch.testing.assert_close(
            followed.state[new]["momentum_buffer"],
            result.plan.cut(name, state["momentum_buffer"]),
            rtol=0,
            atol=0,
        )
        assert new.shape == followed.state[new]["momentum_buffer"].shape
    followed.param_groups[0]["lr"] = 9.0  # nothing is shared with the old one
    train(result.model, followed, batches((3, 6, 6), 2))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(after["state"][i]["momentum_buffer"], s["momentum_buffer"]) for i, s in before["state"].items()
    )


schedules = torch.optim.lr_scheduler
SCHEDULES = {
    "step": lambda optimizer: schedules.StepLR(optimizer, 3, 0.1),
    "milestones": lambda optimizer: schedules.MultiStepLR(optimizer, [2, 8]),
    "cosine": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 10),
    "restarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, 3),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, 0.5, 20),
    "cyclic": lambda optimizer: schedules.CyclicLR(optimizer, 0.01, 0.1, 3, mode="triangular2"),
    "lambda": lambda optimizer: schedules.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "chained": lambda optimizer: schedules.ChainedScheduler(
        [schedules.ConstantLR(optimizer, 0.1, 4), schedules.ExponentialLR(optimizer, 0.9)]
    ),
    "sequence": lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.LinearLR(optimizer, 0.1, total_iters=4), schedules.PolynomialLR(optimizer, 6)], [4]
    ),
}


@pytest.mark.parametrize("begun", [0, 2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.filterwarnings("error:.*lr_scheduler")
def test_a_schedule_goes_on(schedule, begun: int) -> None:
    model, rates = nn.Linear(2, 2), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    old = schedule(optimizer)
    steps = [(optimizer.step(), old.step()) for _ in range(begun)]
    assert len(steps) == begun
    followed = follow(optimizer, model, Moved(copy.deepcopy(model)))
    new = follow_schedule(old, optimizer, followed)
    assert followed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for name, one, its in (("new", new, followed), ("old", old, optimizer)):  # one after the other: nothing is shared
        rates[name] = [(its.step(), one.step(), its.param_groups[0]["lr"], *one.get_last_lr())[2:] for _ in range(8)]
    assert rates["old"] == rates["new"] and len(set(rates["old"])) > 1


def test_a_schedule_by_plateaus_goes_on() -> None:
    dense = ConvNet()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    old = schedules.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    old.step(1.0)
    old.step(1.0)
    followed = follow(optimizer, dense, compressed(dense, torch.randn(2, 3, 6, 6)))
    new = follow_schedule(old, optimizer, followed)
    new.step(1.0)
    assert followed.param_groups[0]["lr"] == 0.05 and optimizer.param_groups[0]["lr"] == 0.1


def test_the_schedule_of_another_optimizer_is_refused() -> None:
    model = ConvNet()
    one, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(ConfigError, match="StepLR: belongs to another optimizer"):
        follow_schedule(schedules.StepLR(one, 3), other, one)


def test_tied_weights_and_recurrent_layers() -> None:
    dense = Tied()
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.01)
    tokens = torch.randint(20, (4, 5))
    dense(tokens).square().sum().backward()
    optimizer.step()
    result = compressed(dense, tokens)
    followed = follow(optimizer, dense, result)
    shrunk = result.model
    assert shrunk.head.weight is shrunk.embedding.weight and shrunk.head.weight.shape[1] < 8
    assert shrunk.lstm.weight_hh_l0.shape != dense.lstm.weight_hh_l0.shape
    held = [id(p) for p in followed.param_groups[0]["params"]]
    assert held == [id(p) for p in shrunk.parameters()]
    assert {id(p) for p in shrunk.lstm._flat_weights} <= set(held)
    before = shrunk.lstm.weight_hh_l0.clone()
    shrunk(tokens).square().sum().backward()
    followed.step()
    assert not torch.equal(before, shrunk.lstm.weight_hh_l0)


def test_a_graph_has_the_parameters_that_it_uses() -> None:
    dense = Hidden()
    optimizer = torch.optim.SGD(dense.named_parameters(), lr=0.1, momentum=0.9)
    dense(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    result = compressed(dense, torch.randn(2, 6))
    assert isinstance(result.model, ShrunkGraph)
    (group,) = follow(optimizer, dense, result).param_groups
    assert group["param_names"] == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert [id(p) for p in group["params"]] == [id(result.model.get_parameter(n)) for n in group["param_names"]]


def test_a_copy_is_followed_too() -> None:
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, batches((3, 6, 6), 2))
    other = copy.deepcopy(model)
    followed = follow(optimizer, model, Moved(other))
    train(model, optimizer, batches((3, 6, 6), 2))
    train(other, followed, batches((3, 6, 6), 2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class Factors(Optimizer):
    """What Adafactor keeps, in the form of torch (dimensions of one) or of others (dimensions left out)."""

    def __init__(self, params, lr: float = 0.1, form: str = "torch") -> None:
        super().__init__(params, {"lr": lr})
        self.form = form

    @torch.no_grad()
    def step(self, closure=None) -> None:
        keep = self.form == "torch"
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            square = p.grad.square() + 1e-30
            if p.dim() > 1:
                row, col = square.mean(-1, keepdim=keep), square.mean(-2, keepdim=keep)
                for key, new in (("sq_row", row), ("sq_col", col)):
                    state[key] = 0.9 * state[key] + 0.1 * new if key in state else new
            else:
                state["sq"] = 0.9 * state["sq"] + 0.1 * square if "sq" in state else square
            p.sub_(p.grad / self.estimate(p).sqrt().add(1e-3), alpha=self.param_groups[0]["lr"])

    def estimate(self, p: Tensor) -> Tensor:
        """The mean square of each gradient: row times column over the mean of the rows."""
        state = self.state[p]
        if p.dim() < 2:
            return state["sq"]
        keep = self.form == "torch"
        row, col = (state[k] if keep else state[k].unsqueeze(d) for k, d in (("sq_row", -1), ("sq_col", -2)))
        return row * col / row.mean(-2, keepdim=True)


def square_net() -> nn.Module:
    """Square weights, of which only names tell rows from columns, and a convolution."""
    layers = [nn.Conv2d(3, 12, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(12, 5))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("form", ["torch", "others"])
def test_factored_averages_stand_for_the_same_numbers(form: str) -> None:
    dense = square_net()
    result = compressed(dense, torch.randn(2, 3, 2, 2))
    masks = {name: kept(result.plan, name, p) for name, p in dense.named_parameters()}
    optimizer = Factors(dense.parameters(), lr=0.01, form=form)

    def mask(what: str) -> None:
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                (parameter if what == "weights" else parameter.grad).mul_(masks[name])

    mask("weights")
    train(dense, optimizer, batches((3, 2, 2), 3), mask)
    followed = follow(optimizer, dense, result)
    assert followed.form == form
    for name, old in dense.named_parameters():
        new = result.model.get_parameter(name)
        assert followed.estimate(new).shape == new.shape
        torch.testing.assert_close(
            followed.estimate(new), result.plan.cut(name, optimizer.estimate(old)), rtol=1e-9, atol=0
        )
    assert {
        key: tuple(value.shape) for key, value in followed.state[result.model.get_parameter("3.weight")].items()
    } == ({"sq_row": (6, 1), "sq_col": (1, 6)} if form == "torch" else {"sq_row": (6,), "sq_col": (6,)})
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            result.model.get_parameter(name).copy_(result.plan.cut(name, parameter))
    train(dense, optimizer, batches((3, 2, 2), 5), mask)
    train(result.model, followed, batches((3, 2, 2), 5))
    for name, parameter in dense.named_parameters():
        shrunk = result.model.get_parameter(name)
        torch.testing.assert_close(shrunk, result.plan.cut(name, parameter), rtol=0, atol=1e-6)


def test_adafactor_of_torch_follows() -> None:
    dense = square_net()
    optimizer = torch.optim.Adafactor(dense.parameters(), lr=0.01)
    train(dense, optimizer, batches((3, 2, 2), 3))
    result = compressed(dense, torch.randn(2, 3, 2, 2))
    followed = follow(optimizer, dense, result)
    old, new = dense.get_parameter("3.weight"), result.model.get_parameter("3.weight")
    entries = optimizer.state[old], followed.state[new]
    dense_estimate, estimate = (one["row_var"] * one["col_var"] / one["row_var"].mean() for one in entries)
    torch.testing.assert_close(result.plan.cut("3.weight", dense_estimate), estimate)
    train(result.model, followed, batches((3, 2, 2), 2))


def test_what_cannot_be_cut_with_certainty_is_refused() -> None:
    dense = square_net()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    result = compressed(dense, torch.randn(2, 3, 2, 2))
    for strange in (torch.zeros(12), torch.zeros(144), torch.zeros(12, 12, 2), torch.zeros(7)):
        optimizer.state[dense.get_parameter("3.weight")]["history"] = strange
        with pytest.raises(ConfigError, match=r"3\.weight: history of its optimizer has shape"):
            follow(optimizer, dense, result)
    optimizer.state[dense.get_parameter("3.weight")]["history"] = [torch.zeros(12, 12), 3, torch.tensor(2.0), None]
    entry = follow(optimizer, dense, result).state[result.model.get_parameter("3.weight")]["history"]
    assert [getattr(leaf, "shape", leaf) for leaf in entry] == [(6, 6), 3, (), None]


def test_the_rows_of_a_grouped_weight_that_keep_other_inputs_have_no_common_average() -> None:
    weight = nn.Parameter(torch.randn(2, 3))
    holder = nn.ParameterDict({"w": weight})
    plan = ShrinkPlan(rows={"w": torch.tensor([[0, 1], [1, 2]]).numpy()})
    shrunk = nn.ParameterDict({"w": plan.cut_copy("w", weight)})
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for entry in (
        {"mean": torch.tensor([[1.0, 2.0, 3.0]])},
        {"row": torch.ones(2), "col": torch.tensor([1.0, 2.0, 3.0])},
    ):
        optimizer.state[weight] = entry
        with pytest.raises(ConfigError, match="w: (mean|row) of its optimizer"):
            follow(optimizer, holder, Moved(shrunk, plan))
    optimizer.state[weight] = {"mean": torch.tensor([[1.0], [2.0]])}
    entry = follow(optimizer, holder, Moved(shrunk, plan)).state[shrunk["w"]]
    assert torch.equal(entry["mean"], torch.tensor([[1.0], [2.0]]))


class Wrapping(torch.optim.SGD):
    def __init__(self, params) -> None:
        params = list(params)
        super().__init__(params, lr=0.1)
        self.inner = torch.optim.SGD(params, lr=0.1)


def test_wrong_optimizers_are_refused() -> None:
    dense, other = square_net(), square_net()
    result = compressed(dense, torch.randn(2, 3, 2, 2))
    with pytest.raises(ConfigError, match=r"SGD: holds a parameter of shape \(12, 3, 2, 2\) that the model does not"):
        follow(torch.optim.SGD(other.parameters(), lr=0.1), dense, result)
    with pytest.raises(ConfigError, match="Wrapping: holds another optimizer as inner"):
        follow(Wrapping(dense.parameters()), dense, result)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    optimizer.step = lambda closure=None: None
    with pytest.raises(ConfigError, match="SGD: its step was replaced"):
        follow(optimizer, dense, result)
    wide = nn.Sequential(*other[:-1], nn.Linear(12, 4))
    with pytest.raises(ConfigError, match=r"7\.weight: has shape \(4, 12\) here and \(5, 6\)"):
        follow(torch.optim.SGD(wide.parameters(), lr=0.1), wide, result)
    with pytest.raises(ConfigError, match="fc.weight: is missing in the shrunk model"):
        net = ConvNet()
        follow(torch.optim.SGD(net.fc.parameters(), lr=0.1), net, result)


def test_results_of_something_else_are_refused() -> None:
    dense = square_net()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    result = compressed(dense, torch.randn(2, 3, 2, 2))
    for args, text in (
        (
            (optimizer, dense, result.model),
            r"result: is .{60}, which does not say what is left. Give what compress\(\)",
        ),
        ((optimizer, dense, None), "result: is None, which does not say what is left"),
        ((optimizer, None, result), "model: is None. Give the dense model."),
        (("sgd", dense, result), "optimizer: is 'sgd'. Give the optimizer of the model."),
        (
            (optimizer, dense, ModelSpeedup(dense, torch.randn(2, 3, 2, 2), {})),
            r"result: ModelSpeedup has no smaller mo",
        ),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            follow(*args)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="schedule: is 'step'. Give the schedule of the optimizer."):
        follow_schedule("step", optimizer, optimizer)


def test_an_optimizer_follows_a_speedup_by_masks() -> None:
    dense, example = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.1)
    dense(example).square().sum().backward()
    optimizer.step()
    weight = dense[0].weight
    mask = torch.ones_like(weight)
    mask[::2] = 0
    speedup = ModelSpeedup(dense, example, {"0.weight": mask})
    small = speedup.speedup_model()
    assert speedup.model is small
    moved = follow(optimizer, dense, speedup)
    now = dict(small.named_parameters())["0.weight"]
    assert len(now) == len(weight) // 2
    assert torch.equal(moved.state[now]["exp_avg"], optimizer.state[weight]["exp_avg"][1::2])


def test_hooks_and_attributes_of_an_optimizer_come_along() -> None:
    dense = square_net()
    optimizer = Factors(dense.parameters(), form="others")
    calls = []
    optimizer.register_step_pre_hook(lambda one, args, kwargs: calls.append(one))
    result = compressed(dense, torch.randn(2, 3, 2, 2))
    followed = follow(optimizer, dense, result)
    train(result.model, followed, batches((3, 2, 2), 1))
    assert calls == [followed]

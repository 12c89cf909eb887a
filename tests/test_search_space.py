"""What can be chosen of a model: shares, limits and costs; the models that come of it; and states on the way."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from searching import MODELS, chain, chain_space, jiggle, widths
from test_parts import Stubborn
from test_rules import one_thread
from torch import nn

import graphprune
from graphprune.budget import cost
from graphprune.criteria import CRITERIA
from graphprune.dependency import trace
from graphprune.errors import ConfigError, ModelError
from graphprune.search import Space
from graphprune.search.reach import reach
from graphprune.search.state import tensors_after, tensors_of
from graphprune.search.tally import Tally
from graphprune.select import select
from graphprune.source import load_source
from graphprune.targets import Target
from speedup.analysis import Analysis
from speedup.cut import shrink_graph
from speedup.planning import make_plan


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 1, groups=4)
        self.c, self.d = nn.Conv2d(24, 12, 1, groups=2), nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(nn.functional.channel_shuffle(self.b(self.a(x).relu()), 4)).relu())


def model_of(name: str) -> tuple[nn.Module, Any]:
    """A network of ``models/`` with its inputs; without a name the one above."""
    if not name:
        return Shuffled(), torch.randn(2, 3, 4, 4)
    source = load_source(str(MODELS / f"{name}.py"))
    return source.model, source.example_inputs


@pytest.mark.parametrize("name", ["", "digits", "resnet20_cifar", "mha_encoder", "llama", "tied_lm"])
def test_costs_are_counted_as_on_the_graph(name: str) -> None:
    dependencies = trace(*model_of(name))
    analysis, draws = dependencies.analysis, np.random.default_rng(0)
    tally = Tally(analysis)
    dense = cost(analysis.captured.graph_module, analysis.captured)
    everything = np.ones(analysis.classes.count, dtype=np.bool_)
    assert (tally.params(everything), tally.macs(everything)) == (dense.params, dense.macs)
    wished = {group.index: Target(draws.uniform(0, 0.8)) for group in dependencies.prunable}
    live = select(dependencies, CRITERIA["l1"](analysis, 0), lambda group: wished[group.index]).live
    found = cost(shrink_graph(analysis.captured, make_plan(analysis, live)), analysis.captured)
    assert found.params < dense.params
    assert (tally.params(live), tally.macs(live)) == (found.params, found.macs)


def test_a_choice_group_by_group_is_the_one_of_a_selection() -> None:
    space = Space.of(Shuffled(), torch.randn(2, 3, 4, 4), round_to=1)
    draws = np.random.default_rng(0)
    shares = {name: float(draws.uniform(0, 0.9)) for name in space.groups}
    names = {group.index: name for name, group in space.groups.items()}
    whole = select(space.dependencies, space.start.scores, lambda group: Target(shares[names[group.index]]))
    found = space.selection(shares)
    assert (found.live == whole.live).all()
    assert [(c.asked, c.kept, c.note) for c in found.choices] == [(c.asked, c.kept, c.note) for c in whole.choices]


@pytest.mark.parametrize(
    ("name", "seed"), [("", 0), ("", 1), ("", 2), ("", 3), ("resnet20_cifar", 0), ("mha_encoder", 0)]
)
def test_what_is_gone_stays_gone_and_what_is_left_fits(name: str, seed: int) -> None:
    """Other scores in between: every later choice is within the one before, and a plan can be made of it."""
    space = Space.of(*model_of(name), round_to=1)
    draws, state = np.random.default_rng(seed), space.start
    for _ in range(3):
        now = space.shares(state.live)
        shares = {n: now[n] + 0.4 * float(draws.random()) * (1 - now[n]) for n in space.groups}
        live = space.live(shares, state)
        assert not (live & ~state.live).any() and live.sum() < state.live.sum()
        make_plan(space.analysis, live)  # raises where it is no rectangle
        state = space.cut(state, live)
        state = replace(state, scores=np.where(np.isnan(state.scores), np.nan, draws.random(len(live))))
    assert space.live({}, state).tolist() == state.live.tolist()


def test_shares_and_widths_say_the_same() -> None:
    space = chain_space(10, 20)
    live = space.live({"layers.0.weight": 0.3, "layers.1.weight": 0.52})
    assert widths(space.model(live)) == [7, 9]
    assert space.shares(live) == {"layers.0.weight": 0.3, "layers.1.weight": 0.55}
    assert space.left(live, "weights") == pytest.approx(1 - (0.3 * 40 + 0.55 * 200) / 240)
    assert space.left(live, "params") == pytest.approx((7 * 5 + 9 * 8 + 3 * 10 + 2 * 16) / (10 * 5 + 20 * 11 + 63 + 60))
    assert space.left(live, "macs") == pytest.approx((4 * 7 + 7 * 9 + 9 * 3) / (40 + 200 + 60))


def test_as_much_is_kept_as_was_asked_for() -> None:
    space = chain_space(10, 20, keep_at_least=0.45)
    assert widths(space.model(space.live(dict.fromkeys(space.groups, 1.0)))) == [5, 9]
    assert widths(space.model(space.limited(4, 0.1).live(dict.fromkeys(space.groups, 1.0)))) == [8, 12]


def test_the_least_that_reaches_a_target() -> None:
    """Wishes in the ratio 1 : 2; one unit less of both would not be enough."""
    space = chain_space(50, 50)
    found = reach(space, {"layers.0.weight": 0.2, "layers.1.weight": 0.4}, 0.5, "params", space.start)
    live = space.live(found)
    assert space.left(live, "params") <= 0.5
    assert found["layers.1.weight"] == pytest.approx(2 * found["layers.0.weight"])
    assert space.left(space.live({name: share - 1 / 50 for name, share in space.shares(live).items()}), "params") > 0.5


def test_a_tiny_wish_does_not_coarsen_the_others() -> None:
    space = chain_space(50, 50)
    found = reach(space, {"layers.0.weight": 1e-9, "layers.1.weight": 0.4}, 0.5, "params", space.start)
    assert found["layers.0.weight"] == 0 and 0.48 < space.left(space.live(found), "params") <= 0.5
    found = reach(space, {"layers.0.weight": 1e-4, "layers.1.weight": 0.4}, 0.5, "params", space.start)
    assert found["layers.0.weight"] < 0.02 and 0.48 < space.left(space.live(found), "params") <= 0.5


def test_groups_that_were_not_wished_for_give_where_the_others_cannot() -> None:
    space = chain_space(10, 10)
    found = reach(space, {"layers.0.weight": 1.0}, 0.4, "weights", space.start)
    assert found["layers.0.weight"] == 0.9 and found["layers.1.weight"] > 0
    assert space.left(space.live(found), "weights") <= 0.4
    with pytest.raises(ConfigError, match="stay even where every group gives all it may. Ask for less"):
        reach(space, {}, 0.01, "weights", space.start)


def test_trained_weights_go_back_to_their_places() -> None:
    """Of the trained model cut again by the same choice nothing has changed; where channels went there is nothing."""
    space = chain_space(10, 20)
    live = space.live({"layers.0.weight": 0.3, "layers.1.weight": 0.5})
    model = space.model(live)
    jiggle(model)
    state = space.moved(space.start, live, tensors_after(model), "x")
    again = tensors_after(space.model(live, state))
    assert again.keys() == tensors_after(model).keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors_after(model).items())
    assert state.weights is not None
    gone = ~live[space.analysis.classes.plane(space.analysis.parameters["layers.0.weight"].planes[0])]
    assert gone.sum() == 3 and not state.weights["layers.0.weight"][torch.from_numpy(gone)].any()
    smaller = space.live({"layers.0.weight": 0.6, "layers.1.weight": 0.5}, state)
    assert not (smaller & ~live).any() and widths(space.model(smaller, state)) == [4, 10]


def test_the_result_holds_the_trained_weights_and_is_proven() -> None:
    space = chain_space(10, 20)
    before = {name: tensor.clone() for name, tensor in tensors_of(space.analysis.captured.model).items()}
    live = space.live({"layers.0.weight": 0.3, "layers.1.weight": 0.5})
    model = space.model(live)
    jiggle(model)
    state = space.moved(space.start, live, tensors_after(model), "x")
    result = space.result(space.shares(live), state)
    x = torch.randn(8, 4)
    assert torch.equal(result.model.eval()(x), model.eval()(x))
    assert result.report["proof"]["nodes"] > 5 and widths(result.model) == [7, 10]
    dense = result.dependencies.analysis.captured.model
    assert torch.equal(dense.get_parameter("layers.0.weight"), state.weights["layers.0.weight"])  # type: ignore[index]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(space.analysis.captured.model).items())


def test_a_model_that_came_back_as_a_graph_is_trained_and_cut_again() -> None:
    """The shortcuts of this network pad zeros, which its own code does not do for fewer channels."""
    source = load_source(str(MODELS / "resnet20_cifar.py"))
    space = Space.of(source.model, source.example_inputs, round_to=1)
    live = space.live(dict.fromkeys(space.groups, 0.4))
    model = space.model(live).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    state = space.moved(space.start, live, tensors_after(model), "x")
    result = space.result(space.shares(live), state)
    assert result.report["result"]["form"] == "graph"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(result.model.eval()(x), model.eval()(x))
    again = space.live(dict.fromkeys(space.groups, 0.6), state)
    assert not (again & ~live).any() and space.model(again, state)(x).shape == model(x).shape


def test_the_result_without_training_is_that_of_compress() -> None:
    model, x = chain(10, 20), torch.randn(2, 4)
    space = Space.of(model, x, round_to=1)
    ours = space.result(dict.fromkeys(space.groups, 0.5))
    theirs = graphprune.compress(model, x, 0.5, round_to=1)
    assert ours.plan.to_json() == theirs.plan.to_json()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    assert ours.report["request"]["sparsity"] == 0.5 and ours.report["params"] == theirs.report["params"]


def test_the_users_model_is_left_alone() -> None:
    model = chain(10, 20).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    space = Space.of(model, torch.randn(2, 4), round_to=1)
    small = space.model(space.live({"layers.0.weight": 0.5}))
    assert small.training
    jiggle(small)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Fused(nn.Module):
    """One layer makes the channels of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.a, self.b = nn.Linear(4, 12), nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.both(x).split([4, 8], 1)
        return self.a(left.relu()) + self.b(right.relu())


def test_groups_of_one_layer_have_names_of_their_own() -> None:
    space = Space.of(Fused(), torch.randn(2, 4), round_to=1)
    assert list(space.groups) == ["both.weight", "both.weight#2"]
    assert sorted(space.weight_counts.values()) == [16, 32]
    of_b = next(name for name, group in space.groups.items() if group.units == 8)
    live = space.live({of_b: 0.5})
    assert space.shares(live) == {name: 0.5 * (name == of_b) for name in space.groups}
    small = space.model(live)
    assert small.get_parameter("a.weight").shape[1] == 4 and small.get_parameter("b.weight").shape[1] == 4


def test_what_limits_a_space() -> None:
    space = chain_space(10, 20, exclude="layers.0")
    assert list(space.groups) == ["layers.1.weight"]
    chosen = space.selection({"layers.1.weight": 0.5}).choices[0]
    assert (chosen.kept, chosen.note) == (10, "excluded by name (layers.0)")


def test_a_fingerprint_knows_weights_and_limits() -> None:
    space = chain_space(10, 20)
    assert space.fingerprint == chain_space(10, 20).fingerprint
    others = [chain_space(10, 20, keep_at_least=0.1), chain_space(10, 20, criterion="l2"), chain_space(10, 21)]
    others.append(Space.of(chain(10, 20, seed=1), torch.randn(2, 4), round_to=1))
    assert len({space.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_a_criterion_may_be_a_function() -> None:
    space = chain_space(4, criterion=lambda analysis, seed: np.arange(analysis.classes.count, dtype=float))
    live = space.live({"layers.0.weight": 0.5})
    group = space.groups["layers.0.weight"]
    assert live[group.classes].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep_at_least": 1.5}, "keep_at_least 1.5: is not in [0, 1]. Use a share such as 0.2."),
        ({"criterion": "l3"}, "criterion 'l3': is not known. Use one of"),
        ({"exclude": "none"}, "'none': no module has that name"),
    ],
)
def test_spaces_that_make_no_sense(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chain_space(4, 5, **options)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_parts_whose_code_does_not_fit_are_left_alone() -> None:
    space = Space.of(Stubborn().eval(), torch.randn(2, 3, 8, 8), round_to=1)
    assert list(space.groups) == ["head.0.weight"]
    assert any(why.startswith("code does not fit a smaller work: ") for why in space.reasons.values())
    result = space.result({"head.0.weight": 0.5})
    assert result.model.get_parameter("head.0.weight").shape[0] == 6
    assert any(str(group["note"]).startswith("code does not fit") for group in result.report["groups"])


def test_what_a_criterion_draws_is_seeded() -> None:
    def drawn(analysis: Analysis, seed: int) -> np.ndarray:
        return torch.rand(analysis.classes.count).double().numpy()

    first, again, other = (chain_space(10, criterion=drawn, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    live = first.live({"layers.0.weight": 0.5})
    states = [space.moved(space.start, live, tensors_after(space.model(live)), "x") for space in (first, again)]
    assert (states[0].scores == states[1].scores).all()


def test_shares_that_make_no_sense() -> None:
    space = chain_space(4, 5)
    with pytest.raises(ConfigError, match=r"'layers.0.weigh': no group .* \(did you mean 'layers.0.weight'\?\)"):
        space.live({"layers.0.weigh": 0.5})
    with pytest.raises(ConfigError, match=r"a share of 1.5 is not in \[0, 1\]"):
        space.live({"layers.0.weight": 1.5})
    with pytest.raises(ConfigError, match="'flops': nothing that is counted. Use one of weights, params, macs."):
        space.left(space.start.live, "flops")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"model: nothing can be pruned \(excluded by name"):
        chain_space(4, 5, exclude="layers.*")

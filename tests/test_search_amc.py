"""AMC: the agent learns, the bound is always met, and every number of the state is what the paper says."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from searching import chain_space, widths
from test_rules import one_thread
from torch import nn

from graphprune.errors import ConfigError
from graphprune.search import Episodes, Learning, Space, Trials, amc
from graphprune.search.agent import Agent, Step
from graphprune.search.amc import _layer_features, _Track
from graphprune.search.reach import reach

COSTS = np.array([5.0, 1.0, 7.0, 2.0])
SIZE = 40


def value(shares: np.ndarray) -> float:
    return 1 - float((COSTS * np.square(shares)).sum()) / 10


def score(model: nn.Module) -> float:
    return value(1 - np.array(widths(model)) / SIZE)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def space() -> Space:
    return chain_space(*[SIZE] * len(COSTS))


@pytest.mark.parametrize("seed", [10, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (11, 12))])
def test_it_learns_and_beats_uniform_shares(space: Space, seed: int) -> None:
    """The defaults of the agent were chosen on another objective and other seeds."""
    episodes = Episodes(150, 50, decay=0.97)
    found = amc(Trials(space, score, seed=seed), 0.5, round_to=4, episodes=episodes)
    uniform = reach(space, dict.fromkeys(space.groups, 1.0), 0.5, "macs", space.start)
    assert found.score > value(np.array(list(uniform.values()))) + 0.02
    scores = [evaluation.score for evaluation in found.history]
    assert len(scores) == 150 and np.mean(scores[-10:]) > np.mean(scores[:50]) + 0.2
    for evaluation in found.history:
        assert space.left(evaluation.live, "macs") <= 0.5 + 1e-9
        kept = [round(SIZE * (1 - share)) for share in evaluation.shares.values()]
        assert all(count >= 8 and count % 4 == 0 for count in kept)
    assert found.result.report["macs"]["shrunk"] <= 0.5 * found.result.report["macs"]["dense"]


@pytest.mark.parametrize(("ratio", "of"), [(0.2, "macs"), (0.3, "params"), (0.6, "weights"), (1.0, "macs")])
def test_the_bound_is_met_whatever_the_agent_wants(space: Space, ratio: float, of: str) -> None:
    """An agent that gives nothing: the groups in front keep all, those behind give what the bound takes."""

    class Greedy(Agent):
        def act(self, seen: np.ndarray, noise: float) -> float:
            return 0.0

    limited = space.limited(1, 0.2)
    track = _Track(limited, of, ratio)  # type: ignore[arg-type]
    walk = track.walk(Greedy(track.features, Learning(), 0), 0.5)
    assert limited.left(limited.live(walk.shares), of) <= ratio + 1e-9  # type: ignore[arg-type]
    last_that_gives = max((n for n, s in enumerate(walk.shares.values()) if s > 0), default=None)
    if last_that_gives is not None:
        less = dict(walk.shares)
        name = list(less)[last_that_gives]
        less[name] -= 1 / SIZE
        assert limited.left(limited.live(less), of) > ratio  # type: ignore[arg-type]
    assert (ratio == 1.0) == (last_that_gives is None)


def test_what_the_agent_sees() -> None:
    """(place, kind, n, c, h, w, stride, k, MACs) of two convolutions and a linear layer, by hand."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(36, 6))
    space = Space.of(nn.Sequential(net, nn.Linear(6, 2)), torch.randn(2, 3, 7, 7), round_to=1)
    table, macs = _layer_features(space)
    rows = np.array(
        [
            [0, 1, 8, 3, 7, 7, 2, 3, 8 * 27 * 9],
            [1, 1, 4, 8, 3, 3, 1, 1, 4 * 8 * 9],
            [2, 2, 6, 36, 1, 1, 1, 1, 6 * 36],
        ],
        dtype=float,
    )
    assert [group.units for group in space.groups.values()] == [8, 4, 6]
    assert table == pytest.approx(rows / rows.max(axis=0))
    assert (macs == 2 * 2 * rows[:, -1]).all()  # operations of a batch of two


def test_an_agent_learns_what_a_bandit_pays() -> None:
    """One step, two places to see: 0.2 is right in one and 0.8 in the other."""
    agent = Agent(2, Learning(hidden=32), 0)
    places = [np.array(row, dtype=np.float32) for row in ([1, 0], [0, 1])]
    draws = np.random.default_rng(0)
    for _ in range(250):
        place = int(draws.integers(2))
        action = agent.act(places[place], 0.4)
        agent.remember([Step(places[place], action, -100 * (action - (0.2, 0.8)[place]) ** 2, None)])
        agent.learn(3)
    assert agent.act(places[0], 0) == pytest.approx(0.2, abs=0.1)
    assert agent.act(places[1], 0) == pytest.approx(0.8, abs=0.1)


def test_noise_stays_within_bounds_and_is_of_the_asked_size() -> None:
    agent = Agent(1, Learning(), 0)
    seen = np.ones(1, dtype=np.float32)
    mean = agent.act(seen, 0.0)
    drawn = np.array([agent.act(seen, 0.05) for _ in range(400)])
    assert 0.4 < mean < 0.6 and drawn.std() == pytest.approx(0.05, rel=0.15) and abs(drawn.mean() - mean) < 0.01
    wide = np.array([agent.act(seen, 5.0) for _ in range(200)])
    assert wide.min() >= 0 and wide.max() <= 1 and wide.std() == pytest.approx(12**-0.5, rel=0.15)


def test_a_reward_that_weighs_error_and_macs(space: Space) -> None:
    """With a score that does not depend on the widths the fewest MACs win; -error alone does not care."""
    episodes = Episodes(12, 4)
    found = amc(Trials(space, lambda m: 0.5), 0.9, episodes=episodes, reward="error * log(macs)")
    macs = [space.tally.macs(evaluation.live) for evaluation in found.history]
    assert space.tally.macs(space.live(found.shares)) == min(macs) < max(macs)


def test_a_seed_decides(space: Space) -> None:
    first, again, other = (amc(Trials(space, score, seed=s), 0.5, episodes=Episodes(10, 4)) for s in (5, 5, 6))
    assert first.history == again.history and first.history != other.history


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: amc(t, 0.0), "ratio 0.0: is not in (0, 1]. Use one such as 0.5."),
        (lambda t: amc(t, 0.01), "ratio 0.01: 0.0"),
        (lambda t: amc(t, 0.5, episodes=Episodes(5, 5)), "episodes: 5 with 5 to warm up"),
    ],
)
def test_wrong_settings(space: Space, call: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(Trials(space, score))  # type: ignore[operator]
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)

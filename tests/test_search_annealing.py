"""Annealing: what it accepts, what it finds, and that only its seed decides."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from searching import chain_space, fit, jiggle, widths
from test_rules import one_thread
from torch import nn

from graphprune.errors import ConfigError
from graphprune.search import Episodes, Schedule, Space, Trials, amc, annealing
from graphprune.search.annealing import acceptance
from graphprune.search.reach import reach

COSTS = np.array([1.0, 8.0, 0.5, 3.0, 10.0, 0.8])
SIZE = 40
SPARSITY = 0.5


def value(shares: np.ndarray) -> float:
    """-sum c s^2: a function of the widths whose best ones are known."""
    return -float((COSTS * np.square(shares)).sum())


def score(model: nn.Module) -> float:
    return value(1 - np.array(widths(model)) / SIZE)


def hundredfold(model: nn.Module) -> float:
    return 100 * score(model) + 7


def best_value(space: Space) -> float:
    """The highest value at the overall sparsity: by Lagrange s_i = min(most, l * w_i / c_i)."""
    weights = np.array(list(space.weight_counts.values()), dtype=float)

    def shares(factor: float) -> np.ndarray:
        return np.minimum(factor * weights / COSTS, (SIZE - 1) / SIZE)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (weights * shares(middle)).sum() < SPARSITY * weights.sum() else (low, middle)
    return value(shares(high))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def space() -> Space:
    return chain_space(*[SIZE] * len(COSTS))


@pytest.mark.parametrize("seed", [0, 1])
def test_it_comes_near_the_optimum_and_random_search_does_not(space: Space, seed: int) -> None:
    found = annealing(Trials(space, score, seed=seed), SPARSITY)
    draws = np.random.default_rng(seed)
    drawn = []
    for _ in found.history:
        wish = {name: float(draws.uniform()) for name in space.groups}
        live = space.live(reach(space, wish, 1 - SPARSITY, "weights", space.start))
        drawn.append(value(np.array(list(space.shares(live).values()))))
    assert found.score > max(drawn)
    assert best_value(space) * 1.2 < found.score <= best_value(space) + 1e-9
    assert all(abs(1 - space.left(space.live(e.shares), "weights") - SPARSITY) < 0.03 for e in found.history)
    assert all(space.left(space.live(e.shares), "weights") <= 1 - SPARSITY + 1e-9 for e in found.history)


def test_the_units_of_a_score_do_not_matter(space: Space) -> None:
    schedule = Schedule(cool=0.5, tries=2, batch=2)
    one, other = (annealing(Trials(space, f), SPARSITY, schedule=schedule) for f in (score, hundredfold))
    assert [e.shares for e in one.history] == [e.shares for e in other.history]
    assert other.score == 100 * one.score + 7


def test_lower_is_better_if_one_says_so(space: Space) -> None:
    schedule = Schedule(cool=0.5, tries=2, batch=2)
    one = annealing(Trials(space, score), SPARSITY, schedule=schedule)
    other = annealing(Trials(space, lambda model: -score(model), minimize=True), SPARSITY, schedule=schedule)
    assert one.shares == other.shares and other.score == -one.score


def test_a_seed_decides(space: Space) -> None:
    schedule = Schedule(cool=0.5, tries=2, batch=2)
    first, again, other = (annealing(Trials(space, score, seed=s), SPARSITY, schedule=schedule) for s in (3, 3, 4))
    assert first.history == again.history and first.history != other.history
    state = torch.get_rng_state()
    annealing(Trials(space, score), SPARSITY, schedule=Schedule(start=20))
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_accepted() -> None:
    """exp(-dE / s / T): a usual loss with 1/e at first and e^-5 at a fifth of the temperature, whatever its units."""
    assert acceptance(-1.0, [1.0], 0.2) == acceptance(0.0, [0.0], 1.0) == 1.0
    assert acceptance(0.01, [0.01, 0.01], 1.0) == acceptance(5.0, [5.0, 5.0], 1.0) == pytest.approx(math.exp(-1))
    assert acceptance(0.02, [0.01, 0.02, 0.03], 0.2) == pytest.approx(math.exp(-5))
    assert math.exp(-0.5 / 20) > 0.95  # the manuals' rule, half of all accuracy lost at the lowest temperature


def test_larger_groups_give_more_at_first() -> None:
    space = chain_space(50, 150, 100, 200)
    found = annealing(Trials(space, lambda model: 0.0), 0.3, schedule=Schedule(start=20, batch=1, tries=1))
    first = found.history[0].shares
    order = sorted(first, key=lambda name: space.weight_counts[name])
    given = [first[name] for name in order]
    assert all(less < more + 1 / 50 for less, more in itertools.pairwise(given)) and given[0] < given[-1] - 0.2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: annealing(t, 1.0), "sparsity 1.0: is not in (0, 1). Use one such as 0.5."),
        (lambda t: annealing(t, 0.5, schedule=Schedule(cool=1.0)), "annealing: from 100.0 to 20.0 by 1.0 never ends."),
        (
            lambda t: annealing(t, 0.5, schedule=Schedule(tries=0)),
            "annealing: tries, batch and perturbation are above 0",
        ),
        (lambda t: annealing(t, 0.995), "target: 0.005 of the weights may be left, and"),
    ],
)
def test_wrong_settings(space: Space, call: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(Trials(space, score))  # type: ignore[operator]
    assert str(caught.value).startswith(says)


def test_what_was_found_is_trained_in_the_end() -> None:
    space = chain_space(6, 8)
    for search in (
        lambda **more: annealing(Trials(space, fit), 0.4, schedule=Schedule(start=20, tries=1), **more),
        lambda **more: amc(Trials(space, fit), 0.6, round_to=1, episodes=Episodes(4, 1), **more),
    ):
        plain, trained = search(), search(finetune=jiggle)
        assert trained.shares == plain.shares and trained.history[:-1] == plain.history
        bias = [found.result.model.get_parameter("layers.2.bias") for found in (plain, trained)]
        assert not torch.equal(*bias) and torch.equal(
            bias[0], space.analysis.captured.model.get_parameter("layers.2.bias")
        )
        assert trained.score == fit(trained.result.model) != plain.score

"""What is asked of each group: shares of its own, rankings, what a unit weighs in them, and how much of one may go."""

import numpy as np
import pytest
from test_rules import image
from test_select import EIGHT, TEN, counts, scored, three_layers

import graphprune
from graphprune.select import Selection, select
from graphprune.targets import Target


def selected(first: Target, second: Target) -> Selection:
    """Ten channels of scores 0 to 9, and eight of 10 to 80."""
    d = graphprune.trace(three_layers(), image())
    scores = scored(d, _0=TEN, _1=EIGHT)
    return select(d, scores, lambda group: first if group.name == "0.weight" else second)


def test_each_group_has_a_share_of_its_own() -> None:
    assert counts(selected(Target(0.2), Target(0.75))) == {"0.weight": (8, 8), "1.weight": (2, 2)}


def test_rankings_do_not_meet() -> None:
    assert counts(selected(Target(0.2, "a"), Target(0.5, "b"))) == {"0.weight": (8, 8), "1.weight": (4, 4)}


def test_a_ranking_of_scores_as_they_are() -> None:
    target = Target(0.5, "all", relative=False)
    assert counts(selected(target, target)) == {"0.weight": (1, 1), "1.weight": (8, 8)}


def test_a_ranking_goes_on_where_a_group_may_give_no_more() -> None:
    target = Target(0.5, "all", most=0.6, relative=False)
    assert counts(selected(target, target)) == {"0.weight": (4, 4), "1.weight": (5, 5)}


def test_what_is_asked_beyond_what_may_go_takes_all_that_may() -> None:
    target = Target(0.9, "all", most=0.5)
    assert counts(selected(target, target)) == {"0.weight": (5, 5), "1.weight": (4, 4)}


@pytest.mark.parametrize(("sparsity", "kept"), [(0.1, (4, 8)), (0.2, (1, 7)), (0.5, (1, 4)), (0.0, (10, 8))])
def test_the_share_of_a_ranking_is_one_of_weights(sparsity: float, kept: tuple[int, int]) -> None:
    """Ten units of weight 1 and eight of weight 6 are 58 in all."""
    first, second = (Target(sparsity, "all", weight=weight, relative=False) for weight in (1.0, 6.0))
    found = tuple(kept for _, kept in counts(selected(first, second)).values())
    order = [1.0] * 9 + [6.0] * 7  # the last unit of a group always stays
    gone = int(np.searchsorted(np.cumsum(order), 58 * sparsity - 1e-9)) + 1 if sparsity else 0
    assert found == kept == (10 - min(gone, 9), 8 - max(gone - 9, 0))

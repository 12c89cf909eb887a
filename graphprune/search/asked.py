"""What was asked of each group -> shares of the dense groups: those of a round, and how much goes of all together."""

from collections.abc import Sequence

import numpy as np

from graphprune.compress import nothing_goes
from graphprune.criteria import Scores
from graphprune.schedule import Schedule
from graphprune.search.remains import remaining
from graphprune.search.space import Shares, Space
from graphprune.search.state import State
from graphprune.targets import lowest_together


def asked_shares(space: Space, state: State, schedule: Schedule, i: int, n: int) -> dict[str, float]:
    """Returns which share of each dense group should be gone after a round, where each grows to what was asked of it.

    Groups that are ranked together give by one ranking of what is left of them, as they do in one shot.

    Args:
        space: What can be chosen, and what was asked.
        state: Where the rounds stand; what is gone there counts.
        schedule: How shares grow.
        i: The round, from 0 to ``n``.
        n: How many rounds there are.
    """
    shares: dict[str, float] = {}
    together: dict[str, list[str]] = {}
    for name in space.groups:
        target = space.targets[name]
        if target.ranking is None:
            shares[name] = schedule(target.initial, target.sparsity, i, n)
        else:
            together.setdefault(target.ranking, []).append(name)
    for names in together.values():
        first = space.targets[names[0]]
        shares |= _ranked(space, state, names, schedule(first.initial, first.sparsity, i, n))
    return shares


def check_something_goes(space: Space, shares: Shares) -> None:
    """Refuses shares of which nothing is left once what stays is rounded up.

    Raises:
        ModelError: Nothing goes, though something is asked for.
    """
    selection = space.selection(shares)
    if any(shares.values()) and bool((selection.live == space.start.live).all()):
        wishes = {group.index: space.targets[name] for name, group in space.groups.items()}
        notes = [(choice.group, choice.note) for choice in selection.choices]
        raise nothing_goes(notes, lambda group: wishes.get(group.index) or space.reasons.get(group.index, ""))


def asked_sparsity(space: Space) -> float:
    """Returns how much goes of the weights that make the channels of all groups, as was asked of each, in [0, 1)."""
    counts = space.weight_counts
    goes = sum(space.targets[name].sparsity * counts[name] for name in space.groups)
    return round(goes / sum(counts.values()), 12)  # equal shares add up to that share


def _ranked(space: Space, state: State, names: Sequence[str], share: float) -> dict[str, float]:
    """The shares of groups that are ranked together, and of which together ``share`` should be gone."""
    targets = [space.targets[name] for name in names]
    gone = [space.gone(name, state.live) for name in names]
    values: list[Scores] = []
    most: list[int] = []
    for name, target, done in zip(names, targets, gone, strict=True):
        group = space.groups[name]
        rest = remaining(group, state.live[group.classes])
        totals = np.bincount(rest.unit_of, weights=state.scores[rest.classes], minlength=rest.units)
        values.append(np.asarray(totals[~rest.locked], dtype=np.float64))
        most.append(max(min(int(target.most * group.size + 1e-9), group.units - 1) - done, 0))
    weights = [target.weight for target in targets]
    total = sum(weight * space.groups[name].size for weight, name in zip(weights, names, strict=True))
    before = sum(weight * done for weight, done in zip(weights, gone, strict=True))
    further = max(share * total - before, 0.0) / (total - before)
    more = lowest_together(values, weights, further, most, relative=targets[0].relative)
    return {
        name: (done + count) / max(space.groups[name].size, 1)
        for name, done, count in zip(names, gone, more, strict=True)
    }

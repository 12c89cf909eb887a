"""What is wished of each group -> shares that reach an overall target, and no more than that."""

import math

from graphprune.errors import ConfigError
from graphprune.search.space import Measure, Shares, Space
from graphprune.search.state import State

_RESOLUTION = 1e-12
"""Relative to it no factors are told apart below this: several groups give a unit at the same one."""

_NOTHING = 1e-6
"""Wishes below this part of the largest are none."""


def reach(space: Space, wish: Shares, left: float, of: Measure, state: State) -> dict[str, float]:
    """Returns the shares s = min(most, now + f * wish * (1 - now)) of the smallest f that leaves at most ``left``.

    Where that is not enough, groups that were not wished for give as well, all by the same share of what they have.

    Args:
        space: What can be chosen.
        wish: For each group by name how much of what is left of it should go, relative to the others; 0 or more.
        left: Share of the dense model that may be left, in (0, 1].
        of: What is counted.
        state: Where the search stands: ``now`` is what is gone there.

    Raises:
        ConfigError: So much cannot go.
    """
    now = space.shares(state.live)
    largest = max(wish.values(), default=0.0)
    wish = {name: value for name, value in wish.items() if value > _NOTHING * largest}
    highest = 1 / min(wish.values(), default=1.0)

    def wished(factor: float) -> dict[str, float]:
        return {n: min(space.most(n), s + factor * wish.get(n, 0.0) * (1 - s)) for n, s in now.items()}

    def further(factor: float) -> dict[str, float]:
        first = wished(highest)
        return {n: min(space.most(n), max(first[n], s + factor * (1 - s))) for n, s in now.items()}

    def enough(shares: Shares) -> bool:
        return space.left(space.live(shares, state), of) <= left + 1e-9

    def units(shares: Shares) -> int:
        return sum(math.ceil(space.groups[name].size * share - 1e-9) for name, share in shares.items())

    for some, top in ((wished, highest), (further, 1.0)):
        low, high = 0.0, top
        if enough(some(low)):
            return some(low)
        if not enough(some(high)):
            continue
        while units(some(high)) - units(some(low)) > 1 and high - low > _RESOLUTION * high:
            middle = (low + high) / 2
            low, high = (low, middle) if enough(some(middle)) else (middle, high)
        return some(high)
    raise out_of_reach(left, of, space.left(space.live(further(1.0), state), of))


def check_reachable(space: Space, left: float, of: Measure) -> None:
    """Refuses a target that cannot be reached, before anything is evaluated.

    Raises:
        ConfigError: More than ``left`` of the dense model stays even where every group gives all it may.
    """
    least = space.left(space.live({name: space.most(name) for name in space.groups}), of)
    if least > left + 1e-9:
        raise out_of_reach(left, of, least)


def out_of_reach(left: float, of: str, least: float) -> ConfigError:
    """What is wrong with a target that is below what always stays; all are shares of the dense model."""
    return ConfigError(
        f"target: {left:.3f} of the {of} may be left, and {least:.3f} stay even where every group gives all it may. "
        "Ask for less, or let more groups go."
    )

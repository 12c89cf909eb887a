"""What is wished of each group -> shares that reach an overall target, and no more than that."""

from collections.abc import Callable

from graphprune.errors import ConfigError
from graphprune.search.space import Measure, Shares, Space
from graphprune.search.state import State

_HALVINGS = 30


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

    def wished(factor: float) -> dict[str, float]:
        return {n: min(space.most(n), s + factor * max(wish.get(n, 0.0), 0.0) * (1 - s)) for n, s in now.items()}

    def further(factor: float) -> dict[str, float]:
        first = wished(1 / min((w for w in wish.values() if w > 0), default=1.0))
        return {n: min(space.most(n), max(first[n], s + factor * (1 - s))) for n, s in now.items()}

    def enough(shares: Shares) -> bool:
        return space.left(space.live(shares, state), of) <= left + 1e-9

    for some in (wished, further):
        found = _smallest(some, enough, wish)
        if found is not None:
            return found
    least = space.left(space.live(further(1.0), state), of)
    raise ConfigError(
        f"target: {left:.3f} of the {of} may be left, and {least:.3f} stay even where every group gives all it may. "
        "Ask for less, or let more groups go."
    )


def _smallest(
    some: Callable[[float], dict[str, float]], enough: Callable[[Shares], bool], wish: Shares
) -> dict[str, float] | None:
    """The shares of the smallest factor that are enough, up to where every wish takes all; None if none are."""
    low, high = 0.0, 1 / min((w for w in wish.values() if w > 0), default=1.0)
    if enough(some(low)):
        return some(low)
    if not enough(some(high)):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(some(middle)) else (middle, high)
    return some(high)

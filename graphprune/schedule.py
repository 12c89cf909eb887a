"""Schedules: how sparsity grows over rounds or epochs. A schedule is one function."""

from collections.abc import Callable, Mapping

from graphprune.config_list import Entry, Setting

Schedule = Callable[[float, float, int, int], float]
"""From the sparsities at the beginning and the end, a round and their number, to the sparsity after that round."""


def one_shot(initial: float, final: float, i: int, n: int) -> float:
    """``s``: all of it in every round."""
    return final


def linear(initial: float, final: float, i: int, n: int) -> float:
    """``s_i + (s - s_i) i / n``."""
    return initial + (final - initial) * i / n


def agp(initial: float, final: float, i: int, n: int) -> float:
    """``s + (s_i - s) (1 - i / n)^3`` (Zhu & Gupta, To prune, or not to prune, 2017, equation 1)."""
    return final + (initial - final) * (1 - i / n) ** 3


def lottery_ticket(initial: float, final: float, i: int, n: int) -> float:
    """``1 - (1 - s)^(i / n)``: each round prunes the same share of what survives (Frankle & Carbin, 2019)."""
    return float(1 - (1 - initial) * ((1 - final) / (1 - initial)) ** (i / n))


SCHEDULES: Mapping[str, Schedule] = {
    "one_shot": one_shot,
    "linear": linear,
    "agp": agp,
    "lottery_ticket": lottery_ticket,
}


def at_epoch(schedule: Schedule, entry: Entry, epoch: int) -> float:
    """Returns the sparsity that an entry asks for in an epoch.

    Nothing before ``start_epoch``, and the initial sparsity in it; a step every ``frequency`` epochs, the last of which
    reaches the final one in ``end_epoch``.

    Args:
        schedule: How it grows from the initial sparsity to the final one.
        entry: An entry with ``end_epoch``.
        epoch: The epoch that begins.
    """
    assert entry.end_epoch is not None
    if epoch < entry.start_epoch:
        return 0.0
    final, span = entry.share or 0.0, entry.end_epoch - entry.start_epoch
    passed = min(epoch - entry.start_epoch, span)
    step = passed if passed == span else passed // entry.frequency * entry.frequency
    return schedule(entry.initial_sparsity, final, step, span)


def at_round(
    settings: Mapping[str, Setting],
    schedule: Schedule,
    i: int,
    n: int,
    done: Callable[[str], float] = lambda layer: 0.0,
) -> dict[str, Setting]:
    """Returns what to ask of each layer in round ``i`` of ``n``.

    Args:
        settings: What is asked of each layer in the end.
        schedule: How it grows.
        i: The round, from 1 to ``n``.
        n: How many rounds there are.
        done: The share of a layer that went physically in the rounds before: of what is left then goes
            ``(target - done) / (1 - done)``.
    """

    def share(layer: str, entry: Entry) -> float:
        gone = done(layer)
        return max((schedule(entry.initial_sparsity, entry.share or 0.0, i, n) - gone) / (1 - gone), 0.0)

    return {layer: setting.asking(share(layer, setting.entry)) for layer, setting in settings.items()}

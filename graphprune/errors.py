"""The errors of ``graphprune``; the base and the kinds shared with ``speedup`` come from there."""

from speedup.errors import SpeedupError


class GraphpruneError(SpeedupError):
    """Something was asked that cannot be done; the text is one line: subject, fact, remedy."""


class ConfigError(GraphpruneError):
    """What was asked for makes no sense: a value out of range, an unknown name."""


class ModelError(GraphpruneError):
    """The model cannot be loaded, or holds nothing that could be pruned."""


class TrainingError(GraphpruneError):
    """Training went wrong: a loss that is no number, a trainer that trains something else."""


def shown(value: object) -> str:
    """Returns how ``value`` looks, in one line of no more than 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."

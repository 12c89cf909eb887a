"""The errors of both packages: one line each, made of a subject, a fact and a remedy."""

from collections.abc import Mapping


class SpeedupError(Exception):
    """A mistake or a limit that the user can do something about; its text is one line."""


class CaptureError(SpeedupError):
    """The model could not be turned into a graph."""


class PlanError(SpeedupError):
    """A plan or a set of masks does not fit the model."""


class MisfitError(PlanError):
    """The code of a model that is captured in parts does not fit smaller tensors.

    Attributes:
        parts: Why, for each part in which that is so; empty where it is not known in which.
    """

    def __init__(self, text: str, parts: Mapping[str, str]) -> None:
        super().__init__(text)
        self.parts = parts


class ProofError(SpeedupError):
    """The shrunk model is not equal to the masked original."""


class ExportError(SpeedupError):
    """A file could not be written, or does not compute what the model computes."""


BUG = "A rule is wrong, or the plan does not fit the model: compress again, and report it if it stays."
"""The remedy where it is not the user who can do something."""


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, without a full stop; its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__

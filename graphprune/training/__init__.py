"""Training in the user's own loop, or in a plain one over data and a loss."""

from graphprune.training.fit import Epoch, Fit, fit
from graphprune.training.hooks import Hooks
from graphprune.training.loop import Training
from graphprune.training.optimizer import follow, follow_schedule

__all__ = ["Epoch", "Fit", "Hooks", "Training", "fit", "follow", "follow_schedule"]

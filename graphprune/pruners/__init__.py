"""The algorithms under the names that their users know from NNI.

Every pruner takes a model and a config list, then what it took there. ``compress()`` returns the model, to which masks
are attached, and the masks; :class:`speedup.ModelSpeedup` makes a smaller model of them.
"""

from graphprune.pruners.basic import (
    ActivationAPoZRankFilterPruner,
    ActivationAPoZRankPruner,
    ActivationMeanRankFilterPruner,
    ActivationMeanRankPruner,
    ADMMPruner,
    FPGMPruner,
    L1FilterPruner,
    L1NormPruner,
    L2FilterPruner,
    L2NormPruner,
    LevelPruner,
    MovementPruner,
    RandomPruner,
    SlimPruner,
    TaylorFOWeightFilterPruner,
    TaylorFOWeightPruner,
)
from graphprune.pruners.scheduled import AGP_Pruner, AGPPruner, LinearPruner, LotteryTicketPruner
from graphprune.pruners.searched import (
    AMCPruner,
    AutoCompressPruner,
    NetAdaptPruner,
    SensitivityPruner,
    SimulatedAnnealingPruner,
)
from graphprune.pruners.tasks import (
    AGPTaskGenerator,
    LinearTaskGenerator,
    LotteryTicketTaskGenerator,
    PruningScheduler,
)

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "AGPTaskGenerator",
    "AGP_Pruner",
    "AMCPruner",
    "ActivationAPoZRankFilterPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankFilterPruner",
    "ActivationMeanRankPruner",
    "AutoCompressPruner",
    "FPGMPruner",
    "L1FilterPruner",
    "L1NormPruner",
    "L2FilterPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "LinearTaskGenerator",
    "LotteryTicketPruner",
    "LotteryTicketTaskGenerator",
    "MovementPruner",
    "NetAdaptPruner",
    "PruningScheduler",
    "RandomPruner",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "SlimPruner",
    "TaylorFOWeightFilterPruner",
    "TaylorFOWeightPruner",
]

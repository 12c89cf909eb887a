"""The basic pruners under the names that their users know from NNI."""

from collections.abc import Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any, ClassVar

from torch import nn

from graphprune.errors import ConfigError
from graphprune.pruners.algorithms import Pruner
from graphprune.pruners.options import Options


class BasicPruner(Pruner):
    """A basic pruner with the arguments that it took in NNI.

    Attributes:
        takes: Its arguments after the config list, in their order; others are given by name.
    """

    name: ClassVar[str]
    takes: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> None:
        options = Options.of(by_name(type(self).__name__, self.takes, args, kwargs))
        super().__init__(model, config_list, self.name, options)


def by_name(subject: str, takes: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments by their names, with those that have one already."""
    if len(args) > len(takes):
        raise ConfigError(
            f"{subject}: takes {len(takes)} arguments after the config list, not {len(args)}. They are "
            f"{', '.join(takes)}; give others by name."
        )
    values = dict(zip(takes, args, strict=False))
    if twice := sorted(values.keys() & kwargs.keys()):
        raise ConfigError(f"{subject}: {twice[0]} is given twice. Give it once.")
    return {**values, **kwargs}


def _basic(name: str, algorithm: str, what: str, *takes: str) -> type[BasicPruner]:
    """The class of a basic pruner: its name, algorithm, what goes, and its arguments in their order."""
    arguments = [Parameter(one, Parameter.POSITIONAL_OR_KEYWORD) for one in ("model", "config_list")]
    arguments += [Parameter(one, Parameter.POSITIONAL_OR_KEYWORD, default=None) for one in takes]
    attributes: dict[str, Any] = {
        "__doc__": f"{what}\n\nOther arguments are the fields of :class:`~graphprune.pruners.options.Options`.",
        "__module__": __name__,
        "__signature__": Signature([*arguments, Parameter("options", Parameter.VAR_KEYWORD)]),
        "name": algorithm,
        "takes": takes,
    }
    return type(name, (BasicPruner,), attributes)


_LOOP = ("trainer", "optimizer", "criterion")
_L1 = "Channels of smallest L1 norm go (Li et al., Pruning Filters for Efficient ConvNets, 2017)."
_L2 = "Channels of smallest L2 norm go."
_APOZ = "Channels go whose activations are zero most often (Hu et al., Network Trimming, 2016)."
_MEAN = "Channels of smallest mean activation go (Molchanov et al., 2017, section 2.2)."
_TAYLOR = "Channels go that cost least by a first-order Taylor expansion (Molchanov et al., 2019)."

LevelPruner = _basic("LevelPruner", "level", "Single weights of smallest size go (Han et al., 2015).", "mode")
L1NormPruner = _basic("L1NormPruner", "l1", _L1, "mode", "dummy_input")
L2NormPruner = _basic("L2NormPruner", "l2", _L2, "mode", "dummy_input")
RandomPruner = _basic(
    "RandomPruner", "random", "Channels go by lot: the control for all others.", "mode", "dummy_input"
)
FPGMPruner = _basic(
    "FPGMPruner", "fpgm", "Channels nearest to the geometric median go (He et al., 2019).", "mode", "dummy_input"
)
SlimPruner = _basic(
    "SlimPruner",
    "slim",
    "Channels of smallest batch norm scale go, ranked together, after training with a penalty on the scales (Liu et "
    "al., Network Slimming, 2017). Without a trainer the scales are taken as they are.",
    *(*_LOOP, "training_epochs", "scale", "mode", "dummy_input"),
)
_SEEN = (*_LOOP, "training_batches", "activation", "mode", "dummy_input")
ActivationAPoZRankPruner = _basic("ActivationAPoZRankPruner", "apoz", _APOZ, *_SEEN)
ActivationMeanRankPruner = _basic("ActivationMeanRankPruner", "mean_activation", _MEAN, *_SEEN)
TaylorFOWeightPruner = _basic(
    "TaylorFOWeightPruner",
    "taylorfo",
    _TAYLOR,
    *(*_LOOP, "training_batches", "mode", "max_sparsity_per_layer", "dummy_input"),
)
ADMMPruner = _basic(
    "ADMMPruner",
    "admm",
    "Weights are trained towards sparse ones, and then pruned (Zhang et al., 2018).",
    *(*_LOOP, "iterations", "training_epochs", "granularity"),
)
MovementPruner = _basic(
    "MovementPruner",
    "movement",
    "Weights go that move towards zero in training (Sanh et al., Movement Pruning, 2020).",
    *(*_LOOP, "training_epochs", "warm_up_step", "cool_down_beginning_step"),
)

# The names of the first generation.
L1FilterPruner = _basic("L1FilterPruner", "l1", _L1, "dependency_aware", "dummy_input")
L2FilterPruner = _basic("L2FilterPruner", "l2", _L2, "dependency_aware", "dummy_input")
_COUNTED = ("optimizer", "trainer", "criterion", "statistics_batch_num")
ActivationAPoZRankFilterPruner = _basic("ActivationAPoZRankFilterPruner", "apoz", _APOZ, *_COUNTED)
ActivationMeanRankFilterPruner = _basic("ActivationMeanRankFilterPruner", "mean_activation", _MEAN, *_COUNTED)
TaylorFOWeightFilterPruner = _basic("TaylorFOWeightFilterPruner", "taylorfo", _TAYLOR, *_COUNTED)

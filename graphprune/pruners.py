"""The algorithms under the names that their users know from NNI.

Every pruner takes a model and a config list, then what it took there. ``compress()`` returns the model, to which masks
are attached, and the masks; :class:`speedup.ModelSpeedup` makes a smaller model of them.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graphprune.algorithms import Pruner
from graphprune.errors import ConfigError
from graphprune.options import Options
from graphprune.rounds import Task, Work, best_of, in_rounds
from graphprune.schedule import SCHEDULES, at_epoch, at_round
from graphprune.searched import (
    AMCPruner,
    AutoCompressPruner,
    NetAdaptPruner,
    SensitivityPruner,
    SimulatedAnnealingPruner,
)
from graphprune.sparsify import Masks

__all__ = [
    "ADMMPruner",
    "AGPPruner",
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
    "LotteryTicketPruner",
    "MovementPruner",
    "NetAdaptPruner",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "SlimPruner",
    "TaylorFOWeightFilterPruner",
    "TaylorFOWeightPruner",
]


class BasicPruner(Pruner):
    """A basic pruner with the arguments that it took in NNI.

    Attributes:
        takes: Its arguments after the config list, in their order; others are given by name.
    """

    name: ClassVar[str]
    takes: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> None:
        options = Options.of(_by_name(type(self).__name__, self.takes, args, kwargs))
        super().__init__(model, config_list, self.name, options)


def _by_name(subject: str, takes: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
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
        "__doc__": f"{what}\n\nOther arguments are the fields of :class:`~graphprune.options.Options`.",
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


class ScheduledPruner:
    """A schedule and a basic pruner.

    With ``total_iteration`` it runs by itself, as in the second generation of NNI: :meth:`compress` prunes in so many
    rounds, and after each of them makes the model physically smaller (``speedup``), trains it (``finetuner``) and asks
    how good it is (``evaluator``). Without, the user's own loop drives it, as in the first generation: see the classes.

    Attributes:
        schedule: A name in :data:`~graphprune.schedule.SCHEDULES`.
        rewind: Whether surviving weights return to their first values after each round.
        tasks: What the rounds came to so far.
    """

    schedule: ClassVar[str]
    rewind: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        pruning_algorithm: str = "level",
        total_iteration: int | None = None,
        *,
        finetuner: Work | None = None,
        speedup: bool = False,
        dummy_input: Any = None,
        evaluator: Callable[[nn.Module], float] | None = None,
        pruning_params: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Checks what is asked; nothing is done yet.

        Args:
            model: Any module.
            config_list: Which layers, and how much of each in the end.
            pruning_algorithm: A name in :data:`~graphprune.algorithms.ALGORITHMS`.
            total_iteration: Rounds; None if the user's loop drives it.
            finetuner: ``finetuner(model)`` trains the model of a round in place.
            speedup: Whether the model becomes physically smaller after each round.
            dummy_input: Example inputs.
            evaluator: ``evaluator(model)`` returns a number, higher for better models.
            pruning_params: Options of the basic pruner.
            **options: The same.

        Raises:
            ConfigError: What is asked makes no sense for this model.
        """
        values = {**(pruning_params or {}), **options}
        if dummy_input is not None:
            values.setdefault("dummy_input", dummy_input)
        self._algorithm, self._options = pruning_algorithm, Options.of(values)
        self._model, self._finetuner, self._evaluator, self._speedup = model, finetuner, evaluator, speedup
        self._rounds, self._example = total_iteration, dummy_input
        self._config_list = list(config_list)
        self.pruner = Pruner(model, config_list, pruning_algorithm, self._options)
        self.settings = dict(self.pruner.settings)
        self.tasks: list[Task] = []

    @property
    def masks(self) -> Masks:
        """The masks that are attached to the user's model."""
        return self.pruner.masks

    def compress(self) -> tuple[nn.Module, Masks]:
        """Prunes in rounds, and returns the model and the masks of the best one."""
        if self._rounds is None:
            raise ConfigError(f"{type(self).__name__}: total_iteration is missing. Say how many rounds there are.")
        for task in in_rounds(
            self._model,
            self.settings,
            lambda model: Pruner(model, self._config_list, self._algorithm, self._options),
            SCHEDULES[self.schedule],
            self._rounds,
            finetune=self._finetuner,
            evaluate=self._evaluator,
            example_inputs=self._example,
            speedup=self._speedup,
            rewind=self.rewind,
        ):
            self.tasks.append(task)
        best = best_of(self.tasks)
        return best.model, best.masks

    def get_best_result(self) -> tuple[int, nn.Module, Masks, float | None, list[dict[str, Any]]] | None:
        """Returns the number, model, masks, score and config list of the best round; None before there is one."""
        if not self.tasks:
            return None
        best = best_of(self.tasks)
        return best.id, best.model, best.masks, best.score, best.config_list


class LinearPruner(ScheduledPruner):
    """Sparsity grows by the same amount in each round."""

    schedule = "linear"


class AGPPruner(ScheduledPruner):
    """Sparsity grows fast at first and ever more slowly (Zhu & Gupta, To prune, or not to prune, 2017).

    Without ``total_iteration`` it goes by epochs: entries of the config list have ``initial_sparsity``,
    ``final_sparsity``, ``start_epoch``, ``end_epoch`` and ``frequency``, :meth:`compress` attaches masks for the
    initial sparsity, and the user's loop calls :meth:`update_epoch` once in every epoch.
    """

    schedule = "agp"

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        optimizer: Optimizer | str | None = None,
        pruning_algorithm: str | int = "level",
        **options: Any,
    ) -> None:
        """Takes ``(optimizer, pruning_algorithm)`` after the config list, or ``(pruning_algorithm, total_iteration)``.

        The optimizer is not needed: masks act in the model, whatever steps are taken. See :class:`ScheduledPruner` for
        the rest.
        """
        if isinstance(optimizer, str):
            if isinstance(pruning_algorithm, int):
                options["total_iteration"] = pruning_algorithm
            pruning_algorithm = optimizer
        super().__init__(model, config_list, str(pruning_algorithm), **options)
        if self._rounds is None and any(
            one.entry.end_epoch is None for one in self.settings.values() if not one.entry.exclude
        ):
            raise ConfigError(
                "AGPPruner: does not know when to end. Give entries an end_epoch, or the pruner total_iteration."
            )

    def compress(self) -> tuple[nn.Module, Masks]:
        """Attaches masks for the initial sparsity; or prunes in rounds if ``total_iteration`` is given."""
        if self._rounds is not None:
            return super().compress()
        self.update_epoch(0)
        return self._model, self.masks

    def update_epoch(self, epoch: int) -> None:
        """Attaches masks for the sparsity of the epoch that begins.

        A basic pruner that looks at activations or gradients takes those of the epochs since the last time.
        """
        self.pruner.go_on(
            {
                layer: one.asking(at_epoch(SCHEDULES[self.schedule], one.entry, epoch))
                for layer, one in self.settings.items()
            }
        )


AGP_Pruner = AGPPruner
"""The same in the very first manual."""


class LotteryTicketPruner(ScheduledPruner):
    """Each round prunes the same share of what survives, which returns to its first values (Frankle & Carbin, 2019).

    Without ``total_iteration`` the user's loop drives it: entries of the config list have ``prune_iterations``, and

    .. code-block:: python

        pruner = LotteryTicketPruner(model, config_list, optimizer)
        pruner.compress()
        for _ in pruner.get_prune_iterations():  # one more than prune_iterations: the first trains the dense model
            pruner.prune_iteration_start()
            ...  # train
    """

    schedule = "lottery_ticket"
    rewind = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        optimizer: Optimizer | str | None = None,
        lr_scheduler: LRScheduler | int | None = None,
        reset_weights: bool = True,
        **options: Any,
    ) -> None:
        """Takes ``(optimizer, lr_scheduler)`` after the config list, or ``(pruning_algorithm, total_iteration)``.

        Optimizer and learning rate scheduler return to what they were, too. See :class:`ScheduledPruner` for the rest.
        """
        algorithm = options.pop("pruning_algorithm", "level")
        if isinstance(optimizer, str):
            algorithm, optimizer = optimizer, None
        if isinstance(lr_scheduler, int):
            options["total_iteration"], lr_scheduler = lr_scheduler, None
        self.rewind = bool(options.pop("reset_weight", reset_weights))  # type: ignore[misc]  # of this one
        super().__init__(model, config_list, algorithm, **options)
        self._stateful = [one for one in (optimizer, lr_scheduler) if one is not None]
        self._first: list[dict[str, Any]] = []
        self._started = -1
        if self._rounds is None:
            found = {one.entry.prune_iterations for one in self.settings.values() if not one.entry.exclude}
            if found == {None} or len(found) > 1:
                raise ConfigError(
                    f"LotteryTicketPruner: entries have prune_iterations {', '.join(map(str, found))}. Give all of "
                    "them the same number."
                )
            (self._iterations,) = found

    def compress(self) -> tuple[nn.Module, Masks]:
        """Remembers the first values; or prunes in rounds if ``total_iteration`` is given."""
        if self._rounds is not None:
            return super().compress()
        self._first = [copy.deepcopy(one.state_dict()) for one in (self._model, *self._stateful)]
        return self._model, self.masks

    def get_prune_iterations(self) -> Iterable[int]:
        """Returns the rounds, the first of which trains the dense model."""
        return range((self._iterations or 0) + 1)

    def prune_iteration_start(self) -> None:
        """Prunes what the last round has trained, and rewinds what survives."""
        if not self._first:
            raise ConfigError("LotteryTicketPruner: compress() was not called. Call it first.")
        self._started += 1
        if self._started not in self.get_prune_iterations():
            raise ConfigError(
                f"LotteryTicketPruner: all {self._iterations} rounds are over. Use get_prune_iterations()."
            )
        if self._started == 0:
            return
        self.pruner.go_on(at_round(self.settings, SCHEDULES[self.schedule], self._started, self._iterations or 1))
        for one, state in zip((self._model, *self._stateful), self._first, strict=True):
            if self.rewind:
                one.load_state_dict(copy.deepcopy(state))

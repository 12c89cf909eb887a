"""Scheduled pruners: a schedule and a basic pruner, in rounds or driven by the user's own loop."""

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from graphprune.errors import ConfigError, shown
from graphprune.pruners.algorithms import Pruner
from graphprune.pruners.basic import by_name
from graphprune.pruners.options import Options
from graphprune.pruners.rounds import Task, Work, best_of, in_rounds
from graphprune.pruners.sparsify import Masks
from graphprune.schedule import SCHEDULES, at_epoch, at_round
from speedup.masking import beneath_masks


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
            pruning_algorithm: A name in :data:`~graphprune.pruners.algorithms.ALGORITHMS`.
            total_iteration: Rounds; None if the user's loop drives it.
            finetuner: ``finetuner(model)`` trains the model of a round in place.
            speedup: Whether the model becomes physically smaller after each round.
            dummy_input: Example inputs.
            evaluator: ``evaluator(model)`` returns a number, higher for better models.
            pruning_params: Options of the basic pruner.
            **options: The same; what ``pruning_params`` says counts.

        Raises:
            ConfigError: What is asked makes no sense for this model.
        """
        values = {**options, **(pruning_params or {})}
        if dummy_input is not None:
            values.setdefault("dummy_input", dummy_input)
        for what, value in (("finetuner", finetuner), ("evaluator", evaluator)):
            if value is not None and not callable(value):
                raise ConfigError(f"{what}: is a {type(value).__name__}. Give a function of a model.")
        if total_iteration is not None and (not isinstance(total_iteration, int) or total_iteration < 1):
            raise ConfigError(f"total_iteration {total_iteration!r}: is no number of rounds. Use 1 or more.")
        if speedup and dummy_input is None:
            raise ConfigError("speedup: needs example inputs. Give dummy_input.")
        self._model, self._finetuner, self._evaluator, self._speedup = model, finetuner, evaluator, speedup
        self._rounds, self._example = total_iteration, dummy_input
        self.pruner = Pruner(model, config_list, pruning_algorithm, Options.of(values))
        self.settings = dict(self.pruner.settings)
        self.tasks: list[Task] = []
        self._check()

    def _check(self) -> None:
        """Refuses what a schedule cannot follow."""
        for layer, one in self.settings.items():
            if one.entry.share is None and not one.entry.exclude:
                raise ConfigError(
                    f"{layer}: the config list does not say how much goes. Give it a sparsity such as 0.5."
                )
        learning = self.pruner.algorithm.learning
        if self._rounds is None and learning is not None and self.pruner.options.trainer is not None:
            raise ConfigError(
                f"{type(self).__name__}: {learning} trains the model by itself, which your own loop cannot drive. Give "
                "total_iteration."
            )

    @property
    def masks(self) -> Masks:
        """The masks that are attached to the user's model."""
        return self.pruner.masks

    def compress(self) -> tuple[nn.Module, Masks]:
        """Prunes in rounds, and returns the model and the masks of the best one."""
        if self._rounds is None:
            raise ConfigError(f"{type(self).__name__}: total_iteration is missing. Say how many rounds there are.")
        self.tasks.clear()
        for task in in_rounds(
            self.pruner,
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


def _either_form(subject: str, takes: Sequence[str], args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments by their names: ``takes``, or of a scheduled pruner if the first is a name."""
    rounds = ("pruning_algorithm", "total_iteration")
    return by_name(subject, rounds if args and isinstance(args[0], str) else takes, args, options)


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
        *args: Any,
        **options: Any,
    ) -> None:
        """Takes ``(optimizer, pruning_algorithm)`` after the config list, or ``(pruning_algorithm, total_iteration)``.

        The optimizer is that of the user's loop, or of a basic pruner that trains; masks need none, they act in the
        model. See :class:`ScheduledPruner` for the rest.
        """
        super().__init__(
            model, config_list, **_either_form("AGPPruner", ("optimizer", "pruning_algorithm"), args, options)
        )
        self._shares: dict[str, float] = {}
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
        try:
            number = operator.index(epoch)
        except TypeError:
            number = -1
        if isinstance(epoch, bool) or number < 0:
            raise ConfigError(f"epoch: is {shown(epoch)}. Give the number of the epoch, from 0.")
        chosen = {layer: one for layer, one in self.settings.items() if not one.entry.exclude}
        shares = {layer: at_epoch(SCHEDULES[self.schedule], one.entry, number) for layer, one in chosen.items()}
        if shares == self._shares:
            return
        last = all(share == chosen[layer].entry.share for layer, share in shares.items())
        if self.pruner.go_on(
            {layer: one.asking(shares.get(layer, 0.0)) for layer, one in self.settings.items()}, last=last
        ):
            self._shares = shares


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
        *args: Any,
        **options: Any,
    ) -> None:
        """Takes ``(optimizer, lr_scheduler)`` after the config list, or ``(pruning_algorithm, total_iteration)``.

        Optimizer and learning rate scheduler return to what they were, too, and weights unless ``reset_weight`` is
        false. See :class:`ScheduledPruner` for the rest.
        """
        values = _either_form("LotteryTicketPruner", ("optimizer", "lr_scheduler", "reset_weights"), args, options)
        lr_scheduler, again = values.pop("lr_scheduler", None), values.pop("reset_weights", True)
        self.rewind = bool(values.pop("reset_weight", again))  # type: ignore[misc]  # of this one
        super().__init__(model, config_list, **values)
        if lr_scheduler is not None and not hasattr(lr_scheduler, "load_state_dict"):
            kind = type(lr_scheduler).__name__
            raise ConfigError(f"lr_scheduler: is a {kind}, without a state that could return. Give yours.")
        optimizer = self.pruner.options.optimizer
        own = optimizer if isinstance(optimizer, Optimizer) else None
        self._stateful = [one for one in (own, lr_scheduler) if one is not None]
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
        states = beneath_masks(self._model.state_dict()), *(one.state_dict() for one in self._stateful)
        self._first = [copy.deepcopy(state) for state in states]
        self._started = -1
        self.pruner.watch()
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
        asked = at_round(self.settings, SCHEDULES[self.schedule], self._started, self._iterations or 1)
        self.pruner.go_on(asked, last=self._started == self._iterations)
        for one, state in zip((self._model, *self._stateful), self._first, strict=True):
            if self.rewind or one is not self._model:
                one.load_state_dict(copy.deepcopy(state))

"""The searches under the names that their users know from NNI's auto pruners."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.config import closest
from graphprune.config_list import read_config_list, target_of
from graphprune.errors import ConfigError
from graphprune.evidence import at_first_call
from graphprune.pruners.algorithms import ALGORITHMS, Pruner
from graphprune.pruners.options import Options
from graphprune.pruners.sparsify import Masks, masks_of
from graphprune.search import (
    Episodes,
    Found,
    Schedule,
    Space,
    Trials,
    amc,
    annealing,
    autocompress,
    netadapt,
    prune_by_sensitivity,
)
from graphprune.search.annealing import MANUAL
from graphprune.search.asked import asked_sparsity
from speedup.inputs import ExampleInputs
from speedup.masking import attach_masks

Evaluator = Callable[..., Any]


class SearchPruner:
    """A search for how much of each layer goes.

    The config list says which layers may give channels, and by its sparsities how much goes of their weights in all.
    Candidates are physically smaller models; :meth:`compress` leaves the user's model with masks for the best of them,
    and with its weights where the search trains.

    Attributes:
        found: What the search has found, once it has run; ``found.result.model`` is the smaller model.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator,
        *,
        optimize_mode: str = "maximize",
        base_algo: str = "l1",
        dummy_input: ExampleInputs | None = None,
        experiment_data_dir: Path | str | None = None,
        workers: Any = None,
        seed: int = 0,
        keep_at_least: float = 0.0,
        shares: bool = True,
    ) -> None:
        """Checks what is asked; nothing is done yet.

        Args:
            model: Any module.
            config_list: Which layers, and how much of them.
            evaluator: ``evaluator(model)`` returns a number.
            optimize_mode: ``maximize`` or ``minimize`` it.
            base_algo: What scores a channel: l1, l2, fpgm or slim.
            dummy_input: Example inputs; those of the evaluator's first call if they are left out.
            experiment_data_dir: Folder for the journal from which a search that was stopped goes on; None for none.
            workers: Where candidates are evaluated; None for this process, or see :class:`~graphprune.search.Trials`.
            seed: Of everything that is random.
            keep_at_least: Share of the channels of every group that stays.
            shares: Whether the config list has to say how much goes.

        Raises:
            ConfigError: What is asked makes no sense for this model.
        """
        criterion = ALGORITHMS[base_algo].criterion if base_algo in ALGORITHMS else None
        if criterion not in ("l1", "l2", "fpgm", "bn_scale"):
            known = ("l1", "l2", "fpgm", "slim")
            raise ConfigError(
                f"base_algo {base_algo!r}: scores no channels by their weights{closest(str(base_algo), known)}. "
                f"Use one of {', '.join(known)}."
            )
        if optimize_mode not in ("maximize", "minimize"):
            raise ConfigError(f"optimize_mode {optimize_mode!r}: is not known. Use maximize or minimize.")
        if not callable(evaluator):
            raise ConfigError(f"evaluator: is a {type(evaluator).__name__}. Give a function of a model.")
        self._model, self._evaluator, self._criterion = model, evaluator, criterion
        self._minimize, self._workers, self._seed = optimize_mode == "minimize", workers, seed
        self._folder = None if experiment_data_dir is None else Path(experiment_data_dir)
        self._example, self._keep_at_least = dummy_input, keep_at_least
        self._settings = read_config_list(model, config_list, shares=shares)
        self.found: Found | None = None

    def compress(self) -> tuple[nn.Module, Masks]:
        """Searches, and returns the user's model, with masks attached, and the masks."""
        trials = self._trials()
        self.found = self.search(trials)
        result = self.found.result
        dense = result.dependencies.analysis.captured.model
        self._model.load_state_dict(dense.state_dict())
        masks = masks_of(result.dependencies, result.selection)
        attach_masks(self._model, masks)
        return self._model, masks

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        raise NotImplementedError

    def sparsity(self, space: Space) -> float:
        """How much goes of the weights of all groups that the config list selects."""
        return asked_sparsity(space)

    def _trials(self) -> Trials:
        if self._example is None:
            self._example = self._inputs_of_evaluator()
        space = Space.of(
            self._model,
            self._example,
            criterion=self._criterion,
            asked=partial(target_of, settings=self._settings),
            keep_at_least=self._keep_at_least,
            round_to=1,
            seed=self._seed,
        )
        journal = None if self._folder is None else self._folder / f"{type(self).__name__}.jsonl"
        return Trials(space, self._evaluator, self._minimize, self._workers, journal, self._seed)

    def _inputs_of_evaluator(self) -> ExampleInputs:
        noted: list[ExampleInputs] = []
        modes = {module: module.training for module in self._model.modules()}
        with at_first_call(self._model, lambda inputs, *_: noted.append(inputs)):
            self._evaluator(self._model)
        for module, mode in modes.items():
            module.training = mode
        if not noted:
            raise ConfigError("evaluator: does not call the model that it is given. Give dummy_input.")
        return noted[0]


class SimulatedAnnealingPruner(SearchPruner):
    """See :func:`graphprune.search.annealing`."""

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator,
        *,
        start_temperature: float = MANUAL.start,
        stop_temperature: float = MANUAL.stop,
        cool_down_rate: float = MANUAL.cool,
        perturbation_magnitude: float = MANUAL.perturbation,
        **options: Any,
    ) -> None:
        """Takes how it cools, and what :class:`SearchPruner` takes."""
        super().__init__(model, config_list, evaluator, **options)
        self._schedule = Schedule(start_temperature, stop_temperature, cool_down_rate, perturbation_magnitude)

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        return annealing(trials, self.sparsity(trials.space), schedule=self._schedule)


class NetAdaptPruner(SearchPruner):
    """See :func:`graphprune.search.netadapt`; ``resource`` is weights, params, macs or latency."""

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        short_term_fine_tuner: Callable[[nn.Module], Any] | None,
        evaluator: Evaluator,
        *,
        sparsity_per_iteration: float = 0.05,
        resource: Any = "weights",
        **options: Any,
    ) -> None:
        """Takes how each candidate is trained and how large a step is, and what :class:`SearchPruner` takes."""
        super().__init__(model, config_list, evaluator, **options)
        self._finetune, self._step, self._resource = short_term_fine_tuner, sparsity_per_iteration, resource

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        budget = 1 - self.sparsity(trials.space)
        return netadapt(trials, budget, resource=self._resource, step=self._step, finetune=self._finetune)


class SensitivityPruner(SearchPruner):
    """See :func:`graphprune.search.prune_by_sensitivity`."""

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator,
        finetuner: Callable[..., Any] | None = None,
        *,
        sparsity_per_iter: float = 0.1,
        acc_drop_threshold: float = 0.05,
        **options: Any,
    ) -> None:
        """Takes how the model of a round is trained and how large a step is, and what :class:`SearchPruner` takes."""
        super().__init__(model, config_list, evaluator, **options)
        self._finetune, self._step, self._drop = finetuner, sparsity_per_iter, acc_drop_threshold

    def compress(
        self,
        eval_args: Sequence[Any] = (),
        eval_kwargs: Mapping[str, Any] | None = None,
        finetune_args: Sequence[Any] = (),
        finetune_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[nn.Module, Masks]:
        """Searches; what is given is handed on to evaluator and finetuner, the candidate where the model stands."""
        evaluator, finetuner = self._evaluator, self._finetune
        self._evaluator = _Given(evaluator, self._model, tuple(eval_args), dict(eval_kwargs or {}))
        if finetuner is not None:
            self._finetune = _Given(finetuner, self._model, tuple(finetune_args), dict(finetune_kwargs or {}))
        try:
            return super().compress()
        finally:
            self._evaluator, self._finetune = evaluator, finetuner

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        sparsity = self.sparsity(trials.space)
        return prune_by_sensitivity(trials, sparsity, step=self._step, drop=self._drop, finetune=self._finetune)


class AutoCompressPruner(SearchPruner):
    """See :func:`graphprune.search.autocompress`; its structured ADMM is that of ``ADMMPruner``."""

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        trainer: Callable[..., Any],
        evaluator: Evaluator,
        dummy_input: ExampleInputs | None = None,
        *,
        criterion: Any = None,
        optimizer: Any = None,
        num_iterations: int = 3,
        start_temperature: float = MANUAL.start,
        stop_temperature: float = MANUAL.stop,
        cool_down_rate: float = MANUAL.cool,
        perturbation_magnitude: float = MANUAL.perturbation,
        admm_num_iterations: int = 30,
        admm_training_epochs: int = 5,
        row: float = 1e-4,
        **options: Any,
    ) -> None:
        """Takes how the model is trained and how long, and what :class:`SearchPruner` takes.

        The optimizer has to be a function of parameters, because the model of each round is another one.
        """
        super().__init__(model, config_list, evaluator, dummy_input=dummy_input, **options)
        self._rounds = num_iterations
        self._schedule = Schedule(start_temperature, stop_temperature, cool_down_rate, perturbation_magnitude)
        self._admm = {
            "trainer": trainer,
            "optimizer": optimizer,
            "criterion": criterion,
            "iterations": admm_num_iterations,
            "training_epochs": admm_training_epochs,
            "rho": row,
        }

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        space = trials.space
        regularise = TowardsShares(space.layers, space.example_inputs, self._admm)
        sparsity = self.sparsity(space)
        return autocompress(trials, sparsity, rounds=self._rounds, schedule=self._schedule, regularise=regularise)


class AMCPruner(SearchPruner):
    """See :func:`graphprune.search.amc`; the evaluator takes ``(val_loader, model)``, or the model without a loader."""

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator,
        val_loader: Any = None,
        *,
        flops_ratio: float = 0.5,
        lbound: float = 0.2,
        channel_round: int = 8,
        train_episode: int = 800,
        warmup: int = 100,
        **options: Any,
    ) -> None:
        """Takes the bound and how long the agent learns, and what :class:`SearchPruner` takes."""
        given = evaluator if val_loader is None else partial(evaluator, val_loader)
        super().__init__(model, config_list, given, shares=False, **options)
        self._ratio, self._least, self._round_to = flops_ratio, lbound, channel_round
        self._episodes = Episodes(train_episode, warmup)

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        return amc(trials, self._ratio, keep_at_least=self._least, round_to=self._round_to, episodes=self._episodes)


class _Given:
    """A function with arguments, among which a candidate takes the place of the model."""

    def __init__(self, function: Evaluator, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._function = function
        self._places = [place for place, value in enumerate(args) if value is model] or ([] if args else [0])
        self._names = [name for name, value in kwargs.items() if value is model]
        self._args = [None if value is model else value for value in args] or [None]
        self._kwargs = {name: None if value is model else value for name, value in kwargs.items()}

    def __call__(self, candidate: nn.Module) -> Any:
        """The function of the candidate."""
        args = [candidate if place in self._places else value for place, value in enumerate(self._args)]
        kwargs = {name: candidate if name in self._names else value for name, value in self._kwargs.items()}
        return self._function(*args, **kwargs)


class TowardsShares:
    """ADMM towards the shares of a round of AutoCompress; a value, so that it can go to a worker."""

    def __init__(self, layers: Mapping[str, Sequence[str]], example: ExampleInputs, options: Mapping[str, Any]) -> None:
        """Takes the layers of each group, example inputs, and :class:`~graphprune.pruners.options.Options` of ADMM."""
        self._layers = dict(layers)
        self._options = {**options, "dummy_input": example, "granularity": "coarse-grained"}

    def __call__(self, model: nn.Module, shares: Mapping[str, float]) -> None:
        """Trains the model in place."""
        config_list = [
            {"op_names": list(self._layers[group]), "sparsity": share} for group, share in shares.items() if share > 0
        ]
        if config_list:
            pruner = Pruner(model, config_list, "admm", Options.of(self._options))
            pruner.learn(pruner.settings)

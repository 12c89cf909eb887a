"""The searches under the names that their users know from NNI's auto pruners."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from graphprune.config_list import read_config_list, target_of
from graphprune.errors import ConfigError, shown
from graphprune.evidence import at_first_call
from graphprune.pruners.algorithms import Pruner
from graphprune.pruners.options import Options
from graphprune.pruners.search_options import (
    AMCOptions,
    AnnealingOptions,
    AutoCompressOptions,
    NetAdaptOptions,
    SearchOptions,
    SensitivityOptions,
)
from graphprune.pruners.sparsify import Masks, masks_of, within
from graphprune.search import Found, Space, Trials, amc, annealing, autocompress, netadapt, prune_by_sensitivity
from graphprune.search.asked import asked_sparsity
from graphprune.search.candidate import seeded
from graphprune.search.code import is_plain
from speedup.inputs import ExampleInputs
from speedup.masking import attach_masks, attached_masks
from speedup.repair import repaired

Evaluator = Callable[..., Any]
_ELSEWHERE = ("dummy_input", "experiment_data_dir", "workers", "seed", "optimize_mode")
"""Options on which nothing depends that a search finds, or of which its journal knows already."""


class SearchPruner:
    """A search for how much of each layer goes.

    The config list says which layers may give channels, and by its sparsities how much goes of their weights in all.
    Candidates are physically smaller models; :meth:`compress` leaves the user's model with masks for the best of them,
    and with its weights where the search trains.

    Attributes:
        takes: The class of its options.
        shares: Whether the config list has to say how much goes.
        options: Everything that it was given beside the model and the config list.
        found: What the search has found, once it has run; ``found.result.model`` is the smaller model.
    """

    takes: ClassVar[type[SearchOptions]] = SearchOptions
    shares: ClassVar[bool] = True

    options: SearchOptions

    def __init__(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], evaluator: Evaluator, **options: Any
    ) -> None:
        """Checks what is asked; nothing is done yet.

        Args:
            model: Any module.
            config_list: Which layers, and how much of them.
            evaluator: ``evaluator(model)`` returns a number.
            **options: The fields of :attr:`takes`.

        Raises:
            ConfigError: What is asked makes no sense for this model.
        """
        self.options = self.takes.of({"evaluator": evaluator, **options})
        self._model, self._evaluator = model, evaluator
        self._settings = read_config_list(model, config_list, shares=self.shares)
        if self.options.trains and attached_masks(model):
            raise ConfigError(
                "model: has masks, and the models that the search trains have none. Take them out with detach_masks."
            )
        self.found: Found | None = None

    def compress(self) -> tuple[nn.Module, Masks]:
        """Searches, and returns the user's model, with masks attached, and the masks."""
        trials = self._trials()
        self.found = self.search(trials)
        result = self.found.result
        dense = result.dependencies.analysis.captured.model
        self._model.load_state_dict(dense.state_dict())
        masks = within(masks_of(result.dependencies, result.selection), attached_masks(self._model))
        attach_masks(self._model, masks)
        return self._model, masks

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        raise NotImplementedError

    def sparsity(self, space: Space) -> float:
        """How much goes of the weights of all groups that the config list selects."""
        return asked_sparsity(space)

    def _trials(self) -> Trials:
        options = self.options
        space = Space.of(
            self._model,
            self._inputs_of_evaluator() if options.dummy_input is None else options.dummy_input,
            criterion=options.scores_by,
            asked=partial(target_of, settings=self._settings),
            keep_at_least=options.keep_at_least,
            round_to=1,
            seed=options.seed,
        )
        folder, minimize = options.experiment_data_dir, options.optimize_mode == "minimize"
        journal = None if folder is None else Path(folder) / f"{type(self).__name__}.jsonl"
        given = {name: value for name, value in options if name not in _ELSEWHERE}
        return Trials(
            space,
            self._evaluator,
            minimize,
            options.workers,
            journal,
            options.seed,
            about={name: value for name, value in given.items() if is_plain(value)},
        )

    def _inputs_of_evaluator(self) -> ExampleInputs:
        """What the evaluator calls a model with; it may change that, and is given a copy as it is given candidates."""
        noted: list[ExampleInputs] = []
        model = repaired(self._model, {}, ()).eval()
        seeds = seeded(self.options.seed, torch.get_num_threads())
        with seeds, at_first_call(model, lambda inputs, *_: noted.append(inputs)):
            self._evaluator(model)
        if not noted:
            raise ConfigError("evaluator: does not call the model that it is given. Give dummy_input.")
        return noted[0]


class SimulatedAnnealingPruner(SearchPruner):
    """See :func:`graphprune.search.annealing`; it takes :class:`AnnealingOptions`."""

    takes = AnnealingOptions
    options: AnnealingOptions

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        return annealing(trials, self.sparsity(trials.space), schedule=self.options.schedule)


class NetAdaptPruner(SearchPruner):
    """See :func:`graphprune.search.netadapt`; it takes :class:`NetAdaptOptions`."""

    takes = NetAdaptOptions
    options: NetAdaptOptions

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        short_term_fine_tuner: Callable[[nn.Module], Any] | None,
        evaluator: Evaluator,
        **options: Any,
    ) -> None:
        """Takes what trains each candidate for a short time, and what :class:`SearchPruner` takes."""
        super().__init__(model, config_list, evaluator, short_term_fine_tuner=short_term_fine_tuner, **options)

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        budget, options = 1 - self.sparsity(trials.space), self.options
        tune = options.short_term_fine_tuner
        return netadapt(trials, budget, resource=options.resource, step=options.sparsity_per_iteration, finetune=tune)


class SensitivityPruner(SearchPruner):
    """See :func:`graphprune.search.prune_by_sensitivity`; it takes :class:`SensitivityOptions`."""

    takes = SensitivityOptions
    options: SensitivityOptions

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator,
        finetuner: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        """Takes what trains the model of a round, and what :class:`SearchPruner` takes."""
        super().__init__(model, config_list, evaluator, finetuner=finetuner, **options)
        self._finetune: Callable[..., Any] | None = finetuner

    def compress(
        self,
        eval_args: Sequence[Any] = (),
        eval_kwargs: Mapping[str, Any] | None = None,
        finetune_args: Sequence[Any] = (),
        finetune_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[nn.Module, Masks]:
        """Searches; what is given is handed on to evaluator and finetuner, the candidate where the model stands.

        Where the model is not among it, the candidate comes first if nothing else is given by position, or as the
        argument ``model``.

        Raises:
            ConfigError: It is not known where the candidate goes.
        """
        evaluator, finetuner = self._evaluator, self._finetune
        self._evaluator = _given("eval", evaluator, self._model, eval_args, eval_kwargs or {})
        if finetuner is not None:
            self._finetune = _given("finetune", finetuner, self._model, finetune_args, finetune_kwargs or {})
        try:
            return super().compress()
        finally:
            self._evaluator, self._finetune = evaluator, finetuner

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        sparsity, step, drop = (
            self.sparsity(trials.space),
            self.options.sparsity_per_iter,
            self.options.acc_drop_threshold,
        )
        return prune_by_sensitivity(trials, sparsity, step=step, drop=drop, finetune=self._finetune)


class AutoCompressPruner(SearchPruner):
    """See :func:`graphprune.search.autocompress`; its structured ADMM is that of ``ADMMPruner``.

    It takes :class:`AutoCompressOptions`.
    """

    takes = AutoCompressOptions
    options: AutoCompressOptions

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        trainer: Callable[..., Any],
        evaluator: Evaluator,
        dummy_input: ExampleInputs | None = None,
        **options: Any,
    ) -> None:
        """Takes how the model is trained, and what :class:`SearchPruner` takes."""
        super().__init__(model, config_list, evaluator, trainer=trainer, dummy_input=dummy_input, **options)

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        space, options = trials.space, self.options
        regularise = TowardsShares(space.layers, space.example_inputs, options.admm)
        rounds, schedule = options.num_iterations, options.schedule
        return autocompress(trials, self.sparsity(space), rounds=rounds, schedule=schedule, regularise=regularise)


class AMCPruner(SearchPruner):
    """See :func:`graphprune.search.amc`; the evaluator takes ``(val_loader, model)``, or the model without a loader.

    It takes :class:`AMCOptions`.
    """

    takes = AMCOptions
    shares = False
    options: AMCOptions

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator,
        val_loader: Any = None,
        **options: Any,
    ) -> None:
        """Takes what the evaluator takes beside the model, and what :class:`SearchPruner` takes."""
        super().__init__(model, config_list, evaluator, val_loader=val_loader, **options)
        if val_loader is not None:
            self._evaluator = partial(evaluator, val_loader)

    def search(self, trials: Trials) -> Found:
        """Runs the search."""
        ratio, least, block = self.options.flops_ratio, self.options.lbound, self.options.channel_round
        return amc(trials, ratio, keep_at_least=least, round_to=block, episodes=self.options.episodes)


def _given(
    what: str, function: Evaluator, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> "_Given":
    """Returns a function of a candidate alone, from one with arguments among which is the model or has a place.

    Raises:
        ConfigError: The arguments are none, or it is not known where the candidate goes.
    """
    for name, value, kind, form in (
        (f"{what}_args", args, Sequence, "a list, such as [model]"),
        (f"{what}_kwargs", kwargs, Mapping, "a mapping"),
    ):
        if not isinstance(value, kind) or isinstance(value, str):
            raise ConfigError(f"{name}: is {shown(value)}. Give {form}.")
    places = [place for place, value in enumerate(args) if value is model]
    names = [name for name, value in kwargs.items() if value is model]
    args = list(args)
    if not places and not names:
        held = [value for value in args if isinstance(value, nn.Module)]
        place = 0 if not args else None if held else _place_of_model(function)
        if place is None:
            fact = f"holds a {type(held[0]).__name__} that is not the model" if held else "does not hold the model"
            raise ConfigError(f"{what}_args: {fact}, so that all candidates would be the same. Put the model into it.")
        args.insert(place, model)
        places = [place]
    if (why := _misfit(function, args, kwargs)) is not None:
        raise ConfigError(f"{what}_args: the function cannot be called with them ({why}). Give all that it takes.")
    return _Given(
        function,
        [None if value is model else value for value in args],
        {name: value for name, value in kwargs.items() if value is not model},
        places,
        names,
    )


def _place_of_model(function: Evaluator) -> int | None:
    """The place of the argument that is called ``model``; None if there is none."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a built-in
        return None
    found = [p.name == "model" and p.kind is not p.KEYWORD_ONLY for p in parameters]
    return found.index(True) if any(found) else None


def _misfit(function: Evaluator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why a function does not take these arguments; None if it does, or does not say what it takes."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    except ValueError:  # a built-in
        return None
    return None


@dataclass(frozen=True)
class _Given:
    """A function with arguments, among which a candidate takes the place of the model; it can go to a worker."""

    function: Evaluator
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    places: Sequence[int]
    names: Sequence[str]

    def __call__(self, candidate: nn.Module) -> Any:
        """The function of the candidate."""
        args = [candidate if place in self.places else value for place, value in enumerate(self.args)]
        return self.function(*args, **{**self.kwargs, **dict.fromkeys(self.names, candidate)})


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

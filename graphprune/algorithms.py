"""The basic pruners: one table of what they do, and what happens to a model that one of them is given."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.config import closest
from graphprune.config_list import Setting, read_config_list
from graphprune.criteria import CRITERIA, SLICES
from graphprune.dependency import DependencyGraph, find_dependencies
from graphprune.errors import ConfigError
from graphprune.evidence import ACTIVATIONS, NOTHING, Evidence, Observer, put_back
from graphprune.fit import fit
from graphprune.learned import Movement, Weights, admm, movement, slim
from graphprune.options import Options
from graphprune.select import Selection
from graphprune.sparsify import Masks, channel_masks, element_masks, layer_masks
from graphprune.training import Training
from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.inputs import ExampleInputs
from speedup.masking import attach_masks, attached_masks, detach_masks, flat_masks

Learning = Literal["slim", "admm", "movement"]


@dataclass(frozen=True)
class Algorithm:
    """What a basic pruner does.

    Attributes:
        criterion: What scores a channel, a name in :data:`~graphprune.criteria.CRITERIA`; None where single elements of
            weights go by their size.
        together: Whether all selected layers are ranked together, even where the config list does not say so.
        learning: What is done to the weights before they are scored.
    """

    criterion: str | None
    together: bool = False
    learning: Learning | None = None


ALGORITHMS: Mapping[str, Algorithm] = {
    "level": Algorithm(None),
    "l1": Algorithm("l1"),
    "l2": Algorithm("l2"),
    "fpgm": Algorithm("fpgm"),
    "slim": Algorithm("bn_scale", together=True, learning="slim"),
    "apoz": Algorithm("apoz"),
    "mean_activation": Algorithm("mean_activation"),
    "taylorfo": Algorithm("taylor"),
    "admm": Algorithm(None, learning="admm"),
    "movement": Algorithm(None, learning="movement"),
}
"""The basic pruners by the names under which NNI's scheduled pruners know them."""


class Pruner:
    """One algorithm at work on one model.

    The model is changed in place: :meth:`compress` attaches masks to it, and algorithms that learn train it. Masked
    channels go from everything that produces them, norms included, so that what masks leave is what a physical shrink
    leaves.

    Attributes:
        model: The user's model.
        masks: The masks that are attached, by layer and parameter.
        settings: What is asked of each layer.
        selection: What was asked of each channel group and what it got; None for single elements, or while no example
            inputs are known.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        algorithm: str,
        options: Options,
        *,
        shares: bool = True,
    ) -> None:
        """Checks what is asked; nothing is done yet.

        Args:
            model: Any module.
            config_list: Which layers, and how much of each.
            algorithm: A name in :data:`ALGORITHMS`.
            options: Everything else.
            shares: Whether every entry has to say how much goes.

        Raises:
            ConfigError: What is asked makes no sense for this model.
        """
        if algorithm not in ALGORITHMS:
            known = list(ALGORITHMS)
            raise ConfigError(
                f"{algorithm!r}: is no basic pruner{closest(str(algorithm), known)}. Use one of {', '.join(known)}."
            )
        self.model, self.options, self.algorithm = model, options, ALGORITHMS[algorithm]
        self.settings: dict[str, Setting] = {
            layer: setting.at_most(options.max_sparsity_per_layer)
            for layer, setting in read_config_list(model, config_list, shares=shares).items()
        }
        if options.dependency_aware and options.dummy_input is None and options.trainer is None:
            raise ConfigError("dependency_aware: needs example inputs to know what depends on what. Give dummy_input.")
        self.masks: Masks = {}
        self.selection: Selection | None = None
        self._training = options.training
        self._inputs: ExampleInputs | None = options.dummy_input
        self._known: DependencyGraph | None = None
        self._scores: Weights | None = None
        self._need = CRITERIA[self.algorithm.criterion or "l1"].need
        self._watching: tuple[Observer, ExitStack] | None = None

    def compress(self, settings: Mapping[str, Setting] | None = None) -> tuple[nn.Module, Masks]:
        """Returns the model, with masks attached, and the masks.

        Without a trainer, what looks at activations or gradients waits until the user's own loop has run the model for
        so many batches: the masks are empty until then.

        Args:
            settings: What is asked of each layer from now on, instead of what it was.
        """
        self.settings = dict(settings or self.settings)
        self.learn(self.settings)
        if self._need == "weights":
            self.prune(self.settings)
        elif self._training is not None:
            self.prune(self.settings, self.observe(self._training))
        else:
            self._wait()
        return self.model, self.masks

    def prune(self, settings: Mapping[str, Setting], evidence: Evidence = NOTHING) -> None:
        """Attaches masks for what is asked of each layer; what is masked already goes first."""
        masks = attached_masks(self.model)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        with self._holding({name: named[name] * mask for name, mask in masks.items()}):
            found, self.selection = self._find(settings, evidence, self.selection)
        attach_masks(self.model, found)
        self.masks.clear()
        self.masks.update(found)

    def go_on(self, settings: Mapping[str, Setting]) -> None:
        """Attaches masks for what is asked now, by what somebody else's loop has shown since the last time.

        What looks at activations or gradients does nothing as long as nothing was shown.
        """
        evidence = NOTHING
        if self._need != "weights":
            if self._watching is None:
                self._watch()
                return
            observer, stack = self._watching
            if not observer.count:
                return
            stack.close()
            evidence = observer.evidence(self.options.seed)
            self._watch()
        self.prune(settings, evidence)

    def learn(self, settings: Mapping[str, Setting]) -> None:
        """Trains the model as the algorithm does before its weights are scored."""
        learning, options, training = self.algorithm.learning, self.options, self._training
        if learning is None or (learning == "slim" and training is None):
            return
        if training is None:
            raise ConfigError(f"trainer: is missing, and {learning} trains the model. Give a trainer.")
        weights = self._weights(settings)
        epochs = options.training_epochs or (5 if learning == "admm" else 1)
        with self._remembering_inputs():
            if learning == "slim":
                slim(self.model, training, weights, scale=options.scale, epochs=epochs)
            elif learning == "admm":
                admm(
                    self.model,
                    training,
                    weights,
                    lambda values: self._project(settings, values),
                    rho=options.rho,
                    iterations=options.iterations,
                    epochs=epochs,
                )
            else:
                self._scores = self._movement(settings, weights, training, epochs)

    def _movement(
        self, settings: Mapping[str, Setting], weights: Weights, training: Training, epochs: int
    ) -> dict[str, Tensor]:
        """The scores that movement learns."""

        def keep(values: Weights, share: float) -> Weights:
            asked = {layer: one.asking((one.entry.share or 0.0) * share) for layer, one in settings.items()}
            return dict(flat_masks(element_masks(self.model, asked, scores=values)))

        begin, options = self.options.warm_up_step, self.options
        scores = Movement(
            self.model,
            weights,
            keep,
            begin=begin,
            end=max(options.cool_down_beginning_step, begin + 1),
            threshold=options.score_threshold,
            penalty=options.regular_scale,
        )
        movement(self.model, training, scores, epochs)
        return {name: score.detach() for name, score in scores.scores.items()}

    def observe(self, training: Training) -> Evidence:
        """Returns what is seen while the model is trained for an epoch; model and optimizer are put back afterwards."""
        observer, optimizer = self._observer(), training.optimizer
        state = copy.deepcopy(optimizer.state_dict()) if isinstance(optimizer, Optimizer) else None
        with put_back(self.model), observer.watching():
            fit(self.model, replace(training, schedule=None), 1, seed=self.options.seed)
        if isinstance(optimizer, Optimizer) and state is not None:
            optimizer.load_state_dict(state)
        return observer.evidence(self.options.seed)

    @property
    def dependencies(self) -> DependencyGraph | None:
        """What goes together; None while no example inputs are known."""
        if self._known is None and self._inputs is not None:
            masks = attached_masks(self.model)
            detach_masks(self.model, multiply=False)
            try:
                self._known = find_dependencies(analyse(capture(self.model, self._inputs)))
            finally:
                attach_masks(self.model, masks)
        return self._known

    def _observer(self) -> Observer:
        activation, known = self.options.activation, self.dependencies
        return Observer(
            self._analysed if known is None else known.analysis,
            self.model,
            self._need,
            self.options.training_batches,
            tuple(ACTIVATIONS) if activation is None else (activation,),
        )

    def _analysed(self, inputs: ExampleInputs) -> Analysis:
        self._inputs = inputs
        assert self.dependencies is not None
        return self.dependencies.analysis

    def _watch(self) -> tuple[Observer, ExitStack]:
        """Begins to look on while somebody else's loop runs the model."""
        observer, stack = self._observer(), ExitStack()
        stack.enter_context(observer.watching())
        self._watching = observer, stack
        return self._watching

    def _wait(self) -> None:
        """Attaches masks as soon as somebody else's loop has shown enough batches."""
        observer, stack = self._watch()

        def on_call(*_: Any) -> None:
            if observer.count >= self.options.training_batches:
                stack.close()
                self.prune(self.settings, observer.evidence(self.options.seed))

        stack.callback(self.model.register_forward_pre_hook(on_call).remove)

    def _find(
        self, settings: Mapping[str, Setting], evidence: Evidence, before: Selection | None
    ) -> tuple[Masks, Selection | None]:
        """Masks for what is asked, and what was chosen of each group; what was gone before goes again."""
        if not self._structured:
            return element_masks(self.model, settings, block=self.options.block, scores=self._scores), None
        name, known = self.algorithm.criterion or "l2", self.dependencies
        if known is None:
            if name not in (*SLICES, "bn_scale"):
                raise ConfigError(f"criterion {name!r}: needs example inputs. Give dummy_input.")
            return layer_masks(self.model, settings, name), None
        criterion = CRITERIA[name]
        scores = criterion(known.analysis, evidence, produced=True)
        if before is not None:
            scores[~before.live] = min(0.0, float(np.nanmin(scores, initial=0.0)))
        together = self.algorithm.together or self.options.mode == "global"
        return channel_masks(known, scores, settings, together=together, relative=not criterion.absolute)

    def _project(self, settings: Mapping[str, Setting], values: Weights) -> Weights:
        """The masks that are asked of weights with these values."""
        with self._holding(values):
            masks, _ = self._find(settings, NOTHING, None)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = dict(flat_masks(masks))
        return {name: found.get(name, torch.ones_like(parameters[name])) for name in values}

    def _weights(self, settings: Mapping[str, Setting]) -> dict[str, nn.Parameter]:
        """The weights of the selected layers, by qualified name."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] for name, _ in flat_masks(element_masks(self.model, settings))}

    @contextmanager
    def _holding(self, values: Weights) -> Iterator[None]:
        """Puts values into parameters while the context is open."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        held = {name: named[name].detach().clone() for name in values}
        try:
            with torch.no_grad():
                for name, value in values.items():
                    named[name].copy_(value)
            yield
        finally:
            with torch.no_grad():
                for name, value in held.items():
                    named[name].copy_(value)

    @contextmanager
    def _remembering_inputs(self) -> Iterator[None]:
        """Takes the inputs of the first call as the example, if there is none."""
        observer = Observer(self._analysed, self.model, "activations", 0)
        with observer.watching() if self._inputs is None and self._structured else ExitStack():
            yield

    @property
    def _structured(self) -> bool:
        return self.algorithm.criterion is not None or self.options.granularity == "coarse-grained"

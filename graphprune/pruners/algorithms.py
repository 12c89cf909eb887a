"""The basic pruners: one table of what they do, and what happens to a model that one of them is given."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.config import closest
from graphprune.config_list import Setting, read_config_list
from graphprune.criteria import CRITERIA
from graphprune.errors import ConfigError
from graphprune.evidence import ACTIVATIONS, NOTHING, Evidence, Observer, put_back
from graphprune.pruners.finding import MaskFinder
from graphprune.pruners.learned import Movement, Weights, admm, movement, slim
from graphprune.pruners.options import Options
from graphprune.pruners.sparsify import Masks, by_layer, element_masks, within
from graphprune.select import Selection
from graphprune.training import Training
from graphprune.training.fit import fit
from graphprune.training.optimizer import Moved, follow
from speedup.analysis import Analysis
from speedup.inputs import ExampleInputs
from speedup.masking import attach_masks, attached_masks, flat_masks
from speedup.plan import ShrinkPlan

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
    "random": Algorithm("random"),
}
"""The basic pruners by the names under which NNI's scheduled pruners know them, and a control."""


class Pruner:
    """One algorithm at work on one model.

    The model is changed in place: :meth:`compress` attaches masks to it, and algorithms that learn train it. Masked
    channels go from everything that produces them, norms included, so that what masks leave is what a physical shrink
    leaves.

    Attributes:
        model: The user's model.
        masks: The masks that are attached, by layer and parameter.
        settings: What is asked of each layer.
        finder: What finds its masks.
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
        settings: Mapping[str, Setting] | None = None,
    ) -> None:
        """Checks what is asked; nothing is done yet.

        Args:
            model: Any module.
            config_list: Which layers, and how much of each. Soft movement may leave that to its threshold.
            algorithm: A name in :data:`ALGORITHMS`.
            options: Everything else.
            settings: What a config list says of each layer, if it was read already.

        Raises:
            ConfigError: What is asked makes no sense for this model.
        """
        if algorithm not in ALGORITHMS:
            known = list(ALGORITHMS)
            raise ConfigError(
                f"{algorithm!r}: is no basic pruner{closest(str(algorithm), known)}. Use one of {', '.join(known)}."
            )
        self.model, self.options, self.algorithm = model, options, ALGORITHMS[algorithm]
        self._name, self._training = algorithm, options.training
        self.finder = MaskFinder(
            model,
            self.algorithm.criterion or ("l2" if options.granularity == "coarse-grained" else None),
            together=self.algorithm.together or options.mode == "global",
            block=options.block,
            inputs=options.dummy_input,
        )
        self._check()
        if settings is None:
            soft = self.algorithm.learning == "movement" and options.score_threshold is not None
            read = read_config_list(model, config_list, shares=not soft)
            settings = {layer: one.at_most(options.max_sparsity_per_layer) for layer, one in read.items()}
        self.settings = dict(settings)
        self.masks: Masks = {}
        self.selection: Selection | None = None
        self._scores: Weights | None = None
        self._soft: Masks = {}
        self._before: dict[str, Tensor] | None = None
        self._need = CRITERIA[self.algorithm.criterion or "l1"].need
        self._watching: tuple[Observer, ExitStack] | None = None

    def _check(self) -> None:
        """Refuses options that do not go together."""
        options, learning, known = self.options, self.algorithm.learning, self.options.dummy_input is not None
        if learning in ("admm", "movement") and self._training is None:
            raise ConfigError(f"trainer: is missing, and {self._name} trains the model. Give a trainer.")
        if learning in ("slim", "admm") and self._training is not None:
            self._training.regularised(lambda: torch.zeros(()))
        if (options.dependency_aware or options.mode == "dependency_aware") and not known and self._training is None:
            raise ConfigError("dependency_aware: needs example inputs to know what depends on what. Give dummy_input.")
        if learning == "movement" and self.structured and not known:
            raise ConfigError("granularity 'coarse-grained': movement needs example inputs for it. Give dummy_input.")
        if learning == "movement" and self.structured and options.score_threshold is not None:
            raise ConfigError("score_threshold: is one of single elements. Use granularity 'fine-grained'.")

    def following(self, model: nn.Module, plan: ShrinkPlan | None = None) -> "Pruner":
        """Returns the same pruner for another model; its optimizer follows.

        Args:
            model: A copy of the model, or what is left of it.
            plan: What is left; None for everything.
        """
        options = self.options
        if isinstance(options.optimizer, Optimizer):
            moved = Moved(model) if plan is None else Moved(model, plan)
            options = options.model_copy(update={"optimizer": follow(options.optimizer, self.model, moved)})
        made = Pruner(model, (), self._name, options, settings=self.settings)
        made.finder.inputs = self.finder.inputs
        return made

    @property
    def structured(self) -> bool:
        """Whether whole channels go."""
        return self.finder.criterion is not None

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
            self.prune(self.settings, Evidence(self.options.seed))
        elif self._training is not None:
            self.prune(self.settings, self.observe(self._training))
        else:
            self._wait()
        return self.model, self.masks

    def prune(self, settings: Mapping[str, Setting], evidence: Evidence = NOTHING) -> None:
        """Attaches masks for what is asked of each layer; what is masked already goes first.

        What others have masked before stays masked; what the pruner itself has may come back if less is asked.
        """
        gone = attached_masks(self.model)
        if self._before is None:
            self._before = gone
        if self.structured:
            named = dict(self.model.named_parameters(remove_duplicate=False))
            with self.finder.holding({name: named[name] * mask for name, mask in gone.items()}):
                found, self.selection = self.finder.channels(settings, evidence, scores=self._scores, gone=gone)
        else:
            asked = {layer: one for layer, one in settings.items() if one.entry.exclude or one.entry.share is not None}
            found = self.finder.elements(asked, scores=self._scores, gone=gone)
            found |= {layer: masks for layer, masks in self._soft.items() if layer not in asked}
        found = within(found, self._before)
        attach_masks(self.model, found)
        self.masks.clear()
        self.masks.update(found)

    def watch(self) -> None:
        """Begins to look on while somebody else's loop runs the model, if the algorithm looks at more than weights."""
        if self._watching is not None:
            self._watching[1].close()
            self._watching = None
        if self._need != "weights":
            observer, stack = self._observer(), ExitStack()
            stack.enter_context(observer.watching())
            self._watching = observer, stack

    def go_on(self, settings: Mapping[str, Setting], *, last: bool = False) -> bool:
        """Attaches masks for what is asked now, by what somebody else's loop has shown since the last time.

        Returns whether it did: what looks at activations or gradients does not as long as nothing was shown.

        Args:
            settings: What is asked of each layer.
            last: Whether nothing is looked at afterwards.
        """
        if self._watching is None:
            self.watch()
        evidence = Evidence(self.options.seed)
        if self._watching is not None:
            observer, stack = self._watching
            if not observer.count:
                return False
            evidence = observer.evidence(self.options.seed)
            stack.close()
            self._watching = None
            if not last:
                self.watch()
        self.prune(settings, evidence)
        return True

    def learn(self, settings: Mapping[str, Setting]) -> None:
        """Trains the model as the algorithm does before its weights are scored."""
        learning, options, training = self.algorithm.learning, self.options, self._training
        if learning is None or (learning == "slim" and training is None):
            return
        assert training is not None
        named = dict(self.model.named_parameters(remove_duplicate=False))
        weights = {name: named[name] for name, _ in flat_masks(element_masks(self.model, settings))}
        epochs = options.training_epochs or (5 if learning == "admm" else 1)
        with self._remembering_inputs():
            if learning == "slim":
                slim(self.model, training, weights, scale=options.scale, epochs=epochs, seed=options.seed)
            elif learning == "admm":
                admm(
                    self.model,
                    training,
                    weights,
                    partial(self.finder.project, settings),
                    rho=options.rho,
                    iterations=options.iterations,
                    epochs=epochs,
                    seed=options.seed,
                    waits=self.structured and self.finder.inputs is None,
                )
            else:
                self._scores = self._movement(settings, weights, training, epochs)

    def _movement(
        self, settings: Mapping[str, Setting], weights: Weights, training: Training, epochs: int
    ) -> dict[str, Tensor]:
        """The scores that movement learns."""

        def keep(values: Weights, gone: Weights, share: float) -> Weights:
            asked = {layer: one.asking((one.entry.share or 0.0) * share) for layer, one in settings.items()}
            return self.finder.project(asked, weights, scores=values, gone=gone)

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
        movement(self.model, training, scores, epochs, options.seed)
        if options.score_threshold is not None:
            self._soft = by_layer(scores.masks())
        return {name: score.detach() for name, score in scores.scores.items()}

    def observe(self, training: Training) -> Evidence:
        """Returns what is seen while the model is trained for an epoch; model and optimizer are put back afterwards."""
        observer = self._observer()
        with put_back(self.model, training.optimizer), observer.watching():
            some = replace(training.first(self.options.training_batches), schedule=None)
            fit(self.model, some, 1, seed=self.options.seed)
        return observer.evidence(self.options.seed)

    def _observer(self) -> Observer:
        activation, known = self.options.activation, self.finder.dependencies
        return Observer(
            self._analysed if known is None else known.analysis,
            self.model,
            self._need,
            self.options.training_batches,
            tuple(ACTIVATIONS) if activation is None else (activation,),
        )

    def _analysed(self, inputs: ExampleInputs) -> Analysis:
        self.finder.inputs = inputs
        assert self.finder.dependencies is not None
        return self.finder.dependencies.analysis

    def _wait(self) -> None:
        """Attaches masks in the first call of the model after somebody else's loop has shown enough batches."""

        def on_call(*_: Any) -> None:
            if self._watching is not None and self._watching[0].count >= self.options.training_batches:
                observer, stack = self._watching
                stack.close()
                self._watching = None
                self.prune(self.settings, observer.evidence(self.options.seed))

        self.watch()
        assert self._watching is not None
        handle = self.model.register_forward_pre_hook(on_call, prepend=True)  # runs before those of the observer
        self._watching[1].callback(handle.remove)

    @contextmanager
    def _remembering_inputs(self) -> Iterator[None]:
        """Takes the inputs of the first call as the example, if there is none."""
        observer = Observer(self._analysed, self.model, "activations", 0)
        with observer.watching() if self.finder.inputs is None and self.structured else ExitStack():
            yield

"""What an algorithm masks of a model for what is asked: single elements, or channels with all that is tied to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from graphprune.config_list import Setting
from graphprune.criteria import CRITERIA, SLICES, learned_scores
from graphprune.dependency import DependencyGraph, find_dependencies
from graphprune.errors import ConfigError
from graphprune.evidence import NOTHING, Evidence
from graphprune.pruners.learned import Weights
from graphprune.pruners.sparsify import Masks, channel_masks, element_masks, first_to_go, layer_masks
from graphprune.select import Selection
from speedup.analysis import analyse
from speedup.capture import capture
from speedup.inputs import ExampleInputs
from speedup.masking import attach_masks, attached_masks, detach_masks, flat_masks
from speedup.masks import produced_channels


class MaskFinder:
    """Finds the masks of one model.

    Attributes:
        criterion: What scores a channel, a name in :data:`~graphprune.criteria.CRITERIA`; None where elements go.
        together: Whether all layers of an entry are ranked together, even where that does not say so.
        inputs: Example inputs; without them each layer is looked at by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: str | None,
        *,
        together: bool = False,
        block: Sequence[int] = (),
        inputs: ExampleInputs | None = None,
    ) -> None:
        """Does nothing yet.

        Args:
            model: Any module, with masks attached or without.
            criterion: What scores a channel, or None.
            together: Whether layers are ranked together.
            block: Sizes of the blocks that go whole where single elements would go.
            inputs: Example inputs.
        """
        self._model, self._block = model, tuple(block)
        self._known: DependencyGraph | None = None
        self.criterion, self.together, self.inputs = criterion, together, inputs

    @property
    def dependencies(self) -> DependencyGraph | None:
        """What goes together; None while no example inputs are known."""
        if self._known is None and self.inputs is not None:
            masks = attached_masks(self._model)
            detach_masks(self._model, multiply=False)
            try:
                self._known = find_dependencies(analyse(capture(self._model, self.inputs)))
            finally:
                attach_masks(self._model, masks)
        return self._known

    def elements(
        self, settings: Mapping[str, Setting], *, scores: Weights | None = None, gone: Weights | None = None
    ) -> Masks:
        """Masks for single elements; what is masked out by ``gone`` goes first."""
        return element_masks(self._model, settings, block=self._block, scores=scores, gone=gone, together=self.together)

    def channels(
        self,
        settings: Mapping[str, Setting],
        evidence: Evidence = NOTHING,
        *,
        scores: Weights | None = None,
        gone: Weights | None = None,
    ) -> tuple[Masks, Selection | None]:
        """Masks for channels, and what was chosen of each group.

        Args:
            settings: What is asked of each layer.
            evidence: What the criterion knows beside the weights.
            scores: Scores of single elements, by qualified name of their weight, instead of the criterion.
            gone: Masks that there are: channels that are masked out whole go first.

        Raises:
            ConfigError: Nothing of what is selected can go, or the criterion needs example inputs.
        """
        name, known = self.criterion or "l2", self.dependencies
        if known is None:
            if name not in (*SLICES, "bn_scale"):
                raise ConfigError(f"criterion {name!r}: needs example inputs. Give dummy_input.")
            return layer_masks(self._model, settings, name, gone=gone, together=self.together), None
        masked = gone or {}
        if scores is not None:
            scores = {weight: score * masked[weight] if weight in masked else score for weight, score in scores.items()}
        criterion = CRITERIA[name] if scores is None else learned_scores(scores)
        found = criterion(known.analysis, evidence, produced=True)
        if masked:
            found = first_to_go(found, ~produced_channels(known.analysis, masked))
        masks, selection = channel_masks(
            known, found, settings, together=self.together, relative=not criterion.absolute
        )
        _refuse_if_nothing_can_go(settings, selection)
        return masks, selection

    def project(
        self,
        settings: Mapping[str, Setting],
        values: Weights,
        *,
        scores: Weights | None = None,
        gone: Weights | None = None,
    ) -> Weights:
        """The masks that are asked of weights with these values; ones where there is none."""
        with self.holding(values):
            masks = (
                self.elements(settings, scores=scores, gone=gone)
                if self.criterion is None
                else self.channels(settings, scores=scores, gone=gone)[0]
            )
        aliases: Mapping[str, str] = {} if self._known is None else self._known.analysis.aliases
        found = dict(flat_masks(masks))
        return {name: found.get(aliases.get(name, name), torch.ones_like(one)) for name, one in values.items()}

    @contextmanager
    def holding(self, values: Weights) -> Iterator[None]:
        """Puts values into parameters while the context is open."""
        named = dict(self._model.named_parameters(remove_duplicate=False))
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


def _refuse_if_nothing_can_go(settings: Mapping[str, Setting], selection: Selection) -> None:
    """Asks that of the layers that are selected at least one is of a group of which something may go."""
    if not any(one.entry.share for one in settings.values()):
        return
    if all(choice.note is not None and choice.asked == choice.group.units for choice in selection.choices):
        selected = {layer for layer, one in settings.items() if not one.entry.exclude}
        meant = [c for c in selection.choices if any(m.module in selected and m.role == "out" for m in c.group.members)]
        why = f" {meant[0].group.name}: {meant[0].note}." if meant else ""
        raise ConfigError(f"config_list: selects only channels that have to stay.{why} Select other layers.")

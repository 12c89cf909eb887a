"""Masks made elsewhere -> a shrunk model: what a user of NNI's speedup expects."""

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor, nn

from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.errors import PlanError
from speedup.inputs import ExampleInputs
from speedup.labels import Index, Mask, support
from speedup.planning import make_plan
from speedup.proof import Proof, prove
from speedup.shrink import shrink


class ModelSpeedup:
    """Shrinks a model by masks, and proves that the result equals the masked original.

    A channel goes when every weight that produces it has it masked out whole. The masks of coupled weights are
    reconciled: what any of them keeps is kept, and so is what keeps a block rectangular.

    Attributes:
        reconciled: For each masked tensor by name how many channels it masks out that are kept all the same.
        proof: The proof, once :meth:`speedup_model` has run.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        masks: Mapping[str, Tensor | Mapping[str, Tensor]],
    ) -> None:
        """Analyses the model.

        Args:
            model: Any module that ``torch.export`` can capture; it is left as it was.
            example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
            masks: By qualified name of a parameter a tensor of its shape, zero where it is masked out; or by name of
                a module a mapping of such tensors by the name of its parameter, as pruners of NNI return them.

        Raises:
            PlanError: A mask names no parameter of the model, or has another shape.
            CaptureError: ``torch.export`` cannot capture the model.
        """
        self._analysis = analyse(capture(model, example_inputs))
        self._masks = {name: self._checked(name, mask) for name, mask in _flat_masks(masks)}
        self._live = _rectangular(self._analysis, _produced(self._analysis, self._masks))
        self.reconciled = self._count_reconciled()
        self.proof: Proof | None = None

    def speedup_model(self) -> nn.Module:
        """Returns the shrunk model: the class of the original where its code still fits, else the rewritten graph.

        Raises:
            ProofError: The shrunk model is not equal to the masked original.
        """
        plan = make_plan(self._analysis, self._live)
        shrunk = shrink(self._analysis.captured, plan)
        self.proof = prove(self._analysis, self._live, plan, shrunk.graph)
        return shrunk.model

    def _checked(self, name: str, mask: Tensor) -> Mask:
        canonical = self._analysis.aliases.get(name)
        if canonical is None or canonical not in self._analysis.parameters:
            raise PlanError(f"{name}: is masked, but the model uses no parameter of that name. Name one that it uses.")
        shape = self._analysis.parameters[canonical].shape
        if tuple(mask.shape) != shape:
            raise PlanError(
                f"{name}: the mask has shape {tuple(mask.shape)}, the parameter {shape}. Give masks of its shape."
            )
        alive: Mask = (mask != 0).cpu().numpy()
        return alive

    def _count_reconciled(self) -> dict[str, int]:
        found = {}
        for name, mask in self._masks.items():
            for dim, classes in _produced_axes(self._analysis, name):
                gone = ~mask.any(axis=tuple(d for d in range(mask.ndim) if d != dim))
                found[name] = int(self._live[classes[gone]].sum())
        return found


def _flat_masks(masks: Mapping[str, Tensor | Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, mask in masks.items():
        if isinstance(mask, Mapping):
            yield from ((f"{name}.{inner}", value) for inner, value in mask.items() if isinstance(value, Tensor))
        else:
            yield name, mask


def _produced_axes(analysis: Analysis, name: str) -> list[tuple[int, Index]]:
    """The dimensions of a parameter whose channels its operator produces, with their classes."""
    canonical = analysis.aliases.get(name, name)
    planes = [plane for plane in analysis.parameters[canonical].planes if len(support(plane)) == 1]
    found = ((support(plane)[0], analysis.classes.plane(plane)) for plane in planes)
    return [(dim, classes) for dim, classes in found if analysis.produces(canonical, classes)]


def _produced(analysis: Analysis, masks: Mapping[str, Mask]) -> Mask:
    """Which classes live, shape (classes,), when a channel goes that all weights which produce it mask out."""
    kept = np.zeros(analysis.classes.count, dtype=np.bool_)
    dropped = np.zeros(analysis.classes.count, dtype=np.bool_)
    canonical = {analysis.aliases[name]: mask for name, mask in masks.items()}
    for name, labels in analysis.parameters.items():
        for dim, classes in _produced_axes(analysis, name) if len(labels.shape) > 1 or name in canonical else ():
            mask = canonical.get(name)
            others = tuple(d for d in range(len(labels.shape)) if d != dim)
            alive = np.ones(len(classes), dtype=np.bool_) if mask is None else mask.any(axis=others)
            if len(labels.shape) > 1:
                kept[classes[alive]] = True
            dropped[classes[~alive]] = True
    return kept | ~dropped | (analysis.classes.pin_of >= 0)


def _rectangular(analysis: Analysis, live: Mask) -> Mask:
    """Returns ``live`` with as many channels back as make every block a rectangle; rows that are gone stay gone."""
    blocks = [block for block in analysis.classes.blocks if len(block.members) > 1]
    while True:
        before = live.copy()
        for block in blocks:
            counts = live[block.members].sum(axis=1)
            for row, count in zip(block.members, counts, strict=True):
                if 0 < count < counts.max():
                    live[row[~live[row]][: counts.max() - count]] = True
        if (live == before).all():
            return analysis.classes.with_slabs(live)

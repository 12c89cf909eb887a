"""Masks made elsewhere -> a shrunk model: what a user of NNI's speedup expects."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from speedup.analysis import Analysis, analyse, tensor_names
from speedup.capture import Captured, attribute, capture
from speedup.cut import shrink_graph
from speedup.errors import PlanError
from speedup.folding import find_leftovers
from speedup.inputs import ExampleInputs
from speedup.labels import Index, Mask, support
from speedup.masking import attached_masks, flat_masks, without_masks
from speedup.numeric import relative_difference
from speedup.plan import ShrinkPlan
from speedup.planning import make_plan
from speedup.program import evaluating
from speedup.proof import Proof, prove
from speedup.reconciling import reconcile
from speedup.shrink import shrink
from speedup.silenced import Silenced


class ModelSpeedup:
    """Shrinks a model by masks, and proves that the result equals the original without the removed channels.

    A channel goes when every weight that produces it has it masked out whole, or is read by nothing but norms, such as
    batch norms, that have its scale and shift masked out. The masks of coupled weights are reconciled: what any of them
    keeps is kept, and so is what keeps a block rectangular. What is kept is multiplied by its masks, so that single
    masked elements and masked inputs are zero.

    A mask on a weight alone may leave a constant of a channel behind, such as the shift of a batch norm after it. Where
    that is certain whatever the inputs are, and adds the same at every place, of any batch and of an image of any size,
    it goes into the next bias, or out of the mean that a batch norm has stored: in evaluation that is exact up to
    rounding. Where it is not, it goes with the channel: at borders that are padded with zeros, in a norm or a mean over
    channels, before a layer without a bias, after an operator of which it is not known what it does with constants.
    That is told, and makes the :attr:`difference`.

    Attributes:
        reconciled: For each masked tensor by name how many channels it masks out that are kept all the same.
        plan: What is kept of each tensor, by its canonical name.
        model: The shrunk model, once :meth:`speedup_model` has run.
        proof: The proof, once :meth:`speedup_model` has run; it compares what is kept, before anything is folded.
        folded: For each bias or stored mean by name the most that was added to an element of it for what is left of
            removed channels, once :meth:`speedup_model` has run.
        left_behind: By name of the weight, or node of the graph, that takes what is left of removed channels and is not
            folded: why, in one line. Without any, the shrunk model is the masked original up to rounding.
        difference: Largest difference between the outputs of the shrunk model and of the original with its weights
            multiplied by their masks, relative to the largest output, once :meth:`speedup_model` has run.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        masks: Mapping[str, Tensor | Mapping[str, Tensor]],
    ) -> None:
        """Analyses the model.

        Args:
            model: Any module that ``torch.export`` can capture; it is left as it was. With masks attached it may be,
                and counts as multiplied by them.
            example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
            masks: By qualified name of a parameter a tensor of its shape, zero where it is masked out; or by name of
                a module a mapping of such tensors by the name of its parameter, as pruners of NNI return them.

        Raises:
            PlanError: A mask names no parameter of the model, or has another shape.
            CaptureError: ``torch.export`` cannot capture the model.
        """
        self._analysis = analyse(capture(without_masks(model), example_inputs))
        self._values = self._one_of_each(masks)
        self._check()
        self._masks = {name: mask for name, mask in self._values.items() if self._is_used(name)}
        attached = attached_masks(model)
        for name, mask in self._values.items():
            if name in attached and torch.equal(attached[name], mask.to(attached[name])):
                self._values[name] = torch.ones_like(mask)  # the model is multiplied by it
        self._live = reconcile(self._analysis, produced_channels(self._analysis, self._masks))
        self.reconciled = self._count_reconciled()
        self.plan = make_plan(self._analysis, self._live)
        self.model: nn.Module | None = None
        self.proof: Proof | None = None
        self.difference: float | None = None
        self.folded: dict[str, float] = {}
        self.left_behind: dict[str, str] = {}

    def speedup_model(self) -> nn.Module:
        """Returns the shrunk model: the class of the original where its code still fits, else the rewritten graph.

        Raises:
            ProofError: The shrunk model is not equal to the original without the removed channels.
        """
        plan = self.plan
        captured = self._analysis.captured
        shrunk = shrink(captured, plan)
        self.proof = prove(self._analysis, self._live, plan, shrunk.graph)
        dense = shrink_graph(captured, ShrinkPlan())
        with torch.no_grad():
            read = set(tensor_names(captured.graph_module).values())
            own = dict(shrunk.model.named_parameters(remove_duplicate=False))
            for name, mask in self._values.items():
                canonical = self._analysis.aliases.get(name, name)
                kept = plan.cut(canonical, mask)
                if canonical in read:
                    for graph, factor in ((dense, mask), (shrunk.graph, kept)):
                        tensor = attribute(graph, canonical)
                        tensor.mul_(factor.to(tensor))
                elif name in own:  # of what only training uses, or nothing
                    own[name].mul_(kept.to(own[name]))
            leftovers = find_leftovers(self._analysis, self._live, partial(attribute, dense))
            for name, amount in leftovers.folds.items():
                tensor, added = attribute(shrunk.graph, name), plan.cut(name, amount)
                tensor.copy_(tensor.double() + added.to(tensor.device))
        self.folded = {name: float(amount.abs().max()) for name, amount in leftovers.folds.items()}
        self.left_behind = dict(leftovers.left)
        self.difference = _output_difference(dense, shrunk.model, captured)
        self.model = shrunk.model
        return shrunk.model

    def cut(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what is left of tensors of the original, by their names in its state dict: averages, first values."""
        aliases = self._analysis.aliases
        return {name: self.plan.cut(aliases.get(name, name), tensor) for name, tensor in state.items()}

    def _one_of_each(self, masks: Mapping[str, Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The mask of each parameter under the first name that it comes with."""
        own = self._analysis.captured.model.named_parameters(remove_duplicate=False)
        which: dict[str, str | int] = {**{name: id(held) for name, held in own}, **self._analysis.aliases}
        first: dict[str | int, str] = {}
        found: dict[str, Tensor] = {}
        for name, mask in flat_masks(masks):
            known = first.setdefault(which.get(name, name), name)
            if found.setdefault(known, mask) is not mask and not torch.equal(found[known], mask.to(found[known])):
                raise PlanError(f"{name}: is the same parameter as {known}, and their masks differ. Give one mask.")
        return found

    def _check(self) -> None:
        """Refuses masks that are none of the model's parameters."""
        own = dict(self._analysis.captured.model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        aliases, read = self._analysis.aliases, self._analysis.parameters
        shapes |= {name: read[canonical].shape for name, canonical in aliases.items() if canonical in read}
        for name, mask in self._values.items():
            if name not in shapes:
                raise PlanError(
                    f"{name}: is masked, but the model has no parameter of that name. Name one that it has."
                )
            shape = shapes[name]
            if tuple(mask.shape) != shape:
                raise PlanError(
                    f"{name}: the mask has shape {tuple(mask.shape)}, the parameter {shape}. Give masks of its shape."
                )
            if bool(mask.isnan().any()):
                raise PlanError(f"{name}: the mask holds nan. Give zeros where it is masked out, and ones elsewhere.")

    def _is_used(self, name: str) -> bool:
        """Whether the model computes with a parameter, be it in training alone."""
        return self._analysis.aliases.get(name) in self._analysis.parameters

    def _count_reconciled(self) -> dict[str, int]:
        found = {}
        for name, mask in self._masks.items():
            for dims, classes in _produced_axes(self._analysis, name):
                gone = ~_along(_alive(mask), dims)
                if len(dims) > 1:
                    kept = self._live & _all_of(classes.reshape(-1), gone.reshape(-1), len(self._live))
                    found[name] = int(kept.sum())
                else:
                    found[name] = int(self._live[classes[gone]].sum())
        return found


def _output_difference(dense: nn.Module, small: nn.Module, captured: Captured) -> float:
    """How far the outputs of a graph and of a model, or of its parts, are apart on the example inputs."""
    with evaluating(dense, small), torch.no_grad():
        outputs = [
            pytree.tree_leaves(model(*copy.deepcopy(captured.args), **copy.deepcopy(captured.kwargs)))
            for model in (dense, captured.entry(small))
        ]
    pairs = [(one, other) for one, other in zip(*outputs, strict=True) if isinstance(one, Tensor)]
    return max((relative_difference(one.double(), other.double()) for one, other in pairs), default=0.0)


def _produced_axes(analysis: Analysis, name: str) -> list[tuple[tuple[int, ...], Index]]:
    """The dimensions of a parameter whose channels its operator produces, with their classes in that shape.

    They are two for a grouped transposed convolution: its inputs say to which group an output belongs.
    """
    canonical = analysis.aliases.get(name, name)
    planes = [plane for plane in analysis.parameters[canonical].planes if support(plane)]
    found = ((support(plane), analysis.classes.plane(plane)) for plane in planes)
    return [(dims, classes) for dims, classes in found if analysis.produces(canonical, classes)]


def _alive(mask: Tensor) -> Mask:
    alive: Mask = (mask != 0).cpu().numpy()
    return alive


def _along(mask: Mask, dims: Sequence[int]) -> Mask:
    """Which indices of some dimensions a mask leaves something of."""
    alive: Mask = np.asarray(mask.any(axis=tuple(d for d in range(mask.ndim) if d not in dims)))
    return alive


def produced_channels(analysis: Analysis, masks: Mapping[str, Tensor]) -> Mask:
    """Returns which classes live, shape (classes,), when a channel goes that all weights which produce it mask out.

    A weight counts as masked out where all that reads its output is a norm of which scale and shift are.

    Args:
        analysis: The model.
        masks: By names of its parameters, of those that it uses.
    """
    kept = np.zeros(analysis.classes.count, dtype=np.bool_)
    dropped = np.zeros(analysis.classes.count, dtype=np.bool_)
    known = {name: mask for name, mask in masks.items() if name in analysis.aliases}
    canonical = {analysis.aliases[name]: _alive(mask) for name, mask in known.items()}
    silenced = Silenced(analysis, canonical)
    for name, labels in analysis.parameters.items():
        carried, masked = np.zeros_like(kept), np.zeros_like(kept)  # of what feeds back a weight has both ends
        for dims, classes in _produced_axes(analysis, name) if len(labels.shape) > 1 or name in canonical else ():
            mask = canonical.get(name)
            alive: Mask = np.ones(classes.shape, dtype=np.bool_) if mask is None else _along(mask, dims)
            gone = ~alive | silenced.of(name, classes)
            carried[classes] = True
            masked |= _all_of(classes.reshape(-1), gone.reshape(-1), len(masked))
        if len(labels.shape) > 1:
            kept |= carried & ~masked
        dropped |= masked
    return kept | ~dropped | (analysis.classes.pin_of >= 0)


def _all_of(classes: Index, gone: Mask, count: int) -> Mask:
    """The classes of which every index is gone, shape (count,): a unit of a recurrent layer has one in each gate."""
    found = np.bincount(classes, minlength=count)
    every: Mask = (found > 0) & (np.bincount(classes, weights=gone, minlength=count) == found)
    return every

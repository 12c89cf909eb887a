"""Masks that act inside a model while it trains; no module is wrapped or replaced, and no parameter renamed.

A module whose parameters are masked gets a class of its own, derived from the one it had and called like it, in which
the attribute of a masked parameter is ``parameter * mask``. The parameter stays in its place in the module under its
name, so optimizers, ``named_parameters()`` and the keys of ``state_dict()`` know nothing of masks; the mask is a buffer
beside it.
"""

import copy
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from speedup.errors import PlanError
from speedup.masked_class import PREFIX, Masked, install, is_covered, masked_names, masks_in, unmask

Masks = Mapping[str, Tensor | Mapping[str, Tensor]]
"""Tensors by qualified names of parameters, or mappings of them by names of modules."""


def attach_masks(model: nn.Module, masks: Masks) -> None:
    """Makes ``model`` compute with ``parameter * mask``, until :func:`detach_masks`.

    Gradients of a parameter are multiplied by its mask too: zero where it is masked out. The :class:`nn.Parameter`
    objects stay, so an optimizer may be built before or after. What it does to masked elements out of momentum or
    weight decay changes their hidden values, and nothing that the model computes; it shows when a later mask lets them
    back.

    Called again, it replaces the masks of the parameters that it names and leaves the others; the values are copied
    into what is there, so that a compiled model stays as it is and it may be done in every step, between a backward
    and the next forward.

    ``module.weight`` of a masked module is the product, a new tensor at each access: what is written into it is lost,
    and it has no ``grad``. The parameter itself is what ``named_parameters()`` gives; ``get_parameter()`` refuses the
    product. An average of weights, or what else goes through buffers by their order, is to be made afterwards. Where
    code of the model reads ``parameters()`` while it runs, it reads them without masks. ``type(module)`` is a class
    derived from the module's own; ``isinstance`` and its name tell no difference. Weight normalisation divides by the
    norm of a channel's slice of ``original1``: of a channel that goes whole, mask ``original0``.

    ``state_dict()`` holds every parameter under its name, as the optimizer knows it, and each mask beside it, as
    ``mask_of_weight`` beside ``weight``. Loaded into a model with masks on the same parameters, it brings the masks; a
    state without masks can be loaded too, and leaves them as they are. A plain model refuses the state of a masked one
    for the masks in it: give it :func:`plain_state` of that.

    Args:
        model: Any module; it is changed in place.
        masks: By qualified name of a parameter, any of its names, a tensor of its shape, zero where it is masked out;
            or by name of a module a mapping of such tensors by the name of its parameter. Values other than 0 and 1
            are multiplied as they are. They are copied, to the type and device of the parameter.

    Raises:
        PlanError: A mask names no parameter of the model, has another shape or holds nan or inf; two masks of one
            parameter differ; or a mask would not reach everything that uses the parameter. Nothing is attached then.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    given: dict[int, tuple[str, Tensor]] = {}
    for name, mask in flat_masks(masks):
        parameter = _maskable(model, named, name)
        fitting = _fitting(name, parameter, mask)
        first, known = given.setdefault(id(parameter), (name, fitting))
        if known is not fitting and not torch.equal(known, fitting):
            raise PlanError(f"{name}: is the same parameter as {first}, and their masks differ. Give one mask.")
    places = [
        (module, {name: id(held) for name, held in module._parameters.items() if id(held) in given})
        for module in model.modules()
    ]
    fresh = {key for module, own in places for name, key in own.items() if name not in masked_names(module)}
    if fresh:
        _check_reach(model, {key: given[key][0] for key in fresh})
    for module, own in places:
        install(module, {name: given[key][1] for name, key in own.items()})


def attached_masks(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of each mask in ``model``, by each qualified name of its parameter; empty if there are none."""
    return {
        f"{path}.{name}".lstrip("."): mask.detach().clone()
        for path, module in model.named_modules(remove_duplicate=False)
        for name, mask in masks_in(module)
    }


def detach_masks(model: nn.Module, *, multiply: bool = True) -> None:
    """Takes all masks out of ``model``, which is then as it was: classes, parameter objects, names and their order.

    Args:
        model: Any module; it is changed in place.
        multiply: Whether parameters are multiplied by their masks, so that the model computes what it did with them.
            Otherwise masked elements have the values that were hidden.

    Raises:
        PlanError: A module has got another class since its masks were attached. Nothing is detached then.
    """
    masked = [module for module in model.modules() if isinstance(module, Masked)]
    for module in masked:
        if is_covered(module):
            raise PlanError(
                f"{type(module).__name__}: got this class after its masks were attached. Undo first what made it."
            )
    if multiply:
        multiply_masks(model)
    for module in masked:
        unmask(module)


def multiply_masks(model: nn.Module) -> None:
    """Multiplies each masked parameter by its mask, which stays: what is masked out is zero in the parameter as well.

    Only for masks of zeros and ones it may be done more than once.

    Args:
        model: Any module; the values of its parameters are changed in place.
    """
    multiplied: set[int] = set()
    for module in model.modules():
        for name, mask in masks_in(module):
            parameter = module._parameters.get(name)
            if parameter is not None and id(parameter) not in multiplied:
                multiplied.add(id(parameter))
                with torch.no_grad():
                    parameter.mul_(mask)


def without_masks(model: nn.Module) -> nn.Module:
    """Returns ``model`` if it has no masks, else a copy with its parameters multiplied by them, and no masks."""
    if not any(isinstance(module, Masked) for module in model.modules()):
        return model
    plain = copy.deepcopy(model)
    detach_masks(plain)
    return plain


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of a masked model as one that a plain model can load: parameters multiplied, no masks.

    Args:
        state: What ``state_dict()`` of a masked model, or of one that contains it, gave.
    """
    with torch.no_grad():
        return {
            key: value * state[_beside(key)].to(value) if _beside(key) in state else value
            for key, value in beneath_masks(state).items()
        }


def beneath_masks(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of a masked model without the masks: its parameters are as they are, those masked out too."""
    masks = {_beside(key) for key in state}
    return {key: value for key, value in state.items() if key not in masks}


def flat_masks(masks: Masks) -> Iterator[tuple[str, Tensor]]:
    """Yields the name of each masked parameter with its mask, of masks in either form; None stands for no mask.

    Raises:
        PlanError: They are no mapping, or one of them is no tensor.
    """
    if not isinstance(masks, Mapping):
        raise PlanError(f"masks: are of type {type(masks).__name__}. Give tensors by the names of parameters.")
    for name, mask in masks.items():
        inside = mask.items() if isinstance(mask, Mapping) else [("", mask)]
        for inner, value in inside:
            full = f"{name}.{inner}".strip(".")
            if value is not None and not isinstance(value, Tensor):
                raise PlanError(f"{full}: the mask is of type {type(value).__name__}. Give a tensor of zeros and ones.")
            if value is not None:
                yield full, value


def _beside(name: str) -> str:
    """The qualified name of the mask of a parameter."""
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{PREFIX}{last}"


def _maskable(model: nn.Module, named: Mapping[str, nn.Parameter], name: str) -> nn.Parameter:
    """The parameter of that name, if a mask can act on it."""
    parameter = named.get(name)
    if parameter is None:
        path, _, last = name.rpartition(".")
        inner = f"{path}.parametrizations.{last}.".lstrip(".")
        sources = [other for other in named if other.startswith(inner)]
        if sources:
            raise PlanError(f"{name}: is computed from parameters. Mask one of them: {', '.join(sources)}.")
        raise PlanError(f"{name}: is masked, but the model has no parameter of that name. Name one that it has.")
    if is_lazy(parameter):
        raise PlanError(f"{name}: has no shape yet. Call the model once on an example.")
    return parameter


def _fitting(name: str, parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """The mask in the type of its parameter and where that is."""
    if mask.shape != parameter.shape:
        shapes = f"has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}"
        raise PlanError(f"{name}: the mask {shapes}. Give masks of its shape.")
    fitting = mask.detach().to(parameter)
    if not bool(fitting.isfinite().all()):
        what = "nan" if bool(fitting.isnan().any()) else "inf"
        raise PlanError(f"{name}: the mask holds {what}. Give zeros where it is masked out, and ones elsewhere.")
    return fitting


def _check_reach(model: nn.Module, masked: Mapping[int, str]) -> None:
    """Asks that masks of parameters, given by identity, act on everything that uses these.

    Raises:
        PlanError: One is used by compiled code, written to by its module, or held in an attribute that is none of the
            module's parameters; or the name of its mask is taken.
    """
    reached = set(model.modules())
    for path, module in model.named_modules():
        owner = path or type(module).__name__
        for attribute, parameter in module._parameters.items():
            if id(parameter) in masked and (reason := _refusal(module, attribute)):
                raise PlanError(f"{masked[id(parameter)]}: cannot be masked, {owner} {reason}")
        if type(module).__module__.startswith("torch."):
            continue  # but for recurrent layers they compute with nothing that is no attribute
        for attribute, value in vars(module).items():
            if attribute == "_parameters" or (isinstance(module, nn.RNNBase) and attribute == "_flat_weights"):
                continue
            name = next((masked[id(held)] for held in _held(value, reached, set()) if id(held) in masked), None)
            if name is not None:
                raise PlanError(
                    f"{name}: is held in attribute {attribute} of {owner} as well, where no mask acts on it. "
                    "Read it from the module that it is a parameter of."
                )


def _held(value: Any, reached: Set[nn.Module], seen: set[int]) -> Iterator[Any]:
    """What an attribute holds, also in containers, views, what functions know, and modules that no mask reaches."""
    for leaf in pytree.tree_leaves(value):
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        yield leaf
        if isinstance(leaf, Tensor) and leaf._base is not None:
            yield leaf._base
        elif isinstance(leaf, nn.Module) and leaf not in reached:
            for module in set(leaf.modules()) - reached:
                yield from module._parameters.values()
        elif isinstance(leaf, partial):
            yield from _held((leaf.func, leaf.args, leaf.keywords), reached, seen)
        elif isinstance(leaf, MethodType):
            yield from _held((leaf.__self__, leaf.__func__), reached, seen)
        elif isinstance(leaf, FunctionType):
            yield from _held((leaf.__defaults__, leaf.__kwdefaults__, list(closed_over(leaf))), reached, seen)
        elif callable(leaf) and hasattr(leaf, "__wrapped__"):  # functools.cache, for one
            yield from _held(leaf.__wrapped__, reached, seen)


def closed_over(function: FunctionType) -> Iterator[Any]:
    """What a function knows of the functions around it; a name that has no value yet is left out."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents


def _refusal(module: nn.Module, name: str) -> str | None:
    """Why a parameter cannot be masked in one of the modules that hold it; None if it can be."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule. Mask the model that it was made of."
    if is_covered(module):
        return f"got its class {type(module).__name__} after other masks. Undo first what made it."
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "writes to it when it runs (max_norm). Make it without."
    if name not in masked_names(module) and hasattr(module, PREFIX + name):
        return f"has an attribute {PREFIX}{name} of its own. Give that another name."
    return None

"""From scores to masks: single elements, channels of one layer, or channels with everything that is coupled to them."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from graphprune.config_list import Entry, Setting, target_of
from graphprune.criteria import CRITERIA, SLICES, Scores
from graphprune.dependency import DependencyGraph
from graphprune.errors import ConfigError
from graphprune.select import Selection, select
from graphprune.targets import lowest_together, removed
from speedup.labels import Mask, support
from speedup.masking import flat_masks

Masks = dict[str, dict[str, Tensor]]
"""By layer and by parameter of it a tensor of the parameter's shape: 1 where it stays, 0 where it is masked out."""

_OUTPUTS_LAST: tuple[type[nn.Module], ...] = (
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
"""Layers whose second dimension has the channels that they produce."""


def element_masks(
    model: nn.Module,
    settings: Mapping[str, Setting],
    *,
    block: Sequence[int] = (),
    scores: Mapping[str, Tensor] | None = None,
    gone: Mapping[str, Tensor] | None = None,
    together: bool = False,
) -> Masks:
    """Returns masks for single elements of the selected layers' weights: the smallest go (Han et al., 2015).

    Args:
        model: The model.
        settings: What is asked of each layer.
        block: Sizes of the blocks that go whole, by their mean, aligned to the last dimensions of a weight; single
            elements if empty.
        scores: By qualified name of a weight a tensor of its shape, instead of its absolute values.
        gone: By qualified name of a weight a mask that it has already: what is masked out counts as zero, and goes
            first, of blocks those that are masked out whole.
        together: Whether a share is one of all layers of an entry, even where that does not say so.

    Raises:
        ConfigError: A weight cannot be divided into such blocks.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    least = _least(model, settings)
    masks: dict[str, Tensor] = {}
    for entry, layers in _by_entry(settings):
        weights = {
            name: parameters[name]
            for layer in layers
            for name in weight_names(model, layer)
            if least[id(parameters[name])].asks_like(settings[layer])
        }
        masks |= tensor_masks(weights, entry, block=block, scores=scores, gone=gone, together=together)
    return by_layer(masks)


def tensor_masks(
    weights: Mapping[str, Tensor],
    entry: Entry,
    *,
    block: Sequence[int] = (),
    scores: Mapping[str, Tensor] | None = None,
    gone: Mapping[str, Tensor] | None = None,
    together: bool = False,
) -> dict[str, Tensor]:
    """Returns masks for single elements of tensors, by the names that these have: see :func:`element_masks`.

    Args:
        weights: The tensors; of one under several names the last is taken.
        entry: How much is asked of them.
        block: Sizes of the blocks that go whole.
        scores: Instead of absolute values.
        gone: Masks that tensors have already.
        together: Whether the share is one of all of them together.
    """
    values: dict[str, Tensor] = {}
    for name in {id(weight): name for name, weight in weights.items()}.values():
        value = (weights[name].detach().abs() if scores is None else scores[name]).double()
        if gone is None or name not in gone:
            values[name] = _blocked(name, value, block)
        else:
            stays = (gone[name] != 0).to(value)
            found = _blocked(name, value * stays, block)
            values[name] = found.masked_fill(_blocked(name, stays, block) == 0, -math.inf)
    counts = _counts(values, dict.fromkeys(values, 1.0), entry, together=together)
    return {name: _stretched(_without_lowest(values[name], count), weights[name]) for name, count in counts.items()}


def channel_masks(
    dependencies: DependencyGraph,
    scores: Scores,
    settings: Mapping[str, Setting],
    *,
    together: bool = False,
    relative: bool = True,
) -> tuple[Masks, Selection]:
    """Returns masks for channels, the same for everything that produces them, and what was chosen of each group.

    Channels that are coupled go together: their scores are summed, of layers with different sparsities the smallest is
    taken, and a grouped convolution loses as many of each group (the manuals' dependency-aware mode).

    Args:
        dependencies: The channel groups.
        scores: A score for each class, shape (classes,).
        settings: What is asked of each layer.
        together: Whether a share is one of all selected layers together.
        relative: Whether a ranking of several groups compares scores divided by their mean in the group.
    """
    target = target_of(dependencies.analysis, settings, together=together, relative=relative)
    selection = select(dependencies, scores, target)
    return masks_of(dependencies, selection), selection


def masks_of(dependencies: DependencyGraph, selection: Selection) -> Masks:
    """Returns masks for what a selection leaves, of all parameters whose operators produce channels that go."""
    analysis = dependencies.analysis
    asked = {choice.group.index for choice in selection.choices if choice.kept < choice.group.units}
    masks: dict[str, Tensor] = {}
    learned = {name for name, _ in analysis.captured.model.named_parameters(remove_duplicate=False)}
    for group in dependencies.groups:
        for name in {member.tensor for member in group.members if member.role == "out"}:
            if group.index not in asked or name not in learned:
                continue
            mask = torch.ones(analysis.parameters[name].shape)
            for plane in analysis.parameters[name].planes:
                classes = analysis.classes.plane(plane)
                if analysis.produces(name, classes):
                    where = [size if dim in support(plane) else 1 for dim, size in enumerate(mask.shape)]
                    mask *= torch.from_numpy(selection.live[classes]).reshape(where)
            masks[name] = mask
    return by_layer(masks)


def layer_masks(
    model: nn.Module,
    settings: Mapping[str, Setting],
    criterion: str,
    *,
    gone: Mapping[str, Tensor] | None = None,
    together: bool = False,
) -> Masks:
    """Returns masks for output channels, each layer by itself: for models of which no example inputs are known.

    Layers that are coupled may lose different channels; :class:`speedup.ModelSpeedup` keeps what any of them keeps. A
    weight that several layers share has one mask, of what the first of them produces of which the least is asked.

    Args:
        model: The model.
        settings: What is asked of each layer.
        criterion: A name in :data:`~graphprune.criteria.SLICES`, or ``bn_scale``, for which layers are norms.
        gone: By qualified name of a weight a mask that it has already: channels that are masked out whole go first.
        together: Whether a share is one of all layers of an entry, even where that does not say so.

    Raises:
        ConfigError: A layer has no weights that the criterion can look at.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = {layer: model.get_submodule(layer) for layer in settings}
    least = _least(model, settings)
    chosen: dict[int, tuple[str, Tensor]] = {}  # by weight, of which layer which channels stay
    masks: Masks = {}
    for entry, layers in _by_entry(settings):
        scores = {layer: _channel_scores(layer, modules[layer], criterion) for layer in layers}
        for layer, mask in ((layer, (gone or {}).get(f"{layer}.weight")) for layer in layers):
            if mask is not None:
                stays = _outputs_first(modules[layer], mask).flatten(1).any(1) if mask.dim() > 1 else mask != 0
                scores[layer] = torch.from_numpy(first_to_go(scores[layer].cpu().numpy(), ~stays.cpu().numpy()))
        shared = {layer: parameters[f"{layer}.weight"] for layer in layers}
        asked = [layer for layer in layers if least[id(shared[layer])].asks_like(settings[layer])]
        first = {id(shared[layer]): layer for layer in reversed(asked) if id(shared[layer]) not in chosen}
        values = {layer: scores[layer] for layer in asked if layer in first.values()}
        weights = {layer: shared[layer].numel() / value.numel() for layer, value in values.items()}
        relative = not CRITERIA[criterion].absolute
        for layer, count in _counts(values, weights, entry, together=together, relative=relative).items():
            channels = _without_lowest(values[layer], count, _parts(modules[layer], values[layer].numel()))
            chosen[id(shared[layer])] = layer, channels
        for layer in asked:
            source, channels = chosen[id(shared[layer])]
            if outputs_along(modules[layer]) == outputs_along(modules[source]):
                masks[layer] = {
                    name: _spread(channels, modules[layer], parameter)
                    for name, parameter in modules[layer].named_parameters(recurse=False)
                    if _has_channels(modules[layer], parameter, len(channels))
                }
    return masks


def outputs_along(layer: nn.Module) -> int:
    """Returns the dimension of a layer's weight that has the channels which it produces."""
    return int(isinstance(layer, _OUTPUTS_LAST))


def first_to_go(scores: Scores, gone: Mask) -> Scores:
    """Returns scores in which what is ``gone`` has one below all others, in any ranking with the scores of others."""
    low, high = (float(of(scores, initial=0.0)) for of in (np.nanmin, np.nanmax))
    return np.where(gone, low - 1e-9 * ((high - low) or 1.0), scores)


def within(masks: Masks, before: Mapping[str, Tensor]) -> Masks:
    """Returns masks times those, by qualified name, that were there before."""
    return by_layer(
        {name: mask * before[name].to(mask) if name in before else mask for name, mask in flat_masks(masks)}
    )


def by_layer(masks: Mapping[str, Tensor]) -> Masks:
    """Returns masks by qualified name as masks by layer and parameter."""
    found: Masks = {}
    for name, mask in masks.items():
        layer, _, parameter = name.rpartition(".")
        found.setdefault(layer, {})[parameter] = mask
    return found


def _by_entry(settings: Mapping[str, Setting]) -> Iterator[tuple[Entry, list[str]]]:
    """The layers of which the same is asked together; those that are excluded are none of them."""
    chosen: dict[tuple[int, float | None], list[str]] = {}
    for layer, setting in settings.items():
        if not setting.entry.exclude:
            chosen.setdefault((setting.position, setting.entry.share), []).append(layer)
    for layers in chosen.values():
        yield settings[layers[0]].entry, layers


def _least(model: nn.Module, settings: Mapping[str, Setting]) -> dict[int, Setting]:
    """What is asked of each weight, by its identity: the least that any layer which has it is asked for."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    asked: dict[int, list[Setting]] = {}
    for layer, setting in settings.items():
        own = [f"{layer}.{name}" for name, _ in model.get_submodule(layer).named_parameters(recurse=False)]
        for name in own if setting.entry.exclude else weight_names(model, layer):
            asked.setdefault(id(parameters[name]), []).append(setting)
    return {
        weight: min(holders, key=lambda one: 0.0 if one.entry.exclude else one.entry.share or 0.0)
        for weight, holders in asked.items()
    }


def _counts(
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    entry: Entry,
    *,
    together: bool,
    relative: bool = False,
) -> dict[str, int]:
    """How many of the values go of each layer: its share of them, or by one ranking of all; but never all."""
    share = entry.share or 0.0
    if not values or (entry.total_sparsity is None and not together):
        return {name: removed(value.numel(), share) for name, value in values.items()}
    most = [min(int(entry.max_sparsity_per_layer * v.numel() + 1e-9), v.numel() - 1) for v in values.values()]
    scores = [value.reshape(-1).cpu().numpy() for value in values.values()]
    counts = lowest_together(scores, [weights[name] for name in values], share, most, relative=relative)
    return dict(zip(values, counts, strict=True))


def _without_lowest(values: Tensor, count: int, parts: int = 1) -> Tensor:
    """A mask in the shape of ``values`` without the ``count`` lowest, or so many nearby that equal parts lose alike."""
    rows = values.reshape(parts, -1)
    order = rows.argsort(dim=1, stable=True)[:, : min((2 * count + parts) // (2 * parts), rows.shape[1] - 1)]
    return torch.ones_like(rows).scatter_(1, order, 0.0).reshape(values.shape)


def weight_names(model: nn.Module, layer: str) -> list[str]:
    """Returns the names of a layer's weights: what has two dimensions or more, or else the scale of a norm.

    Of a weight that is normalised by a hook that is its direction, and not its length.
    """
    module = model.get_submodule(layer)
    own = dict(module.named_parameters(recurse=False))
    lengths = {f"{hook.name}_g" for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)}
    found = [name for name, parameter in own.items() if parameter.dim() > 1 and name not in lengths] or [
        name for name in own if name == "weight"
    ]
    if not found:
        raise ConfigError(f"{layer}: has no weights, only {', '.join(own)}. Leave it out of the config list.")
    return [f"{layer}.{name}" for name in found]


def _blocked(name: str, values: Tensor, block: Sequence[int]) -> Tensor:
    """The mean of each block of ``values``."""
    for dim, size in zip(range(-len(block), 0), block, strict=True):
        if -dim > values.dim() or values.shape[dim] % size:
            raise ConfigError(
                f"{name}: its shape {tuple(values.shape)} is no multiple of blocks of {tuple(block)}. Give sizes that "
                "divide the last dimensions, or leave out the layer."
            )
        values = values.reshape(*values.shape[:dim], -1, size, *values.shape[dim:][1:]).mean(dim)
    return values


def _stretched(mask: Tensor, weight: Tensor) -> Tensor:
    """A mask of blocks as one of single elements."""
    for dim, (blocks, size) in enumerate(zip(mask.shape, weight.shape, strict=True)):
        mask = mask.repeat_interleave(size // max(blocks, 1), dim)
    return mask.to(weight)


def _channel_scores(name: str, layer: nn.Module, criterion: str) -> Tensor:
    """A score for each channel that a layer produces, from its own weights alone."""
    weight = layer._parameters.get("weight")
    is_norm = weight is not None and weight.dim() == 1
    if weight is None or is_norm != (criterion == "bn_scale"):
        wanted = "norms with a scale" if criterion == "bn_scale" else "layers with a weight that are no norms"
        raise ConfigError(f"{name}: criterion {criterion!r} looks at {wanted}. Select such, or give example inputs.")
    if is_norm:
        return weight.detach().double().abs()
    of_slice, finish = SLICES[criterion]
    scores = finish(of_slice(_outputs_first(layer, weight.detach()).flatten(1), [1]).double().cpu().numpy())
    return torch.from_numpy(np.asarray(scores))


def _parts(layer: nn.Module, channels: int) -> int:
    """How many parts of the channels of a layer have to lose as many; a part of one channel may go."""
    groups = int(getattr(layer, "groups", 1))
    return groups if groups < channels else 1


def _outputs_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as (outputs, inputs of a group, ...); a transposed convolution has the inputs of all groups first."""
    if not outputs_along(layer):
        return weight
    return torch.unflatten(weight, 0, (int(getattr(layer, "groups", 1)), -1)).transpose(1, 2).flatten(0, 1)


def _has_channels(layer: nn.Module, parameter: Tensor, channels: int) -> bool:
    """Whether a parameter of a layer has something for each channel that it produces."""
    if parameter.dim() < 2:
        return parameter.dim() == 1 and len(parameter) == channels
    along = outputs_along(layer)
    return parameter.shape[along] * (int(getattr(layer, "groups", 1)) if along else 1) == channels


def _spread(channels: Tensor, layer: nn.Module, parameter: Tensor) -> Tensor:
    """A mask of the channels that a layer produces in the shape of one of its parameters."""
    mask = torch.ones_like(parameter)
    if parameter.dim() == 1:
        return mask * channels.to(mask)
    rows = channels.to(mask).reshape(-1, *[1] * (mask.dim() - 1))
    if not outputs_along(layer):
        return mask * rows
    parts = (int(getattr(layer, "groups", 1)), -1)
    return (torch.unflatten(mask, 0, parts) * torch.unflatten(rows, 0, parts).transpose(1, 2)).flatten(0, 1)

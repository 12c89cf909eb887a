"""From scores to masks: single elements, channels of one layer, or channels with everything that is coupled to them."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.config_list import Entry, Setting, target_of
from graphprune.criteria import SLICES, Scores
from graphprune.dependency import DependencyGraph
from graphprune.errors import ConfigError
from graphprune.select import Selection, select
from speedup.labels import support

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
) -> Masks:
    """Returns masks for single elements of the selected layers' weights: the smallest go (Han et al., 2015).

    Args:
        model: The model.
        settings: What is asked of each layer.
        block: Sizes of the blocks that go whole, by their mean, aligned to the last dimensions of a weight; single
            elements if empty.
        scores: By qualified name of a weight a tensor of its shape, instead of its absolute values.

    Raises:
        ConfigError: A weight cannot be divided into such blocks.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    masks: dict[str, Tensor] = {}
    for entry, layers in _by_entry(settings):
        weights = {name: parameters[name] for layer in layers for name in weight_names(model, layer)}
        values = {
            name: _blocked(name, (weight.detach().abs() if scores is None else scores[name]).double(), block)
            for name, weight in weights.items()
        }
        most = {name: round(entry.max_sparsity_per_layer * value.numel()) for name, value in values.items()}
        for name, count in _counts(values, entry, most, together=False).items():
            masks[name] = _stretched(_without_lowest(values[name], count), weights[name])
    return by_layer(masks)


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


def layer_masks(model: nn.Module, settings: Mapping[str, Setting], criterion: str) -> Masks:
    """Returns masks for output channels, each layer by itself: for models of which no example inputs are known.

    Layers that are coupled may lose different channels; :class:`speedup.ModelSpeedup` keeps what any of them keeps.

    Args:
        model: The model.
        settings: What is asked of each layer.
        criterion: A name in :data:`~graphprune.criteria.SLICES`, or ``bn_scale``, for which layers are norms.

    Raises:
        ConfigError: A layer has no weights that the criterion can look at.
    """
    masks: Masks = {}
    for entry, layers in _by_entry(settings):
        values = {layer: _channel_scores(layer, model.get_submodule(layer), criterion) for layer in layers}
        most = {
            layer: min(round(entry.max_sparsity_per_layer * value.numel()), value.numel() - 1)
            for layer, value in values.items()
        }
        for layer, count in _counts(values, entry, most, together=criterion == "bn_scale").items():
            module = model.get_submodule(layer)
            channels = _without_lowest(values[layer], count, groups=_groups(module, count))
            masks[layer] = {
                name: _along(channels, parameter, outputs_along(module))
                for name, parameter in module.named_parameters(recurse=False)
            }
    return masks


def outputs_along(layer: nn.Module) -> int:
    """Returns the dimension of a layer's weight that has the channels which it produces."""
    return int(isinstance(layer, _OUTPUTS_LAST))


def by_layer(masks: Mapping[str, Tensor]) -> Masks:
    """Returns masks by qualified name as masks by layer and parameter."""
    found: Masks = {}
    for name, mask in masks.items():
        layer, _, parameter = name.rpartition(".")
        found.setdefault(layer, {})[parameter] = mask
    return found


def _by_entry(settings: Mapping[str, Setting]) -> Iterator[tuple[Entry, list[str]]]:
    """The layers of each entry that does not exclude them."""
    chosen: dict[int, list[str]] = {}
    for layer, setting in settings.items():
        if not setting.entry.exclude:
            chosen.setdefault(setting.position, []).append(layer)
    for layers in chosen.values():
        yield settings[layers[0]].entry, layers


def _counts(values: Mapping[str, Tensor], entry: Entry, most: Mapping[str, int], *, together: bool) -> dict[str, int]:
    """How many of the values go of each layer: its share of them, or by one ranking of all."""
    share = entry.share or 0.0
    if entry.total_sparsity is None and not together:
        return {name: min(math.ceil(value.numel() * share - 1e-9), most[name]) for name, value in values.items()}
    lowest = {name: value.reshape(-1).sort(stable=True).values[: most[name]] for name, value in values.items()}
    ranked = torch.cat(list(lowest.values()))
    owners = torch.repeat_interleave(torch.arange(len(lowest)), torch.tensor([len(low) for low in lowest.values()]))
    wanted = math.ceil(sum(value.numel() for value in values.values()) * share - 1e-9)
    gone = owners[ranked.argsort(stable=True)[:wanted]]
    return dict(zip(values, torch.bincount(gone, minlength=len(lowest)).tolist(), strict=True))


def _without_lowest(values: Tensor, count: int, groups: int = 1) -> Tensor:
    """A mask in the shape of ``values`` without the ``count`` lowest, as many of each of ``groups`` equal parts."""
    parts = values.reshape(groups, -1)
    order = parts.argsort(dim=1, stable=True)[:, : count // groups]
    return torch.ones_like(parts).scatter_(1, order, 0.0).reshape(values.shape)


def weight_names(model: nn.Module, layer: str) -> list[str]:
    """Returns the names of a layer's weights: what has two dimensions or more, or else the scale of a norm."""
    own = dict(model.get_submodule(layer).named_parameters(recurse=False))
    found = [name for name, parameter in own.items() if parameter.dim() > 1] or [
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
        mask = mask.repeat_interleave(size // blocks, dim)
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
    along = outputs_along(layer)
    scores = finish(
        of_slice(weight.detach(), [dim for dim in range(weight.dim()) if dim != along]).double().cpu().numpy()
    )
    return torch.from_numpy(np.asarray(scores))


def _groups(layer: nn.Module, count: int) -> int:
    """In how many parts the channels of a layer have to lose equal numbers; one if that cannot be."""
    groups = int(getattr(layer, "groups", 1))
    return groups if count % groups == 0 else 1


def _along(channels: Tensor, parameter: Tensor, dim: int) -> Tensor:
    """A mask of channels in the shape of a parameter, whose dimension ``dim`` has them; or its only one."""
    shape = [1] * parameter.dim()
    shape[dim if parameter.dim() > 1 else 0] = -1
    return channels.to(parameter).reshape(shape).expand_as(parameter).clone()

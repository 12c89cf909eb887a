"""Pruning in rounds: a schedule and a basic pruner; between the rounds shrink, train, evaluate."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.config_list import Setting
from graphprune.errors import ConfigError
from graphprune.pruners.algorithms import Pruner
from graphprune.pruners.sparsify import Masks, by_layer, outputs_along, weight_names
from graphprune.schedule import Schedule, at_round
from graphprune.training.fit import evaluated
from graphprune.training.loop import in_place
from speedup.inputs import ExampleInputs
from speedup.masking import attach_masks, beneath_masks, flat_masks, without_masks
from speedup.masks import ModelSpeedup

Work = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Task:
    """What a round came to.

    Attributes:
        id: Its number. Rounds that prune are counted from 1.
        model: The model after it: shrunk, its masks multiplied in.
        masks: The masks that act in it, by layer and parameter; of channels that are gone there are none.
        score: What the evaluator said of it; None without one.
        config_list: What was asked in it, layer by layer.
    """

    id: int
    model: nn.Module
    masks: Masks
    score: float | None
    config_list: list[dict[str, Any]]


def in_rounds(
    pruner: Pruner,
    schedule: Schedule,
    rounds: int,
    *,
    finetune: Work | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    example_inputs: ExampleInputs | None = None,
    speedup: bool = False,
    rewind: bool = False,
) -> Iterator[Task]:
    """Yields what each round comes to. The pruner's model is not changed; each round goes on with that of the last.

    Args:
        pruner: The basic pruner, and what is asked of each layer in the end.
        schedule: How sparsity grows.
        rounds: How many there are.
        finetune: Trains the masked or shrunk model of a round in place.
        evaluate: Says how good a model is, in eval mode.
        example_inputs: For the shrink.
        speedup: Whether channels go physically after each round: the next one takes ``(target - done) / (1 - done)``.
        rewind: Whether what survives a round returns to its first values (the lottery ticket); the dense model is
            trained once before the first round then.

    Raises:
        ConfigError: An option makes no sense.
        TrainingError: The evaluator returns no number, or what trains the model returns another one.
    """
    if rounds < 1:
        raise ConfigError(f"total_iteration {rounds}: is below 1. Use 1 or more.")
    if speedup and example_inputs is None:
        raise ConfigError("speedup: needs example inputs. Give dummy_input.")
    settings, dense = pruner.settings, pruner.model
    current = copy.deepcopy(dense)
    pruner = pruner.following(current)
    values = beneath_masks(current.state_dict()).items()
    first = {name: value.detach().clone() for name, value in values if isinstance(value, torch.Tensor)}
    if rewind and finetune is not None:
        in_place(current, finetune)
    for number in range(1, rounds + 1):
        asked = at_round(settings, schedule, number, rounds, _gone(pruner, dense))
        _, masks = pruner.compress(asked)
        masks = copy.deepcopy(masks)
        if speedup:
            assert example_inputs is not None
            shrinker = ModelSpeedup(current, example_inputs, masks)
            current = shrinker.speedup_model()
            pruner = pruner.following(current, shrinker.plan)
            first = shrinker.cut(first)
            left = {name: mask for name, mask in shrinker.cut(dict(flat_masks(masks))).items() if not bool(mask.all())}
            attach_masks(current, left)
            masks = by_layer(left)
        if rewind:
            with torch.no_grad():
                for name, tensor in current.state_dict(keep_vars=True).items():
                    if name in first:
                        tensor.copy_(first[name])
        if finetune is not None:
            in_place(current, finetune)
        score = None if evaluate is None else evaluated(evaluate, current)
        yield Task(number, without_masks(copy.deepcopy(current)), masks, score, config_list_of(asked))


def best_of(tasks: Iterable[Task]) -> Task:
    """Returns the task of highest score; of those without one, or of equal ones, the last."""
    return max(tasks, key=lambda task: (-math.inf if task.score is None else task.score, task.id))


def config_list_of(settings: Mapping[str, Setting]) -> list[dict[str, Any]]:
    """Returns what is asked of each layer as a config list."""
    together: dict[tuple[int, float | None], list[str]] = {}
    for layer, setting in settings.items():
        together.setdefault((setting.position, setting.entry.share), []).append(layer)
    found: list[dict[str, Any]] = []
    for layers in together.values():
        entry = settings[layers[0]].entry
        if entry.exclude:
            found.append({"op_names": layers, "exclude": True})
        elif entry.total_sparsity is None:
            found.append({"op_names": layers, "sparsity": entry.sparsity})
        else:
            most = entry.max_sparsity_per_layer
            found.append({"op_names": layers, "total_sparsity": entry.total_sparsity, "max_sparsity_per_layer": most})
    return found


def _gone(pruner: Pruner, dense: nn.Module) -> Callable[[str], float]:
    """Returns what says which share of a layer is gone; where several are ranked, of all of their weights.

    Where channels go, a layer's weights count by the channels that it produces; what goes with channels that it reads
    is no part of its share.
    """
    now, before = (dict(one.named_parameters(remove_duplicate=False)) for one in (pruner.model, dense))

    def left(layer: str) -> tuple[float, int]:
        """How many weights a layer has now and had before."""
        names = weight_names(dense, layer)
        if not pruner.structured:
            return sum(now[name].numel() for name in names), sum(before[name].numel() for name in names)
        wide, narrow = before[names[0]], now[names[0]]
        along = outputs_along(dense.get_submodule(layer)) if wide.dim() > 1 else 0
        return wide.numel() * narrow.shape[along] / wide.shape[along], wide.numel()

    def gone(layer: str) -> float:
        setting = pruner.settings[layer]
        ranked = pruner.finder.together or setting.entry.total_sparsity is not None
        alike = [other for other, one in pruner.settings.items() if one.position == setting.position]
        counts = [left(one) for one in (alike if ranked else [layer])]
        return 1 - sum(count for count, _ in counts) / sum(total for _, total in counts)

    return gone

"""Pruning in rounds: a schedule and a basic pruner; between the rounds shrink, train, evaluate."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.algorithms import Pruner
from graphprune.config_list import Setting
from graphprune.errors import ConfigError
from graphprune.fit import evaluated
from graphprune.schedule import Schedule, at_round
from graphprune.sparsify import Masks, outputs_along, weight_names
from speedup.inputs import ExampleInputs
from speedup.masking import without_masks
from speedup.masks import ModelSpeedup

Work = Callable[[nn.Module], Any]
MakePruner = Callable[[nn.Module], Pruner]
"""From a model to its basic pruner."""


@dataclass(frozen=True)
class Task:
    """What a round came to.

    Attributes:
        id: Its number, from 0, which is the model as it was.
        model: The model after it: shrunk, or with its masks multiplied in.
        masks: The masks of the round, by layer and parameter; of channels that are gone already there are none.
        score: What the evaluator said of it; None without one.
        config_list: What was asked in it, layer by layer.
    """

    id: int
    model: nn.Module
    masks: Masks
    score: float | None
    config_list: list[dict[str, Any]]


def in_rounds(
    model: nn.Module,
    settings: Mapping[str, Setting],
    make_pruner: MakePruner,
    schedule: Schedule,
    rounds: int,
    *,
    finetune: Work | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    example_inputs: ExampleInputs | None = None,
    speedup: bool = False,
    rewind: bool = False,
) -> Iterator[Task]:
    """Yields what each round comes to. The model is not changed; each round goes on with that of the last.

    Args:
        model: The model.
        settings: What is asked of each layer in the end.
        make_pruner: Makes the basic pruner of a round.
        schedule: How sparsity grows.
        rounds: How many there are.
        finetune: Trains the masked or shrunk model of a round in place.
        evaluate: Says how good a model is, in eval mode.
        example_inputs: For the shrink.
        speedup: Whether channels go physically after each round: the next one takes ``(target - done) / (1 - done)``.
        rewind: Whether what survives a round returns to its first values (the lottery ticket).

    Raises:
        ConfigError: An option makes no sense.
        TrainingError: The evaluator returns no number.
    """
    if rounds < 1:
        raise ConfigError(f"total_iteration {rounds}: is below 1. Use 1 or more.")
    if speedup and example_inputs is None:
        raise ConfigError("speedup: needs example inputs. Give dummy_input.")
    current = copy.deepcopy(model)
    first = {name: tensor.detach().clone() for name, tensor in current.state_dict().items()}
    dense = _widths(current, current, settings)
    pruner = make_pruner(current)
    for number in range(1, rounds + 1):
        gone = _gone(dense, _widths(current, model, settings), settings)
        asked = at_round(settings, schedule, number, rounds, gone)
        _, masks = pruner.compress(asked)
        masks = copy.deepcopy(masks)
        if speedup:
            assert example_inputs is not None
            shrinker = ModelSpeedup(current, example_inputs, masks)
            current = shrinker.speedup_model()
            first = shrinker.cut(first)
            pruner = make_pruner(current)
        if rewind:
            with torch.no_grad():
                for name, tensor in current.state_dict(keep_vars=True).items():
                    if name in first:  # masks are not
                        tensor.copy_(first[name])
        if finetune is not None:
            finetune(current)
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


def _widths(model: nn.Module, dense: nn.Module, settings: Mapping[str, Setting]) -> dict[str, tuple[int, int]]:
    """Of each layer the channels that it produces now, and its weights in the dense model."""
    named, before = (dict(one.named_parameters(remove_duplicate=False)) for one in (model, dense))
    found = {}
    for layer in settings:
        name = next(iter(weight_names(dense, layer)))
        along = outputs_along(dense.get_submodule(layer))
        found[layer] = (named[name].shape[along if named[name].dim() > 1 else 0], before[name].numel())
    return found


def _gone(
    dense: Mapping[str, tuple[int, int]], now: Mapping[str, tuple[int, int]], settings: Mapping[str, Setting]
) -> Callable[[str], float]:
    """Returns what says which share of a layer is gone; where several are ranked, of all of their weights."""

    def gone(layer: str) -> float:
        setting = settings[layer]
        alike = [other for other, one in settings.items() if one.position == setting.position]
        counted = [layer] if setting.entry.total_sparsity is None else alike
        left = sum(now[one][0] / dense[one][0] * dense[one][1] for one in counted)
        return 1 - left / sum(dense[one][1] for one in counted)

    return gone

"""The user's own class with smaller tensors: its attributes that repeat sizes get the new ones."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speedup.capture import Captured
from speedup.inputs import batch_size
from speedup.plan import Scaled, ShrinkPlan
from speedup.program import evaluating
from speedup.rules.call import raw_argument


@dataclass(frozen=True)
class Repair:
    """An attribute of a submodule that held a dense size and now holds the new one."""

    module: str
    attribute: str
    old: Any
    new: Any


def repaired(model: nn.Module, swaps: Mapping[int, Tensor], repairs: Iterable[Repair]) -> nn.Module:
    """Returns a copy of ``model`` with other tensors in the places of its own, and attributes set to new sizes."""
    computed = {id(tensor): tensor.detach() for tensor in _attributes(model) if not tensor.is_leaf}
    module = copy.deepcopy(model, {**computed, **swaps})
    for repair in repairs:
        setattr(module.get_submodule(repair.module), repair.attribute, repair.new)
    new = []
    with evaluating(module), torch.no_grad():  # a parametrised weight is computed when it is read
        for submodule in module.modules():
            for kind, sizes in STANDARD_SIZES.items():
                if isinstance(submodule, kind):
                    new += [(submodule, name, value) for name, value in sizes(submodule).items()]
    for submodule, name, value in new:
        setattr(submodule, name, value)
    return module


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that modules hold as plain attributes, such as the last weight of a weight norm of the old kind."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _convolution_sizes(module: Any) -> dict[str, Any]:
    first, second = module.weight.shape[:2]
    if module.transposed:
        return {"in_channels": first, "out_channels": second * module.groups}
    return {"in_channels": second * module.groups, "out_channels": first}


def _vector_length(*names: str) -> Callable[[Any], dict[str, Any]]:
    """Sizes of a norm: those of its weight, or of its running mean."""

    def sizes(module: Any) -> dict[str, Any]:
        vectors = (getattr(module, name, None) for name in ("weight", "running_mean"))
        vector = next((v for v in vectors if v is not None), None)
        if vector is None:
            return {}
        return {name: tuple(vector.shape) if name == "normalized_shape" else vector.shape[0] for name in names}

    return sizes


_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def _recurrent_sizes(module: Any) -> dict[str, Any]:
    rows, inputs = module.weight_ih_l0.shape
    sizes = {"input_size": inputs, "hidden_size": rows // _GATES[module.mode]}
    return sizes | ({"proj_size": module.weight_hr_l0.shape[0]} if module.proj_size else {})


STANDARD_SIZES: Mapping[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    nn.modules.conv._ConvNd: _convolution_sizes,
    nn.Bilinear: lambda module: dict(
        zip(("out_features", "in1_features", "in2_features"), module.weight.shape, strict=True)
    ),
    nn.RNNBase: _recurrent_sizes,
    nn.RNNCellBase: lambda module: {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]},
    nn.Linear: lambda module: {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]},
    nn.modules.batchnorm._NormBase: _vector_length("num_features"),
    nn.GroupNorm: _vector_length("num_channels"),
    nn.LayerNorm: _vector_length("normalized_shape"),
    nn.RMSNorm: _vector_length("normalized_shape"),
    nn.Embedding: lambda module: {"embedding_dim": module.weight.shape[1]},
    nn.EmbeddingBag: lambda module: {"embedding_dim": module.weight.shape[1]},
    nn.PReLU: _vector_length("num_parameters"),
    nn.MultiheadAttention: lambda module: {
        "embed_dim": module.out_proj.weight.shape[0],
        "kdim": module.out_proj.weight.shape[0],
        "vdim": module.out_proj.weight.shape[0],
        "head_dim": module.out_proj.weight.shape[0] // module.num_heads,
    },
}
"""The attributes of layers of ``torch.nn`` that repeat the sizes of their tensors."""


def find_repairs(captured: Captured, plan: ShrinkPlan) -> tuple[Repair, ...]:
    """Returns the attributes that hold a size which a literal of the graph had to give up.

    A changed literal names its module by ``nn_module_stack``. If the module has an attribute of the argument's name,
    that is given the new value; else any integer of that module that equals the old value, alone or inside a tuple.
    Two literals that disagree leave the attribute as it is.
    """
    changes: dict[str, dict[int, set[int]]] = {}
    repairs = []
    batch = batch_size(captured.flat_inputs())
    modules = dict(captured.model.named_modules())
    for node in captured.nodes:
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path in modules]
        if node.name not in plan.literals or not stack:
            continue
        for argument, value in plan.literals[node.name].items():
            old = raw_argument(node, argument)
            held = vars(modules[stack[-1]]).get(argument)
            if isinstance(held, int | tuple | list) and held == old:
                repairs.append(Repair(stack[-1], argument, old, value))
                continue
            entries = value if isinstance(value, list) else [value]
            olds = list(old) if isinstance(old, list | tuple) else [old]
            for new_entry, old_entry in zip(entries, olds, strict=False):
                if isinstance(new_entry, Scaled) and new_entry.old % batch == new_entry.new % batch == 0:
                    changes.setdefault(stack[-1], {}).setdefault(new_entry.old // batch, set()).add(
                        new_entry.new // batch
                    )
                elif isinstance(new_entry, int) and isinstance(old_entry, int) and new_entry != old_entry:
                    changes.setdefault(stack[-1], {}).setdefault(old_entry, set()).add(new_entry)
    for path, sizes in changes.items():
        certain = {old: news.copy().pop() for old, news in sizes.items() if len(news) == 1}
        for name, value in vars(modules[path]).items():
            new = _replaced(value, certain)
            if not name.startswith("_") and new is not value and new != value:
                repairs.append(Repair(path, name, value, new))
    return tuple(repairs)


def _replaced(value: Any, sizes: Mapping[int, int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return sizes.get(value, value)
    if type(value) in (tuple, list) and all(isinstance(item, int | tuple | list) for item in value):
        return type(value)(_replaced(item, sizes) for item in value)
    return value


def fewest(repairs: tuple[Repair, ...], fits: Callable[[tuple[Repair, ...]], bool]) -> tuple[Repair, ...] | None:
    """Returns as few of the repairs, by attribute name, as the class fits with; None if it fits with none of the tries.

    A number can be equal to a size by chance: where it is not needed, or does harm, it stays.
    """
    if fits(()):
        return ()
    found = repairs if repairs and fits(repairs) else None
    for name in dict.fromkeys(repair.attribute for repair in repairs):
        fewer = tuple(repair for repair in found or repairs if repair.attribute != name)
        if fewer and fits(fewer):
            found = fewer
    return found

"""The user's own class with smaller tensors: its attributes that repeat sizes get the new ones."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speedup.program import evaluating


@dataclass(frozen=True)
class Repair:
    """An attribute of a submodule that held a dense size and now holds the new one.

    Attributes:
        module: Qualified name of the submodule.
        attribute: Its name; ``config.num_heads`` for one of an object that the submodule holds as ``config``.
        old: The dense value.
        new: The value in the shrunk model.
    """

    module: str
    attribute: str
    old: Any
    new: Any

    @property
    def holder(self) -> str:
        """Name of the attribute that holds the object; empty where the attribute is the submodule's own."""
        return self.attribute.rpartition(".")[0]


def repaired(model: nn.Module, swaps: Mapping[int, Tensor], repairs: Iterable[Repair]) -> nn.Module:
    """Returns a copy of ``model`` with other tensors in the places of its own, and attributes set to new sizes."""
    computed = {id(tensor): tensor.detach() for tensor in _attributes(model) if not tensor.is_leaf}
    module = copy.deepcopy(model, {**computed, **swaps})
    repairs = tuple(repairs)
    _share_out(module, repairs)
    for repair in repairs:
        owner = module.get_submodule(repair.module)
        name = repair.attribute.rpartition(".")[2]
        try:
            setattr(getattr(owner, repair.holder) if repair.holder else owner, name, repair.new)
        except (AttributeError, TypeError, ValueError):  # a configuration that is frozen; this one is a copy
            vars(getattr(owner, repair.holder))[name] = repair.new
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


def _share_out(module: nn.Module, repairs: Sequence[Repair]) -> None:
    """Gives submodules that hold one object, but need other sizes in it, copies of their own."""
    wanted: dict[tuple[int, str], set[str]] = {}
    holders: dict[int, set[tuple[str, str]]] = {}
    for repair in repairs:
        if repair.holder:
            held = id(getattr(module.get_submodule(repair.module), repair.holder))
            wanted.setdefault((held, repair.attribute), set()).add(repr(repair.new))
            holders.setdefault(held, set()).add((repair.module, repair.holder))
    for held in {held for (held, _), values in wanted.items() if len(values) > 1}:
        for path, name in holders[held]:
            owner = module.get_submodule(path)
            setattr(owner, name, copy.copy(getattr(owner, name)))


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

"""Where a search stands: which channels live, and the weights that training on the way has left."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from graphprune.criteria import Scores
from graphprune.errors import ModelError
from speedup.analysis import Analysis
from speedup.capture import attribute
from speedup.labels import Mask
from speedup.plan import ShrinkPlan
from speedup.planning import make_plan
from speedup.shrink import shrink

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class State:
    """What a candidate starts from.

    Attributes:
        live: The classes that are left, shape (classes,).
        scores: A score for each class.
        weights: The tensors of the model in their dense shapes, parameters 0 where channels are gone; None while they
            are those that the model came with.
        key: Says which state it is.
    """

    live: Mask
    scores: Scores
    weights: Weights | None = None
    key: str = ""


def digest(*parts: bytes | str) -> str:
    """Returns the SHA-256 of what ``parts`` say, one after the other."""
    sha256 = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha256.update(len(data).to_bytes(8, "little"))
        sha256.update(data)
    return sha256.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory; none of one that holds none, or has no such place for them."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested or is_lazy(tensor):
        return b""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors in the state dict of ``model``, tied ones once, by their first names."""
    held = model.state_dict(keep_vars=True).items()
    first: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in held
        if isinstance(tensor, Tensor) and first.setdefault(id(tensor), name) == name
    }


def tensors_after(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors in the state dict of a shrunk ``model``, on the CPU, by all their names."""
    held = model.state_dict(keep_vars=True).items()
    return {name: t.detach().cpu().clone().contiguous() for name, t in held if isinstance(t, Tensor)}


@contextmanager
def holding(model: nn.Module, weights: Weights | None) -> Iterator[None]:
    """Lets ``model`` hold ``weights`` for a while."""
    own = {name: tensor.detach() for name, tensor in tensors_of(model).items() if name in (weights or {})}
    before = {name: tensor.clone() for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.copy_((weights or {})[name])
        yield
    finally:
        for name, tensor in own.items():
            tensor.copy_(before[name])


def shrunk_model(analysis: Analysis, live: Mask, weights: Weights | None) -> nn.Module:
    """Returns the physically smaller model in which only the classes ``live`` are left, as far as numbers tell.

    It is the user's own class where that computes on the example inputs what the rewritten graph does, else the graph.
    """
    captured = analysis.captured
    with holding(captured.model, weights):
        return shrink(captured, make_plan(analysis, live), thorough=False).model


def scattered(analysis: Analysis, plan: ShrinkPlan, found: Weights) -> dict[str, Tensor]:
    """Returns the tensors of a model that was shrunk by ``plan`` at their dense places: y[kept] = x.

    What is gone of a parameter is 0 there, what is gone of a buffer is what the dense model has.

    Args:
        analysis: The dense model.
        plan: What was kept of it.
        found: The tensors of the shrunk model by name.

    Raises:
        ModelError: Training has changed the shape of a tensor.
    """
    captured = analysis.captured
    dense = captured.model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    graph_names = {id(attribute(captured.graph_module, name)): name for name in analysis.parameters}
    result: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        if not isinstance(tensor, Tensor):
            continue
        own = first.setdefault(id(tensor), name)
        if name not in found or own in result:
            continue
        small = found[name]
        places = torch.arange(tensor.numel()).reshape(tensor.shape)
        places = plan.cut(graph_names.get(id(tensor), name), places)
        if places.shape != small.shape:
            raise ModelError(
                f"{name}: training has made its shape {tuple(small.shape)}, not {tuple(places.shape)}. Leave it."
            )
        full = torch.zeros_like(tensor) if isinstance(tensor, nn.Parameter) else tensor
        full = full.detach().cpu().clone().contiguous()
        full.view(-1)[places.reshape(-1)] = small.detach().cpu().to(full.dtype).reshape(-1)
        result[own] = full
    return result

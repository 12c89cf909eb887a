"""plan.json: what was kept and how to build the shrunk model again from a fresh instance of the user's class."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graphprune.errors import ModelError
from speedup.analysis import tensor_names
from speedup.capture import Captured, attribute
from speedup.plan import ShrinkPlan
from speedup.repair import Repair
from speedup.shrink import Shrunk

FORMAT = 1
_REMEDY = "Use the model that was compressed."
Form = Literal["module", "graph"]


@dataclass(frozen=True)
class Blueprint:
    """What a fresh instance of a model needs to become the shrunk one, weights aside.

    Attributes:
        model: Name of the user's class.
        form: Whether the shrunk model is an instance of that class or the rewritten graph.
        plan: What is kept.
        repairs: Attributes of the class that get another value.
        inputs: Positional and keyword inputs that it was captured with, as :func:`described`.
        dense: Shape and type of every tensor of the dense model's state dict.
        tied: For every further name of a tensor the name that the plan uses.
    """

    model: str
    form: Form
    plan: ShrinkPlan
    repairs: tuple[Repair, ...]
    inputs: Any
    dense: Mapping[str, tuple[tuple[int, ...], str]]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, captured: Captured, plan: ShrinkPlan, shrunk: Shrunk) -> "Blueprint":
        """Returns the blueprint of a model that was shrunk."""
        state = captured.model.state_dict()
        return cls(
            model=type(captured.model).__name__,
            form="module" if shrunk.obstacle is None else "graph",
            plan=plan,
            repairs=shrunk.repairs,
            inputs=described((captured.args, captured.kwargs)),
            dense={name: _type(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)},
            tied=_tied(captured),
        )

    def write(self, path: Path) -> None:
        """Writes plan.json."""
        data = {
            "format": FORMAT,
            "model": self.model,
            "form": self.form,
            "repairs": [asdict(r) | {"old": _told(r.old), "new": _told(r.new)} for r in self.repairs],
            "inputs": self.inputs,
            "dense": {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in self.dense.items()},
            "tied": dict(self.tied),
            **self.plan.to_json(),
        }
        path.write_text(json.dumps(data), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Blueprint":
        """Returns what :meth:`write` wrote.

        Raises:
            ModelError: There is no such file, or it is none of this format.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ModelError(f"{path}: has format {data['format']}, not {FORMAT}. Compress the model again.")
            if data["form"] not in ("module", "graph"):
                raise ValueError(data["form"])
            return cls(
                model=str(data["model"]),
                form=data["form"],
                plan=ShrinkPlan.from_json(data),
                repairs=tuple(
                    Repair(str(r["module"]), str(r["attribute"]), _held(r["old"]), _held(r["new"]))
                    for r in data["repairs"]
                ),
                inputs=data["inputs"],
                dense={name: (tuple(one["shape"]), one["dtype"]) for name, one in data["dense"].items()},
                tied=dict(data["tied"]),
            )
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}). Name a folder of graphprune.") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path}: is not the plan of a shrunk model. Compress the model again.") from error

    def check(self, model: torch.nn.Module) -> None:
        """Refuses a model that is not the one that was compressed.

        Raises:
            ModelError: A tensor is missing, is one too many, or has another shape or type.
        """
        state = {name: _type(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        for name, (shape, dtype) in self.dense.items():
            if name not in state:
                raise ModelError(f"{name}: the compressed {self.model} has it, this model does not. {_REMEDY}")
            own_shape, own_dtype = state[name]
            if own_shape != shape:
                raise ModelError(f"{name}: has shape {own_shape}, in the compressed {self.model} {shape}. {_REMEDY}")
            if own_dtype != dtype:
                raise ModelError(f"{name}: is {own_dtype}, in the compressed {self.model} {dtype}. {_REMEDY}")
        for name in state:
            if name not in self.dense:
                raise ModelError(f"{name}: this model has it, the compressed {self.model} does not. {_REMEDY}")

    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns positional and keyword inputs like those that the model was captured with.

        Raises:
            ModelError: One of them is of a kind that JSON cannot describe.
        """
        args, kwargs = _rebuilt(self.inputs)
        return args, kwargs


def described(value: Any) -> Any:
    """Returns what is needed to make up a value like this one: shapes and types of tensors, and how they are nested."""
    if isinstance(value, Tensor):
        shape, dtype = _type(value)
        return {"tensor": {"shape": shape, "dtype": dtype}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) is tuple:
        return {"tuple": [described(item) for item in value]}
    if type(value) is list:
        return [described(item) for item in value]
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: described(item) for key, item in value.items()}}
    return {"other": type(value).__name__}


def _rebuilt(data: Any) -> Any:
    if isinstance(data, list):
        return [_rebuilt(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "tuple":
        return tuple(_rebuilt(item) for item in value)
    if kind == "dict":
        return {key: _rebuilt(item) for key, item in value.items()}
    if kind != "tensor":
        raise ModelError(f"plan.json: cannot make up an input of type {value}. Give example_inputs to load().")
    dtype: torch.dtype = getattr(torch, value["dtype"])
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(value["shape"], generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(2, value["shape"], generator=generator).to(dtype)  # 0 and 1 are ids in any vocabulary


def _type(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _told(value: Any) -> Any:
    """The value of an attribute as plain data: numbers, tuples and lists of them."""
    if isinstance(value, tuple):
        return {"tuple": [_told(item) for item in value]}
    return [_told(item) for item in value] if isinstance(value, list) else value


def _held(data: Any) -> Any:
    if isinstance(data, dict):
        return tuple(_held(item) for item in data["tuple"])
    return [_held(item) for item in data] if isinstance(data, list) else data


def _tied(captured: Captured) -> dict[str, str]:
    """For every further name of a tensor, in the graph and in the model, the name that the plan uses."""
    names = tensor_names(captured.graph_module)
    first = {id(attribute(captured.graph_module, name)): name for name in names.values()}
    named = (
        *captured.model.named_parameters(remove_duplicate=False),
        *captured.model.named_buffers(remove_duplicate=False),
    )
    names |= {name: first[id(tensor)] for name, tensor in named if id(tensor) in first}
    return {name: kept for name, kept in names.items() if name != kept}

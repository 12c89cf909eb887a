"""A model's structure without its weights: parameters on the meta device, which hold nothing; buffers as they are."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from graphprune.errors import ModelError


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: The model; none of its tensors holds anything.
        buffers: What its buffers held when it was built, by name: they are computed, and seldom saved.
    """

    model: nn.Module
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, build: Callable[[], nn.Module]) -> "Skeleton":
        """Returns the structure of what ``build`` makes; at most one of its parameters is in memory at a time.

        Raises:
            ModelError: It makes no module.
        """
        with parameters_on_meta():
            model = build()
        if not isinstance(model, nn.Module):
            raise ModelError(f"{build!r:.80}: makes {type(model).__name__}. Return a torch.nn.Module.")
        buffers = dict(model.named_buffers(remove_duplicate=False))
        emptied: dict[int, Tensor] = {}
        for name, buffer in buffers.items():
            owner, _, own = name.rpartition(".")
            twin = emptied.setdefault(id(buffer), buffer.to("meta"))
            model.get_submodule(owner)._buffers[own] = twin
        return cls(model, buffers)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Moves every parameter to the meta device as soon as a module gets it; one that is given twice stays one."""
    moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        original, twin = moved.get(id(parameter), (None, None))
        if original is None or twin is None or original() is not parameter:
            twin = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            moved[id(parameter)] = weakref.ref(parameter), twin
        return twin

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # what it returns is used
    try:
        yield
    finally:
        hook.remove()

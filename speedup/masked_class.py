"""The class of a module whose parameters are masked: like the one it had, but what reads them gets the product."""

import copy
import copyreg
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from speedup.errors import PlanError

PREFIX = "mask_of_"
"""Before the name of a parameter: the name of the buffer that holds its mask."""


class Masked(nn.Module):
    """What the class of a masked module has besides the properties that give its masked parameters.

    Attributes:
        _masked_from: The class that the module has without masks.
        _masked_names: Its masked parameters.
    """

    _masked_from: ClassVar[type[nn.Module]]
    _masked_names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **_: Any) -> None:
        """Keeps the classes made here out of registers of subclasses that a user's class may keep."""

    def __delattr__(self, name: str) -> None:
        if name in type(self)._masked_names:
            raise PlanError(f"{name}: is masked and cannot be taken away or parametrised. Call detach_masks() first.")
        super().__delattr__(name)

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        own: list[str] = []
        super()._load_from_state_dict(state, prefix, metadata, strict, own, *rest)
        optional = {prefix + PREFIX + name for name in type(self)._masked_names}
        missing += [key for key in own if key not in optional]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, given, *rest = tuple(super().__reduce_ex__(protocol))
        if made is not copyreg.__newobj__ or given != (type(self),):  # type: ignore[attr-defined]  # not in the stubs
            raise pickle.PicklingError(
                f"{type(self).__name__}: is not made as modules are, and cannot be stored with masks. "
                "Store its state_dict(), or call detach_masks() first."
            )
        return (_new, (type(self)._masked_from, type(self)._masked_names), *rest)


class _MaskedRecurrent(Masked):
    """A masked recurrent layer: it hands its operator a list of its weights, which is made anew at each use."""

    def _read_flat(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]  # type: ignore[union-attr]

    def _write_flat(self, _: Any) -> None:
        """The list in the module itself stays that of its parameters."""

    _flat_weights = property(_read_flat, _write_flat)

    def _init_flat_weights(self) -> None:
        """There is nothing to keep."""

    def _update_flat_weights(self) -> None:
        """There is nothing to keep."""

    def flatten_parameters(self) -> None:
        """Does nothing: the masked weights do not stay where they are."""


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)


def _masked_class(plain: type[nn.Module], names: tuple[str, ...]) -> type[Masked]:
    """A class like ``plain`` of which the parameters ``names`` are masked."""
    inside: dict[str, Any] = {name: _masked_parameter(name) for name in names}
    inside |= {"_masked_from": plain, "_masked_names": names, "__doc__": plain.__doc__}
    inside |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    if hasattr(plain, "__deepcopy__"):
        inside["__deepcopy__"] = _deep_copied
    own = _MaskedRecurrent if issubclass(plain, nn.RNNBase) else Masked
    metaclass: Any = type(plain)
    made: type[Masked] = metaclass(plain.__name__, (own, plain), inside)
    return made


def _masked_parameter(name: str) -> property:
    """What reads the masked parameter ``name`` of a module, through what tracers watch."""
    beside = PREFIX + name

    def read(module: nn.Module) -> Any:
        own = vars(module)
        parameter: Any = own[name] if name in own else nn.Module.__getattr__(module, name)
        if parameter is None or beside not in own["_buffers"]:
            return parameter
        if isinstance(parameter, Proxy):  # its graph would hold the product, as a constant
            raise PlanError(
                f"{name}: is masked, which symbolic_trace cannot follow. Trace the model, then attach masks."
            )
        mask: Any = nn.Module.__getattr__(module, beside)
        return parameter * mask

    def write(module: nn.Module, value: Any) -> None:
        vars(module)[name] = value  # a replica of a module holds tensors that are no parameters

    return property(read, write)


def _deep_copied(module: Masked, memo: dict[int, Any]) -> nn.Module:
    """A copy made by the own ``__deepcopy__`` of a user's class, with the masks."""
    kind = type(module)
    _become(module, kind._masked_from)
    try:
        twin: nn.Module = copy.deepcopy(module, memo)
    finally:
        _become(module, kind)
    install(twin, dict(masks_in(module)))
    return twin


def _new(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An instance of a masked class, before anything is in it."""
    kind = _masked_class(plain, names)
    return kind.__new__(kind)


def masked_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that are masked."""
    return type(module)._masked_names if isinstance(module, Masked) else ()


def masks_in(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The masks in a module itself, each with the name of its parameter."""
    found = ((name, module._buffers.get(PREFIX + name)) for name in masked_names(module))
    return [(name, mask) for name, mask in found if mask is not None]


def install(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Puts masks of parameters into the module that holds them."""
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode can never be trained with
        for name, mask in masks.items():
            there = module._buffers.get(PREFIX + name)
            if there is not None and (there.shape, there.dtype, there.device) == (mask.shape, mask.dtype, mask.device):
                there.copy_(mask)
            else:
                module._buffers[PREFIX + name] = mask.clone()
    fresh = tuple(name for name in masks if name not in masked_names(module))
    if fresh:
        plain = type(module)._masked_from if isinstance(module, Masked) else type(module)
        _become(module, _masked_class(plain, (*masked_names(module), *fresh)))


def unmask(module: Masked) -> None:
    """Makes a masked module what it was."""
    for name in masked_names(module):
        module._buffers.pop(PREFIX + name, None)
    _become(module, type(module)._masked_from)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def is_covered(module: nn.Module) -> bool:
    """Whether a masked module has got another class since."""
    return isinstance(module, Masked) and "_masked_from" not in vars(type(module))

"""Which attributes of the user's class have to change for it to fit its smaller tensors: candidates, and a search."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from speedup.capture import Captured
from speedup.inputs import batch_size
from speedup.literals import LITERALS
from speedup.plan import Scaled, ShrinkPlan
from speedup.repair import STANDARD_SIZES, Repair
from speedup.rules.call import raw_argument


def find_repairs(captured: Captured, plan: ShrinkPlan) -> tuple[tuple[Repair, ...], ...]:
    """Returns the attributes that hold a size which a literal of the graph had to give up, as sets to try in turn.

    A changed literal names its module by ``nn_module_stack``. If the module has an attribute of the argument's name,
    that is given the new value; else any integer of that module that equals the old value, alone or inside a tuple.
    Two literals that disagree leave the attribute as it is. The first set leaves alone what equals a literal that
    stays as well, the second does not; the third has attributes of objects that the modules hold (a configuration), the
    last those of the modules around them.
    """
    named: list[Repair] = []
    changes: dict[str, _Sizes] = {}
    around: dict[str, _Sizes] = {}
    batch = batch_size(captured.flat_inputs())
    modules = dict(captured.model.named_modules())
    for node in captured.nodes:
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path in modules]
        if node.target not in LITERALS or not stack:
            continue
        sizes = changes.setdefault(stack[-1], _Sizes())
        inside = modules[stack[-1]].named_children()
        near = [*stack[:-1], *(f"{stack[-1]}.{name}".lstrip(".") for name, _ in inside)]
        everyone = [sizes, *(around.setdefault(path, _Sizes()) for path in near)]
        new_values = plan.literals.get(node.name, {})
        for argument in node.target._schema.arguments:  # type: ignore[union-attr]  # an OpOverload
            old = raw_argument(node, argument.name)
            value = new_values.get(argument.name, old)
            held = vars(modules[stack[-1]]).get(argument.name)
            if value is not old and isinstance(held, int | tuple | list) and held == old:
                named.append(Repair(stack[-1], argument.name, old, value))
                continue
            for one in everyone:
                one.note(old, value, batch)
    given = {(repair.module, repair.attribute) for repair in named}

    def own(choice: Callable[["_Sizes"], Mapping[int, int]]) -> tuple[Repair, ...]:
        found = [r for path, sizes in changes.items() for r in _repairs(path, vars(modules[path]), choice(sizes))]
        return (*named, *(repair for repair in found if (repair.module, repair.attribute) not in given))

    held = [
        Repair(path, f"{holder}.{repair.attribute}", repair.old, repair.new)
        for path, sizes in changes.items()
        for holder, thing in vars(modules[path]).items()
        if _holds_sizes(holder, thing)
        for repair in _repairs(path, vars(thing), sizes.possible)
    ]
    nearby = [
        repair
        for path, sizes in around.items()
        if not isinstance(modules[path], tuple(STANDARD_SIZES))
        for repair in _repairs(path, vars(modules[path]), sizes.possible)
    ]
    known = {(repair.module, repair.attribute) for repair in own(lambda sizes: sizes.possible)}
    nearby = [repair for repair in nearby if (repair.module, repair.attribute) not in known]
    first, second = own(lambda sizes: sizes.certain), own(lambda sizes: sizes.possible)
    choices = (first, second, (*second, *held), (*second, *held, *nearby))
    return tuple(choice for place, choice in enumerate(choices) if choice not in choices[:place])


class _Sizes:
    """What has become of the sizes in the literals of a module."""

    def __init__(self) -> None:
        self.changed: dict[int, set[int]] = {}
        self.stayed: set[int] = set()

    def note(self, old: Any, value: Any, batch: int) -> None:
        """Notes an argument: a number or a list of numbers, before and after."""
        entries = value if isinstance(value, list | tuple) else [value]
        olds = list(old) if isinstance(old, list | tuple) else [old]
        for new_entry, old_entry in zip(entries, olds, strict=False):
            if isinstance(new_entry, Scaled) and new_entry.old % batch == new_entry.new % batch == 0:
                self.changed.setdefault(new_entry.old // batch, set()).add(new_entry.new // batch)
            elif isinstance(new_entry, int) and isinstance(old_entry, int) and new_entry != old_entry:
                self.changed.setdefault(old_entry, set()).add(new_entry)
            elif isinstance(old_entry, int) and isinstance(old, list | tuple):
                self.stayed.add(old_entry)

    @property
    def possible(self) -> dict[int, int]:
        """The sizes that some literal gave up, and the one that took their place."""
        return {old: next(iter(news)) for old, news in self.changed.items() if len(news) == 1}

    @property
    def certain(self) -> dict[int, int]:
        """Those that no literal keeps."""
        return {old: new for old, new in self.possible.items() if old not in self.stayed}


def _repairs(path: str, attributes: Mapping[str, Any], sizes: Mapping[int, int]) -> Iterator[Repair]:
    """The attributes that hold one of the sizes."""
    for name, value in attributes.items():
        new = _replaced(value, sizes)
        if not name.startswith("_") and new is not value and new != value:
            yield Repair(path, name, value, new)


def _holds_sizes(name: str, thing: Any) -> bool:
    """Whether a module's attribute is an object with attributes: a configuration."""
    plain = not isinstance(thing, nn.Module | Tensor | type) and not callable(thing)
    return plain and hasattr(thing, "__dict__") and not name.startswith("_")


def _replaced(value: Any, sizes: Mapping[int, int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return sizes.get(value, value)
    if type(value) in (tuple, list) and all(isinstance(item, int | tuple | list) for item in value):
        return type(value)(_replaced(item, sizes) for item in value)
    return value


FITS = float("inf")
_TRIES = 60
"""Runs of the class that a search may take."""


def fewest(
    model: nn.Module, choices: Sequence[tuple[Repair, ...]], far: Callable[[tuple[Repair, ...]], float]
) -> Iterator[tuple[Repair, ...]]:
    """Yields sets of repairs with which the class fits, each with as few as it needs.

    The first set to choose from is where the search begins; it is part of the others.
    A number can be equal to a size by chance: where it is not needed, or does harm, it stays.

    Args:
        model: The dense model.
        choices: Repairs to choose from, in sets to try in turn.
        far: Runs the class with some repairs; returns how far it gets: the calls of modules, :data:`FITS` if it fits.
    """
    known: dict[frozenset[tuple[str, str]], float] = {}

    def once(repairs: tuple[Repair, ...]) -> float:
        key = frozenset((repair.module, repair.attribute) for repair in repairs)
        if key not in known and len(known) < _TRIES:
            known[key] = far(repairs)
        return known.get(key, 0.0)

    if once(()) == FITS:
        yield ()
        return
    if once(choices[0]) == FITS:
        yield _needed(model, choices[0], once)
    for repairs in filter(None, choices[1:] or choices):
        for start in sorted((choices[0], repairs, ()), key=lambda start: -once(start)):
            found = _searched(model, repairs, start, once)
            if found is not None:
                yield _needed(model, found, once)
                break


def _searched(
    model: nn.Module,
    repairs: tuple[Repair, ...],
    chosen: tuple[Repair, ...],
    far: Callable[[tuple[Repair, ...]], float],
) -> tuple[Repair, ...] | None:
    """Leaves out, or takes in, what gets the class further: by name, by class, by place, one by one."""
    best, improved = far(chosen), True
    while improved and best < FITS:
        improved = False
        for group in _groups(model, repairs):
            whole = all(repair in chosen for repair in group)
            other = tuple(
                r for r in repairs if (r in chosen and not (whole and r in group)) or (r in group and not whole)
            )
            reached = far(other)
            if reached > best:
                chosen, best, improved = other, reached, True
                if best == FITS:
                    break
    return chosen if best == FITS else None


def _needed(
    model: nn.Module, repairs: tuple[Repair, ...], far: Callable[[tuple[Repair, ...]], float]
) -> tuple[Repair, ...]:
    """Those of the repairs, in groups of one name and class, without which the class does not fit."""
    for group in _groups(model, repairs, finest=2):
        fewer = tuple(repair for repair in repairs if repair not in group)
        if fewer and len(fewer) < len(repairs) and far(fewer) == FITS:
            repairs = fewer
    return repairs


def _groups(model: nn.Module, repairs: Sequence[Repair], finest: int = 4) -> list[list[Repair]]:
    """Repairs that likely are needed together or not at all, the largest groups first, each once."""
    keys: tuple[Callable[[Repair], Any], ...] = (
        lambda repair: repair.attribute,
        lambda repair: (type(model.get_submodule(repair.module)), repair.attribute),
        lambda repair: (re.sub(r"\d+", "*", repair.module), repair.attribute),
        lambda repair: (repair.module, repair.attribute),
    )
    found: list[list[Repair]] = []
    for key in keys[:finest]:
        groups: dict[Any, list[Repair]] = {}
        for repair in repairs:
            groups.setdefault(key(repair), []).append(repair)
        found += [group for group in groups.values() if group not in found]
    return found

"""(graph, plan) -> a smaller module: the user's own class where its Python still fits, else the rewritten graph."""

import copy
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from speedup.analysis import tensor_names
from speedup.capture import Captured, attribute, captured_from
from speedup.cut import ShrunkGraph, shrink_graph
from speedup.errors import MisfitError, first_line
from speedup.fitting import FITS, fewest, find_repairs
from speedup.inputs import with_batch
from speedup.numeric import perturbed, relative_difference, varied
from speedup.plan import ShrinkPlan
from speedup.program import beside, copied, evaluating, is_hollow, quiet, to_program
from speedup.repair import Repair, repaired
from speedup.replay import first_difference
from speedup.surroundings import surroundings_differ


@dataclass(frozen=True)
class Shrunk:
    """A shrunk model.

    Attributes:
        model: The user's own class, or the rewritten graph.
        graph: The rewritten graph, which shares its tensors with ``model``.
        repairs: Attributes that were changed; empty for a graph.
        obstacle: Why the user's own class could not be used; None where it is.
    """

    model: nn.Module
    graph: ShrunkGraph
    repairs: tuple[Repair, ...]
    obstacle: str | None


def shrink(captured: Captured, plan: ShrinkPlan, *, thorough: bool = True) -> Shrunk:
    """Returns the shrunk model: the user's class if its Python code then does what the rewritten graph does.

    That is checked, not assumed: by numbers on the example inputs at two batch sizes, and call by call in the graph of
    the class, captured again; on the meta device, where there are no numbers, by the calls alone. Attributes get a new
    value only where it is needed for that.

    Args:
        captured: The model.
        plan: What is kept of it.
        thorough: Whether the class is captured again, too; without that the numbers alone decide, which takes
            milliseconds instead of seconds.
    """
    graph = shrink_graph(captured, plan)
    for module in captured.graph_module.modules():
        module.training = captured.model.training
    swaps = _swaps(captured, plan, graph)
    obstacles: list[str] = []

    def far(repairs: tuple[Repair, ...]) -> float:
        entry = captured.entry(repaired(captured.model, swaps, repairs))
        obstacle, calls = _compared(entry, graph, captured)
        obstacle = obstacle or _training_error(entry, captured)
        obstacles.append(obstacle or "")
        return calls if obstacle else FITS

    obstacle = _uncopied(captured.model, swaps)
    for repairs in fewest(captured.model, find_repairs(captured, plan), far) if not obstacle else ():
        module = repaired(captured.model, swaps, repairs)
        measured = repairs + _bare_norms(module, captured)
        if measured != repairs:
            module = repaired(captured.model, swaps, measured)
        tried = is_hollow(captured.model) and measured == repairs  # without weights the calls are compared at once
        other = None if tried or not thorough else _other_calls(captured.entry(module), graph, captured)
        if other is None and captured.parts is not None:
            other = surroundings_differ(captured.parts, captured.model, module)
        if not other:
            return Shrunk(module, graph, measured, None)
        obstacle = obstacle or other
    obstacle = obstacle or obstacles[:2][-1]  # that of the first repairs, tried second
    if captured.parts is not None:
        raise MisfitError(
            f"{obstacle}: this code does not fit smaller tensors, and a model that is captured in parts has no other. "
            "Exclude the module that it belongs to, or whose sizes it reads.",
            _misfits(captured, plan, swaps, graph),
        )
    graph.train(captured.model.training)
    return Shrunk(graph, graph, (), obstacle)


def _uncopied(model: nn.Module, swaps: dict[int, Tensor]) -> str:
    """Why ``model`` cannot be copied; empty if it can be."""
    try:
        repaired(model, swaps, ())
    except Exception as error:  # noqa: BLE001  # whatever the user's objects raise
        return f"{type(model).__name__}: cannot be copied ({type(error).__name__}: {first_line(error)})"
    return ""


def _misfits(captured: Captured, plan: ShrinkPlan, swaps: dict[int, Tensor], graph: ShrunkGraph) -> dict[str, str]:
    """Why a part does not fit its smaller tensors, or the code around it while the others stay as they are."""
    parts, model = captured.parts, captured.model
    assert parts is not None
    choices = ((), *find_repairs(captured, plan))
    found: dict[str, str] = {}
    if surroundings_differ(
        parts, model, repaired(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}, ())
    ):
        return found  # a copy does something else even with all its tensors
    for path in dict.fromkeys(parts.paths):
        part = model.get_submodule(path)
        own = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
        alone = {held: tensor for held, tensor in swaps.items() if held in own}
        reasons = []
        for choice in choices:
            within = tuple(repair for repair in choice if f"{repair.module}.".startswith(f"{path}."))
            small = repaired(model, alone, within)
            reasons.append(_own_misfit(path, small, graph, captured) or surroundings_differ(parts, model, small))
        if all(reasons):
            found[path] = str(reasons[0])
    if not found:  # the numbers agree by chance, the calls do not
        for choice in choices:
            text, node = _other_call(captured.entry(repaired(model, swaps, choice)), graph, captured)
            around = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()] if node else []
            found |= dict.fromkeys([path for path in parts.paths if path in around], text)
    return found


def _own_misfit(path: str, small: nn.Module, graph: ShrunkGraph, captured: Captured) -> str | None:
    """How a part of ``small`` differs from what the graph says of it; None if it does not."""
    assert captured.parts is not None
    with evaluating(small, graph, captured.model), torch.no_grad(), quiet():
        results, _ = graph(*copy.deepcopy(captured.args))
        for name, (args, kwargs), expected in zip(captured.parts.paths, captured.args, results, strict=True):
            if name != path:
                continue
            try:
                found = small.get_submodule(path)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            except Exception as error:  # noqa: BLE001  # whatever the user's code raises
                return f"{_last_line_of(error)}: {first_line(error)}"
            leaves = pytree.tree_leaves(expected), pytree.tree_leaves(found)
            if len(leaves[0]) != len(leaves[1]) or not all(map(_same, *leaves)):
                return "its Python code computes something else than the rewritten graph"
    return None


def _other_calls(entry: nn.Module, graph: ShrunkGraph, captured: Captured) -> str | None:
    """Where the graph of ``entry``, captured again, does something else than ``graph``; None if nowhere."""
    return _other_call(entry, graph, captured)[0] or None


def _other_call(entry: nn.Module, graph: ShrunkGraph, captured: Captured) -> tuple[str, fx.Node | None]:
    """The same, with the node that does it if there is one."""
    args, kwargs = captured.args, captured.kwargs
    with evaluating(entry, captured.model), quiet():  # hooks of a copy may write to the model
        try:
            with torch.no_grad():
                if not is_hollow(entry):
                    entry(*copy.deepcopy(args), **copy.deepcopy(kwargs))  # what it makes once and keeps is made now
            program = to_program(entry, args, kwargs, dynamic=captured.fixed_batch is None)
        except Exception as error:  # noqa: BLE001  # whatever the user's code raises
            raised = error.__cause__ if isinstance(error.__cause__, Exception) else error  # inside torch.export
            return f"{_last_line_of(raised)}: {first_line(raised)}", None
        again = captured_from(program, entry).graph_module
    owned = {id(tensor) for tensor in (*entry.parameters(), *entry.buffers())}
    return first_difference(graph, again, captured.flat_inputs(), batches=captured.batches, owned=owned)


def _swaps(captured: Captured, plan: ShrinkPlan, graph: ShrunkGraph) -> dict[int, Tensor]:
    """For each tensor of the user's model by identity the one that takes its place."""
    names = tensor_names(captured.graph_module)
    swaps = {id(attribute(captured.graph_module, name)): attribute(graph, name) for name in names}
    for name in sorted(plan.tensors.difference(names)):  # what training alone uses
        dense = attribute(captured.graph_module, name)
        swaps[id(dense)] = plan.cut_copy(name, dense)
    return swaps


def _training_error(entry: nn.Module, captured: Captured) -> str | None:
    """How ``entry`` fails in training mode where that computes more and the original does not; None if it does not."""
    if not captured.unused:
        return None
    error = _raised_in_training(entry, captured)
    if error is None or _raised_in_training(captured.entry(captured.model), captured) is not None:
        return None
    return f"{_last_line_of(error)}: {first_line(error)}"


def _raised_in_training(module: nn.Module, captured: Captured) -> Exception | None:
    module, args, kwargs = copy.deepcopy((module, captured.args, captured.kwargs))
    args, kwargs = beside(module, (args, kwargs))
    try:
        with torch.no_grad(), quiet():
            module.train()(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        return error
    return None


def _bare_norms(module: nn.Module, captured: Captured) -> tuple[Repair, ...]:
    """Repairs for norms without vectors: only a run tells how many channels they get."""
    norms = {name: norm for name, norm in module.named_modules() if isinstance(norm, _NormBase) and not norm.affine}
    found: dict[str, Repair] = {}

    def note(name: str, norm: _NormBase, inputs: tuple[Tensor, ...]) -> None:
        alone = isinstance(norm, _InstanceNorm) and inputs[0].dim() == norm._get_no_batch_dim()  # type: ignore[no-untyped-call]  # of torch
        size = inputs[0].shape[0 if alone else 1]
        if size != norm.num_features:
            found[name] = Repair(name, "num_features", norm.num_features, size)

    hooks = [norm.register_forward_pre_hook(partial(note, name)) for name, norm in norms.items()]
    if hooks:
        args, kwargs = beside(module, copy.deepcopy((captured.args, captured.kwargs)))
        with evaluating(module), torch.no_grad(), quiet():
            captured.entry(module)(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return tuple(found.values())


def _compared(module: nn.Module, graph: ShrunkGraph, captured: Captured) -> tuple[str | None, int]:
    """Returns what :func:`difference` does, and how many calls of modules there were before it showed.

    Without weights no numbers can differ: the calls are compared instead.
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        compared = _other_calls if is_hollow(module) else difference
        return compared(module, graph, captured), calls
    finally:
        hook.remove()


def difference(module: nn.Module, graph: ShrunkGraph, captured: Captured) -> str | None:
    """Returns how ``module`` differs from ``graph`` at two batch sizes; None if it does not.

    Both run with the same perturbed parameters, so that no zero can hide a mistake, and in their own precision: they
    should be the same calls in the same order. Constants that the user's code makes as it runs stay what they are.
    """
    module, graph = copied((module, graph))  # together: they share their tensors
    generator = torch.Generator().manual_seed(0)
    with evaluating(module, graph, captured.model), torch.no_grad(), quiet():
        shared = {id(tensor) for tensor in (*graph.parameters(), *graph.buffers())}
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in shared:
                tensor.copy_(perturbed(tensor, generator))
        for batch in captured.batches:
            args, kwargs = with_batch((captured.args, captured.kwargs), batch)
            args, kwargs = pytree.tree_map(lambda leaf: varied(leaf, generator), (args, kwargs))
            try:  # first the class, which fails early if it does
                found = pytree.tree_leaves(module(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
            except Exception as error:  # noqa: BLE001  # whatever the user's code raises
                return f"{_last_line_of(error)}: {first_line(error)}"
            try:
                expected = pytree.tree_leaves(graph(*args, **kwargs))
            except Exception as error:  # noqa: BLE001  # the proof will name the node
                return f"the rewritten graph fails: {first_line(error)}"
            if len(found) != len(expected) or not all(map(_same, expected, found)):
                return "its Python code computes something else than the rewritten graph"
    return None


def _same(expected: Any, found: Any) -> bool:
    """Whether two outputs are one up to rounding."""
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return not isinstance(expected, Tensor) or torch.equal(expected, found)
    if not isinstance(found, Tensor) or expected.shape != found.shape:
        return False
    return relative_difference(expected.double(), found.double()) <= 100 * torch.finfo(expected.dtype).eps


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def _last_line_of(error: Exception) -> str:
    """The last line of the user's code in a traceback, as file:line."""
    frame, place = error.__traceback__, "the model's code"
    while frame is not None:
        code = frame.tb_frame.f_code
        if not code.co_filename.startswith((_TORCH, "<")) and code.co_filename != __file__:
            place = f"{code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place

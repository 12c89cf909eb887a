"""A model in, one graph of ATen calls out, through ``torch.export``.

The graph keeps composite operators (``conv2d``, ``linear``, ``layer_norm``, ...), every shape, the fully
qualified name of every parameter and the line of Python that made each node.
"""

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from speedup.errors import CaptureError, first_line
from speedup.inputs import ExampleInputs, attempts, batch_size, describe, split_inputs
from speedup.normalise import normalise
from speedup.parts import Parts, find_parts
from speedup.program import evaluating, is_hollow, quiet, to_program


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Attributes:
        model: The user's own module, never changed.
        graph_module: The captured graph; its ``get_attr`` nodes name the tensors of ``model``, which it shares.
        args: Positional example inputs, with a batch of two or more.
        kwargs: Keyword example inputs, likewise.
        program: What ``torch.export`` gave, from which the graph was made.
        training: The graph of the training mode, where that uses parameters which evaluation does not (auxiliary
            heads); None if it does not, or cannot be captured.
        parts: How the model is captured that cannot be whole; ``args`` are the inputs of the parts then. None if it is.
        read: Gives what a tensor holds by its name, or None if it does not know, where the model itself is on the meta
            device and holds nothing.
    """

    model: nn.Module
    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    program: ExportedProgram
    training: fx.GraphModule | None = None
    parts: Parts | None = None
    read: Callable[[str], Tensor | None] | None = None

    def tensor(self, name: str) -> Tensor:
        """Returns what the tensor ``name`` of the graph holds; only as long as the caller keeps it is it in memory.

        Raises:
            CaptureError: It is on the meta device, and nothing else says what it holds.
        """
        held: Tensor = attribute(self.graph_module, name)
        found = held if not held.is_meta else self.read(name) if self.read is not None else None
        if found is None:
            raise CaptureError(f"{name}: is on the meta device and holds nothing. Give the model with its weights.")
        return found

    def known(self, name: str) -> Any:
        """What is registered under ``name``; of a model on the meta device what its buffers hold, if that is known."""
        held = attribute(self.graph_module, name)
        if not isinstance(held, Tensor) or not held.is_meta:
            return held
        return self.read(name) if self.read is not None and not isinstance(held, nn.Parameter) else None

    def entry(self, model: nn.Module) -> nn.Module:
        """Returns what takes the inputs of the graph: ``model``, the captured one or its like, or its parts."""
        return model if self.parts is None else self.parts.entry(model)

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the graph in the order in which they run."""
        return list(self.graph_module.graph.nodes)

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size at which the graph is right; None where it is right at any."""
        inputs = [node.meta.get("val") for node in self.nodes if node.op == "placeholder"]
        sizes = [size for value in inputs if isinstance(value, Tensor) for size in value.shape]
        dynamic = any(not is_concrete_int(size) for size in sizes)
        return None if dynamic else batch_size((self.args, self.kwargs))

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes to compare at: that of the example, and another where the graph is right at any."""
        example = batch_size((self.args, self.kwargs))
        return (example, 3) if self.fixed_batch is None else (example,)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters that the graph should use and does not: heads for training only, spare layers."""
        read = self.graph_module.graph.find_nodes(op="get_attr")
        used = {id(attribute(self.graph_module, str(node.target))) for node in read if node.users}
        outside = self.parts.outside(self.model) if self.parts is not None else {}
        named = self.model.named_parameters()
        return tuple(name for name, tensor in named if name not in outside and id(tensor) not in used)

    def flat_inputs(self) -> list[Any]:
        """The example inputs, one for each placeholder."""
        return pytree.tree_leaves((self.args, self.kwargs))


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Captured:
    """Returns ``model`` as a graph, with an open batch if its code allows one.

    The model is captured in eval mode and is left as it was. It may be on the meta device, whatever the inputs are on:
    then nothing is computed.

    Args:
        model: Any module that ``torch.export`` can capture, whole or in parts.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.

    Raises:
        CaptureError: The model raises on the example, or nothing of it can be captured.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{model!r:.80}: is no torch.nn.Module. Give an instance of one.")
    args, kwargs = split_inputs(example_inputs)
    if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
        raise CaptureError("inputs: torch.export takes no packed sequences. Give padded ones, and the layers them too.")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(f"{type(model).__name__}: its lazy layers have no sizes yet. Call it once on an example.")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(
            f"{type(model).__name__}: was made under torch.inference_mode(), whose tensors cannot be changed outside. "
            "Make it outside."
        )
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and (not leaf.numel() or (leaf.is_floating_point() and not _numbers(leaf))):
            fact = "holds nan" if leaf.numel() else "is empty"
            raise CaptureError(f"{describe(leaf)}: this example input {fact}. Give one that the model is made for.")
    with evaluating(model):
        try:
            with torch.no_grad():
                if not is_hollow(model):  # which may ask for numbers that only torch.export makes up
                    model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception as error:  # whatever the user's code raises is the user's to read
            raise CaptureError(
                f"{type(model).__name__}: raises {type(error).__name__} on the example inputs ({first_line(error)}). "
                f"Check the shapes and types of the inputs: {describe((args, kwargs))}."
            ) from error
        try:
            captured = _captured(model, model, args, kwargs)
        except CaptureError as error:
            parts = None if is_hollow(model) else find_parts(model, args, kwargs, str(error))
            if parts is None:
                raise
            captured = replace(_captured(model, parts.entry(model), parts.calls, {}), parts=parts)
        return replace(captured, training=_training_graph(captured))


def _captured(model: nn.Module, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """The graph of ``entry``, ``model`` or parts of it, with an open batch if that can be.

    Raises:
        CaptureError: It cannot be captured; the reason against an open batch.
    """
    refusal: CaptureError | None = None
    for some_args, some_kwargs, dynamic in attempts(args, kwargs):
        try:
            captured = captured_from(to_program(entry, some_args, some_kwargs, dynamic=dynamic), model)
        except CaptureError as error:
            refusal = refusal or error
            continue
        if is_hollow(model):  # the program has inputs without content as well
            captured = replace(captured, args=some_args, kwargs=some_kwargs)
        return captured
    assert refusal is not None
    raise refusal


def _numbers(tensor: Tensor) -> bool:
    return tensor.is_meta or not bool(tensor.isnan().any())


def captured_from(program: ExportedProgram, model: nn.Module | None = None) -> Captured:
    """Returns an exported program, fresh or loaded from a .pt2 file, as a graph.

    Args:
        program: Exported without decomposition, so that composite operators are whole.
        model: The module it was exported from; if there is none any more, its graph stands for it.

    Raises:
        CaptureError: A submodule has a name that Python cannot read in code, such as ``in``.
    """
    try:
        with quiet():
            graph_module = program.module(check_guards=False)
            assert isinstance(graph_module, fx.GraphModule)
            normalise(graph_module)
            graph_module.recompile()
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise CaptureError(f"{line}: a submodule is named like a word of Python. Give it another name.") from error
    args, kwargs = program.example_inputs
    return Captured(graph_module if model is None else model, graph_module, args, kwargs, program)


def _training_graph(captured: Captured) -> fx.GraphModule | None:
    if not captured.unused:
        return None
    entry = captured.entry(captured.model)
    entry.train()  # capture puts the modes back
    try:
        program = to_program(entry, captured.args, captured.kwargs, dynamic=captured.fixed_batch is None)
    except CaptureError:
        return None
    return captured_from(program, captured.model).graph_module


def attribute(module: nn.Module, name: str) -> Any:
    """Whatever is registered in ``module`` under the qualified ``name``."""
    return operator.attrgetter(name)(module)


def at_source(node: fx.Node) -> str:
    """Where in the user's code a node comes from, as " at file:line"; empty if unknown."""
    line = source_line(node)
    return f" at {line}" if line else ""


def output_names(graph_module: fx.GraphModule) -> list[str]:
    """The names of what a graph returns, one for each leaf, as far as its containers have names; empty for others."""
    info = getattr(graph_module.graph._codegen, "pytree_info", None)
    return [] if info is None or info.out_spec is None else list(_leaf_names(info.out_spec, ""))


def _leaf_names(spec: pytree.TreeSpec, prefix: str) -> Iterator[str]:
    """The names of the leaves under a container: its own name, and their keys or places in it."""
    if spec.is_leaf():
        yield prefix
        return
    children = spec.children()
    named = isinstance(spec.context, list | tuple) and all(isinstance(key, str) for key in spec.context)
    keys = spec.context if named and len(spec.context) == len(children) else [""] * len(children)
    for key, child in zip(keys, children, strict=True):
        yield from _leaf_names(child, f"{prefix}.{key}".strip("."))


def source_line(node: fx.Node) -> str:
    """Where in the user's code a node comes from, as file:line; empty if unknown."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).splitlines()]
    frames = [line for line in lines if line.startswith("File")]
    if not frames:
        return ""
    file, _, rest = frames[-1].removeprefix('File "').partition('", line ')
    return f"{file}:{rest.split(',')[0]}"

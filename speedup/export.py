"""A model in, a file that stands alone out: ONNX or a .pt2 archive, compared with the model before anybody sees it."""

import inspect
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx_ir.passes import PassError
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass, OutputFixPass
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind, TensorArgument
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.onnx import ONNXProgram
from torch.onnx.errors import OnnxExporterError
from torch.utils import _pytree as pytree

from speedup.agreement import TOLERANCE, Agreement, compare, tensors, weights
from speedup.errors import ExportError, SpeedupError, first_line
from speedup.inputs import ExampleInputs, attempts, batch_size, carries_batch, split_inputs
from speedup.program import evaluating, quiet, to_program, write_program
from speedup.session import NUMPY_TYPES, ORT_ERRORS, NoKernel, one_line, open_session

OPSETS = range(18, 26)
"""Opsets that can be asked for: torch writes 18, and onnxscript converts from there up to 25."""


@dataclass(frozen=True)
class ModelFile(Agreement):
    """A file that was written, and how near it is to the model; its note also says why a batch is fixed.

    Attributes:
        path: The file.
        size: Bytes, those of external data included.
        dynamic_batch: Whether it takes any batch; if not, that of the example only.
    """

    path: Path
    size: int
    dynamic_batch: bool


@dataclass(frozen=True)
class OnnxFile(ModelFile):
    """An ONNX file that was written.

    Attributes:
        opset: Version of the operators.
    """

    opset: int


def export_onnx(
    model: nn.Module, example_inputs: ExampleInputs, path: Path | str, *, opset: int | None = None
) -> OnnxFile:
    """Writes `model` in eval mode as one ONNX file that `check_onnx` agrees with; otherwise nothing appears at `path`.

    Inputs are named after the parameters of `forward`, outputs after their place in what it returns («output»,
    «output_0», «logits»), the open dimension «batch». Weights of more than 1.5 GB go to a second file, `path`.data.

    Args:
        model: Any module that `torch.export` can capture whole, or a `ShrunkGraph`; it is left as it was.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        path: The file to write; one that is there is replaced.
        opset: One of `OPSETS`; None for 20, or 22 with bfloat16, which convolutions do not take before.

    Raises:
        ExportError: The path cannot be written, the opset is not supported, ONNX cannot express an operator or an
            output, or the file does not compute what the model computes.
    """
    path = Path(path)
    bfloat16 = any(tensor.dtype is torch.bfloat16 for tensor in (*weights(model), *tensors(example_inputs)))
    version = opset if opset is not None else 22 if bfloat16 else 20
    if version not in OPSETS:
        raise ExportError(f"{path}: opset {version} is not supported. Use one from {OPSETS[0]} to {OPSETS[-1]}.")

    def write(program: ExportedProgram, draft: Path, batches: Sequence[int]) -> Agreement:
        # onnxscript 0.7 merges a bfloat16 batch norm into weights of float32, which no longer fit their input.
        translated = _translate(program, model, example_inputs, version, optimize=not bfloat16)
        translated.save(draft, external_data=False)
        return check_onnx(draft, model, example_inputs, batches=batches)

    return OnnxFile(**_written(model, example_inputs, path, write), opset=version)


def export_pt2(model: nn.Module, example_inputs: ExampleInputs, path: Path | str) -> ModelFile:
    """Writes `model` in eval mode for `torch.export.load`; what does not compute the same when loaded never appears.

    Args:
        model: Any module that `torch.export` can capture whole, or a `ShrunkGraph`; it is left as it was.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        path: The file to write, with the suffix .pt2; one that is there is replaced.

    Raises:
        ExportError: The path cannot be written, the model cannot be captured or saved, or differs when loaded.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(f"{path}: torch.export.load takes the suffix .pt2 only. Name it {path.stem}.pt2.")

    def write(program: ExportedProgram, draft: Path, batches: Sequence[int]) -> Agreement:
        try:
            write_program(program, draft)
        except OSError:
            raise
        except Exception as error:  # what cannot be serialised has no common error class
            raise ExportError(
                f"{type(model).__name__}: torch.export cannot save it ({first_line(error)}). Take and return plain "
                "tuples, lists and dictionaries of tensors."
            ) from error
        loaded = torch.export.load(draft).module()

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
            try:
                return tensors(loaded(*args, **kwargs))
            except Exception as error:  # guards and operators raise what they like
                raise ExportError(f"{path}: fails when loaded again ({first_line(error)}). Use ONNX.") from error

        return compare(run, draft, model, example_inputs, batches=batches)

    return ModelFile(**_written(model, example_inputs, path, write))


def check_onnx(
    path: Path | str,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batches: Sequence[int] = (1, 3),
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Returns how near an ONNX file is to `model` in onnxruntime on the CPU, after the checks of `onnx.checker`.

    A file with a fixed batch is compared at that one. Nothing is compared where the CPU provider has no kernel for a
    type; the note then says so. The inputs and the tolerance are those of `agreement.compare`.

    Args:
        path: An ONNX file whose inputs are named as `export_onnx` names them.
        model: What it should compute in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        batches: Batch sizes to compare at.
        tolerance: Largest difference allowed, relative to the largest value of an output.

    Raises:
        ExportError: The file is not valid, cannot be run, or differs.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: is not valid ONNX ({first_line(error)}). Use another opset.") from error
    try:
        session = open_session(path, threads=None, provider="CPUExecutionProvider")
    except SpeedupError as error:
        if isinstance(error.__cause__, NoKernel):
            return Agreement(False, None, (), f"Not compared: {one_line(error.__cause__)}")
        raise ExportError(str(error)) from error
    declared = {value.name: value for value in session.get_inputs()}
    for value in (*declared.values(), *session.get_outputs()):
        if value.type not in NUMPY_TYPES:
            return Agreement(False, None, (), f"Not compared: onnxruntime takes and gives no arrays of {value.type}.")
    inputs = _named_inputs(model, example_inputs)
    if not declared.keys() <= inputs.keys():
        raise ExportError(
            f"{path}: takes {', '.join(declared)}, but the model {', '.join(inputs)}. Write it with export_onnx."
        )
    present = batch_size(example_inputs)
    firsts = [value.shape[0] for name, value in declared.items() if carries_batch(inputs[name], present)]
    fixed = [first for first in firsts if isinstance(first, int)]

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        arrays = dict(zip(inputs, (leaf.numpy(force=True) for leaf in tensors((args, kwargs))), strict=True))
        try:
            return [torch.from_numpy(array) for array in session.run(None, {name: arrays[name] for name in declared})]
        except ORT_ERRORS as error:
            batch = batch_size((args, kwargs))
            raise ExportError(
                f"{path}: onnxruntime cannot run it with batch {batch}: {one_line(error)} Use another opset."
            ) from error

    return compare(run, path, model, example_inputs, batches=fixed[:1] or batches, tolerance=tolerance)


def _written(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: Path,
    write: Callable[[ExportedProgram, Path, Sequence[int]], Agreement],
) -> dict[str, Any]:
    """Puts what `write` makes of `model` at `path`, with an open batch if that agrees, and returns the file's facts.

    Raises:
        ExportError: The reason against an open batch, where that of the example does not do either.
    """
    reasons: list[str] = []
    with _draft(path) as draft, quiet(), evaluating(model):
        for args, kwargs, dynamic in attempts(*split_inputs(example_inputs)):
            batch = batch_size((args, kwargs))
            try:
                program = to_program(model, args, kwargs, dynamic=dynamic)
                agreement = write(program, draft, (1, 3) if dynamic else (batch,))
            except SpeedupError as error:
                reasons.append(str(error).replace(str(draft), str(path)))
                cause = error
                continue
            size = sum(file.stat().st_size for file in draft.parent.iterdir())
            note = "" if dynamic else f"The batch is fixed at {batch}. An open one does not do: {reasons[0]}"
            facts = asdict(agreement) | {"note": f"{note} {agreement.note}".strip()}
            return {**facts, "path": path, "size": size, "dynamic_batch": dynamic}
        raise ExportError(reasons[0]) from cause


def _translate(
    program: ExportedProgram, model: nn.Module, example_inputs: ExampleInputs, opset: int, *, optimize: bool
) -> ONNXProgram:
    """Returns `program` in ONNX, with names that dense and shrunk files share and without the user's source lines."""
    who = type(model).__name__
    returned = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    for value in returned:
        if not isinstance(value, TensorArgument) and not (isinstance(value, ConstantArgument) and value.value is None):
            raise ExportError(f"{who}: returns a number, which ONNX has no output for. Return tensors only.")
    outputs = _names(pytree.tree_unflatten(returned, program.call_spec.out_spec), TensorArgument)
    inputs = _named_inputs(model, example_inputs)
    present = batch_size(example_inputs)
    shapes = [{0: "batch"} if carries_batch(leaf, present) else None for leaf in inputs.values()]
    try:
        try:
            translated = _exported(program, opset, shapes, optimize)
        except PassError:  # the optimiser of onnxscript does not know every graph
            translated = _exported(program, opset, shapes, False)
    except OnnxExporterError as error:
        operator = re.search(r"OpOverload\(op='([\w.]+)'", str(error))
        told = first_line(error.__cause__ or error)
        fact = f"ONNX has no operator for {operator[1]}" if operator else f"torch.onnx fails ({told})"
        raise ExportError(f"{who}: {fact}. Replace it in the model, or use a .pt2 file.") from error
    assert translated is not None
    if translated.model.opset_imports.get("", opset) != opset:  # the converter only logs it
        raise ExportError(f"{who}: cannot be converted to opset {opset}. Use a lower one, down to {OPSETS[0]}.")
    OutputFixPass()(translated.model)  # what is input and output, or output twice, becomes two values
    graph = translated.model.graph
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name
    NameFixPass()(translated.model)
    ClearMetadataAndDocStringPass()(translated.model)
    return translated


def _exported(
    program: ExportedProgram, opset: int, shapes: list[dict[int, str] | None], optimize: bool
) -> ONNXProgram | None:
    with sdpa_kernel(SDPBackend.MATH):  # other kernels lay their outputs out as ONNX's parts of attention do not
        return torch.onnx.export(
            _without_projections(program),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            optimize=optimize,
            dynamic_shapes=shapes,
        )


def _without_projections(program: ExportedProgram) -> ExportedProgram:
    """Returns `program`, its LSTMs written out step by step if one projects its state: that of ONNX does not."""
    layers = program.graph.find_nodes(op="call_function", target=torch.ops.aten.lstm.input)
    if all(len({state.meta["val"].shape[-1] for state in layer.args[1]}) == 1 for layer in layers):
        return program
    every = torch.export.default_decompositions()
    steps: ExportedProgram = program.run_decompositions({torch.ops.aten.lstm.input: every[torch.ops.aten.lstm.input]})
    return steps


def _named_inputs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """The tensors among the inputs, in order, by the parameter of `forward` and their place in it."""
    args, kwargs = split_inputs(example_inputs)
    tree = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    return dict(zip(_names(tree, Tensor), tensors(tree), strict=True))


def _names(tree: Any, kind: type) -> list[str]:
    """Names for the leaves of `kind` in `tree` after the keys and indices that lead there: «state_t_0», «output_1»."""
    try:
        leaves = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:  # a container that was registered without keys
        leaves = [(str(index), leaf) for index, leaf in enumerate(pytree.tree_leaves(tree))]
    names = [re.sub(r"\W+", "_", name).strip("_") for name, leaf in leaves if isinstance(leaf, kind)]
    return [name if name[:1].isalpha() else f"output_{name}".strip("_") for name in names]


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Gives a path to write to; without an error what is there in the end takes its place at `path` in one step."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder, path.name)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # external data before what refers to them
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be written ({error.strerror or error}). Name a file in a folder that you may write to."
        ) from error

"""From a checkpoint folder to a smaller one, tensor by tensor: the model is never in memory. Whole or not at all."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune import folder as files
from graphprune.blueprint import Blueprint, described
from graphprune.checkpoints.architecture import resized
from graphprune.checkpoints.checkpoint import INDEX, PICKLED, Checkpoint, check_fits, is_counter, write_checkpoint
from graphprune.checkpoints.skeleton import Skeleton
from graphprune.compress import Progress, Stages, costs_of, planned
from graphprune.config import Request
from graphprune.errors import ModelError
from graphprune.folder import replacing, writing
from graphprune.report import Report, build_report
from speedup.capture import capture
from speedup.inputs import ExampleInputs
from speedup.plan import ShrinkPlan
from speedup.proof import prove
from speedup.shrink import shrink

CONFIG, DENSE_CONFIG = "config.json", "config.dense.json"


@dataclass(frozen=True)
class _Weights:
    """What the tensors of a model hold: those of a checkpoint, and the buffers that are computed.

    Attributes:
        checkpoint: The checkpoint.
        buffers: The buffers that it does not hold.
        names: For each name of a tensor of the model the name under which the checkpoint has it.
    """

    checkpoint: Checkpoint
    buffers: Mapping[str, Tensor]
    names: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, skeleton: Skeleton) -> "_Weights":
        """Returns the weights of a model, after a check that the checkpoint is that of the model.

        Raises:
            ModelError: It is another's, or two names of one tensor hold different things.
        """
        state = skeleton.model.state_dict(keep_vars=True)
        tensors = {
            **dict(skeleton.model.named_parameters(remove_duplicate=False)),
            **dict(skeleton.model.named_buffers(remove_duplicate=False)),
        }
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise ModelError(f"{name}: the state dict holds a {type(value).__name__} there. Leave it out.")
        first: dict[int, str] = {}
        owners = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        needed = {name: owner for name, owner in owners.items() if name in state and not is_counter(name)}
        check_fits(checkpoint, {name: tensor.shape for name, tensor in tensors.items()}, needed)
        for name, entry in checkpoint.entries.items():
            if entry.dtype.startswith(("F", "BF")) != tensors[name].is_floating_point():
                raise ModelError(
                    f"{checkpoint.folder}: {name} is of type {entry.dtype}, in the model "
                    f"{str(tensors[name].dtype).removeprefix('torch.')}. Build the model of this checkpoint."
                )
        holder: dict[str, str] = {}
        for name in checkpoint.entries:
            twin = holder.setdefault(owners[name], name)
            if twin != name and not torch.equal(checkpoint.tensor(twin), checkpoint.tensor(name)):
                raise ModelError(
                    f"{checkpoint.folder}: {name} and {twin} differ, and the model makes one tensor of them. "
                    "Build a model that does not tie them."
                )
        names = {name: holder[owner] for name, owner in owners.items() if owner in holder}
        return cls(checkpoint, skeleton.buffers, names)

    def __call__(self, name: str) -> Tensor | None:
        """What the tensor ``name`` holds, read now; None if that is not known."""
        held = self.names.get(name)
        return self.buffers.get(name) if held is None else self.checkpoint.tensor(held)


def compress_checkpoint(
    build_model: Callable[[], nn.Module],
    example_inputs: ExampleInputs,
    checkpoint: Path | str,
    out: Path | str,
    sparsity: float = 0.5,
    *,
    prove_it: bool = True,
    force: bool = False,
    **options: Any,
) -> Report:
    """Makes of a checkpoint folder a smaller one, tensor by tensor, and returns what was done, as in its report.json.

    The model is built without its weights, analysed and planned on shapes. A criterion reads one tensor at a time, and
    so does what is written: about the largest tensor has to fit into memory, twice if two of its dimensions shrink. The
    proof needs some ten times as many bytes for each element of that tensor, because it computes in double precision.

    The folder holds the weights in files of the same names, plan.json and report.json, and what else lay beside the
    weights, pickles left out. config.json has the new sizes where it is certain that the model's own code builds what
    is left; where it is not, the old one is called config.dense.json, and ``graphprune.load`` builds the model.

    Args:
        build_model: Makes the model that the checkpoint belongs to, such as its class.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        checkpoint: Folder with model.safetensors, or with model.safetensors.index.json and the files it names.
        out: Folder to write; it appears when everything in it is written.
        sparsity: Share of the channels of every prunable group that goes, in [0, 1).
        prove_it: Whether every node of the shrunk graph is compared with the masked original, with the weights of both
            checkpoints. Otherwise only the plan is checked: every shape follows from the labels.
        force: Whether to replace a folder of ``graphprune`` that is there.
        **options: The other fields of :class:`~graphprune.config.Request`.

    Raises:
        ConfigError: An option makes no sense, or a folder is missing or taken.
        ModelError: The checkpoint is damaged, holds pickles, or is not that of the model; nothing can be pruned.
        ProofError: The written checkpoint does not compute what the masked original does: nothing is handed over.
    """
    request = Request.of(sparsity=sparsity, **options)
    return deliver_checkpoint(
        Skeleton.of(build_model), example_inputs, Path(checkpoint), Path(out), request, prove_it=prove_it, force=force
    )


def deliver_checkpoint(
    skeleton: Skeleton,
    example_inputs: ExampleInputs,
    checkpoint: Path,
    out: Path,
    request: Request,
    *,
    prove_it: bool = True,
    force: bool = False,
    text: str = "",
    command: Sequence[str] = (),
    progress: Progress = lambda name: None,
) -> Report:
    """Does what :func:`compress_checkpoint` says with a model that is there without its weights.

    Args:
        skeleton: The model.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        checkpoint: Folder with its weights.
        out: Folder to write.
        request: What is asked.
        prove_it: Whether to compare with the masked original.
        force: Whether to replace a folder that is there.
        text: How the user named the model, for the report.
        command: The command line, for the report.
        progress: Called with the name of each stage as it begins.
    """
    stage = Stages(progress)
    with replacing(out, force=force) as draft:
        source = stage("open", Checkpoint.open, checkpoint)
        weights = stage("open", _Weights.of, source, skeleton)
        captured = replace(stage("capture", capture, skeleton.model, example_inputs), read=weights)
        dependencies, selection, plan, block = planned(captured, request, stage)
        shrunk = stage("shrink", shrink, captured, plan)
        blueprint = Blueprint.of(captured, plan, shrunk)
        shapes = _shapes(source, plan, blueprint.tied)

        def cut(name: str) -> Tensor:
            return plan.cut(blueprint.tied.get(name, name), source.tensor(name))

        with writing(out):
            stage("write", write_checkpoint, draft, source, shapes, cut)
        written = replace(weights, checkpoint=Checkpoint.open(draft))
        proof = None
        if prove_it:
            proof = stage(
                "verify",
                prove,
                dependencies.analysis,
                selection.live,
                plan,
                shrunk.graph,
                seed=request.seed,
                written=lambda name: _written(written, plan, name),
            )
        with writing(out):
            config = stage("write", _write_rest, source, draft, shapes, plan)
            blueprint.write(draft / files.PLAN)
        costs = stage("count", costs_of, captured, shrunk)
        report: Report = {
            "source": {
                "model": text,
                "class": type(skeleton.model).__name__,
                "inputs": described(example_inputs),
            },
            "command": list(command),
            **build_report(
                request=request,
                block=block,
                dependencies=dependencies,
                selection=selection,
                shrunk=shrunk,
                proof=proof,
                costs=costs,
                seconds=stage.seconds,
            ),
            "checkpoint": {
                "folder": str(checkpoint),
                "tensors": len(source.entries),
                "cut": sum(entry.shape != tuple(shapes[name]) for name, entry in source.entries.items()),
                "bytes": {"dense": source.bytes, "shrunk": written.checkpoint.bytes},
                "config": config,
            },
            "accuracy": None,
            "latency": None,
            "exports": {},
            "files": {path.name: files.fingerprint(path) for path in sorted(draft.iterdir())},
            "seconds": stage.seconds,
        }
        report["sha256"] = files.digest(report)
        (draft / files.REPORT).write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    return report


def _written(weights: _Weights, plan: ShrinkPlan, name: str) -> Tensor:
    """What the written checkpoint holds of a tensor; of what it does not hold, what the plan keeps."""
    found = weights(name)
    assert found is not None
    return found if name in weights.names else plan.cut(name, found)


def _shapes(source: Checkpoint, plan: ShrinkPlan, tied: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor after the shrink."""
    return {
        name: tuple(plan.cut(tied.get(name, name), torch.empty(entry.shape, device="meta")).shape)
        for name, entry in source.entries.items()
    }


def _write_rest(
    source: Checkpoint, draft: Path, shapes: Mapping[str, Sequence[int]], plan: ShrinkPlan
) -> dict[str, Any]:
    """Copies what lies beside the weights, and writes config.json; returns what became of that."""
    taken = {*source.metadata, INDEX, CONFIG, DENSE_CONFIG, files.PLAN, files.REPORT}
    for path in sorted(source.folder.iterdir()):
        weights = path.name.endswith((".safetensors", ".index.json", *PICKLED))
        if path.is_file() and path.name not in taken and not weights:
            shutil.copyfile(path, draft / path.name)
    if not (source.folder / CONFIG).is_file():
        return {"written": False, "reason": "the checkpoint has none"}
    try:
        told = json.loads((source.folder / CONFIG).read_bytes())
        dense = {name: entry.shape for name, entry in source.entries.items()}
        new = resized(told, dense, shapes, plan)
    except (ValueError, AttributeError):
        new = "it is no JSON object"
    if isinstance(new, str):
        shutil.copyfile(source.folder / CONFIG, draft / DENSE_CONFIG)
        return {"written": False, "reason": new}
    (draft / CONFIG).write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    changed = {key: [told.get(key), value] for key, value in new.items() if told.get(key) != value}
    return {"written": True, "changed": changed}

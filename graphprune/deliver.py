"""From a source to a folder: compress, export, measure, evaluate, write. Whole or not at all."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from graphprune import folder as files
from graphprune.archive import save_program
from graphprune.blueprint import Blueprint, described
from graphprune.compress import Calibrate, Progress, Result, Stages, compress
from graphprune.config import Request
from graphprune.errors import ConfigError
from graphprune.folder import replacing, writing
from graphprune.report import Report
from graphprune.source import Source
from graphprune.training import Training
from graphprune.training.fit import fit
from graphprune.weights import save_weights
from speedup.export import OPSETS, ModelFile, export_onnx, export_pt2
from speedup.latency import DEFAULT_LIMITS, Benchmark, Limits, benchmark

Find = Callable[[Source, Request, Calibrate | None], Result]
"""From a source, what is asked and what runs the model on some batches, to a result of the pipeline."""


@dataclass(frozen=True)
class Delivery:
    """A compressed model and where it is.

    Attributes:
        folder: The folder with all of it.
        report: What report.json holds.
        result: The shrunk model itself.
    """

    folder: Path
    report: Report
    result: Result


def deliver(
    source: Source,
    folder: Path,
    request: Request,
    *,
    force: bool = False,
    opset: int | None = None,
    find: Find | None = None,
    limits: Limits | None = DEFAULT_LIMITS,
    threads: int | None = None,
    command: Sequence[str] = (),
    progress: Progress = lambda name: None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Delivery:
    """Compresses a model into a folder, which appears when everything in it is written and proven.

    Args:
        source: The model; it is not changed.
        folder: Where to put it.
        request: What is asked.
        force: Whether to replace a folder that is there.
        find: A search or rounds, by which the model is found; None compresses in one shot.
        opset: Of the ONNX files; None leaves it to :func:`~speedup.export.export_onnx`.
        limits: How long to measure latency; None not to.
        threads: That onnxruntime may use while latency is measured; None leaves it to onnxruntime.
        command: The command line, for the report.
        progress: Called with the name of each stage as it begins.
        facts: What else the report says, or says otherwise.

    Raises:
        SpeedupError: One of the stages refused; there is no folder then, or what was there before.
    """
    if opset is not None and opset not in OPSETS:
        raise ConfigError(f"opset {opset}: is not supported. Use one from {OPSETS[0]} to {OPSETS[-1]}.")
    stage = Stages(progress)
    with replacing(folder, force=force) as draft:
        before = stage("evaluate", source.evaluate, source.model) if source.evaluate else None
        training = None if source.training is None else source.training.first(request.batches)
        calibrate = None if training is None else source.in_training(partial(_epoch, training, request.seed))
        if find is not None:
            result = stage("search", find, source, request, calibrate)
        else:
            result = compress(
                source.model, source.example_inputs, calibrate=calibrate, progress=progress, **request.model_dump()
            )
        stage.seconds |= result.report["seconds"]
        with writing(folder):
            exported = stage("export", _export, source, result, draft, opset)
        latency = stage("measure", _latency, exported, draft, threads, limits) if limits else None
        after = stage("evaluate", source.evaluate, result.model) if source.evaluate else None
        with writing(folder):
            stage("write", _write, result, draft)
        report: Report = {
            "source": {
                "model": source.text,
                "class": type(source.model).__name__,
                "inputs": described(source.example_inputs),
            },
            "command": list(command),
            **result.report,
            "accuracy": None if before is None else {"dense": before, "shrunk": after},
            "latency": latency,
            "exports": {name: _facts(file, draft) for name, file in exported.items()},
            "files": {path.name: files.fingerprint(path) for path in sorted(draft.iterdir())},
            "seconds": stage.seconds,
            **facts,
        }
        report["sha256"] = files.digest(report)
        with writing(folder):
            (draft / files.REPORT).write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    return Delivery(folder, report, result)


def _epoch(training: Training, seed: int, model: nn.Module) -> None:
    fit(model, training, 1, seed=seed)


def _export(source: Source, result: Result, draft: Path, opset: int | None) -> dict[str, ModelFile]:
    captured = result.dependencies.analysis.captured
    save_program(captured.program, draft / files.DENSE_PROGRAM)
    dense, small = (captured.entry(model) for model in (captured.model, result.model))
    inputs = source.example_inputs if captured.parts is None else captured.args
    models: Mapping[str, nn.Module] = {files.DENSE_ONNX: dense, files.ONNX: small}
    written: dict[str, ModelFile] = {
        name: export_onnx(model, inputs, draft / name, opset=opset) for name, model in models.items()
    }
    written[files.PROGRAM] = export_pt2(small, inputs, draft / files.PROGRAM)
    return written


def _latency(
    exported: Mapping[str, ModelFile], draft: Path, threads: int | None, limits: Limits
) -> dict[str, Any] | None:
    """The dense ONNX file and the shrunk one measured side by side; None where onnxruntime cannot run them."""
    dense, small = exported[files.DENSE_ONNX], exported[files.ONNX]
    if not (dense.checked and small.checked):
        return None
    batch = 1 if dense.dynamic_batch and small.dynamic_batch else max(dense.batches)
    found = benchmark([dense.path, small.path], threads=threads, batch=batch, limits=limits)
    return _named(found, draft).to_dict()


def _named(found: Benchmark, draft: Path) -> Benchmark:
    """``found`` with the names of the files instead of where they lay while they were measured."""
    prefix = f"{draft}/"
    return replace(
        found,
        models=tuple(replace(latency, model=Path(latency.model).name) for latency in found.models),
        control=replace(found.control, model=Path(found.control.model).name),
        warnings=tuple(warning.replace(prefix, "") for warning in found.warnings),
    )


def _facts(file: ModelFile, draft: Path) -> dict[str, Any]:
    facts = asdict(file) | {"note": file.note.replace(f"{draft}/", "")}
    del facts["path"], facts["size"]
    return facts


def _write(result: Result, draft: Path) -> None:
    captured = result.dependencies.analysis.captured
    save_weights(result.model, draft / files.WEIGHTS)
    Blueprint.of(captured, result.plan, result.shrunk).write(draft / files.PLAN)

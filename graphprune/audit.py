"""Proves again, from the files of a folder alone, what the folder claims."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune import folder as files
from graphprune.archive import read_program
from graphprune.blueprint import Blueprint
from graphprune.budget import cost
from graphprune.checkpoints.checkpoint import INDEX, SINGLE
from graphprune.errors import ConfigError, ModelError
from graphprune.weights import read_weights
from speedup.agreement import compare, tensors
from speedup.analysis import Analysis, analyse
from speedup.capture import Captured, attribute, captured_from
from speedup.cut import ShrunkGraph, shrink_graph
from speedup.errors import PlanError, ProofError
from speedup.labels import Mask
from speedup.plan import ShrinkPlan
from speedup.planning import live_from_keep, make_plan
from speedup.proof import prove

_REMEDY = "Compress the model again."


@dataclass(frozen=True)
class Finding:
    """One thing that was proven."""

    subject: str
    fact: str


def audit(folder: Path, progress: Callable[[str], None] = lambda name: None) -> tuple[Finding, ...]:
    """Returns what was proven about a folder that ``graphprune compress`` wrote.

    The dense graph is analysed again, the plan is made again from what it keeps, the shrunk graph is built and proven
    again, and every other file is compared with it.

    Args:
        folder: The folder.
        progress: Called with the subject of each step as it begins.

    Raises:
        ConfigError: There is no such folder, or it holds no compressed model.
        SpeedupError: Something is not as it is claimed; one line with the first such thing.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Name one that graphprune compress wrote.")
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise ConfigError(
            f"{folder}: holds a shrunk checkpoint, which was compared with its original when it was written. "
            "Compress that again to compare again."
        )
    if not (folder / files.PLAN).is_file():
        raise ConfigError(f"{folder}: holds no {files.PLAN}. Name a folder that graphprune compress wrote.")
    return tuple(_findings(folder, progress))


def _findings(folder: Path, progress: Callable[[str], None]) -> Iterator[Finding]:
    progress(files.DENSE_PROGRAM)
    blueprint = Blueprint.read(folder / files.PLAN)
    captured = captured_from(read_program(folder / files.DENSE_PROGRAM))
    _retie(captured.graph_module, blueprint.tied)
    analysis = analyse(captured)
    yield Finding(files.DENSE_PROGRAM, f"{len(captured.nodes)} nodes captured, {len(analysis.parameters)} tensors")

    progress(files.PLAN)
    plan = blueprint.plan.of(analysis.parameters.keys() | (blueprint.plan.tensors - set(captured.unused)))
    live = live_from_keep(analysis, plan)
    _check_plan(analysis, live, plan)
    fact = f"follows from the {int(live.sum())} of {len(live)} channel labels that it keeps"
    others = len(blueprint.plan.tensors - plan.tensors)
    yield Finding(files.PLAN, f"{fact}; {others} tensors of training alone are not proven" if others else fact)

    progress("proof")
    graph = shrink_graph(captured, plan)
    proof = prove(analysis, live, plan, graph)
    yield Finding(
        "proof", f"{proof.nodes} nodes equal the masked original, to {proof.difference:.1g} of the largest value"
    )

    progress(files.WEIGHTS)
    count = _check_weights(folder / files.WEIGHTS, captured, graph, blueprint)
    yield Finding(files.WEIGHTS, f"{count} tensors are what the plan keeps of {files.DENSE_PROGRAM}, bit by bit")

    dense = shrink_graph(captured, ShrinkPlan())
    for name, model in ((files.PROGRAM, graph), (files.ONNX, graph), (files.DENSE_ONNX, dense)):
        progress(name)
        yield Finding(name, _check_file(folder / name, model, captured))

    progress(files.REPORT)
    yield Finding(files.REPORT, _check_report(folder, captured, graph))


def _retie(module: nn.Module, tied: Mapping[str, str]) -> None:
    """Makes one tensor again of those that were one; an archive keeps them as several of the same content."""
    for name, first in tied.items():
        try:
            alias, tensor = attribute(module, name), attribute(module, first)
        except AttributeError:
            continue  # a name of the model that its graph does not read
        if not torch.equal(alias, tensor):
            raise ProofError(f"{name}: is not the same as {first} in {files.DENSE_PROGRAM}. {_REMEDY}")
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, tensor)


def _check_plan(analysis: Analysis, live: Mask, claimed: ShrinkPlan) -> None:
    """Refuses a plan that is not the one that follows from what it keeps."""
    try:
        ours, theirs = make_plan(analysis, live).to_json(), claimed.to_json()
    except PlanError as error:
        raise ProofError(f"{files.PLAN}: cannot keep what it keeps ({str(error).rstrip('.')}). {_REMEDY}") from error
    for part in ("keep", "rows", "literals"):
        for name in [*ours[part], *theirs[part]]:
            if ours[part].get(name) != theirs[part].get(name):
                raise ProofError(f"{files.PLAN}: {part} of {name} is not what follows from the rest of it. {_REMEDY}")


def _check_weights(path: Path, captured: Captured, graph: ShrunkGraph, blueprint: Blueprint) -> int:
    """Returns how many weights were found to be exactly what the plan keeps of the dense model."""
    if blueprint.form == "graph":
        expected: dict[str, Tensor] = dict(graph.state_dict())
    else:
        dense = {name: value for name, value in captured.program.state_dict.items() if isinstance(value, Tensor)}
        expected = {name: blueprint.plan.cut(blueprint.tied.get(name, name), tensor) for name, tensor in dense.items()}
    found = read_weights(path)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            where = "lacks" if name not in found else "holds"
            raise ProofError(f"{path.name}: {where} {name}, unlike the model. {_REMEDY}")
        if not _same(found[name], expected[name]):
            raise ProofError(f"{path.name}: {name} is not what the plan keeps of {files.DENSE_PROGRAM}. {_REMEDY}")
    return len(found)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.detach().cpu())


def _check_file(path: Path, model: nn.Module, captured: Captured) -> str:
    """Returns how near a file is to the graph it was made from."""
    if not path.is_file():
        raise ProofError(f"{path.name}: is missing. {_REMEDY}")
    inputs: Any = captured.kwargs or captured.args
    batches = (1, 3) if captured.fixed_batch is None else captured.batches
    if path.suffix == ".pt2":
        loaded = read_program(path).module(check_guards=False)
        agreement = compare(lambda args, kwargs: tensors(loaded(*args, **kwargs)), path, model, inputs, batches=batches)
    else:
        from speedup.export import check_onnx  # noqa: PLC0415 - onnx takes its time to import

        agreement = check_onnx(path, model, inputs, batches=batches)
    if not agreement.checked:
        return agreement.note
    compared = " and ".join(map(str, agreement.batches))
    return f"computes the same at batch {compared}, to {agreement.difference:.1g} of the largest value"


def _check_report(folder: Path, captured: Captured, graph: ShrunkGraph) -> str:
    """Refuses a report whose numbers are not those of the files."""
    path = folder / files.REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        claims = {
            "params": (report["params"]["dense"], report["params"]["shrunk"]),
            "macs": (report["macs"]["dense"], report["macs"]["shrunk"]),
        }
        told = dict(report["files"])
        if told.keys() != set(files.FILES) - {files.REPORT}:
            raise ValueError(told)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is not the report of a compression. {_REMEDY}") from error
    dense, small = cost(captured.graph_module, captured), cost(graph, captured)
    for name, found in (("params", (dense.params, small.params)), ("macs", (dense.macs, small.macs))):
        if claims[name] != found:
            raise ProofError(f"{files.REPORT}: says {name} {claims[name]}, the graphs have {found}. {_REMEDY}")
    for name, fingerprint in told.items():
        if not (folder / name).is_file() or files.fingerprint(folder / name) != fingerprint:
            raise ProofError(f"{name}: is not the file that {files.REPORT} describes, by its SHA-256. {_REMEDY}")
    if report.get("sha256") != files.digest(report):
        raise ProofError(f"{files.REPORT}: is not as it was written, by its SHA-256. {_REMEDY}")
    return (
        f"{dense.params} -> {small.params} parameters, {dense.macs} -> {small.macs} MACs; "
        f"{len(told)} files as they were written, by SHA-256"
    )

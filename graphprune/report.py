"""What is known of a model or of a compression, as plain data ready for JSON."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from graphprune.budget import Cost
from graphprune.config import Request
from graphprune.dependency import DependencyGraph
from graphprune.groups import ChannelGroup, Member
from graphprune.select import Choice, Selection
from speedup.capture import Captured
from speedup.proof import Proof
from speedup.shrink import Shrunk

Report = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A number before and after."""

    dense: int
    shrunk: int

    def to_json(self) -> dict[str, Any]:
        """The two numbers and how many times smaller the second is."""
        return {"dense": self.dense, "shrunk": self.shrunk, "ratio": self.dense / self.shrunk if self.shrunk else None}


def build_report(
    *,
    request: Request,
    block: int,
    dependencies: DependencyGraph,
    selection: Selection,
    shrunk: Shrunk,
    proof: Proof | None,
    costs: tuple[Cost, Cost],
    seconds: Mapping[str, float],
) -> Report:
    """Returns everything that is known of a compression; ``costs`` are those of the dense and of the shrunk graph."""
    dense, small = costs
    captured = dependencies.analysis.captured
    return {
        "request": request.model_dump(),
        "round_to": block,
        "params": Change(dense.params, small.params).to_json(),
        "macs": Change(dense.macs, small.macs).to_json(),
        "groups": [_chosen(choice) for choice in selection.choices if choice.group.pin is None],
        "layers": _layers(dense, small),
        "pinned": _pinned(dependencies, selection),
        "parts": _parts(captured),
        "unused": sorted(set(captured.unused) - dependencies.analysis.parameters.keys()),
        "unknown_operators": [
            {"node": node.name, "operator": str(node.target)} for node in dependencies.analysis.unknown
        ],
        "result": {
            "form": "module" if shrunk.obstacle is None else "graph",
            "obstacle": shrunk.obstacle,
            "repairs": [asdict(repair) for repair in shrunk.repairs],
        },
        "note": None,
        "proof": None if proof is None else asdict(proof),
        "seconds": dict(seconds),
        "versions": versions(),
    }


def describe_groups(dependencies: DependencyGraph) -> list[dict[str, Any]]:
    """Returns what there is to say of every channel group of a model: size, members, ties by kind, why it is pinned.

    Kernel sizes, positions and vocabularies, of which nobody expects that they shrink, are left out.
    """
    ties: dict[int, dict[str, str]] = {}
    for axis, _, tie in dependencies.graph.edges(data=True):
        ties.setdefault(axis[2], {})[tie["node"]] = tie["kind"]
    structural = _structural(dependencies)
    return [
        {
            "name": group.name,
            "kind": group.kind,
            "units": group.units,
            "unit_width": group.width,
            "prunable": group.size,
            "members": _members(group.members),
            "ties": dict(Counter(ties.get(group.index, {}).values()).most_common()),
            "pin": group.pin,
        }
        for group in dependencies.groups
        if group.pin not in structural
    ]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("graphprune", "torch", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy", "networkx", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "torch": torch.__version__,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # used from a folder of sources
        return "not installed"


def _parts(captured: Captured) -> dict[str, Any] | None:
    """Which parts of a model were captured and what stopped the rest; None where it was captured whole."""
    if captured.parts is None:
        return None
    outside = captured.parts.outside(captured.model)
    return {
        "captured": list(dict.fromkeys(captured.parts.paths)),
        "stopped": dict(captured.parts.stopped),
        "parameters_outside": sum(tensor.numel() for tensor in outside.values()),
        "used_outside": list(captured.parts.shared),
    }


def _chosen(choice: Choice) -> dict[str, Any]:
    group = choice.group
    return {
        "name": group.name,
        "kind": group.kind,
        "units": group.units,
        "unit_width": group.width,
        "asked": choice.asked,
        "kept": choice.kept,
        "note": choice.note,
        "members": _members(group.members),
    }


def _members(members: Sequence[Member]) -> list[dict[str, Any]]:
    return [
        {"tensor": member.tensor, "dims": list(member.dims), "channels": member.channels, "role": member.role}
        for member in members
    ]


def _layers(dense: Cost, small: Cost) -> list[dict[str, Any]]:
    """Each module with parameters or multiply-accumulates of its own, before and after."""
    owned: dict[str, list[str]] = {}
    for name in dense.shapes:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    layers = []
    for layer in dict.fromkeys([*owned, *dense.macs_by_layer]):
        shapes = {name: (dense.shapes[name], small.shapes.get(name, ())) for name in owned.get(layer, ())}
        layers.append(
            {
                "name": layer,
                "params": Change(*(_numel(one[i] for one in shapes.values()) for i in range(2))).to_json(),
                "macs": Change(dense.macs_by_layer.get(layer, 0), small.macs_by_layer.get(layer, 0)).to_json(),
                "shapes": {name: {"dense": list(one), "shrunk": list(other)} for name, (one, other) in shapes.items()},
            }
        )
    return layers


def _numel(shapes: Any) -> int:
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def _pinned(dependencies: DependencyGraph, selection: Selection) -> list[dict[str, Any]]:
    """Groups that were left alone and why; kernel sizes and positions, which nobody expects to shrink, are left out."""
    structural = _structural(dependencies)
    return [
        {"name": choice.group.name, "units": choice.group.units, "reason": choice.note, "members": _names(choice.group)}
        for choice in selection.choices
        if choice.kept == choice.group.units and choice.note and choice.note not in structural
    ]


def _structural(dependencies: DependencyGraph) -> set[str | None]:
    return {f"{pin.reason} ({pin.node})" for pin in dependencies.analysis.classes.pins if pin.structural}


def _names(group: ChannelGroup) -> list[str]:
    return sorted({member.tensor for member in group.members})

"""The result as plain data, and as a table to print."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from graphprune.budget import Cost
from graphprune.config import Request
from graphprune.dependency import DependencyGraph
from graphprune.select import Selection
from speedup.shrink import Shrunk
from speedup.verify import Proof

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
    request: Request,
    block: int,
    dependencies: DependencyGraph,
    selection: Selection,
    shrunk: Shrunk,
    proof: Proof,
    dense_cost: Cost,
    small_cost: Cost,
    seconds: Mapping[str, float],
) -> Report:
    """Returns everything that is known of a compression, ready for JSON."""
    return {
        "request": request.model_dump(),
        "round_to": block,
        "params": Change(dense_cost.params, small_cost.params).to_json(),
        "macs": Change(dense_cost.macs, small_cost.macs).to_json(),
        "groups": _groups(selection),
        "layers": _layers(dense_cost, small_cost),
        "pinned": _pinned(dependencies, selection),
        "result": {
            "form": "graph" if shrunk.obstacle else "module",
            "obstacle": shrunk.obstacle,
            "repairs": [asdict(repair) for repair in shrunk.repairs],
        },
        "proof": asdict(proof),
        "seconds": dict(seconds),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("graphprune", "torch", "onnx", "onnxruntime", "numpy", "scipy", "networkx")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "torch": torch.__version__}


def _groups(selection: Selection) -> list[dict[str, Any]]:
    return [
        {
            "name": choice.group.name,
            "units": choice.group.units,
            "unit_width": choice.group.width,
            "asked": choice.asked,
            "kept": choice.kept,
            "note": choice.note,
            "members": sorted({member.tensor for member in choice.group.members}),
        }
        for choice in selection.choices
        if choice.group.pin is None
    ]


def _layers(dense: Cost, small: Cost) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "dense_shape": shape,
            "shape": small.shapes.get(name, ()),
            "macs": Change(
                dense.macs_by_layer.get(name.rpartition(".")[0], 0), small.macs_by_layer.get(name.rpartition(".")[0], 0)
            ).to_json(),
        }
        for name, shape in dense.shapes.items()
    ]


def _pinned(dependencies: DependencyGraph, selection: Selection) -> list[dict[str, Any]]:
    """Groups that were left alone and why; kernel sizes and positions, which nobody expects to shrink, are left out."""
    pins = dependencies.analysis.classes.pins
    structural = {f"{pin.reason} ({pin.node})" for pin in pins if pin.structural}
    return [
        {"name": choice.group.name, "units": choice.group.units, "reason": choice.note}
        for choice in selection.choices
        if choice.kept == choice.group.units and choice.note and choice.note not in structural
    ]

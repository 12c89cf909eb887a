"""What makes models smaller and proves it: capture, plan, shrink, proof, export and measurement.

Names are imported when they are first used: onnx and onnxruntime take their time.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedup.errors import SpeedupError
    from speedup.export import check_onnx, export_onnx, export_pt2
    from speedup.latency import Benchmark, benchmark
    from speedup.masking import attach_masks, attached_masks, detach_masks, plain_state, without_masks
    from speedup.masks import ModelSpeedup
    from speedup.proof import verify

__all__ = [
    "Benchmark",
    "ModelSpeedup",
    "SpeedupError",
    "attach_masks",
    "attached_masks",
    "benchmark",
    "check_onnx",
    "detach_masks",
    "export_onnx",
    "export_pt2",
    "plain_state",
    "verify",
    "without_masks",
]

_HOMES = MappingProxyType(
    {
        "Benchmark": "latency",
        "SpeedupError": "errors",
        "attach_masks": "masking",
        "attached_masks": "masking",
        "benchmark": "latency",
        "check_onnx": "export",
        "detach_masks": "masking",
        "export_onnx": "export",
        "export_pt2": "export",
        "ModelSpeedup": "masks",
        "plain_state": "masking",
        "verify": "proof",
        "without_masks": "masking",
    }
)
"""Public name -> the module that holds it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

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
    from speedup.masks import ModelSpeedup
    from speedup.proof import verify

__all__ = [
    "Benchmark",
    "ModelSpeedup",
    "SpeedupError",
    "benchmark",
    "check_onnx",
    "export_onnx",
    "export_pt2",
    "verify",
]

_HOMES = MappingProxyType(
    {
        "Benchmark": "latency",
        "SpeedupError": "errors",
        "benchmark": "latency",
        "check_onnx": "export",
        "export_onnx": "export",
        "export_pt2": "export",
        "ModelSpeedup": "masks",
        "verify": "proof",
    }
)
"""Public name -> the module that holds it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

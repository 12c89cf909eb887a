"""Measured latency of a candidate: onnxruntime runs its ONNX file."""

import tempfile
from pathlib import Path

import numpy as np
from torch import nn

from speedup.inputs import ExampleInputs


def measured_ms(model: nn.Module, example_inputs: ExampleInputs) -> float:
    """Returns the median latency of one example in milliseconds, on one thread.

    Raises:
        ExportError: ONNX cannot express the model.
        SpeedupError: onnxruntime cannot run it.
    """
    from speedup.export import export_onnx  # noqa: PLC0415 - onnx takes half a second to import
    from speedup.latency import Limits, measure  # noqa: PLC0415 - and so does onnxruntime
    from speedup.session import load  # noqa: PLC0415

    limits = Limits(min_rounds=20, min_seconds=0.2, max_seconds=5.0, warmup_runs=20, warmup_seconds=1.0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "candidate.onnx"
        export_onnx(model, example_inputs, file)
        return 1e3 * float(np.median(measure([load(file, threads=1)], limits=limits)))

"""Shows how much of the MACs reduction becomes measured speed in onnxruntime, with --round-to auto and with none.

    python benchmarks/latency.py [--models resnet50 mobilenet_v2] [--sparsity 0.3] [--threads 1 2]

Dense, unrounded and rounded files are measured in one interleaved run for each number of threads.
"""

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from graphprune import compress
from speedup import benchmark, export_onnx

ROOT = Path(__file__).resolve().parent.parent


def files(name: str, sparsity: float, folder: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Exports the dense network and its two shrunk forms: their files, and the reports of the latter."""
    sys.path.insert(0, str(ROOT / "models"))
    module = importlib.import_module(name)
    model, example = module.build_model().eval(), module.example_inputs()
    paths, reports = [folder / f"{name}-dense.onnx"], []
    export_onnx(model, example, paths[0])
    for rounding in (1, "auto"):
        result = compress(model, example, sparsity, round_to=rounding)
        paths.append(folder / f"{name}-{rounding}.onnx")
        export_onnx(result.model.eval(), example, paths[-1])
        reports.append(result.report)
    return paths, reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    measured = []
    print(
        "| network | rounded to | threads | MACs | speed (95 % interval) | speed / MACs | dense ms | shrunk ms | A/A |"
    )
    print("|" + " --- |" * 9)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            paths, reports = files(name, given.sparsity, Path(folder))
            for threads in given.threads:
                run = benchmark(paths, threads=threads)
                measured.append(run.to_dict())
                dense, *shrunk = run.models
                for latency, report in zip(shrunk, reports, strict=True):
                    macs, speed = report["macs"]["ratio"], latency.speedup
                    print(
                        f"| {name} | {report['round_to']} | {threads} | {macs:.2f}x "
                        f"| {speed.median:.2f}x ({speed.low:.2f} to {speed.high:.2f}) | {speed.median / macs:.2f} "
                        f"| {dense.p50_ms:.2f} | {latency.p50_ms:.2f} | {run.control.speedup.median:.3f} |",
                        flush=True,
                    )
                for warning in run.warnings:
                    print(f"<!-- {name}, {threads} threads: {warning} -->", flush=True)
    if given.json:
        given.json.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()

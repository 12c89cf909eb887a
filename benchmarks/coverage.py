"""Writes docs/coverage.md: every network of models/, of torchvision and of transformers_zoo.py, one row each.

    python benchmarks/coverage.py --out docs/coverage.md [--only NAME ...] [--seconds 120] [--jobs 1]

With --only, the other rows of a page that is there stay. Each network runs in a process of its own, at half of its
channels, without rounding. Networks of more parameters than --proof-limit, or of very many tokens, are analysed and
planned by shape only.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import own_process
import page

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("captured", "groups", "pinned", "kept", "proof", "onnx", "result", "seconds")
HEAD = (
    "network", "captured", "groups that shrink", "left alone, and why", "parameters kept", "proof", "ONNX", "result",
    "seconds",
)  # fmt: skip


def names() -> Iterator[str]:
    """Every network: those of models/ first."""
    for path in sorted((ROOT / "models").glob("*.py")):
        if "def build_model" in path.read_text():
            yield f"models/{path.stem}"
    import torchvision_zoo
    import transformers_zoo

    yield from (f"torchvision/{name}" for name in torchvision_zoo.networks())
    yield from (f"transformers/{name}" for name in transformers_zoo.RECIPES)


def row(name: str, proof_limit: int) -> dict[str, Any]:
    """Everything about one network, in this process."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    start = time.perf_counter()
    model, example, by_shape = _network(name, proof_limit)
    found = _planned(model, example) if by_shape else _compressed(model, example)
    return {**found, "seconds": f"{time.perf_counter() - start:.1f}"}


def _planned(model: Any, example: Any) -> dict[str, Any]:
    """A network that is too large to be proven here: analysed and planned by the shapes of its tensors."""
    import torch

    from graphprune.criteria import CRITERIA
    from graphprune.dependency import trace
    from graphprune.report import describe_groups
    from graphprune.select import select
    from speedup.planning import make_plan

    dependencies = trace(model, example)
    selection = select(dependencies, CRITERIA["random"](dependencies.analysis), 0.5)
    plan = make_plan(dependencies.analysis, selection.live)
    dense = {n: p.shape for n, p in model.named_parameters()}
    kept = sum(plan.cut(n, torch.empty(shape, device="meta")).numel() for n, shape in dense.items())
    return {
        "captured": "whole",
        "groups": str(len(dependencies.prunable)),
        "pinned": _reasons(group["pin"] for group in describe_groups(dependencies)),
        "kept": f"{kept / sum(shape.numel() for shape in dense.values()):.1%}",
        "proof": "by shape",
        "onnx": "not written",
        "result": "plan",
    }


def _compressed(model: Any, example: Any) -> dict[str, Any]:
    """A network that is compressed, proven, exported and run."""
    import torch

    from graphprune.compress import compress
    from speedup.errors import ExportError
    from speedup.export import export_onnx
    from speedup.inputs import split_inputs

    result = compress(model, example, 0.5, round_to=1)
    args, kwargs = split_inputs(example)
    with torch.no_grad():
        result.model.eval()(*args, **kwargs)
    captured = result.dependencies.analysis.captured
    with tempfile.TemporaryDirectory() as folder:
        inputs = example if captured.parts is None else captured.args
        try:
            file = export_onnx(captured.entry(result.model), inputs, Path(folder, "model.onnx"))
            onnx = f"{file.difference:.0e}" if file.checked else file.note
        except ExportError as error:
            onnx = f"none: {str(error).partition(': ')[2]}"
    report = result.report
    parts = report["parts"]
    sizes = [report["params"][key] + (parts["parameters_outside"] if parts else 0) for key in ("dense", "shrunk")]
    form = {"module": "own class", "graph": f"graph: {_short(str(report['result']['obstacle']))}"}
    return {
        "captured": f"in parts: {', '.join(parts['captured'])} ({_bare(parts['stopped'][''])})" if parts else "whole",
        "groups": str(len(result.dependencies.prunable)),
        "pinned": _reasons(pin["reason"] for pin in report["pinned"]),
        "kept": f"{sizes[1] / sizes[0]:.1%}",
        "proof": f"{report['proof']['difference']:.1e}",
        "onnx": onnx,
        "result": form[report["result"]["form"]],
    }


def _reasons(reasons: Iterable[str | None]) -> str:
    counts = Counter(reason.partition(" (")[0].partition(", ")[0] for reason in reasons if reason)
    return "; ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _bare(refusal: str) -> str:
    """What stopped torch.export, without the path of the file."""
    fact = refusal.partition("(")[2].rpartition(")")[0]
    words, at, place = fact.partition(", at ")
    return f"{words}{at}{Path(place).name}"


def _short(obstacle: str) -> str:
    """What stands in the way of the own class, with the file's name for its path."""
    place, colon, fact = obstacle.partition(": ")
    return f"{Path(place).name}{colon}{fact}"


def _network(name: str, proof_limit: int) -> tuple[Any, Any, bool]:
    library, _, own = name.partition("/")
    if library == "models":
        sys.path.insert(0, str(ROOT / "models"))
        module = __import__(own)
        return module.build_model().eval(), module.example_inputs(), False
    if library == "transformers":
        import transformers_zoo

        return *transformers_zoo.build(own), False
    from torchvision_zoo import LONG, build, build_by_shape

    model, example = build_by_shape(own)
    if own in LONG or sum(p.numel() for p in model.parameters()) > proof_limit:
        return model, example, True
    return *build(own), False


def measured(name: str, seconds: int, proof_limit: int) -> dict[str, Any]:
    """The row of a network."""
    found = own_process.run(__file__, ["--row", name, "--proof-limit", str(proof_limit)], seconds)
    return {"captured": f"no: {found}"} if isinstance(found, str) else found


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    planned = [name for name, values in rows.items() if values.get("proof") == "by shape"]
    proven = [name for name, values in rows.items() if "proof" in values and name not in planned]
    owned = [name for name in proven if rows[name]["result"] == "own class"]
    parts = [name for name in proven if rows[name]["captured"].startswith("in parts")]
    onnx = [name for name in proven if "e-" in rows[name]["onnx"] or rows[name]["onnx"].startswith("0e")]
    lines = [
        "# Coverage",
        "",
        "Written by `python benchmarks/coverage.py --out docs/coverage.md`: half of the channels of every group that can shrink "
        "removed by L1 norm, without rounding, random weights. *Proof*: the largest relative difference at any node between the "
        "masked original and the shrunk graph, in double precision. *ONNX*: that between the shrunk model and onnxruntime on its "
        "file. *Own class*: the user's own class came back; *graph*: the rewritten graph, because of that line. *In parts*: "
        "`torch.export` cannot capture the network whole; the parts were, what is between them runs as it is. *A tensor whose size is fixed* "
        "is an input, or comes from one. *By shape*: too "
        "large to prove here, analysed and planned only.",
        "",
        f"{len(rows)} networks: {len(proven)} proven, of them {len(parts)} in parts; {len(owned)} in their own class, "
        f"{len(onnx)} with an ONNX file that agrees. {len(planned)} planned by shape, "
        f"{len(rows) - len(proven) - len(planned)} without a result.",
        "",
        *page.table(HEAD, COLUMNS, dict(sorted(rows.items()))),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--proof-limit", type=int, default=100_000_000, metavar="PARAMETERS")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--row", help="one network, as JSON")
    given = parser.parse_args()
    if given.row:
        print(json.dumps(row(given.row, given.proof_limit)))
        return
    rows = page.read(given.out, HEAD, COLUMNS) if given.only and given.out and given.out.is_file() else {}
    wanted = given.only or list(names())
    with ThreadPoolExecutor(given.jobs) as pool:
        for name, found in zip(
            wanted, pool.map(lambda n: measured(n, given.seconds, given.proof_limit), wanted), strict=True
        ):
            rows[name] = found
            print(name, found, flush=True)
            if given.out:
                page.write(given.out, markdown(rows))


if __name__ == "__main__":
    main()

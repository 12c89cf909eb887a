"""Writes docs/coverage.md: every network of models/ and every classification network of torchvision, one row each.

    python benchmarks/coverage.py --out docs/coverage.md [--only NAME ...] [--seconds 120]

With --only, the other rows of a page that is there stay. Each network runs in a process of its own, at half of its channels, without rounding. Networks of more parameters than
--proof-limit are analysed and planned by shape only.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_process

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("captured", "groups", "pinned", "kept", "proof", "result", "seconds")
HEAD = "| network | captured | groups prunable | pinned, and why | parameters kept | proof | result | seconds |"


def names() -> Iterator[str]:
    """Every network: those of models/ first."""
    for path in sorted((ROOT / "models").glob("*.py")):
        if "def build_model" in path.read_text():
            yield f"models/{path.stem}"
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from torchvision_zoo import classification_networks

    yield from classification_networks()


def row(name: str, proof_limit: int) -> dict[str, Any]:
    """Everything about one network, in this process."""
    import torch

    from graphprune.compress import compress
    from graphprune.criteria import CRITERIA
    from graphprune.dependency import trace
    from graphprune.report import describe_groups
    from graphprune.select import select
    from speedup.planning import make_plan

    torch.set_num_threads(2)
    start = time.perf_counter()
    model, example, by_shape = _network(name, proof_limit)
    if by_shape:
        dependencies = trace(model, example)
        selection = select(dependencies, CRITERIA["random"](dependencies.analysis, 0), 0.5)
        plan = make_plan(dependencies.analysis, selection.live)
        dense = {n: p.shape for n, p in model.named_parameters()}
        kept = sum(plan.cut(n, torch.empty(shape, device="meta")).numel() for n, shape in dense.items())
        groups, share = dependencies.groups, kept / sum(shape.numel() for shape in dense.values())
        proof, form = "by shape", "plan"
        reasons = [group["pin"] for group in describe_groups(dependencies)]
    else:
        result = compress(model, example, 0.5, round_to=1)
        groups, share = result.dependencies.groups, 1 / result.report["params"]["ratio"]
        proof, form = f"{result.report['proof']['difference']:.1e}", result.report["result"]["form"]
        reasons = [pin["reason"] for pin in result.report["pinned"]]
    counts = Counter(reason.partition(" (")[0] for reason in reasons if reason)
    return {
        "captured": "whole",
        "groups": f"{sum(group.pin is None for group in groups)}",
        "pinned": "; ".join(f"{count} {reason}" for reason, count in counts.most_common()),
        "kept": f"{share:.1%}",
        "proof": proof,
        "result": {"module": "own class", "graph": "graph", "plan": "plan"}[form],
        "seconds": f"{time.perf_counter() - start:.1f}",
    }


def _network(name: str, proof_limit: int) -> tuple[Any, Any, bool]:
    if name.startswith("models/"):
        sys.path.insert(0, str(ROOT / "models"))
        module = __import__(name.removeprefix("models/"))
        return module.build_model().eval(), module.example_inputs(), False
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from torchvision_zoo import build, build_by_shape

    model, example = build_by_shape(name)
    if sum(p.numel() for p in model.parameters()) > proof_limit:
        return model, example, True
    return *build(name), False


def measured(name: str, seconds: int, proof_limit: int) -> dict[str, Any]:
    """The row of a network."""
    found = own_process.run(__file__, ["--row", name, "--proof-limit", str(proof_limit)], seconds)
    return {"captured": f"no: {found}"} if isinstance(found, str) else found


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The page."""
    proven = sum(values.get("proof", "by shape") != "by shape" for values in rows.values())
    planned = sum(values.get("proof") == "by shape" for values in rows.values())
    lines = [
        "# Coverage",
        "",
        "Written by `python benchmarks/coverage.py --out docs/coverage.md`: half of the channels of every prunable group "
        "removed by L1 norm, without rounding, random weights. The proof is the largest relative difference at any node between the "
        "masked original and the shrunk graph, in double precision. *Own class*: the user's own class came back; *graph*: the "
        "rewritten graph. *By shape*: too large to prove here, analysed and planned only.",
        "",
        f"{len(rows)} networks: {proven} proven, {planned} planned by shape, {len(rows) - proven - planned} without a result.",
        "",
        HEAD,
        "|" + " --- |" * 8,
    ]
    for name, values in rows.items():
        lines.append(
            f"| {name} | " + " | ".join(str(values.get(column, "")).replace("|", "/") for column in COLUMNS) + " |"
        )
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a page that was written before."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ") and line != HEAD]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if " --- " not in line]
    return {name: {key: value for key, value in zip(COLUMNS, values, strict=False) if value} for name, *values in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--proof-limit", type=int, default=100_000_000, metavar="PARAMETERS")
    parser.add_argument("--row", help="one network, as JSON")
    given = parser.parse_args()
    if given.row:
        print(json.dumps(row(given.row, given.proof_limit)))
        return
    rows = read(given.out) if given.only and given.out and given.out.is_file() else {}
    for name in given.only or names():
        rows[name] = measured(name, given.seconds, given.proof_limit)
        print(name, rows[name], flush=True)
        if given.out:
            given.out.write_text(markdown(rows))


if __name__ == "__main__":
    main()

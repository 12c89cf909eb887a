"""Times trace + select + shrink side by side with torch-pruning 1.6.1, in one interleaved run.

    pip install torch-pruning==1.6.1 && python benchmarks/tool_time.py [--rounds 3] [--profile]

Every network goes through both tools in turn, in processes of their own so that peak memory is each one's; after a
first round that warms up, the ratio is that of the medians. Nothing is proven or exported in the timed part.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import own_process

NETWORKS = (
    "resnet50",
    "densenet121",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "vit_b_16",
    "convnext_tiny",
    "swin_t",
    "maxvit_t",
)
TOOLS = ("graphprune", "torch-pruning")


def graphprune_once(model: Any, example: Any) -> dict[str, float]:
    """Seconds of each stage of one run."""
    from graphprune.criteria import CRITERIA
    from graphprune.dependency import find_dependencies
    from graphprune.select import select
    from speedup.analysis import analyse
    from speedup.capture import capture
    from speedup.cut import shrink_graph
    from speedup.planning import make_plan

    marks = [time.perf_counter()]
    captured = capture(model, example)
    marks.append(time.perf_counter())
    analysis = analyse(captured)
    dependencies = find_dependencies(analysis)
    marks.append(time.perf_counter())
    selection = select(dependencies, CRITERIA["l1"](analysis), 0.5)
    plan = make_plan(analysis, selection.live)
    marks.append(time.perf_counter())
    shrink_graph(captured, plan)
    marks.append(time.perf_counter())
    names = ("capture", "analyse", "select", "shrink")
    return {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)}


def torch_pruning_once(model: Any, example: Any) -> dict[str, float]:
    """Seconds of one run at the same sparsity; it shrinks the model in place."""
    import torch_pruning

    outputs = [m for m in model.modules() if getattr(m, "out_features", None) == 1000]
    start = time.perf_counter()
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    pruner = torch_pruning.pruner.BasePruner(model, example, importance, pruning_ratio=0.5, ignored_layers=outputs)
    pruner.step()
    return {"all": time.perf_counter() - start}


def once(tool: str, name: str) -> dict[str, Any]:
    """One run of a tool on a network, in this process: seconds by stage, peak memory before and during."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from torchvision_zoo import build

    torch.set_num_threads(2)
    small, image = build("alexnet")
    runner = graphprune_once if tool == "graphprune" else torch_pruning_once
    runner(small, image)  # imports and caches
    model, example = build(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = runner(model, example)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "total": sum(seconds.values()),
        "peak_mib": after / 1024,
        "grown_mib": (after - before) / 1024,
    }


def measured(tool: str, name: str, limit: int) -> dict[str, Any]:
    """One run in a process of its own."""
    found = own_process.run(__file__, ["--once", tool, name], limit)
    return {"failed": found} if isinstance(found, str) else found


def profile(name: str) -> None:
    """Prints where the time of one network goes, by cumulative seconds."""
    import cProfile
    import pstats

    sys.path.insert(0, str(Path(__file__).parent))
    from torchvision_zoo import build

    from speedup.capture import capture

    model, example = build(name)
    captured = capture(model, example)

    def rest() -> None:
        from graphprune.criteria import CRITERIA
        from graphprune.dependency import find_dependencies
        from graphprune.select import select
        from speedup.analysis import analyse
        from speedup.planning import make_plan

        analysis = analyse(captured)
        dependencies = find_dependencies(analysis)
        make_plan(analysis, select(dependencies, CRITERIA["l1"](analysis), 0.5).live)

    rest()
    profiler = cProfile.Profile()
    profiler.runcall(rest)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--once", nargs=2, metavar=("TOOL", "NETWORK"))
    parser.add_argument("--profile", metavar="NETWORK")
    parser.add_argument("--limit", type=int, default=60, help="seconds that one run may take")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(once(*given.once)))
        return
    if given.profile:
        profile(given.profile)
        return
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(given.rounds):
        for name in given.networks:
            for tool in TOOLS:
                runs.setdefault((tool, name), []).append(measured(tool, name, given.limit))
    if given.json:
        given.json.write_text(json.dumps({f"{tool} {name}": found for (tool, name), found in runs.items()}, indent=1))
    report(given.networks, runs)


def report(networks: list[str], runs: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Prints one row for each network and the ratio over those that both tools can do."""
    print(
        "| network | capture s | analyse s | select s | shrink s | all s | torch-pruning s | ratio | peak MiB | torch-pruning MiB |"
    )
    print("|" + " --- |" * 10)
    ours, theirs = 0.0, 0.0
    for name in networks:
        mine, peer = runs["graphprune", name], runs["torch-pruning", name]
        failed = next((run["failed"] for run in mine if "failed" in run), None)
        if failed:
            print(f"| {name} | {failed} |")
            continue
        stages = {key: statistics.median(run["seconds"][key] for run in mine) for key in mine[0]["seconds"]}
        total, memory = (statistics.median(run[key] for run in mine) for key in ("total", "peak_mib"))
        cells = [f"{seconds:.2f}" for seconds in stages.values()] + [f"{total:.2f}"]
        if any("failed" in run for run in peer):
            cells += ["fails", "", f"{memory:.0f}", ""]
        else:
            other = statistics.median(run["total"] for run in peer)
            ours, theirs = ours + total, theirs + other
            peak = statistics.median(run["peak_mib"] for run in peer)
            cells += [f"{other:.2f}", f"{other / total:.2f}x", f"{memory:.0f}", f"{peak:.0f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if ours:
        print(f"\nOver those that both can do: {ours:.1f} s against {theirs:.1f} s, {theirs / ours:.2f}x.")


if __name__ == "__main__":
    main()

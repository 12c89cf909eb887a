"""How time and memory grow with the size of a model.

    python benchmarks/scale.py             # a Llama-like 8B without weights at 8, 16, 32 and 64 layers
    python benchmarks/scale.py --shrink    # a Llama-like 1B: saved, shrunk from folder to folder, loaded and run

Every row runs in a process of its own, so that peak memory is its own; random scores, half of the channels go. Seconds
of the first table are those of the processor, in one thread: what a clock shows where nothing else runs.
"""

import argparse
import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import own_process

STAGES = ("capture", "analyse", "group", "select", "plan")
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))


def planned(layers: int) -> dict[str, Any]:
    """Seconds of each stage and the peak of memory, from a model on the meta device to a plan."""
    import torch
    from llama import Llama, LlamaConfig

    from graphprune.criteria import CRITERIA
    from graphprune.dependency import find_dependencies
    from graphprune.select import select
    from speedup.analysis import analyse
    from speedup.capture import capture
    from speedup.planning import make_plan

    torch.set_num_threads(1)
    capture(torch.nn.Linear(2, 2), torch.ones(2, 2))  # imports and caches
    with torch.device("meta"):
        model = Llama(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=layers,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        )
    marks = [time.process_time()]
    captured = capture(model, torch.zeros(2, 8, dtype=torch.int64))
    marks.append(time.process_time())
    analysis = analyse(captured)
    marks.append(time.process_time())
    dependencies = find_dependencies(analysis)
    marks.append(time.process_time())
    selection = select(dependencies, CRITERIA["random"](analysis, 0), 0.5)
    marks.append(time.process_time())
    plan = make_plan(analysis, selection.live)
    marks.append(time.process_time())
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "kept": sum(plan.cut(name, parameter.detach()).numel() for name, parameter in model.named_parameters()),
        "seconds": dict(zip(STAGES, (b - a for a, b in itertools.pairwise(marks)), strict=True)),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def report_planned(layers: list[int], limit: int) -> None:
    """Prints a row for each number of layers, with the ratio of its total to that of the row before."""
    print("| layers | parameters | kept | " + " s | ".join(STAGES) + " s | all s | ratio | peak MiB |")
    print("|" + " --- |" * (len(STAGES) + 6))
    before = None
    for count in layers:
        found = own_process.run(__file__, ["--once", str(count)], limit)
        if isinstance(found, str):
            print(f"| {count} | {found} |")
            continue
        total = sum(found["seconds"].values())
        cells = [f"{count}", f"{found['parameters'] / 1e9:.2f} G", f"{found['kept'] / 1e9:.2f} G"]
        cells += [f"{found['seconds'][stage]:.2f}" for stage in STAGES]
        cells += [f"{total:.2f}", f"{total / before:.2f}x" if before else "", f"{found['peak_mib']:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
        before = total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--once", metavar="LAYERS", type=int)
    parser.add_argument("--limit", type=int, default=600, help="seconds that one run may take")
    given = parser.parse_args()
    if given.once is not None:
        print(json.dumps(planned(given.once)))
    else:
        report_planned(given.layers, given.limit)


if __name__ == "__main__":
    main()

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
import tempfile
import time
from pathlib import Path
from typing import Any

import own_process

STAGES = ("capture", "analyse", "group", "select", "plan")
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))


def plan_without_weights(layers: int) -> dict[str, Any]:
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
    selection = select(dependencies, CRITERIA["random"](analysis), 0.5)
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


def one_billion() -> Any:
    """A Llama-like model of 1.2 G parameters in bfloat16, its embeddings tied."""
    import torch
    from llama import Llama, LlamaConfig

    torch.set_default_dtype(torch.bfloat16)
    try:
        return Llama(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            )
        )
    finally:
        torch.set_default_dtype(torch.float32)


def tokens() -> Any:
    import torch

    return torch.randint(128256, (2, 8), generator=torch.Generator().manual_seed(1))


def saved(folder: Path) -> dict[str, Any]:
    """Writes random weights as four files and an index."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = one_billion().state_dict()
    del state["lm_head.weight"]  # which is that of the embedding
    names, total = list(state), sum(tensor.nbytes for tensor in state.values())
    shards: list[list[str]] = [[]]
    for name in names:
        if sum(state[other].nbytes for other in shards[-1]) > total / 4:
            shards.append([])
        shards[-1].append(name)
    where = {}
    for place, shard in enumerate(shards, 1):
        file = f"model-{place:05}-of-{len(shards):05}.safetensors"
        save_file({name: state[name] for name in shard}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "files": len(shards),
        "bytes": total,
        "largest_file": max(path.stat().st_size for path in folder.glob("*.safetensors")),
        "largest_tensor": max(tensor.nbytes for tensor in state.values()),
    }


def streamed(dense: Path, small: Path, prove: bool) -> dict[str, Any]:
    """Shrinks the folder ``dense`` into ``small``."""
    from graphprune import compress_checkpoint

    report = compress_checkpoint(one_billion, tokens(), dense, small, 0.5, prove_it=prove, round_to=1, force=True)
    return {"proof": report["proof"], "stages": report["seconds"], **report["checkpoint"]["bytes"]}


def run(dense: Path, small: Path) -> dict[str, Any]:
    """Loads ``small`` into the class and compares it with the graph of the whole model, cut in memory."""
    import torch

    import graphprune
    from graphprune.blueprint import Blueprint
    from graphprune.checkpoints.checkpoint import Checkpoint, fill
    from graphprune.compress import Stages, planned
    from graphprune.config import Request
    from speedup.capture import capture
    from speedup.cut import shrink_graph

    model = one_billion().eval()
    loaded = graphprune.load(small, model).eval()
    fill(model, Checkpoint.open(dense), model.state_dict().keys(), {})
    captured = capture(model, tokens())
    _, _, plan, _ = planned(captured, Request(sparsity=0.5, round_to=1), Stages(lambda name: None))
    direct = shrink_graph(captured, plan)
    with torch.no_grad():
        one, other = loaded(tokens()), direct(tokens())
    return {
        "same_plan": plan.to_json() == Blueprint.read(small / "plan.json").plan.to_json(),
        "same_outputs": torch.equal(one, other),
        "class": type(loaded).__name__,
        "parameters": [sum(parameter.numel() for parameter in one.parameters()) for one in (model, loaded)],
    }


def measured(step: str, *folders: str) -> dict[str, Any]:
    """What a step gives, with its seconds and the peak of memory of this process."""
    import torch

    torch.set_num_threads(2)
    paths = [Path(folder) for folder in folders]
    start = time.perf_counter()
    if step == "save":
        found = saved(paths[0])
    elif step == "run":
        found = run(paths[0], paths[1])
    else:
        found = streamed(paths[0], paths[1], prove=step == "prove")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "seconds": time.perf_counter() - start, "peak_mib": peak}


def report_shrunk(limit: int) -> None:
    """Prints a row for each step on a model of 1.2 G parameters."""
    with tempfile.TemporaryDirectory() as place:
        dense, small = Path(place) / "dense", Path(place) / "small"
        dense.mkdir()
        print("| step | seconds | peak MiB | |\n| --- | --- | --- | --- |")
        for step in ("save", "stream", "prove", "run"):
            found = own_process.run(__file__, ["--step", step, str(dense), str(small)], limit)
            if isinstance(found, str):
                print(f"| {step} | {found} |")
                return
            seconds, peak = found.pop("seconds"), found.pop("peak_mib")
            print(f"| {step} | {seconds:.1f} | {peak:.0f} | {json.dumps(found)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--once", metavar="LAYERS", type=int)
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--step", nargs=3, metavar=("STEP", "DENSE", "SMALL"))
    parser.add_argument("--limit", type=int, default=600, help="seconds that one run may take")
    given = parser.parse_args()
    if given.once is not None:
        print(json.dumps(plan_without_weights(given.once)))
    elif given.step:
        print(json.dumps(measured(*given.step)))
    elif given.shrink:
        report_shrunk(given.limit)
    else:
        report_planned(given.layers, given.limit)


if __name__ == "__main__":
    main()

"""The command that makes a model smaller."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from graphprune import tables
from graphprune.checkpoints.stream import deliver_checkpoint
from graphprune.cli.app import (
    AsJson,
    Device,
    Inputs,
    Model,
    Seed,
    Threads,
    Weights,
    app,
    check_outside,
    check_places,
    show,
    silent_stdout,
)
from graphprune.config import Request, read_request
from graphprune.config_file import read_config_file
from graphprune.criteria import CRITERIA
from graphprune.deliver import deliver
from graphprune.errors import ConfigError
from graphprune.lpot.config import is_lpot
from graphprune.lpot.delivery import deliver_pruned
from graphprune.progress import StageDisplay
from graphprune.schedule import SCHEDULES
from graphprune.search.finder import SEARCHES, Finder, finder_of
from graphprune.source import file_of, load_skeleton, load_source
from speedup.latency import DEFAULT_LIMITS


@app.command("compress")
def compress_command(
    context: typer.Context,
    model: Model,
    *,
    sparsity: Annotated[float, typer.Option(help="Share of the channels of every group that goes, in [0, 1).")] = 0.5,
    criterion: Annotated[str, typer.Option(help=f"What scores a channel: {', '.join(CRITERIA)}.")] = "l1",
    batches: Annotated[
        int, typer.Option(help="Batches of training() in MODEL that apoz, mean_activation and taylor look at.")
    ] = 20,
    scope: Annotated[
        str, typer.Option(help="local: the share of each group; global: of all by one ranking.")
    ] = "local",
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Module whose channels stay, or glob; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Module whose channels may go, or glob; repeatable.")
    ] = None,
    heads: Annotated[
        bool | None, typer.Option("--heads/--no-heads", help="Whole heads of attention may go.", show_default="yes")
    ] = None,
    head_dims: Annotated[
        bool | None,
        typer.Option("--head-dims/--no-head-dims", help="Dimensions of every head may go.", show_default="no"),
    ] = None,
    ffn: Annotated[
        bool | None, typer.Option("--ffn/--no-ffn", help="Channels between two layers may go.", show_default="yes")
    ] = None,
    width: Annotated[
        bool | None, typer.Option("--width/--no-width", help="The residual stream may go.", show_default="yes")
    ] = None,
    round_to: Annotated[str, typer.Option(help="Keep multiples of this; auto asks onnxruntime on this CPU.")] = "auto",
    min_channels: Annotated[int, typer.Option(help="Channels that every axis keeps at least.")] = 1,
    schedule: Annotated[
        str | None,
        typer.Option(help=f"Prune in rounds by this schedule: {', '.join(SCHEDULES)}.", show_default="one_shot"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of the schedule.")] = 1,
    search: Annotated[
        str | None,
        typer.Option(help=f"Search how much of each group goes: {', '.join(SEARCHES)}; needs evaluate(model)."),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=0, help="Train so long, by training() in MODEL, after each shrink of rounds or a search.")
    ] = 0,
    journal: Annotated[
        Path | None, typer.Option(help="File in which rounds and searches note what is done, to go on from.")
    ] = None,
    workers: Annotated[str | None, typer.Option(help="Where candidates run: ray, or ray://host:port.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON: a config list of NNI, config_list and the options above by their names, or a file of "
            "LPOT, by which MODEL is trained and single weights become zero."
        ),
    ] = None,
    seed: Seed = 0,
    inputs: Inputs = None,
    weights: Weights = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of safetensors as on the Hugging Face hub: its weights are shrunk into the folder --out, "
            "tensor by tensor; MODEL is built without weights."
        ),
    ] = None,
    no_proof: Annotated[
        bool, typer.Option("--no-proof", help="With --checkpoint: do not compute; the plan alone is checked.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="<name>-pruned")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    opset: Annotated[int | None, typer.Option(help="Of the ONNX files.")] = None,
    no_bench: Annotated[bool, typer.Option("--no-bench", help="Do not measure latency.")] = False,
    threads: Threads = None,
    device: Device = "cpu",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse operators without a rule.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make MODEL physically smaller, prove it, export it, measure it."""
    options = {
        "sparsity": sparsity,
        "criterion": criterion,
        "batches": batches,
        "scope": scope,
        "exclude": tuple(exclude or ()),
        "only": tuple(only or ()),
        "heads": heads,
        "head_dims": head_dims,
        "ffn": ffn,
        "width": width,
        "round_to": _round_to(round_to),
        "min_channels": min_channels,
        "seed": seed,
        "strict": strict,
    }
    finding = {
        "search": search,
        "schedule": schedule,
        "rounds": rounds,
        "epochs": epochs,
        "journal": journal,
        "workers": workers,
    }
    request, find = _asked(context, options, finding, config)
    notes = None if find is None else find.journal
    check_places((notes,), (file_of(model), weights, config))
    seed = seed if isinstance(request, Path) else request.seed
    given = {
        "--search": find is not None and find.search,
        "--epochs": find is not None and find.epochs,
        "--schedule": find is not None,
        "--weights": weights,
        "--opset": opset,
        "--threads": threads,
        "--device": device != "cpu",
    }
    if checkpoint is not None and (unfit := [option for option, value in given.items() if value]):
        raise ConfigError(f"{unfit[0]}: is not for checkpoints, of which only the weights are written. Leave it out.")
    if no_proof and checkpoint is None:
        raise ConfigError("--no-proof: is for checkpoints larger than the memory. Leave it out.")
    if checkpoint is not None and not isinstance(request, Path):
        with silent_stdout(as_json), StageDisplay() as progress:
            progress("load")
            name, skeleton, example = load_skeleton(model, inputs=inputs or (), seed=seed)
            folder = out or Path(f"{name}-pruned")
            report = deliver_checkpoint(
                skeleton,
                example,
                checkpoint,
                folder,
                request,
                prove_it=not no_proof,
                force=force,
                text=model,
                command=("graphprune", *context.obj),
                progress=progress,
            )
        show(report if as_json else tables.compression(report, folder))
        return
    with silent_stdout(as_json), StageDisplay() as progress:
        progress("load")
        source = load_source(model, inputs=inputs or (), weights=weights, seed=seed, device=device)
        folder = out or Path(f"{source.name}-pruned")
        check_outside(folder, notes)
        if isinstance(request, Path):
            work = partial(deliver_pruned, source, folder, request, seed=seed, strict=strict)
        else:
            work = partial(deliver, source, folder, request, find=find)
        delivery = work(
            force=force,
            opset=opset,
            limits=None if no_bench else DEFAULT_LIMITS,
            threads=threads,
            command=("graphprune", *context.obj),
            progress=progress,
        )
    show(delivery.report if as_json else tables.compression(delivery.report, delivery.folder))


def _asked(
    context: typer.Context, options: Mapping[str, Any], finding: Mapping[str, Any], config: Path | None
) -> tuple[Request | Path, Finder | None]:
    """What is asked and what finds it, on the command line and in a file, of which the first wins.

    Instead of what is asked it may be that file, if it is one of LPOT.
    """
    told = {name: value for name, value in {**options, **finding}.items() if _is_told(context, name)}
    values: Mapping[str, Any] = {}
    if config is not None:
        file = read_config_file(config)
        if is_lpot(file):
            for name in (*told, "checkpoint"):
                if _is_told(context, name) and name not in ("seed", "strict"):
                    option = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"{option}: is not for {config}, which says what to prune. Leave it out.")
            return config, None
        values = read_request(file, config, Finder)
        if "config_list" in values and "sparsity" in told:
            raise ConfigError(f"sparsity: is said by the config_list of {config}. Leave it out.")
    said = {**values, **told}
    request = Request.of(**{**options, **{name: value for name, value in said.items() if name not in finding}})
    return request, finder_of({name: value for name, value in said.items() if name in finding}, request)


def _is_told(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _round_to(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text

"""The commands: they parse, print and set the exit status."""

import contextlib
import json
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

import graphprune
from graphprune import tables
from graphprune.audit import audit
from graphprune.config import Request, read_request
from graphprune.config_file import read_config_file
from graphprune.criteria import CRITERIA
from graphprune.deliver import deliver
from graphprune.dependency import trace
from graphprune.drawing import write_graph
from graphprune.errors import ConfigError
from graphprune.lpot.config import is_lpot
from graphprune.lpot.delivery import deliver_pruned
from graphprune.progress import StageDisplay
from graphprune.report import describe_groups
from graphprune.schedule import SCHEDULES
from graphprune.search.finder import SEARCHES, Finder
from graphprune.source import load_skeleton, load_source
from graphprune.stream import deliver_checkpoint
from speedup.errors import ProofError, SpeedupError
from speedup.latency import DEFAULT_LIMITS, benchmark, to_csv
from speedup.probe import profile


class OneLine(TyperGroup):
    """Ends a mistake in one line on stderr and exit status 2, a failed proof in 1; a bug keeps its traceback."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        """Runs a command line and leaves the process."""
        words = list(sys.argv[1:] if args is None else args)
        with contextlib.suppress(ValueError):  # outside the main thread there are no signals
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that drafts are removed
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # inside torch.export
        try:
            status = super().main(words, **{**extra, "prog_name": "graphprune", "standalone_mode": False, "obj": words})
        except (typer.TyperException, SpeedupError) as error:
            _complain(error)
            sys.exit(1 if isinstance(error, ProofError) else 2)
        except (typer.Abort, KeyboardInterrupt):
            sys.exit(130)
        sys.exit(status or 0)


def _complain(error: Exception) -> None:
    text = str(error)
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "graphprune"
        text = f"{error.format_message().rstrip('.')}. See {path} --help."
    typer.echo(" ".join(text.split()), err=True)


app = typer.Typer(
    cls=OneLine,
    help="Structured pruning of PyTorch models, proven equivalent to the masked original.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(help="file.py, file.py:name or package.module:name.", metavar="MODEL", show_default=False)
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", help="Example input, as in 1x3x224x224 or ids=2x128:int64; repeatable."),
]
Weights = Annotated[Path | None, typer.Option(help="State dict to load: safetensors, or written by torch.save.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of everything that is random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of onnxruntime while latency is measured.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphprune {graphprune.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structured pruning of PyTorch models, proven equivalent to the masked original."""


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
            help="YAML or JSON: a config list of NNI, config_list and other options by their names, or a file of LPOT, "
            "by which MODEL is trained and single weights become zero."
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
    request = _asked(context, options, config)
    seed = seed if isinstance(request, Path) else request.seed
    if search is not None and schedule is not None:
        raise ConfigError("--search and --schedule: exclude each other. Give one of them.")
    find = None
    if search or schedule or epochs:
        find = Finder(search, schedule or "one_shot", rounds, epochs, journal, workers)
    given = {
        "--search": search,
        "--schedule": schedule,
        "--epochs": epochs,
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
        with _silent_stdout(as_json), StageDisplay() as progress:
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
        _show(report if as_json else tables.compression(report, folder))
        return
    with _silent_stdout(as_json), StageDisplay() as progress:
        progress("load")
        source = load_source(model, inputs=inputs or (), weights=weights, seed=seed, device=device)
        folder = out or Path(f"{source.name}-pruned")
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
    _show(delivery.report if as_json else tables.compression(delivery.report, delivery.folder))


@app.command("inspect")
def inspect_command(
    model: Model,
    *,
    inputs: Inputs = None,
    weights: Weights = None,
    graph: Annotated[Path | None, typer.Option(help="Write axes and ties: .dot, .graphml, .json or .svg.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Show the channel groups of MODEL: what goes together, and what is pinned and why."""
    with _silent_stdout(as_json):
        source = load_source(model, inputs=inputs or (), weights=weights, seed=seed, device=device)
        dependencies = trace(source.model, source.example_inputs)
        if graph is not None:
            write_graph(dependencies, graph)
        rows = describe_groups(dependencies)
    _show(rows if as_json else tables.channel_groups(rows))


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="Folder that compress wrote.", metavar="DIR", show_default=False)],
) -> None:
    """Prove again what DIR claims, from its files alone."""
    try:
        with StageDisplay() as progress:
            found = audit(folder, progress)
    except ConfigError:
        raise
    except SpeedupError as error:
        _complain(error)
        raise typer.Exit(1) from error
    _show(tables.findings([(finding.subject, finding.fact) for finding in found]))


@app.command("bench")
def bench_command(
    models: Annotated[list[Path], typer.Argument(help="ONNX files; the first is the baseline.", metavar="ONNX...")],
    *,
    threads: Threads = None,
    batch: Annotated[int, typer.Option(min=1, help="Size of the batch, where it is open.")] = 1,
    provider: Annotated[str, typer.Option(help="Execution provider of onnxruntime.")] = "CPUExecutionProvider",
    seed: Seed = 0,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this file as well.")] = None,
    with_profile: Annotated[bool, typer.Option("--profile", help="Say where the time goes, by operator.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of ONNX files side by side."""
    result = benchmark(models, threads=threads, batch=batch, provider=provider, seed=seed)
    profiles = {
        str(path): [vars(row) for row in profile(path, threads=threads, batch=batch, provider=provider, seed=seed)]
        for path in (models if with_profile else ())
    }
    if csv is not None:
        _write(csv, to_csv(result))
    if as_json:
        _show({**result.to_dict(), "profiles": profiles})
        return
    _show(tables.latencies(result.rows()))
    for name, rows in profiles.items():
        _show(tables.operator_times(name, rows))
    for warning in result.warnings:
        typer.echo(f"Note: {warning}", err=True)


_FINDING = ("schedule", "rounds", "search", "epochs", "journal", "workers")
"""Options that say how to look for what goes."""


def _asked(context: typer.Context, options: Mapping[str, Any], config: Path | None) -> Request | Path:
    """What is asked on the command line and in a file, of which the first wins; or that file, if it is one of LPOT."""
    if config is None:
        return Request.of(**options)
    file = read_config_file(config)
    told = {name: value for name, value in options.items() if _is_told(context, name)}
    if is_lpot(file):
        for name in (*told, "checkpoint", *_FINDING):
            if _is_told(context, name) and name not in ("seed", "strict"):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option}: is not for {config}, which says what to prune. Leave it out.")
        return config
    values = read_request(file, config)
    if "config_list" in values and "sparsity" in {**values, **told}:
        raise ConfigError(f"sparsity: is said by the config_list of {config}. Leave it out.")
    return Request.of(**{**options, **values, **told})


def _is_told(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _round_to(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _silent_stdout(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Sends what a model's own code prints to stderr, so that stdout holds JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def _show(what: Any) -> None:
    """Prints a table, or anything else as JSON."""
    if isinstance(what, dict | list):
        typer.echo(json.dumps(what, indent=1))
        return
    shown: RenderableType = what
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}). Name another file.") from error


def main() -> None:
    """The command line."""
    app()

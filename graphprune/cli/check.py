"""Commands that check what was made: its proof, and its latency."""

from pathlib import Path
from typing import Annotated

import typer

from graphprune import tables
from graphprune.audit import audit
from graphprune.cli.app import AsJson, Seed, Threads, app, check_places, complain, show, write
from graphprune.errors import ConfigError
from graphprune.progress import StageDisplay
from speedup.errors import SpeedupError
from speedup.latency import benchmark, to_csv
from speedup.probe import profile


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
        complain(error)
        raise typer.Exit(1) from error
    show(tables.findings([(finding.subject, finding.fact) for finding in found]))


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
    check_places((csv,), models)
    result = benchmark(models, threads=threads, batch=batch, provider=provider, seed=seed)
    profiles = {
        str(path): [vars(row) for row in profile(path, threads=threads, batch=batch, provider=provider, seed=seed)]
        for path in (models if with_profile else ())
    }
    if csv is not None:
        write(csv, to_csv(result))
    if as_json:
        show({**result.to_dict(), "profiles": profiles})
        return
    show(tables.latencies(result.rows()))
    for name, rows in profiles.items():
        show(tables.operator_times(name, rows))
    for warning in result.warnings:
        typer.echo(f"Note: {warning}", err=True)

"""Commands that look at a model: what depends on what, and what its score depends on."""

from pathlib import Path
from typing import Annotated

import typer

from graphprune import tables
from graphprune.cli.app import (
    AsJson,
    Device,
    Inputs,
    Model,
    Seed,
    Weights,
    app,
    check_places,
    show,
    silent_stdout,
    write,
)
from graphprune.criteria import CRITERIA
from graphprune.dependency import trace
from graphprune.dependency_tables import channel_dependencies, convolution_groups
from graphprune.drawing import check_plot, plot_scores, write_graph
from graphprune.progress import StageDisplay
from graphprune.report import describe_groups
from graphprune.search.finder import analysed
from graphprune.search.sensitivity import SHARES
from graphprune.source import file_of, load_source


@app.command("inspect")
def inspect_command(
    model: Model,
    *,
    inputs: Inputs = None,
    weights: Weights = None,
    graph: Annotated[Path | None, typer.Option(help="Write axes and ties: .dot, .graphml, .json or .svg.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write which layers lose the same channels, as NNI does.")] = None,
    csv_groups: Annotated[
        Path | None, typer.Option(help="Write of what channels of convolutions stay multiples, as NNI does.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Show the channel groups of MODEL: what goes together, and what is pinned and why."""
    check_places((graph, csv, csv_groups), (file_of(model), weights))
    with silent_stdout(as_json):
        source = load_source(model, inputs=inputs or (), weights=weights, seed=seed, device=device)
        dependencies = trace(source.model, source.example_inputs)
        if graph is not None:
            write_graph(dependencies, graph)
        if csv is not None:
            write(csv, channel_dependencies(dependencies))
        if csv_groups is not None:
            write(csv_groups, convolution_groups(dependencies))
        rows = describe_groups(dependencies)
    show(rows if as_json else tables.channel_groups(rows))


@app.command("sensitivity")
def sensitivity_command(
    model: Model,
    *,
    shares: Annotated[
        list[float] | None,
        typer.Option("--share", help="Share that goes; repeatable.", show_default="0.1 to 0.9"),
    ] = None,
    criterion: Annotated[str, typer.Option(help=f"What scores a channel: {', '.join(CRITERIA)}.")] = "l1",
    csv: Annotated[Path | None, typer.Option(help="Write the table, a row for each layer, as NNI does.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: .svg, .png or .pdf.")] = None,
    journal: Annotated[Path | None, typer.Option(help="File to note scores in, and to go on from.")] = None,
    workers: Annotated[str | None, typer.Option(help="Where candidates run: ray, or ray://host:port.")] = None,
    inputs: Inputs = None,
    weights: Weights = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Show the score of MODEL at each share of each channel group, all others whole; needs evaluate(model)."""
    check_places((csv, plot, journal), (file_of(model), weights))
    if plot is not None:
        check_plot(plot)
    with silent_stdout(as_json), StageDisplay() as progress:
        progress("load")
        source = load_source(model, inputs=inputs or (), weights=weights, seed=seed, device=device)
        space, table = analysed(source, tuple(shares or SHARES), criterion, journal, workers, seed, progress)
    show({"dense": table.dense, "scores": table.scores} if as_json else tables.sensitivities(table.dense, table.scores))
    if csv is not None:
        write(csv, table.to_csv(space))
    if plot is not None:
        plot_scores(table.dense, table.scores, plot)

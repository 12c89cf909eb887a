"""What all commands share: the application, the options that several of them have, and how they print."""

import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

import graphprune
from graphprune.errors import ConfigError
from speedup.errors import ProofError, SpeedupError


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
            complain(error)
            sys.exit(1 if isinstance(error, ProofError) else 2)
        except (typer.Abort, KeyboardInterrupt):
            sys.exit(130)
        sys.exit(status or 0)


def complain(error: Exception) -> None:
    """Prints a mistake in one line on stderr."""
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


def silent_stdout(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Sends what a model's own code prints to stderr, so that stdout holds JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def show(what: Any) -> None:
    """Prints a table, or anything else as JSON."""
    if isinstance(what, dict | list):
        typer.echo(json.dumps(what, indent=1))
        return
    shown: RenderableType = what
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def check_places(outputs: Sequence[Path | None], inputs: Sequence[Path | None] = ()) -> None:
    """Refuses files that cannot be made, before the work for what should be in them is done.

    Args:
        outputs: What is written; None stands for nothing.
        inputs: What is read, and must not be written over.

    Raises:
        ConfigError: One is a folder or in none, or is named twice.
    """
    seen = {path.resolve() for path in inputs if path is not None}
    for path in filter(None, outputs):
        if path.is_dir() or not path.absolute().parent.is_dir():
            fact = "is a folder" if path.is_dir() else f"there is no folder {path.absolute().parent} to make it in"
            raise ConfigError(f"{path}: {fact}. Name another file.")
        if path.resolve() in seen:
            raise ConfigError(f"{path}: is named for something else as well. Name another file.")
        seen.add(path.resolve())


def check_outside(folder: Path, path: Path | None) -> None:
    """Refuses a file in a folder that is going to be replaced as a whole.

    Raises:
        ConfigError: It is in there.
    """
    if path is not None and path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{path}: is in {folder}, which is replaced as a whole. Name another file.")


def write(path: Path, text: str) -> None:
    """Writes a text file whole, or leaves what is there; a pipe or terminal just gets it."""
    target = path.resolve()  # of a link
    draft = target.with_name(f".{target.name}-new-{os.getpid()}")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}). Name another file.") from error
    finally:
        draft.unlink(missing_ok=True)

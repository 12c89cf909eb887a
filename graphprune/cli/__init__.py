"""The commands: they parse, print and set the exit status."""

from graphprune.cli import check, compress, look
from graphprune.cli.app import app

__all__ = ["app", "check", "compress", "look", "main"]


def main() -> None:
    """The command line."""
    app()

"""What is going on, on stderr: one line for each stage with its seconds."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text


class _Seconds(ProgressColumn):
    """How long a stage has run."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(f"{seconds or 0.0:7.1f} s", style="progress.elapsed")


class StageDisplay:
    """Shows the stage that runs and those before it; use as a context, and call with the name of each stage."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description:<20}"), _Seconds())
        self._progress = Progress(
            *columns, console=Console(file=sys.stderr), redirect_stdout=False, redirect_stderr=False
        )
        self._task: TaskID | None = None

    def __call__(self, name: str) -> None:
        """Ends the stage that runs and begins another."""
        self._finish()
        self._task = self._progress.add_task(name, total=1)

    def __enter__(self) -> "StageDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        self._progress.stop()

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1)

"""Runs of a benchmark in processes of their own, within a limit."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any


def run(script: str, arguments: Sequence[str], seconds: int) -> dict[str, Any] | str:
    """Returns the JSON on the last line that a script prints, or in words why there is none."""
    command = [sys.executable, "-W", "ignore", script, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not within {seconds} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1][:200] if lines else "no message"
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def side_by_side(
    script: str, runs: Mapping[str, Sequence[str]], seconds: int, jobs: int
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yields the name of each run and what :func:`run` returns for its arguments, in the order in which they end.

    Args:
        script: The benchmark.
        runs: Their arguments, by their names.
        seconds: The limit of one run.
        jobs: How many run at a time.
    """
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(run, script, arguments, seconds): name for name, arguments in runs.items()}
        for done in as_completed(started):
            yield started[done], done.result()

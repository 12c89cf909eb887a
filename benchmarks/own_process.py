"""One run of a benchmark in a process of its own, within a limit."""

import json
import subprocess
import sys
from collections.abc import Sequence
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

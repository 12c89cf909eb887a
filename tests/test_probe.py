"""What the machine is asked: the block to which it pads channels, and where the time of a model goes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from speedup import probe


def network_seconds(widths: Sequence[int], block: int, noise: float = 0.02) -> NDArray[np.float64]:
    """Times of convolutions that are padded to whole blocks, with an overhead and some noise."""
    padded = np.ceil(np.array(widths) / block) * block
    return (20.0 + 3.0 * padded + 0.2 * padded**2) * (1 + np.random.default_rng(0).uniform(0, noise, len(widths)))


@pytest.mark.parametrize("block", [1, 4, 8, 16, 32])
def test_the_block_of_a_staircase_is_found(block: int) -> None:
    assert probe.find_block(lambda widths: list(network_seconds(widths, block))) == block


def test_the_block_is_found_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def chain_seconds(widths: Sequence[int], *, threads: int) -> Sequence[float]:
        calls.append(threads)
        return list(network_seconds(widths, 32))

    monkeypatch.setattr(probe, "chain_seconds", chain_seconds)
    probe.preferred_block.cache_clear()
    try:
        assert probe.preferred_block() == probe.preferred_block() == 32
    finally:
        probe.preferred_block.cache_clear()
    assert calls == [1]


def test_the_chains_run() -> None:
    times = probe.chain_seconds([4, 6], threads=1, rounds=2)
    assert len(times) == 2
    assert all(0 < seconds < 60 for seconds in times)


def test_operator_times_leave_out_the_warm_up() -> None:
    def node(operator: str, start_us: int, duration_us: int) -> dict[str, Any]:
        name = f"n{start_us}_kernel_time"
        return {"cat": "Node", "name": name, "ts": start_us, "dur": duration_us, "args": {"op_name": operator}}

    def run(start_us: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": start_us, "dur": 100}

    warm = [run(0), node("Conv", 1, 9000)]
    events = [*warm, run(100), node("Conv", 101, 3000), node("Relu", 102, 1000)]
    events += [run(200), node("Conv", 201, 5000), node("Relu", 202, 1000)]
    conv, relu = probe.operator_times(events, runs=2)
    assert (conv.operator, conv.nodes, conv.ms, conv.share) == ("Conv", 1, 4.0, 0.8)
    assert (relu.operator, relu.nodes, relu.ms, relu.share) == ("Relu", 1, 1.0, 0.2)

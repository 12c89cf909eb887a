"""Every network of the coverage page: proven, or planned by shape where it is too large to be proven here."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from coverage import names

    NETWORKS = list(names())
except ImportError:
    NETWORKS = []


@pytest.mark.zoo
@pytest.mark.skipif(not NETWORKS, reason="torchvision or transformers is not installed")
@pytest.mark.parametrize("name", NETWORKS or ["none"])
def test_network(name):
    from coverage import measured

    row = measured(name, seconds=600, proof_limit=100_000_000)
    assert row["captured"].startswith(("whole", "in parts"))
    assert row["proof"] == "by shape" or float(row["proof"]) < 1e-9
    assert not row["onnx"].startswith("none") and float(row["kept"].rstrip("%")) < 100

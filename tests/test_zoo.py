"""All classification networks of torchvision: the proof holds on each; the largest are planned by shape only."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from torchvision_zoo import classification_networks

    NETWORKS = classification_networks()
except ImportError:
    NETWORKS = []


@pytest.mark.zoo
@pytest.mark.skipif(not NETWORKS, reason="torchvision is not installed")
@pytest.mark.parametrize("name", NETWORKS or ["none"])
def test_torchvision_classification(name):
    from coverage import measured

    row = measured(name, seconds=600, proof_limit=100_000_000)
    assert row["captured"] == "whole"
    assert row["proof"] == "by shape" or float(row["proof"]) < 1e-9
    assert float(row["kept"].rstrip("%")) < 60

"""What several files of tests share."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from test_rules import one_thread


@pytest.fixture
def quiet_and_quick() -> Iterator[None]:
    """One seed, one thread, and none of the warnings that torch gives about itself."""
    torch.manual_seed(0)
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield

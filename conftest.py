"""For all tests: those that run side by side share the cores instead of fighting for them."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

LONGEST = Path(__file__).parent / "tests/test_ppo.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest goes first: beside it, little else starts a Ray."""
    items.sort(key=lambda item: item.path != LONGEST)

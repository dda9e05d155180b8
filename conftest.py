"""For all tests: how those that run side by side share the cores instead of fighting for them."""

from __future__ import annotations

import os
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

STARTING_RAY = ("tests/test_ppo.py", "tests/test_ppo_cluster.py", "tests/test_generate.py")
"""Files that start a Ray, longest first. Ray gives its parts 30 seconds to be there, which two that start at once may miss."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those files go first, so that the end of the run is many short files."""
    first = {config.rootpath / name: number for number, name in enumerate(STARTING_RAY)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file in one process, as with `--dist loadfile`; those that start a Ray one after the other, all in the same."""
    from xdist.scheduler import LoadFileScheduling

    class OneRayAtATime(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "Ray" if file in STARTING_RAY else file

    return OneRayAtATime(config, log)

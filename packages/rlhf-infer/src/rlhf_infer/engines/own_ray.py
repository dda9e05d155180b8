"""A Ray that a run starts for itself, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def same_environment() -> Iterator[None]:
    """Have the workers of a Ray that is started meanwhile run in this environment and folder, as they are.

    Below `uv run`, Ray would copy the working folder, data and all, and have uv make the whole environment in the copy again:
    right for a cluster whose nodes have neither, gigabytes and minutes for nothing on the machine that has both.
    """
    from ray._private import ray_constants

    before = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        yield
    finally:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = before

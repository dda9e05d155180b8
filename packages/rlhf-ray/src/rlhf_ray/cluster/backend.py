"""How the driver starts processes and calls them: the one seam between the algorithm and Ray.

A worker is an object of a plain class; its methods are the verbs that can be called. `RayBackend` runs each in a process of
its own, `LocalBackend` in this one, at once: for a single rank without vLLM, where a process would only cost time and
memory, and for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_data.errors import RunError


class WorkerDied(RunError):
    """The process of a worker is gone."""


class Unexpected(RunError):
    """A worker raised what was not written for people; the message says what it was."""


@dataclass(frozen=True)
class Place:
    """What a worker's process gets, as planned in `rlhf_ray.cluster.placement`."""

    group: Any = None
    """Ray's placement group; None where there is none."""

    bundle: int = 0
    """Number of the bundle in it."""

    cpus: float = 0
    """CPUs, or shares of one."""

    gpus: float = 0
    """GPUs, or shares of one."""

    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the process, which are set before anything is imported there."""


class Backend(Protocol):
    """Starts workers and calls them. References and handles are opaque."""

    def start(self, worker: Callable[..., Any], *args: Any, place: Place, name: str) -> Any:
        """Start a worker, `worker(*args)` in its process; returns a handle at once. A failing constructor shows in its calls.

        Args:
            worker: a class, importable there.
            args: of its constructor.
            place: where.
            name: what people call it: `policy rank 0`, `engine 3`.
        """
        ...

    def call(self, handle: Any, verb: str, *args: Any) -> Any:
        """Have a worker run a method; returns a reference to its result at once. A worker runs its calls in turn."""
        ...

    def put(self, value: Any) -> Any:
        """Something that several calls get as an argument, handed over once."""
        ...

    def wait(self, references: Sequence[Any], timeout: float) -> list[Any]:
        """Those of the references whose results are there; waits for the first, at most `timeout` seconds."""
        ...

    def result(self, reference: Any) -> Any:
        """The result of a call that has ended.

        Raises:
            WorkerDied: its process is gone.
            Exception: what the method raised.
        """
        ...

    def stop(self, handle: Any) -> None:
        """End a worker's process."""
        ...

    def close(self) -> None:
        """End all that is left."""
        ...


@dataclass(eq=False)
class Done:
    """A call of `LocalBackend`, which has ended."""

    value: Any = None
    error: Exception | None = None


class LocalBackend:
    """Runs workers in this process, every call at once."""

    def start(self, worker: Callable[..., Any], *args: Any, place: Place, name: str) -> Any:
        return worker(*args)

    def call(self, handle: Any, verb: str, *args: Any) -> Done:
        try:
            return Done(getattr(handle, verb)(*args))
        except Exception as error:
            return Done(error=error)

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: Sequence[Done], timeout: float) -> list[Done]:
        return list(references)

    def result(self, reference: Done) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def stop(self, handle: Any) -> None: ...

    def close(self) -> None: ...

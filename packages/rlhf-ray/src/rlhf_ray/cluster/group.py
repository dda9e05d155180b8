"""The ranks of a role, called together: work is divided by tokens, and results come back in the order of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf_data.batching import plan_micro_batches
from rlhf_data.errors import InputError, RunError
from rlhf_ray.cluster.backend import Backend, Place
from rlhf_ray.rollout import SAMPLES, TARGETS, Rollout, ranges

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A micro-batch of one rank."""

    batch: Rollout
    """Its samples; of an `Experience` in an update."""

    idle: bool = False
    """Whether it is only there because other ranks have one more: its model call counts for nothing."""


class Pending(Generic[T]):
    """Calls of a role's ranks that go on.

    Args:
        group: the role.
        verb: what it does, for errors.
        references: one of each rank.
        finish: what is made of the ranks' results.
    """

    def __init__(
        self, group: WorkerGroup, verb: str, references: Sequence[Any], finish: Callable[[list[Any]], T]
    ) -> None:
        self.group, self.verb, self.references, self.finish = group, verb, list(references), finish

    def result(self) -> T:
        """Wait for all ranks.

        Raises:
            RunError: ranks do not answer in time, or one failed: its own error, with role and rank.
        """
        return self.finish(self.group.wait(self.verb, self.references))


class WorkerGroup:
    """The ranks of a role.

    Args:
        role: what people call it: `policy`, `critic`, `reference model`, `reward model NAME`.
        backend: calls the workers.
        handles: of its ranks, in order.
        timeout: seconds that a call may take.
    """

    def __init__(self, role: str, backend: Backend, handles: Sequence[Any], timeout: float) -> None:
        self.role, self.backend, self.handles, self.timeout = role, backend, list(handles), timeout

    def __len__(self) -> int:
        return len(self.handles)

    def start(self, verb: str, *args: Any) -> Pending[list[Any]]:
        """Have all ranks do the same."""
        return self.start_each(verb, [args] * len(self))

    def start_each(self, verb: str, arguments: Sequence[Sequence[Any]]) -> Pending[list[Any]]:
        """Have every rank do its own part."""
        calls = zip(self.handles, arguments, strict=True)
        return Pending(self, verb, [self.backend.call(rank, verb, *own) for rank, own in calls], list)

    def call(self, verb: str, *args: Any) -> list[Any]:
        """Have all ranks do the same, and wait; the results of all ranks."""
        return self.start(verb, *args).result()

    def map(
        self,
        verb: str,
        rollout: Rollout,
        *args: Any,
        gives: Sequence[str],
        size: int,
        token_budget: int | None = None,
    ) -> Pending[list[NDArray[Any]]]:
        """Have the ranks compute something of every sample, divided among them.

        Args:
            verb: a method that takes a list of `Part`, and `args`; it returns a tuple of arrays for each, of no entry for an
                idle part.
            rollout: the samples.
            args: what else every rank is told.
            gives: what these arrays have one entry for, `TARGETS` or `SAMPLES` each.
            size: most samples of a micro-batch.
            token_budget: most tokens of a micro-batch; None to count samples.

        Returns:
            What gives the arrays of all samples, in the order of `rollout`.
        """
        plan = divided(rollout, len(self), size, token_budget)
        parts = [([part_of(rollout, row) for row in rank], *args) for rank in plan]
        order = np.concatenate([row for rank in plan for row in rank])
        rows = {TARGETS: ranges(rollout.target_bounds[order], rollout.response_lengths[order]), SAMPLES: order}

        def finish(answers: list[Any]) -> list[NDArray[Any]]:
            each = [part for rank in answers for part in rank]
            return [in_order(np.concatenate([part[n] for part in each]), rows[what]) for n, what in enumerate(gives)]

        return Pending(self, verb, self.start_each(verb, parts).references, finish)

    def wait(self, verb: str, references: Sequence[Any]) -> list[Any]:
        """Results of one call of every rank; the first failure ends it."""
        left, deadline = dict(enumerate(references)), time.monotonic() + self.timeout
        found: dict[int, Any] = {}
        while left:
            ready = set(self.backend.wait(list(left.values()), max(0.0, deadline - time.monotonic())))
            if not ready:
                ranks = ", ".join(map(str, sorted(left)))
                raise RunError(
                    f"the {self.role} did not answer: `{verb}` of rank {ranks} has taken more than {self.timeout:g} s "
                    "(--call_timeout); --load_checkpoint continues from the newest checkpoint"
                )
            for rank in [rank for rank, reference in left.items() if reference in ready]:
                found[rank] = self.outcome(verb, rank, left.pop(rank))
        return [found[rank] for rank in range(len(references))]

    def outcome(self, verb: str, rank: int, reference: Any) -> Any:
        """The result of one rank's call that has ended."""
        try:
            return self.backend.result(reference)
        except InputError:
            raise
        except Exception as error:
            raise RunError(f"the {self.role}, rank {rank}, `{verb}`: {said(error)}") from error

    def stop(self) -> None:
        """End its processes."""
        for handle in self.handles:
            self.backend.stop(handle)


def start_group(
    backend: Backend, role: str, worker: Callable[..., Any], places: Sequence[Place], timeout: float
) -> tuple[WorkerGroup, tuple[str, int] | None]:
    """Start all ranks of a role, and open the place where they meet.

    Args:
        backend: runs them.
        role: what people call it.
        worker: a class, made with rank and world size; its `meet` opens the place.
        places: of its ranks.
        timeout: seconds that a call may take.

    Returns:
        The role, and address and port of the place; None for a single rank.
    """
    handles = [
        backend.start(worker, rank, len(places), place=place, name=f"{role} rank {rank}")
        for rank, place in enumerate(places)
    ]
    group = WorkerGroup(role, backend, handles, timeout)
    if len(handles) == 1:
        return group, None
    return group, group.wait("meet", [backend.call(handles[0], "meet")])[0]


def wait_all(pendings: Sequence[Pending[Any]], timeout: float, doing: str) -> list[Any]:
    """Results of calls of several roles; the first failure of any of them ends it.

    Args:
        pendings: the calls.
        timeout: seconds that all of them may take together.
        doing: what they do, for errors.

    Raises:
        RunError: some do not answer in time, or one failed: its own error, with role and rank.
    """
    owners = {reference: pending for pending in pendings for reference in pending.references}
    left, deadline = set(owners), time.monotonic() + timeout
    while left:
        backend = next(iter(owners.values())).group.backend
        ready = backend.wait(list(left), max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(sorted({owners[reference].group.role for reference in left}))
            raise RunError(f"{doing} has taken more than {timeout:g} s (--start_timeout); not ready: {late}")
        for reference in ready:
            pending = owners[reference]
            pending.group.outcome(pending.verb, pending.references.index(reference), reference)
        left.difference_update(ready)
    return [pending.result() for pending in pendings]


def divided(rollout: Rollout, ranks: int, size: int, token_budget: int | None) -> list[list[NDArray[np.int64]]]:
    """Places of the samples in the micro-batches of every rank: each has as many, of about as many tokens.

    Adjacent responses to one prompt stay together as far as micro-batches and ranks allow, so that their prompt is computed
    once.

    Args:
        rollout: the samples.
        ranks: to divide them among.
        size: most samples of a micro-batch.
        token_budget: most tokens of a micro-batch; None to count samples.
    """
    starts, width = units(rollout.groups, min(size, -(-len(rollout) // ranks)))
    stops = np.append(starts[1:], len(rollout))
    lengths = np.diff(rollout.cu_seqlens[np.append(starts, len(rollout))])
    budget = None if token_budget is None else max(token_budget, int(lengths.max()))
    plan = plan_micro_batches(lengths, ranks, max(1, size // width), budget)
    return [[ranges(starts[row], stops[row] - starts[row]) for row in rank] for rank in plan]


def units(groups: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], int]:
    """Where runs of adjacent samples of one group start, none longer than `most`; and the length of the longest."""
    changes = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
    longest = min(most, int(np.diff(np.append(changes, len(groups))).max()))
    starts = np.repeat(changes, np.diff(np.append(changes, len(groups))))
    return np.flatnonzero((np.arange(len(groups)) - starts) % longest == 0), longest


def part_of(rollout: Rollout, places: NDArray[np.int64]) -> Part:
    """The samples at some places as a micro-batch; without any, one that idles."""
    return Part(rollout.select(places)) if len(places) else Part(rollout.select([0]), idle=True)


def in_order(values: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """Values, each put to its place."""
    out = np.empty_like(values)
    out[places] = values
    return out


def said(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, RunError) else f"{type(error).__name__}: {text}"

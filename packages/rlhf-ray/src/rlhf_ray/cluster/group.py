"""The ranks of a role, called together: work is divided by tokens, and results come back in the order of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf_data.batching import plan_micro_batches
from rlhf_data.errors import InputError, RunError
from rlhf_ray.cluster.backend import Backend, Place, Unexpected, WorkerDied
from rlhf_ray.rollout import SAMPLES, TARGETS, Rollout, joined, put, slices_of

T = TypeVar("T")

AFTERMATH = 2.0
"""Seconds that other failures are waited for after the first one."""


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

    def start_each(self, verb: str, arguments: Iterable[Sequence[Any]]) -> Pending[list[Any]]:
        """Have every rank do its own part; these are made one by one, as ranks are called."""
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
        plan = divided(rollout.lengths, rollout.groups, len(self), size, token_budget)
        rows = [row for rank in plan for row in rank]
        parts, order = iter(parts_of(rollout, rows)), np.concatenate(rows)
        arguments = ((list(islice(parts, len(rank))), *args) for rank in plan)
        bounds = {TARGETS: rollout.target_bounds, SAMPLES: np.arange(len(rollout) + 1)}

        def finish(answers: list[Any]) -> list[NDArray[Any]]:
            each = [part for rank in answers for part in rank]
            return [
                put(np.concatenate([part[n] for part in each]), bounds[what], order) for n, what in enumerate(gives)
            ]

        return Pending(self, verb, self.start_each(verb, arguments).references, finish)

    def wait(self, verb: str, references: Sequence[Any]) -> list[Any]:
        """Results of one call of every rank; the first failure ends it."""

        def late(calls: Sequence[Call]) -> str:
            ranks = ", ".join(str(call.rank) for call in calls)
            return (
                f"the {self.role} did not answer: `{verb}` of rank {ranks} has taken more than {self.timeout:g} s "
                "(--call_timeout); --load_checkpoint continues from the newest checkpoint"
            )

        calls = [Call(self, verb, rank, reference) for rank, reference in enumerate(references)]
        return gather(self.backend, calls, self.timeout, late)

    def stop(self) -> None:
        """End its processes."""
        for handle in self.handles:
            self.backend.stop(handle)


@dataclass(frozen=True, eq=False)
class Call:
    """What one rank was asked for."""

    group: WorkerGroup
    verb: str
    rank: int
    reference: Any


def start_group(
    backend: Backend, role: str, worker: Callable[[int, int], Any], places: Sequence[Place], timeout: float
) -> tuple[WorkerGroup, tuple[str, int] | None]:
    """Start the ranks of a role, and have the first one open a place where they meet.

    Args:
        backend: starts them.
        role: what people call it.
        worker: makes a rank, given its number and how many there are; a `RankWorker`.
        places: of the ranks.
        timeout: seconds that a call may take.

    Returns:
        The role, and where its ranks meet: address and port; None for a single rank.

    Raises:
        RunError: the first rank does not start.
    """
    size = len(places)
    handles = [
        backend.start(worker, rank, size, place=place, name=f"{role} rank {rank}" if size > 1 else role)
        for rank, place in enumerate(places)
    ]
    group = WorkerGroup(role, backend, handles, timeout)
    if size == 1:
        return group, None
    (meeting,) = group.wait("meet", [backend.call(handles[0], "meet")])
    return group, meeting


def wait_all(pendings: Sequence[Pending[Any]], timeout: float, doing: str) -> list[Any]:
    """Wait for calls of several roles at once; the first failure of any of them ends it.

    Args:
        pendings: the calls.
        timeout: seconds in which all must have ended.
        doing: what they do, for the error: `getting ready`.

    Returns:
        The result of each.

    Raises:
        RunError: some do not answer in time, or one failed: its own error, with role and rank.
    """
    if not pendings:
        return []

    def late(calls: Sequence[Call]) -> str:
        ranks: dict[str, list[str]] = {}
        for call in calls:
            ranks.setdefault(call.group.role, []).append(str(call.rank))
        silent = "; ".join(f"{role}, rank {', '.join(numbers)}" for role, numbers in ranks.items())
        return f"{doing} took more than {timeout:g} s (--start_timeout); no answer from: {silent} (`ray status` shows the cluster)"

    calls = [
        Call(pending.group, pending.verb, rank, reference)
        for pending in pendings
        for rank, reference in enumerate(pending.references)
    ]
    results = iter(gather(pendings[0].group.backend, calls, timeout, late))
    return [pending.finish(list(islice(results, len(pending.references)))) for pending in pendings]


def gather(backend: Backend, calls: Sequence[Call], timeout: float, late: Callable[[Sequence[Call]], str]) -> list[Any]:
    """Results of calls, in their order.

    When one fails, others are often about to: ranks lose their connection to one that died. So after the first failure a
    moment more is waited, and the error is the one that is likeliest to be the cause.

    Args:
        backend: of all of them.
        calls: what was asked for.
        timeout: seconds.
        late: makes an error's text of calls that have not ended in time.

    Raises:
        InputError: as a rank raised it.
        RunError: what another failure was, with role and rank.
    """
    left, deadline = {call.reference: call for call in calls}, time.monotonic() + timeout
    found: dict[Any, Any] = {}
    failed: list[tuple[Call, Exception]] = []
    while left:
        ready = backend.wait(list(left), max(0.0, deadline - time.monotonic()))
        if not ready and not failed:
            raise RunError(late(list(left.values())))
        for reference in ready:
            call = left.pop(reference)
            try:
                found[reference] = backend.result(reference)
            except Exception as error:
                if not failed:
                    deadline = min(deadline, time.monotonic() + AFTERMATH)
                failed.append((call, error))
        if failed and not ready:
            break
    if failed:
        call, error = min(failed, key=lambda failure: suspicion(failure[1]))
        if isinstance(error, InputError):
            raise error
        raise RunError(f"the {call.group.role}, rank {call.rank}, `{call.verb}`: {said(error)}") from error
    return [found[call.reference] for call in calls]


def suspicion(error: Exception) -> int:
    """How likely an error is the cause of others that came with it: the smaller, the likelier."""
    if isinstance(error, WorkerDied):
        return 1
    if isinstance(error, InputError | RunError) and not isinstance(error, Unexpected):
        return 0
    return 2


def divided(
    lengths: NDArray[np.int64], groups: NDArray[np.int64], ranks: int, size: int, token_budget: int | None
) -> list[list[NDArray[np.int64]]]:
    """Places of samples in the micro-batches of every rank: each has as many, of about as many tokens.

    Adjacent responses to one prompt stay together as far as micro-batches and ranks allow, so that their prompt is computed
    once.

    Args:
        lengths: tokens of each sample, `[N]`.
        groups: the request that each sample answers, `[N]`.
        ranks: to divide them among.
        size: most samples of a micro-batch.
        token_budget: most tokens of a micro-batch; None to count samples.
    """
    most = min(size, -(-len(lengths) // ranks))
    if token_budget is not None:
        most = min(most, max(1, token_budget // int(lengths.max())))
    starts, width = units(groups, most)
    tokens = np.add.reduceat(lengths, starts)
    budget = None if token_budget is None else max(token_budget, int(tokens.max()))
    plan = plan_micro_batches(tokens, ranks, max(1, size // width), budget)
    everything, bounds = np.arange(len(lengths)), np.append(starts, len(lengths))
    return [[joined(everything, slices_of(bounds, (row, row + 1))) for row in rank] for rank in plan]


def units(groups: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], int]:
    """Where runs of adjacent samples of one group start, none longer than `most`; and the length of the longest."""
    changes = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
    longest = min(most, int(np.diff(np.append(changes, len(groups))).max()))
    starts = np.repeat(changes, np.diff(np.append(changes, len(groups))))
    return np.flatnonzero((np.arange(len(groups)) - starts) % longest == 0), longest


def parts_of(rollout: Rollout, rows: Sequence[NDArray[np.int64]]) -> list[Part]:
    """Micro-batches: the samples at some places each; one without any idles."""
    chosen = [row if len(row) else np.zeros(1, np.int64) for row in rows]
    pieces = rollout.select(np.concatenate(chosen)).cut([len(row) for row in chosen])
    return [Part(piece, idle=not len(row)) for piece, row in zip(pieces, rows, strict=True)]


def said(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, RunError) else f"{type(error).__name__}: {text}"

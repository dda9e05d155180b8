"""Waiting for calls while engines write."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from rlhf_data.errors import RunError
from rlhf_ray.cluster.backend import Done, LocalBackend, WorkerDied
from rlhf_ray.cluster.group import Pending, WorkerGroup
from rlhf_ray.roles import Roles


class Slow(LocalBackend):
    """Calls end one at a time, in the order of a list."""

    def __init__(self) -> None:
        self.order: list[Done] = []

    def wait(self, references: Sequence[Done], timeout: float) -> list[Done]:
        ready = [reference for reference in self.order if reference in references][:1]
        return ready or list(references)


class Writing:
    """Engines that have something to write as long as they are heard."""

    def __init__(self, rounds: int = 10**6) -> None:
        self.rounds, self.heard = rounds, 0

    @property
    def outstanding(self) -> int:
        return self.rounds - self.heard

    @property
    def references(self) -> list[Done]:
        return [Done(self.heard)] if self.outstanding else []

    def advance(self) -> None:
        self.heard += 1


def make(engines: Any, timeout: float = 60) -> tuple[Slow, Roles, WorkerGroup]:
    backend = Slow()
    group = WorkerGroup("policy", backend, [None, None], timeout)
    return backend, Roles(backend, group, engines, rewards=None), group  # type: ignore[arg-type]


def test_a_rank_that_fails_is_heard_of_while_another_is_silent_and_engines_write():
    engines = Writing()
    backend, roles, group = make(engines)
    dead, silent = Done(error=WorkerDied("was killed")), Done()
    backend.order = [dead]
    backend.result = lambda reference: LocalBackend.result(backend, reference)  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"the policy, rank 0, `update`: .*was killed"):
        roles.wait([Pending(group, "update", [dead, silent], list)])
    assert engines.heard == 1


def test_engines_write_on_while_a_reward_server_is_thinking():
    class Answered(Writing):
        def advance(self) -> None:
            super().advance()
            if self.heard == 5:
                answer.set_result([1.0])

    answer: Future[list[float]] = Future()
    engines = Answered()
    _, roles, _ = make(engines)
    assert roles.wait([], [answer]) == [] and engines.heard == 5


def test_what_is_not_answered_in_time_is_left_to_the_calls_own_error():
    engines = Writing()
    _, roles, _ = make(engines, timeout=0.05)
    assert roles.wait([], [Future()]) == []
    assert engines.heard > 1


def test_nobody_waits_for_engines_that_have_nothing_to_write():
    _, roles, group = make(Writing(0))
    assert roles.wait([Pending(group, "update", [Done(1), Done(2)], list)]) == [[1, 2]]

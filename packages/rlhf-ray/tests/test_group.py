"""How the ranks of a role are called together, and what is said when some of them fail or never answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rlhf_data.errors import InputError, RunError
from rlhf_ray.cluster import group as group_module
from rlhf_ray.cluster.backend import Done, LocalBackend, Place, Unexpected, WorkerDied
from rlhf_ray.cluster.group import Part, WorkerGroup, divided, start_group, wait_all
from rlhf_ray.rollout import SAMPLES, TARGETS, Rollout

PROMPT = 4


class Rank:
    """A rank that says what it was asked."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def meet(self) -> tuple[str, int]:
        return f"rank {self.rank} of {self.world_size}", 29500

    def echo(self, *said: Any) -> tuple[Any, ...]:
        return self.rank, *said

    def sums(self, parts: list[Part], factor: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Each response token times a factor, and the sum of each response."""
        return [self.sums_of(part, factor) for part in parts]

    def sums_of(self, part: Part, factor: int) -> tuple[NDArray[Any], NDArray[Any]]:
        batch = part.batch
        if part.idle:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        tokens = [factor * batch.response(n).astype(np.int64) for n in range(len(batch))]
        return np.concatenate(tokens), np.array([own.sum() for own in tokens])

    def fail(self, errors: dict[int, Exception]) -> int:
        if self.rank in errors:
            raise errors[self.rank]
        return self.rank


class OneByOne(LocalBackend):
    """A backend whose workers answer in a certain order, one at a time, and some of them never."""

    def __init__(self, silent: Sequence[tuple[str, int]] = (), *, backwards: bool = False) -> None:
        self.silent, self.backwards = set(silent), backwards
        self.names: list[str] = []
        self.stopped: list[Any] = []

    def start(self, worker: Any, *args: Any, place: Place, name: str) -> Any:
        self.names.append(name)
        return worker(*args)

    def call(self, handle: Any, verb: str, *args: Any) -> Done:
        done = super().call(handle, verb, *args)
        return Never() if (verb, handle.rank) in self.silent else done

    def wait(self, references: Sequence[Done], timeout: float) -> list[Done]:
        ready = [reference for reference in references if not isinstance(reference, Never)]
        return ready[-1:] if self.backwards else ready[:1]

    def stop(self, handle: Any) -> None:
        self.stopped.append(handle)


class Never(Done):
    """A call that does not end."""


def make_group(ranks: int, backend: LocalBackend | None = None, role: str = "policy") -> WorkerGroup:
    return start_group(backend or OneByOne(), role, Rank, [Place()] * ranks, timeout=60)[0]


@pytest.fixture(autouse=True)
def no_aftermath(monkeypatch: pytest.MonkeyPatch):
    """Stand-ins fail at once: nothing is to be waited for."""
    monkeypatch.setattr(group_module, "AFTERMATH", 0.0)


def make_rollout(responses: Sequence[int], groups: Sequence[int] | None = None) -> Rollout:
    """Samples with responses of some lengths, whose tokens are counted through."""
    count, lengths = len(responses), np.array(responses, np.int64)
    numbers, start = [], 10
    for length in responses:
        numbers += [np.full(PROMPT, 1), np.arange(start, start + length)]
        start += length
    names = np.arange(count) if groups is None else np.array(groups, np.int64)
    return Rollout(
        input_ids=np.concatenate(numbers).astype(np.int32),
        prompt_lengths=np.full(count, PROMPT, np.int64),
        response_lengths=lengths,
        truncated=np.zeros(count, np.bool_),
        rollout_logps=np.zeros(lengths.sum(), np.float32),
        prompts=names,
        groups=names,
        seeds=np.arange(count),
        versions=np.zeros(count, np.int64),
    )


@pytest.mark.parametrize("backwards", [False, True])
def test_results_come_in_the_order_of_the_ranks_whoever_answers_first(backwards: bool):
    group = make_group(3, OneByOne(backwards=backwards))
    assert group.call("echo", "hello") == [(0, "hello"), (1, "hello"), (2, "hello")]
    assert group.start_each("echo", [("a",), ("b", "c"), ()]).result() == [(0, "a"), (1, "b", "c"), (2,)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [None, 12, 40])
@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 1]])
def test_a_computation_divided_among_ranks_is_that_of_all_samples(ranks: int, budget: int | None, groups):
    """Seven ranks have fewer samples than ranks: one of them idles."""
    rollout = make_rollout([3, 1, 5, 2, 2, 4], groups)
    pending = make_group(ranks).map("sums", rollout, 10, gives=(TARGETS, SAMPLES), size=2, token_budget=budget)
    tokens, sums = pending.result()
    assert tokens.tolist() == [10 * token for token in range(10, 27)]
    assert sums.tolist() == [10 * int(rollout.response(n).sum()) for n in range(len(rollout))]


@pytest.mark.parametrize("budget", [None, 30])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_rank_gets_as_many_micro_batches_and_every_sample_is_in_one(size: int, ranks: int, budget: int | None):
    rollout = make_rollout(np.random.default_rng(0).integers(1, 20, 23).tolist())
    plan = divided(rollout.lengths, rollout.groups, ranks, size, budget)
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    batches = [row for rank in plan for row in rank]
    assert sorted(np.concatenate(batches).tolist()) == list(range(23))
    if budget is None:
        assert max(map(len, batches)) <= size
    else:
        assert max(int(rollout.lengths[row].sum()) for row in batches) <= budget


def test_ranks_get_about_as_many_tokens():
    rollout = make_rollout([100, 1, 1, 1, 1, 1, 1, 1, 1, 92], None)
    loads = [
        sum(int(rollout.lengths[row].sum()) for row in rank)
        for rank in divided(rollout.lengths, rollout.groups, 2, 10, None)
    ]
    assert max(loads) / min(loads) < 1.1


def test_responses_to_one_prompt_stay_together():
    rollout = make_rollout([5] * 12, [n // 4 for n in range(12)])
    rows = [row.tolist() for rank in divided(rollout.lengths, rollout.groups, 3, 8, None) for row in rank]
    assert sorted(rows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    rows = [row.tolist() for rank in divided(rollout.lengths, rollout.groups, 2, 2, None) for row in rank if len(row)]
    assert sorted(rows) == [[n, n + 1] for n in range(0, 12, 2)]


def test_an_error_names_role_rank_and_what_it_was_doing():
    with pytest.raises(RunError, match=r"^the critic, rank 1, `fail`: the disk is full$"):
        make_group(2, role="critic").call("fail", {1: RunError("the disk is full")})
    with pytest.raises(RunError, match=r"^the critic, rank 0, `fail`: KeyError: 'no such thing'$") as caught:
        make_group(2, role="critic").call("fail", {0: KeyError("no such thing")})
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_user_stays_what_it_is():
    with pytest.raises(InputError, match=r"^--pretrain: there is none$"):
        make_group(2).call("fail", {1: InputError("--pretrain: there is none")})


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (RunError("loss is nan"), "rank 1, `fail`: loss is nan"),
        (WorkerDied("exit code 137"), "rank 1, `fail`: exit code 137"),
        (InputError("--option"), "^--option$"),
    ],
)
def test_of_several_failures_the_likeliest_cause_is_told(cause: Exception, message: str, backwards: bool):
    """When one rank dies, the connection that the others have to it breaks: that is no news."""
    broken = {n: Unexpected("RuntimeError: connection closed by peer") for n in (0, 2)}
    with pytest.raises((InputError, RunError), match=message):
        make_group(3, OneByOne(backwards=backwards)).call("fail", broken | {1: cause})


def test_a_failure_is_told_although_others_never_answer():
    with pytest.raises(RunError, match="rank 1, `fail`: out of luck"):
        make_group(3, OneByOne([("fail", 0), ("fail", 2)])).call("fail", {1: RunError("out of luck")})


def test_ranks_that_do_not_answer_are_named():
    with pytest.raises(
        RunError, match=r"the policy did not answer: `echo` of rank 1, 3 has taken more than 60 s \(--call_timeo"
    ):
        make_group(4, OneByOne([("echo", 1), ("echo", 3)])).call("echo")


def test_the_ranks_of_a_role_meet_where_the_first_one_says():
    backend = OneByOne()
    group, meeting = start_group(backend, "critic", Rank, [Place()] * 2, timeout=60)
    assert meeting == ("rank 0 of 2", 29500) and len(group) == 2
    assert start_group(backend, "reward rm", Rank, [Place()], timeout=60)[1] is None
    assert backend.names == ["critic rank 0", "critic rank 1", "reward rm"]


def test_a_role_that_is_ended_ends_all_its_ranks():
    backend = OneByOne()
    group = make_group(3, backend)
    group.stop()
    assert backend.stopped == group.handles


@pytest.mark.parametrize("backwards", [False, True])
def test_several_roles_are_waited_for_together(backwards: bool):
    backend = OneByOne(backwards=backwards)
    roles = [make_group(ranks, backend, role) for ranks, role in ((2, "policy"), (1, "critic"), (3, "reference"))]
    results = wait_all([role.start("echo", role.role) for role in roles], 60, "getting ready")
    assert results == [[(rank, role.role) for rank in range(len(role))] for role in roles]
    assert wait_all([], 60, "getting ready") == []


def test_results_of_roles_that_are_waited_for_together_are_finished_like_any_other():
    rollout, backend = make_rollout([3, 1]), OneByOne()
    policy, critic = make_group(2, backend), make_group(1, backend, "critic")
    calls = [role.map("sums", rollout, 1, gives=(TARGETS,), size=1) for role in (policy, critic)]
    assert [[row.tolist() for row in result] for result in wait_all(calls, 60, "scoring")] == [[[10, 11, 12, 13]]] * 2


def test_the_failure_of_one_role_ends_the_wait_for_all():
    backend = OneByOne([("echo", 0)])
    silent, failing = make_group(1, backend), make_group(2, backend, "critic")
    with pytest.raises(RunError, match=r"^the critic, rank 1, `fail`: no memory$"):
        wait_all([silent.start("echo"), failing.start("fail", {1: RunError("no memory")})], 60, "getting ready")


def test_roles_that_do_not_get_ready_are_named():
    backend = OneByOne([("echo", 1)])
    roles = [make_group(ranks, backend, role) for ranks, role in ((2, "policy"), (1, "critic"), (3, "reference"))]
    pattern = (
        r"^getting ready took more than 5 s \(--start_timeout\); no answer from: policy, rank 1; reference, rank 1 "
    )
    with pytest.raises(RunError, match=pattern):
        wait_all([role.start("echo") for role in roles], 5, "getting ready")

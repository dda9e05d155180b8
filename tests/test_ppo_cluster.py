"""Roles as processes of a real Ray: where they run, how they fail, and that nothing of it is left when the driver is gone."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_data.errors import InputError, RunError
from rlhf_ray.cluster.backend import Place, WorkerDied
from rlhf_ray.cluster.group import WorkerGroup, start_group, wait_all
from rlhf_ray.cluster.placement import plan
from rlhf_ray.cluster.ray import OWN, RayBackend, cause_of_death, connect, forget_token
from rlhf_ray.config import ClusterConfig, PPOConfig
from rlhf_ray.rewards import Source

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]


DRIVER = """
import os, threading
from rlhf_ray.cluster.backend import Place
from rlhf_ray.cluster.ray import connect
from rlhf_ray.config import ClusterConfig

with connect(ClusterConfig(ray_address="local")) as backend:
    rank = backend.start(threading.Event, place=Place(), name="rank")
    backend.result(backend.call(rank, "is_set"))
    print(os.environ["RAY_AUTH_TOKEN"], flush=True)
    backend.wait([backend.call(rank, "wait")], 200)
"""
"""A program that waits for a worker on a Ray of its own."""

STARTER = """
import os, sys
import ray
from rlhf_ray.cluster.ray import connect
from rlhf_ray.config import ClusterConfig

with connect(ClusterConfig(ray_address="local")):
    print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    print(dict(ray.get_runtime_context().runtime_env), flush=True)
    sys.stdin.read()
"""
"""A program that keeps a Ray of its own until its input ends, says where it is, and what environment it makes for its workers."""


class Awkward(Exception):
    """An error that cannot be read back: its constructor wants more than its message."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


class Rank:
    """A rank that does little."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def meet(self) -> tuple[str, int]:
        return f"rank {self.rank}", os.getpid()

    def look(self, *variables: str) -> tuple[int, int, str, list[str | None]]:
        """Its rank, process and folder, and some environment variables."""
        return self.rank, os.getpid(), str(Path.cwd()), [os.environ.get(name) for name in variables]

    def double(self, values: Any) -> Any:
        return 2 * values

    def fail(self, error: type[Exception], *said: str) -> None:
        if self.rank == self.world_size - 1:
            raise error(*said)

    def die(self) -> None:
        """Rank 1 is killed; the others hear nothing more of anybody."""
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


class Broken:
    """A rank that cannot be made."""

    def __init__(self, rank: int, world_size: int) -> None:
        raise InputError("--pretrain none: there is no such model")


def make_config(**cluster: Any) -> PPOConfig:
    """Two ranks of the policy, one of the reference model, and no critic."""
    given = {
        "model": {"pretrain": "unread"},
        "data": {"prompt_data": "unread.jsonl"},
        "rewards": {"reward_pretrain": "unread.py"},
        "rollout": {"n_samples_per_prompt": 2},
        "experience": {"advantage_estimator": "rloo"},
        "cluster": {"actor_num_gpus_per_node": 2, "colocate_actor_ref": True, "ref_num_gpus_per_node": 2} | cluster,
    }
    return PPOConfig.model_validate(given)


@pytest.fixture(scope="module")
def own_ray() -> Iterator[RayBackend]:
    """A Ray of the tests' own, which they join.

    Another process starts it: Ray forks, which fails in a process whose mappings are together as large as the memory, and
    those of all tests that ran before are in this one.
    """
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert starter.stdout is not None
        address, token = starter.stdout.readline().split()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (OWN | {"RAY_AUTH_TOKEN": token}).items():
                patch.setenv(name, value)
            patch.setattr("ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV", False)
            forget_token()
            with connect(ClusterConfig(ray_address=address, start_timeout=60)) as backend:
                yield backend
        forget_token()
    finally:
        starter.communicate(timeout=60)


@pytest.fixture(scope="module")
def policy(own_ray: RayBackend) -> WorkerGroup:
    """Two ranks that live as long as the Ray."""
    return start_group(own_ray, "policy", Rank, [Place()] * 2, timeout=60)[0]


@pytest.fixture
def start(own_ray: RayBackend):
    """Start the ranks of a role, which end with the test."""
    groups: list[WorkerGroup] = []

    def make(ranks: int, worker: type = Rank, role: str = "policy", timeout: float = 60) -> WorkerGroup:
        groups.append(start_group(own_ray, role, worker, [Place()] * ranks, timeout)[0])
        return groups[-1]

    yield make
    for group in groups:
        group.stop()


def test_the_processes_of_a_plan_share_the_cpus_and_get_their_environment(own_ray: RayBackend):
    (node,) = own_ray.nodes()
    made = plan(make_config(), [Source("f", "f.py", "function")], [node])
    places = own_ray.reserve(made)
    assert {role: len(own) for role, own in places.items()} == {"policy": 2, "reference": 2, "reward f": 1}
    roles = {role: start_group(own_ray, role, Rank, own, 60) for role, own in places.items()}
    answers = wait_all(
        [role.start("look", "OMP_NUM_THREADS", "DS_ACCELERATOR", "RANK") for role, _ in roles.values()], 60, "looking"
    )
    threads = str(max(1, int(node.cpus) // 2))
    assert [rank for rank, *_ in answers[0]] == [0, 1]
    assert len({process for answer in answers for _, process, *_ in answer} | {os.getpid()}) == 6
    assert {folder for answer in answers for *_, folder, _ in answer} == {str(Path.cwd())}
    assert [answer[-1][-1] for answer in answers] == [
        [threads, "cpu", None], [threads, "cpu", None], [str(int(node.cpus)), "cpu", None],
    ]  # fmt: skip
    policy, meeting = roles["policy"]
    assert meeting == ("rank 0", answers[0][0][1]) and roles["reward f"][1] is None
    assert [result.tolist() for result in policy.call("double", np.arange(3))] == [[0, 2, 4]] * 2
    own_ray.timeout = 0.5
    with pytest.raises(
        RunError, match=r"(?s)\(--start_timeout\); free are: .* CPU.*ray status.*\n  policy +2 processes"
    ):
        own_ray.reserve(made)


def test_errors_of_a_worker_are_its_own(policy: WorkerGroup):
    with pytest.raises(InputError, match=r"^--pretrain: no$") as caught:
        policy.call("fail", InputError, "--pretrain: no")
    assert "in fail" in str(caught.value.__cause__)  # where it was raised
    with pytest.raises(RunError, match=r"^the policy, rank 1, `fail`: the disk is full$"):
        policy.call("fail", RunError, "the disk is full")
    with pytest.raises(RunError, match=r"^the policy, rank 1, `fail`: ValueError: what \? is this$"):
        policy.call("fail", ValueError, "what ? is\nthis")
    with pytest.raises(RunError, match=r"^the policy, rank 1, `fail`: Awkward: one other$"):
        policy.call("fail", Awkward, "one", "other")
    with pytest.raises(
        RunError, match=r"rank [01], `nothing`: AttributeError: 'Rank' object has no attribute 'nothing'"
    ):
        policy.call("nothing")
    assert [rank for rank, *_ in policy.call("look")] == [0, 1]


def test_a_worker_that_cannot_be_made_says_why(start):
    with pytest.raises(InputError, match=r"^--pretrain none: there is no such model$"):
        start(1, Broken).call("look")


def test_the_death_of_a_worker_ends_the_wait_and_names_it(start, own_ray: RayBackend):
    critic = start(2, role="critic")
    with pytest.raises(RunError, match=r"^the critic, rank 1, `die`: its process was killed") as caught:
        critic.call("die")
    assert isinstance(caught.value.__cause__, WorkerDied) and "\n" not in str(caught.value)
    with pytest.raises(WorkerDied):
        own_ray.result(own_ray.call(critic.handles[1], "look"))


def test_a_worker_that_does_not_answer_is_named(start):
    with pytest.raises(RunError, match=r"the reference did not answer: `die` of rank 0 has taken more than 0.2 s"):
        start(1, role="reference", timeout=0.2).call("die")


def test_all_calls_that_have_ended_are_found_at_once(start, policy: WorkerGroup, own_ray: RayBackend):
    calls = [own_ray.call(policy.handles[0], "double", n) for n in range(5)]
    assert [own_ray.result(call) for call in calls] == [0, 2, 4, 6, 8]
    waiting = own_ray.call(start(1).handles[0], "die")
    assert set(own_ray.wait([waiting, *calls], 60)) == set(calls)
    assert own_ray.wait([waiting], 0) == [] == own_ray.wait([], 60)


def test_what_several_calls_get_is_handed_over_once(policy: WorkerGroup, own_ray: RayBackend):
    values = own_ray.put(np.arange(100_000))
    assert [result.sum() for result in policy.call("double", values)] == [9_999_900_000] * 2


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            "Task was killed due to the node running low on memory.\nMemory on the node was 9GB / 9GB",
            "ran out of memory",
        ),
        ("The actor died because its node has died. Node Id: 12\nthe actor's node was terminated", "its node has died"),
        ("Worker exit type: USER_ERROR\nWorker exits with an exit code 3.", "ended with exit code 3"),
        ("The actor is dead because it was killed by `ray.kill`.", "its process was ended"),
        ("Something\nnew", "its process has died: Something new"),
    ],
)
def test_why_a_process_is_gone_is_said_in_one_line(said: str, cause: str):
    assert cause in cause_of_death(said) and "\n" not in cause_of_death(said)


def test_a_driver_that_is_told_to_end_takes_its_ray_with_it():
    """Every process of a Ray of a run's own has the token of the run in its environment."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        token = driver.stdout.readline().strip()
        assert len(processes_with(token)) > 3
        driver.terminate()
        assert driver.wait(60) == 143
        assert processes_with(token) == []
    finally:
        driver.kill()
        driver.communicate()


def test_below_uv_run_the_workers_of_an_own_ray_use_the_environment_that_there_is(tmp_path: Path):
    """Ray asks whether an ancestor is `uv run`: here a shell of that name, with a script of that name."""
    (tmp_path / "uv").symlink_to("/bin/sh")
    (tmp_path / "run").write_text('"$@"\n')
    command = [str(tmp_path / "uv"), "run", sys.executable, "-c", STARTER]
    shown = subprocess.run(
        command, cwd=tmp_path, input="", capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert shown.splitlines()[1] == "{}"


def processes_with(token: str) -> list[str]:
    """Programs that run with a word in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (folder / "environ").read_bytes():
                found.append((folder / "comm").read_text().strip())
        except OSError:
            continue  # it has ended in between
    return found

"""Checkpoints of a run whose roles write their parts: whole or not there, and which error says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.checkpoint import CheckpointError
from rlhf_core.config import CheckpointConfig
from rlhf_data.errors import InputError, RunError
from rlhf_ray.checkpoint import PPOCheckpoints
from rlhf_ray.cluster.backend import LocalBackend, WorkerDied
from rlhf_ray.cluster.group import WorkerGroup


class Role:
    """Writes a number, or fails, or nothing that is seen here."""

    def __init__(self) -> None:
        self.number, self.error = 1, None
        self.elsewhere = False

    def save(self, folder: str) -> None:
        if self.error is not None:
            raise self.error
        if not self.elsewhere:
            (Path(folder) / "number").write_text(str(self.number))

    def load(self, folder: str) -> None:
        self.number = int((Path(folder) / "number").read_text())


@pytest.fixture
def made(tmp_path: Path):
    """Two roles and their checkpoints, which are to be continued."""

    def make(seed: int = 1) -> tuple[Role, Role, PPOCheckpoints]:
        policy, critic = Role(), Role()
        groups = [
            WorkerGroup(name, LocalBackend(), [role], timeout=10)
            for name, role in (("policy", policy), ("critic", critic))
        ]
        config = CheckpointConfig(ckpt_path=str(tmp_path), load_checkpoint=True)
        return policy, critic, PPOCheckpoints(config, groups, {"seed": seed})

    return make


def test_all_roles_go_to_where_they_were(made):
    policy, critic, checkpoints = made()
    policy.number, critic.number = 7, 8
    checkpoints.save(3, {"place": 5})
    policy, critic, checkpoints = made()
    assert checkpoints.resume() == {"identity": {"seed": 1}, "place": 5}
    assert (policy.number, critic.number) == (7, 8)


def test_a_checkpoint_of_another_run_is_refused(made):
    made()[2].save(3, {})
    with pytest.raises(InputError, match=r"global_step3 belongs to another run: seed was 1 and is 2"):
        made(seed=2)[2].resume()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            OSError(28, "No space left on device"),
            CheckpointError,
            r"step 4 could not be .*No space left.*free some space",
        ),
        (WorkerDied("its process was killed"), RunError, r"^the critic, rank 0, `save`: its process was killed"),
    ],
)
def test_what_keeps_a_role_from_writing_is_said_and_the_earlier_checkpoint_stays(made, tmp_path, error, kind, message):
    policy, critic, checkpoints = made()
    checkpoints.save(3, {"place": 5})
    critic.error, policy.number = error, 9
    with pytest.raises(kind, match=message):
        checkpoints.save(4, {"place": 6})
    assert [path.name for path in tmp_path.iterdir()] == ["global_step3"]
    assert made()[2].resume()["place"] == 5


def test_a_role_that_writes_into_another_folder_of_that_name_is_found_out(made, tmp_path):
    _, critic, checkpoints = made()
    critic.elsewhere = True
    with pytest.raises(CheckpointError, match="what the critic wrote is not here: its node has another folder"):
        checkpoints.save(1, {})
    assert list(tmp_path.iterdir()) == []

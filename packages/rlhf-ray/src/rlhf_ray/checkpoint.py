"""Checkpoints of a PPO run: the trained roles each write their part into one folder, which is whole or not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.checkpoint import CheckpointError, Checkpoints, exported
from rlhf_core.config import CheckpointConfig
from rlhf_core.strategy import Alone
from rlhf_data.errors import InputError
from rlhf_ray.cluster.backend import WorkerDied
from rlhf_ray.cluster.group import WorkerGroup


class PPOCheckpoints:
    """The checkpoints of a run; see `rlhf_core.checkpoint`.

    Args:
        config: where, how many, how large.
        roles: whose weights change; the policy is the first.
        identity: what must be the same for a checkpoint to be continued.
    """

    def __init__(self, config: CheckpointConfig, roles: Sequence[WorkerGroup], identity: dict[str, Any]) -> None:
        self.config, self.roles, self.identity = config, list(roles), identity
        self.files = Checkpoints(config, Alone())

    def save(self, number: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, and beside it a Hugging Face export of the policy if asked for.

        Raises:
            CheckpointError: it could not be written; what was there before is intact.
            RunError: a role died.
        """

        def write(staging: Path) -> None:
            for role in self.roles:
                (staging / role.role).mkdir()
                role.call("save", str(staging / role.role))
                if not any((staging / role.role).iterdir()):
                    raise OSError(f"what the {role.role} wrote is not here: its node has another folder of that name")

        try:
            path = self.files.save(write, number, {"identity": self.identity} | state)
        except CheckpointError as error:
            if error.__cause__ is not None and isinstance(error.__cause__.__cause__, WorkerDied):
                raise error.__cause__ from error.__cause__.__cause__  # which is not about the disk
            raise
        if self.config.save_hf_ckpt:
            self.roles[0].call("export", str(exported(path)))

    def resume(self) -> dict[str, Any] | None:
        """Take all roles to where the newest checkpoint is, if asked to; returns its state.

        Raises:
            InputError: it belongs to another run.
        """
        if not self.config.load_checkpoint:
            return None
        found = self.files.newest()
        if found is None:
            print(f"no checkpoint in {self.files.folder}: starting from the beginning", flush=True)
            return None
        path, state = found
        then, now = state["identity"], self.identity
        if different := [f"{key} was {then.get(key)} and is {now[key]}" for key in now if then.get(key) != now[key]]:
            raise InputError(f"--load_checkpoint: {path} belongs to another run: {'; '.join(different)}")
        for role in self.roles:
            role.call("load", str(path / role.role))
        print(f"continuing from {path}", flush=True)
        return state

"""The roles of a run, as the driver holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.cluster.backend import Backend
from rlhf_ray.cluster.group import Pending, WorkerGroup
from rlhf_ray.engines.request import Engines
from rlhf_ray.rewards import Rewards


@dataclass(frozen=True)
class Roles:
    """Who does what. All of them are ready."""

    backend: Backend
    policy: WorkerGroup
    engines: Engines
    rewards: Rewards
    critic: WorkerGroup | None = None
    reference: WorkerGroup | None = None

    @property
    def trained(self) -> list[WorkerGroup]:
        """Those whose weights change."""
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def wait(self, pendings: Sequence[Pending[Any]]) -> list[Any]:
        """Results of calls, while engines go on writing."""
        left = {reference for pending in pendings for reference in pending.references}
        while left and self.engines.outstanding:
            polls = list(self.engines.references)
            if not polls:
                break
            ready = self.backend.wait([*left, *polls], pendings[0].group.timeout)
            if not ready:
                break  # the calls' own errors say who did not answer
            left.difference_update(ready)
            self.engines.advance()
        return [pending.result() for pending in pendings]

    def close(self) -> None:
        """End all processes."""
        self.rewards.close()
        self.engines.close()
        self.backend.close()

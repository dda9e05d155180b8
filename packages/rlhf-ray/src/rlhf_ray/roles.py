"""The roles of a run, as the driver holds them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
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

    def wait(self, pendings: Sequence[Pending[Any]], servers: Sequence[Future[Any]] = ()) -> list[Any]:
        """Results of calls, while engines go on writing.

        Args:
            pendings: the calls.
            servers: what reward servers are to answer, waited for as well.
        """
        left = {reference for pending in pendings for reference in pending.references}
        deadline = time.monotonic() + self.policy.timeout
        while self.engines.outstanding and (left or not all(future.done() for future in servers)):
            polls = list(self.engines.references)
            if not polls:
                break
            ready = self.backend.wait([*left, *polls], max(0.0, deadline - time.monotonic()))
            ended = left.intersection(ready)
            left -= ended
            self.engines.advance()
            if time.monotonic() > deadline or any(self._failed(reference) for reference in ended):
                break  # the calls' own errors say who did not answer, or what failed
        return [pending.result() for pending in pendings]

    def _failed(self, reference: Any) -> bool:
        """Whether a call that has ended raised something, which its `Pending` raises for people."""
        try:
            self.backend.result(reference)
        except Exception:
            return True
        return False

    def close(self) -> None:
        """End all processes."""
        self.rewards.close()
        self.engines.close()
        self.backend.close()

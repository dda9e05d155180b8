"""Rollouts without vLLM (`--vllm_num_engines 0`): the policy's own ranks write, with transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_data.batching import plan_micro_batches
from rlhf_ray.cluster.group import WorkerGroup
from rlhf_ray.engines.request import Answer, Request


class PolicyEngines:
    """The policy, as an engine: it writes when it is waited for, with the weights that it has.

    Args:
        policy: its ranks.
    """

    def __init__(self, policy: WorkerGroup) -> None:
        self.policy = policy
        self.requests: list[Request] = []
        self.references: Sequence[object] = ()

    def submit(self, requests: Sequence[Request], turn: int = 0) -> None:
        """See `Engines`. All requests are answered at once, so none comes before another."""
        self.requests += requests

    def collect(self) -> list[Answer]:
        """All requests, answered; every rank writes about as many tokens."""
        requests, self.requests = self.requests, []
        if not requests:
            return []
        most = np.array([request.n * (len(request.prompt_ids) + request.max_new_tokens) for request in requests])
        plan = plan_micro_batches(most, len(self.policy), len(requests))
        shares = [([requests[place] for row in rank for place in row],) for rank in plan]
        return [answer for rank in self.policy.start_each("generate", shares).result() for answer in rank]

    def advance(self) -> None:
        """Nothing goes on by itself."""

    def sync(self, version: int) -> dict[str, float]:
        """The weights are there already."""
        return {}

    @property
    def outstanding(self) -> int:
        return len(self.requests)

    def figures(self) -> dict[str, float]:
        return {}

    def sleep(self) -> None:
        """The policy needs its device for both."""

    def wake(self) -> None:
        """It never slept."""

    def close(self) -> None:
        """Nothing of its own."""

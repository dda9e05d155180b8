"""What is computed of responses as they come: rewards, and what policy, reference model and critic say of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.cluster.group import Pending
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.request import Answer
from rlhf_ray.experience import Judged, clipped, informative
from rlhf_ray.roles import Roles
from rlhf_ray.rollout import SAMPLES, TARGETS, Rollout, take
from rlhf_ray.rollouts import Rollouts

COLUMNS = {"logps": ("policy", 0), "reference_logps": ("reference", 0), "values": ("critic", 0), "after": ("critic", 1)}
"""Columns of `Judged` that models compute: which role, and which of its results."""


@dataclass
class Chunk:
    """Responses that are judged together."""

    rollout: Rollout
    rewards: Any
    """What gives their rewards, see `Rewards.start`."""
    scores: NDArray[np.float32] | None = None
    parts: dict[str, NDArray[Any]] = field(default_factory=dict)
    calls: dict[str, Pending[Any]] = field(default_factory=dict)
    """What models compute of them, by role."""


class Judging:
    """The judging of one rollout.

    Args:
        roles: who judges.
        rollouts: makes batches of answers.
        config: the run's options.
    """

    def __init__(self, roles: Roles, rollouts: Rollouts, config: PPOConfig) -> None:
        self.roles, self.rollouts, self.config = roles, rollouts, config
        ranks = max(len(group) for group in (roles.policy, roles.reference, roles.critic) if group is not None)
        self.size = config.rollout.micro_rollout_batch_size * ranks
        self.answers: list[Answer] = []
        self.chunks: list[Chunk] = []
        self.dropped = 0

    def add(self, answers: list[Answer]) -> None:
        """Judge some answers, as soon as there are enough for a call."""
        self.answers += answers
        n = self.config.rollout.n_samples_per_prompt
        while len(self.answers) * n >= self.size:
            count = -(-self.size // n)
            self._start(self.answers[:count])
            del self.answers[:count]

    def kept(self) -> int:
        """Requests whose responses are trained on, of all that were added; waits for rewards if these decide it."""
        if self.answers:
            self._start(self.answers)
            self.answers = []
        if self.config.rollout.dynamic_filtering:
            for chunk in self.chunks:
                if chunk.scores is None:
                    self._filter(chunk)
        return sum(len(chunk.rollout) for chunk in self.chunks) // self.config.rollout.n_samples_per_prompt

    def result(self) -> Judged:
        """All responses that are trained on, in the order of their requests, with everything that is known of them."""
        chunks = [chunk for chunk in self.chunks if len(chunk.rollout)]
        for chunk in chunks:
            self._ask_models(chunk)
        unjudged = [chunk for chunk in chunks if chunk.scores is None]
        calls = [call for chunk in chunks for call in chunk.calls.values()]
        self.roles.wait(
            [*calls, *(call for chunk in unjudged for call in chunk.rewards.calls)],
            [answer for chunk in unjudged for answer in chunk.rewards.servers],
        )
        for chunk in unjudged:
            chunk.scores, chunk.parts = chunk.rewards.result()
        rollout = Rollout.concat([chunk.rollout for chunk in chunks])
        samples = np.argsort(rollout.groups, kind="stable")  # they were judged as they came
        computed = [{role: call.result() for role, call in chunk.calls.items()} for chunk in chunks]
        columns = {}
        for name, (role, place) in COLUMNS.items():
            if role in computed[0]:
                values = np.concatenate([calls[role][place] for calls in computed])
                columns[name] = values[samples] if name == "after" else take(values, rollout.target_bounds, samples)
        parts = {
            name: np.concatenate([c.parts.get(name, np.full(len(c.rollout), np.nan, np.float32)) for c in chunks])[
                samples
            ]
            for name in dict.fromkeys(name for chunk in chunks for name in chunk.parts)
        }
        return Judged(
            rollout=rollout.select(samples),
            scores=np.concatenate([chunk.scores for chunk in chunks if chunk.scores is not None])[samples],
            parts=parts,
            **{name: columns.get(name) for name in COLUMNS},
        )

    def _start(self, answers: list[Answer]) -> None:
        rollout = self.rollouts.batch(answers)
        chunk = Chunk(rollout, self.roles.rewards.start(rollout, self.rollouts.prompts))
        self.chunks.append(chunk)
        if not (self.config.rollout.dynamic_filtering or self.config.cluster.colocate_all):
            self._ask_models(chunk)

    def _filter(self, chunk: Chunk) -> None:
        """Leave out the responses to prompts whose responses are all worth the same."""
        self.roles.wait(chunk.rewards.calls, chunk.rewards.servers)
        scores, parts = chunk.rewards.result()
        places = np.flatnonzero(informative(clipped(scores, self.config), chunk.rollout.groups))
        self.dropped += len(scores) - len(places)
        chunk.rollout, chunk.scores = chunk.rollout.select(places), scores[places]
        chunk.parts = {name: values[places] for name, values in parts.items()}

    def _ask_models(self, chunk: Chunk) -> None:
        """Have models compute what the options need, once."""
        if chunk.calls or not len(chunk.rollout):
            return
        size = {"size": self.config.rollout.micro_rollout_batch_size}
        roles = self.roles
        if self.config.recomputes_logps:
            chunk.calls["policy"] = roles.policy.map("token_logps", chunk.rollout, gives=(TARGETS,), **size)
        if roles.reference is not None:
            chunk.calls["reference"] = roles.reference.map("token_logps", chunk.rollout, gives=(TARGETS,), **size)
        elif self.config.needs_reference:
            chunk.calls["reference"] = roles.policy.map("reference_logps", chunk.rollout, gives=(TARGETS,), **size)
        if roles.critic is not None:
            chunk.calls["critic"] = roles.critic.map("values", chunk.rollout, gives=(TARGETS, SAMPLES), **size)

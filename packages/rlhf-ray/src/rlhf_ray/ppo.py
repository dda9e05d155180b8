"""PPO and its relatives: the loop, one line per verb. What a verb does is in the file of its name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_core.fit import due
from rlhf_core.metrics import Record
from rlhf_core.progress import Display
from rlhf_ray.batches import optimizer_steps
from rlhf_ray.checkpoint import PPOCheckpoints
from rlhf_ray.cluster.group import Pending, WorkerGroup
from rlhf_ray.config import PPOConfig
from rlhf_ray.evaluation import evaluate
from rlhf_ray.experience import make_experience
from rlhf_ray.judging import Judging
from rlhf_ray.kl_control import KLController
from rlhf_ray.prompts import PromptData
from rlhf_ray.roles import Roles
from rlhf_ray.rollout import Experience
from rlhf_ray.rollouts import Rollouts
from rlhf_ray.samples import SampleLog, table

SHOWN = ("reward", "kl", "response_length", "entropy", "policy_loss", "value_loss", "samples_per_second")
"""Figures of a rollout that are shown while it runs."""


@dataclass(frozen=True)
class Position:
    """Where a run is, between two rollouts."""

    rollout: int = 0
    """Rollouts trained on."""

    step: int = 0
    """Optimizer steps."""

    request: int = 0
    """Number of the first request that no rollout has had."""

    begun: tuple[int, ...] = ()
    """Numbers of the first requests of rollouts that are being written already (`--async`)."""

    samples: int = 0
    """Responses trained on."""

    tokens: int = 0
    """Their tokens, with those of their prompts."""

    updates: int = 0
    """Rollouts that the policy has been trained on: the version of its weights."""


class PPO:
    """A run: writes, judges, and trains, until the prompts are through.

    Args:
        config: the run's options.
        roles: who does what, ready.
        data: prompts to train and to evaluate on.
        context: longest sequence, in tokens.
        identity: what must be the same for a checkpoint to be continued.
    """

    def __init__(
        self, config: PPOConfig, roles: Roles, data: PromptData, context: int, identity: dict[str, Any]
    ) -> None:
        self.config, self.roles, self.data, self.context = config, roles, data, context
        self.kl = KLController(
            config.experience.init_kl_coef, config.experience.kl_target, config.experience.kl_horizon
        )
        self.checkpoints = PPOCheckpoints(config.checkpoint, roles.trained, identity)
        self.position = Position()
        self.updates, self.synced = 0, -1
        self.seconds: dict[str, float] = {}
        self.logged = (0, 0)

    def run(self) -> None:
        """Train, from where a checkpoint stopped if asked to.

        Raises:
            RunError: a role died, did not answer, or computed what is not a number; the newest checkpoint is intact.
            InputError: the checkpoint to continue from belongs to another run.
        """
        written = self.resume()
        config, position = self.config, self.position
        self.rollouts = Rollouts(
            self.data.train,
            self.roles.engines,
            config,
            self.context,
            position.rollout,
            position.request,
            position.begun,
        )
        with self.recorded(written):
            figures = self.sync()
            if config.logging.eval_at_start and position.rollout == 0:
                self.evaluate()
            while not self.is_done:
                experience, judged = self.make_experience()
                figures |= judged | self.update(experience)
                self.kl.update(judged.get("kl", 0.0), len(experience))
                figures |= self.sync()
                if due(self.position.rollout, config.logging.logging_steps) or self.is_done:
                    self.log(figures, experience)
                if self.evaluation_due:
                    self.evaluate()
                if due(self.position.rollout, config.checkpoint.save_steps):
                    self.save()
                figures = {}
        self.make_room()

    def make_experience(self) -> tuple[Experience, dict[str, float]]:
        """Have a rollout written and judged, and turn it into advantages."""
        with self.timed("generate"):
            judging = Judging(self.roles, self.rollouts, self.config)
            self.rollouts.ask(self.position.rollout)
            while True:
                while self.rollouts.waiting:
                    judging.add(self.rollouts.collect())
                if not (missing := self.config.prompts_per_rollout - judging.kept()):
                    break
                self.rollouts.ask_again(missing)
        with self.timed("sync"):
            self.make_room()
        with self.timed("judge"):
            judged = judging.result()
            experience, figures = make_experience(judged, self.config, self.kl.coef)
        self.parts = judged.parts
        stale = self.updates - experience.versions
        figures |= {"staleness": float(stale.mean()), "staleness_max": float(stale.max()), "kl_coef": self.kl.coef}
        if self.config.rollout.dynamic_filtering:
            figures["filtered"] = judging.dropped / (judging.dropped + len(experience))
        return experience, figures

    def update(self, experience: Experience) -> dict[str, float]:
        """Have the policy and the critic learn from a rollout, both at the same time."""
        config, position = self.config, self.position
        calls = []
        with self.timed("update"):
            if self.trains_policy:
                calls.append(self.start_update(self.roles.policy, experience, config.loss_reduction))
            if self.roles.critic is not None:
                calls.append(self.start_update(self.roles.critic, experience, "token"))
            answers = self.roles.wait(calls)
        figures: dict[str, float] = {}
        for ranks in answers:  # every rank says the same, of each step
            figures |= summary(ranks[0])
        self.updates += self.trains_policy
        self.rollouts.finish()
        self.position = Position(
            position.rollout + 1,
            position.step + len(answers[0][0]),
            self.rollouts.request,
            self.rollouts.begun,
            position.samples + len(experience),
            position.tokens + len(experience.input_ids),
            self.updates,
        )
        return figures

    def start_update(self, group: WorkerGroup, experience: Experience, reduction: str) -> Pending[Any]:
        steps = optimizer_steps(
            experience,
            self.config,
            self.position.rollout,
            len(group),
            longest=self.context,
            kl_coef=self.kl.coef,
            reduction=reduction,
        )
        return group.start_each("update", ((rank,) for rank in steps))

    def sync(self) -> dict[str, float]:
        """Give the policy's weights to the engines, if they have changed."""
        with self.timed("sync"):
            if self.config.cluster.colocate_all and self.roles.critic is not None:
                self.roles.critic.call("offload")  # of the engines, only the weights are awake while these are sent
            figures = {} if self.synced == self.updates else self.roles.engines.sync(self.updates)
            self.synced = self.updates
            self.make_way()
        return figures

    def make_room(self) -> None:
        """Give the devices to the models that train, where engines share them."""
        if self.config.cluster.colocate_all:
            self.roles.engines.sleep()
            for group in self.roles.trained:
                group.call("reload")

    def make_way(self) -> None:
        """Give the devices to the engines, where they share them."""
        if self.config.cluster.colocate_all:
            for group in self.roles.trained:
                group.call("offload")
            self.roles.engines.wake()

    def evaluate(self) -> None:
        if self.data.evaluation is not None:
            with self.timed("evaluate"):
                self.write(evaluate(self.data.evaluation, self.rollouts, self.roles, self.config))

    @property
    def is_done(self) -> bool:
        return self.position.rollout >= self.rollouts.total

    @property
    def trains_policy(self) -> bool:
        """Whether this rollout trains the policy, not only the critic."""
        return self.position.rollout >= self.config.ppo.freezing_actor_steps

    @property
    def evaluation_due(self) -> bool:
        every, rollout = self.config.logging.eval_steps, self.position.rollout
        if every != -1:
            return self.is_done or due(rollout, every)
        per_episode = len(self.data.train) / self.config.prompts_per_rollout
        return self.is_done or int(rollout / per_episode) > int((rollout - 1) / per_episode)

    def log(self, figures: dict[str, float], experience: Experience) -> None:
        """Write the figures of a rollout, and some of its samples, to the record, and show them."""
        spent = sum(self.seconds.values())
        figures |= {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        figures |= {
            "samples": self.position.samples,
            "tokens": self.position.tokens,
            "samples_per_second": (self.position.samples - self.logged[0]) / spent,
            "tokens_per_second": (self.position.tokens - self.logged[1]) / spent,
            "weight_version": self.updates,
        }
        self.write(figures | self.roles.engines.figures())
        rows = self.samples.write(self.position.step, experience, self.parts)
        self.record.table("samples", *table(rows))
        self.seconds, self.logged = {}, (self.position.samples, self.position.tokens)

    def write(self, figures: dict[str, float]) -> None:
        """One row of the record."""
        position = self.position
        episode = (position.begun[0] if position.begun else position.request) / len(self.data.train)
        row = {"step": position.step, "rollout": position.rollout, "epoch": round(episode, 6)} | figures
        self.record.row(row)
        self.display.advance(position.rollout)
        self.display.row(row)

    def save(self) -> None:
        """Write a checkpoint."""
        with self.timed("save"):
            state = {
                "position": asdict(self.position),
                "kl": self.kl.state(),
                "written": {"metrics": self.record.position(), "samples": self.samples.position()},
            }
            self.make_room()
            self.checkpoints.save(self.position.rollout, state)
            self.make_way()

    def resume(self) -> dict[str, int]:
        """Go to where the newest checkpoint is, if asked to; returns the sizes of the record's files there."""
        state = self.checkpoints.resume()
        if state is None:
            return {}
        self.position = Position(**state["position"])
        self.updates, self.logged = self.position.updates, (self.position.samples, self.position.tokens)
        self.kl.restore(state["kl"])
        return state["written"]

    @contextmanager
    def recorded(self, written: dict[str, int]) -> Iterator[None]:
        """Keep a record of what happens inside, from where its files were."""
        folder = Path(self.config.checkpoint.save_path) / "run"
        self.record = Record(folder, self.config, "ppo", written.get("metrics"))
        self.record.write("data.json", self.data.report.to_dict())
        self.samples = SampleLog(folder, self.config, self.data.train, written.get("samples"))
        self.display = Display(self.rollouts.total, self.position.rollout, unit="rollout", shown=SHOWN)
        try:
            yield
        finally:
            self.display.close()
            self.record.close()
            self.samples.close()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds that pass inside to those of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Figures of several optimizer steps as one: their mean, or for a maximum the largest.

    A step without a trained token has no figures of tokens.
    """
    found: dict[str, list[float]] = {}
    for step in steps:
        for name, value in step.items():
            found.setdefault(name, []).append(value)
    return {name: max(values) if name.endswith("_max") else sum(values) / len(values) for name, values in found.items()}

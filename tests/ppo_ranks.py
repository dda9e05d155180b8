"""Two ranks of a policy and of a critic that go through what PPO asks of them, at several ZeRO stages one after another.

Usage: ppo_ranks.py JOB.json, a `Job`; what the first rank found is written beside it as STAGE-ROLE.safetensors and STAGE-ROLE.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

PARTS = [[[0, 1], [2, 3, 4]], [[5, 6, 7], []]]
"""Samples of each micro-batch of each rank."""


def experience(vocabulary: int = 300) -> Any:
    """Two prompts with four responses each, of different lengths."""
    from rlhf_ray.rollout import Experience

    rng = np.random.default_rng(3)
    lengths = np.array([3, 12, 1, 6, 12, 2, 5, 9])
    prompts = [rng.integers(5, vocabulary, length) for length in (10, 9)]
    pieces = [x for n, length in enumerate(lengths) for x in (prompts[n // 4], rng.integers(5, vocabulary, length))]
    tokens = int(lengths.sum())
    return Experience(
        input_ids=np.concatenate(pieces).astype(np.int32),
        prompt_lengths=np.repeat([10, 9], 4),
        response_lengths=lengths,
        truncated=lengths == 12,
        rollout_logps=rng.normal(-3, 1, tokens).astype(np.float32),
        prompts=np.repeat([0, 1], 4),
        groups=np.repeat([0, 1], 4),
        seeds=np.arange(8),
        versions=np.zeros(8, np.int64),
        scores=np.zeros(8, np.float32),
        mask=np.arange(tokens) % 7 != 2,
        advantages=rng.normal(0, 1, tokens).astype(np.float32),
        values=rng.normal(0, 1, tokens).astype(np.float32),
        returns=rng.normal(0, 1, tokens).astype(np.float32),
    )


def requests() -> list[Any]:
    """Three prompts with two responses each."""
    from rlhf_ray.engines.request import Request

    rng = np.random.default_rng(5)
    prompts = [rng.integers(5, 300, length).astype(np.int32) for length in (4, 9, 2)]
    return [Request(number, ids, 100 * number, 2, 0.7, 1.0, 12) for number, ids in enumerate(prompts)]


def parts_of(worker: Any, data: Any) -> list[Any]:
    """The micro-batches of this rank; a single one has all of them."""
    from rlhf_ray.cluster.group import parts_of

    mine = [places for rank in PARTS for places in rank] if worker.world_size == 1 else PARTS[worker.rank]
    return parts_of(data, [np.array(places, np.int64) for places in mine])


def steps_of(parts: list[Any], data: Any) -> list[Any]:
    """Two optimizer steps over all of it."""
    from rlhf_ray.workers.step import Step

    return [Step(parts, float(data.mask.sum()), 0.0, number) for number in range(2)]


def policy(worker: Any, folder: Path) -> dict[str, Any]:
    """What PPO asks of a policy: a rollout, log-probs, two optimizer steps, weights and an export; what came of it."""
    data = experience()
    parts, alone = parts_of(worker, data), worker.world_size == 1
    answers = worker.generate(requests() if alone or worker.rank == 0 else [])  # a rank without any takes part
    told = [part[0].tolist() for part in worker.token_logps(parts)]
    figures = worker.update(steps_of(parts, data))
    weights = {name: w.clone() for name, w in worker.weights()}
    worker.export(str(folder))
    written = [[response.token_ids.tolist() for response in responses] for _, responses in answers]
    return {"written": written, "told": told, "figures": figures, "weights": weights}


def critic(worker: Any, folder: Path) -> dict[str, Any]:
    """What PPO asks of a critic: values, two optimizer steps and an export; what came of it."""
    from safetensors.torch import load_file

    data = experience()
    parts = parts_of(worker, data)
    told = [np.concatenate(each).tolist() for each in worker.values(parts)]
    figures = worker.update(steps_of(parts, data))
    worker.export(str(folder))
    weights = load_file(folder / "model.safetensors") if worker.rank == 0 else {}
    return {"told": told, "figures": figures, "weights": weights}


def go_through(
    rank: int, ranks: int, options: dict[str, Any], meeting: tuple[str, int] | None, folder: Path
) -> dict[str, dict[str, Any]]:
    """What came of both roles."""
    from rlhf_ray.config import PPOConfig
    from rlhf_ray.workers.critic import CriticWorker
    from rlhf_ray.workers.policy import PolicyWorker

    found = {}
    for role, kind, estimator in ((policy, PolicyWorker, "rloo"), (critic, CriticWorker, "gae")):
        worker = kind(rank, ranks)
        worker.setup(PPOConfig(**options, experience={"advantage_estimator": estimator}), meeting, 10)
        found[role.__name__] = role(worker, folder / role.__name__)
    return found


def main(job: Path, rank: int, meeting: tuple[str, int] | None) -> None:
    """One rank of the job."""
    from safetensors.torch import save_file

    from rlhf_ray.workers.policy import PolicyWorker

    first = PolicyWorker(rank, 2)
    meeting = meeting or first.meet()
    command = [sys.executable, __file__, str(job), "1", meeting[0], str(meeting[1])]
    other = subprocess.Popen(command) if rank == 0 else None
    try:
        for stage, options in json.loads(job.read_text()).items():
            for role, found in go_through(rank, 2, options, meeting, job.parent / stage).items():
                if rank == 0:
                    save_file(found.pop("weights"), job.parent / f"{stage}-{role}.safetensors")
                    (job.parent / f"{stage}-{role}.json").write_text(json.dumps(found))
    except BaseException:
        if other:
            other.kill()
        raise
    if other and other.wait(60):
        raise SystemExit("the other rank failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]), (sys.argv[3], int(sys.argv[4])) if sys.argv[3:] else None)

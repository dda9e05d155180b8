"""What the driver of PPO costs at scale: engines and ranks are stand-ins that only keep time.

    python benchmarks/ppo_scale.py            1,000 engines, 100,000 responses per rollout, some rollouts
    python benchmarks/ppo_scale.py --memory   1,000 small rollouts: whether the driver's memory grows

The driver is the real one: `PPO`, its queue of requests, judging, experience and optimizer steps. The backend has a clock of its
own: a call takes as long as its stand-in says, and waiting turns the clock. Seconds of the driver are real ones, those of the
stand-ins not counted; its share is driver / (clock + driver), as if it never worked while others do.

A stand-in engine writes 40 tokens per second of each of at most 256 responses, lengths are log-normal with a median of 200
tokens; 128 ranks of the policy train on 10,000 tokens per second each, and compute log-probs three times as fast; new weights take
2 seconds. Ray's own cost is not in it.
"""

from __future__ import annotations

import argparse
import heapq
import resource
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_data.options import build
from rlhf_ray.cluster.backend import LocalBackend, Place
from rlhf_ray.cluster.group import Part, Pending, WorkerGroup, start_group
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.pool import VLLMEngines
from rlhf_ray.engines.request import Answer, Request, Response
from rlhf_ray.ppo import PPO
from rlhf_ray.prompts import PromptData, PromptReport, Prompts
from rlhf_ray.roles import Roles
from rlhf_ray.rollout import SAMPLES, Rollout, offsets

TOKENS_PER_SECOND, TRAINED_PER_SECOND, SYNC, AT_ONCE = 40.0, 10_000.0, 2.0, 256
PROMPT, LONGEST = 64, 1_024


class Call:
    """A call, and when it ends on the clock."""

    def __init__(self, value: Any, end: float) -> None:
        self.value, self.end = value, end


class Clocked(LocalBackend):
    """Calls stand-ins at once, and says that they took the time that they say."""

    def __init__(self) -> None:
        self.now, self.others = 0.0, 0.0
        self.free: dict[int, float] = {}

    def call(self, handle: Any, verb: str, *args: Any) -> Any:
        begun = time.perf_counter()
        start = max(self.now, self.free.get(id(handle), 0.0))
        value, seconds = getattr(handle, verb)(start, *args)
        self.free[id(handle)] = start + seconds
        call = Call(value, start + seconds)
        self.others += time.perf_counter() - begun
        return call

    def wait(self, references: Sequence[Any], timeout: float) -> list[Any]:
        if timeout:
            self.now = max(self.now, min(reference.end for reference in references))
        return [reference for reference in references if reference.end <= self.now]

    def result(self, reference: Any) -> Any:
        return reference.value


class Engine:
    """Writes, and keeps time."""

    def __init__(self) -> None:
        self.requests: dict[int, list[Response]] = {}
        self.left: dict[int, int] = {}
        self.writing: list[tuple[float, int]] = []
        self.waiting: list[tuple[int, float]] = []

    def poll(self, now: float, requests: Sequence[Request], least: float, most: float) -> tuple[list[Answer], float]:
        for request in requests:
            lengths = drawn(request.seed, request.n, request.max_new_tokens)
            self.requests[request.number] = [response(request.seed + k, int(n)) for k, n in enumerate(lengths)]
            self.left[request.number] = request.n
            self.waiting += [(request.number, float(length) / TOKENS_PER_SECOND) for length in lengths]
        self.begin(now)
        end = min(now + most, max(now + least, self.writing[0][0])) if self.writing else now
        answers: list[Answer] = []
        while self.writing and self.writing[0][0] <= end:
            stop, number = heapq.heappop(self.writing)
            self.begin(stop)
            self.left[number] -= 1
            if not self.left[number]:
                del self.left[number]
                answers.append((number, tuple(self.requests.pop(number))))
        return answers, end - now if self.left else (stop if answers else end) - now

    def begin(self, now: float) -> None:
        while self.waiting and len(self.writing) < AT_ONCE:
            number, seconds = self.waiting.pop()
            heapq.heappush(self.writing, (now + seconds, number))

    def setup(self, now: float, *args: Any) -> tuple[dict[str, Any], float]:
        return {}, 0.0

    def connect(self, now: float, *args: Any) -> tuple[None, float]:
        return None, 0.0

    def update(self, now: float, *args: Any) -> tuple[dict[str, Any], float]:
        return {}, SYNC


class Rank:
    """Computes nothing, and keeps time."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank

    def meet(self, now: float) -> tuple[tuple[str, int], float]:
        return ("nowhere", 0), 0.0

    def token_logps(self, now: float, parts: list[Part]) -> tuple[Any, float]:
        tokens = sum(len(part.batch.input_ids) for part in parts if not part.idle)
        found = [(part.batch.rollout_logps[: 0 if part.idle else None],) for part in parts]
        return found, tokens / (3 * TRAINED_PER_SECOND)

    def judge(self, now: float, parts: list[Part]) -> tuple[Any, float]:
        found = [(part.batch.seeds[: 0 if part.idle else None] % 7 / 7.0,) for part in parts]
        return found, 0.1

    def update(self, now: float, steps: list[Any]) -> tuple[Any, float]:
        tokens = sum(len(part.batch.input_ids) for step in steps for part in step.parts if not part.idle)
        return [{"policy_loss": 0.0, "grad_norm": 1.0} for _ in steps], tokens / TRAINED_PER_SECOND

    def open_sync(self, now: float, *args: Any) -> tuple[tuple[str, int], float]:
        return ("nowhere", 0), 0.0

    def connect(self, now: float) -> tuple[None, float]:
        return None, 0.0

    def describe_weights(self, now: float) -> tuple[list[Any], float]:
        return [], 0.0

    def send_weights(self, now: float) -> tuple[dict[str, int], float]:
        return CHECKSUMS, SYNC


CHECKSUMS = {f"model.layers.{number}.weight": number for number in range(300)}

IDS = np.arange(LONGEST, dtype=np.int32)
LOGPS = np.full(LONGEST, -1.0, np.float32)


def drawn(seed: int, count: int, most: int) -> np.ndarray:
    """Lengths of responses."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(200), 0.6, count), 1, most).astype(np.int64)


def response(seed: int, length: int) -> Response:
    return Response(IDS[:length], LOGPS[:length], length == LONGEST, seed, 0)


class Judges:
    """Rewards from ranks that keep time."""

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group

    def start(self, rollout: Rollout, prompts: Prompts) -> Any:
        pending = self.group.map("judge", rollout, gives=(SAMPLES,), size=1_000)

        class Rewards:
            calls: Sequence[Pending[Any]] = (pending,)
            servers = ()

            def result(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
                return pending.result()[0].astype(np.float32), {}

        return Rewards()

    def close(self) -> None: ...


def options(folder: str, engines: int, samples: int, rollouts: int) -> PPOConfig:
    given = {
        "pretrain": "none", "prompt_data": "none", "reward_pretrain": "none.py", "save_path": folder,
        "vllm_num_engines": engines, "rollout_batch_size": samples, "train_batch_size": samples, "n_samples_per_prompt": 8,
        "micro_train_batch_size": 16, "micro_rollout_batch_size": 16, "generate_max_len": LONGEST, "prompt_max_len": PROMPT,
        "advantage_estimator": "grpo", "init_kl_coef": 0.01, "use_kl_loss": True, "max_rollouts": rollouts,
        "num_episodes": 1_000_000, "check_sync_steps": 0, "logged_samples": 0, "max_num_seqs": AT_ONCE,
        "logging_steps": rollouts,
    }  # fmt: skip
    return build(PPOConfig, given)


def made_prompts(count: int) -> Prompts:
    bounds = offsets(np.full(count, PROMPT))
    ids = np.arange(bounds[-1], dtype=np.int32) % 1_000
    return Prompts(None, "label", ids, bounds, b"", np.zeros(count + 1, np.int64), np.arange(count))  # type: ignore[arg-type]


def measure(engines: int, ranks: int, samples: int, rollouts: int) -> None:
    """Run, and print the driver's share."""
    with tempfile.TemporaryDirectory() as folder:
        config, backend = options(folder, engines, samples, rollouts), Clocked()
        places = [Place()] * ranks
        policy, _ = start_group(backend, "policy", Rank, places, 1e9)
        reference, _ = start_group(backend, "reference", Rank, places, 1e9)
        judges, _ = start_group(backend, "reward", Rank, places[:1], 1e9)
        prompts = made_prompts(max(1_000, samples // 8))
        pool = VLLMEngines(config, backend, policy, lambda number: Engine(), (), [prompts.ids(0)])
        pool.ready.result()
        roles = Roles(backend, policy, pool, Judges(judges), reference=reference)  # type: ignore[arg-type]
        run = PPO(config, roles, PromptData(prompts, None, PromptReport()), PROMPT + LONGEST, {})
        memory: list[int] = []
        finish = run.update

        def watched(experience: Any) -> dict[str, float]:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            return finish(experience)

        run.update = watched  # type: ignore[method-assign]
        begun = time.perf_counter()
        run.run()
        driver = time.perf_counter() - begun - backend.others
    clock, tokens = backend.now / rollouts, run.position.tokens / rollouts
    print(f"{engines:,} engines, {ranks} ranks, {samples:,} responses ({tokens / 1e6:.1f} M tokens) per rollout: a step takes "
          f"{clock:.1f} s, of the driver {driver / rollouts:.2f} s, {driver / (backend.now + driver):.1%}")  # fmt: skip
    late = memory[len(memory) // 10 :]
    print(
        f"peak memory after a tenth of {rollouts} rollouts {late[0] / 1e3:.0f} MB, at the end {late[-1] / 1e3:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="1,000 rollouts of 1,600 responses")
    parser.add_argument("--engines", type=int, default=1_000)
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rollouts", type=int, default=3)
    given = parser.parse_args()
    if given.memory:
        measure(100, 8, 1_600, 1_000)
    else:
        measure(given.engines, given.ranks, given.samples, given.rollouts)


if __name__ == "__main__":
    main()

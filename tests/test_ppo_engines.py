"""Real vLLM beside a real policy: it writes what the policy would, also after updates, in the middle of them, and when killed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import pytest

from rlhf_data.errors import RunError
from rlhf_ray.cluster.backend import Done, LocalBackend, WorkerDied
from rlhf_ray.cluster.group import WorkerGroup
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.pool import VLLMEngines
from rlhf_ray.engines.request import Answer, Request

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

ENGINE = """
import sys
from multiprocessing.connection import Connection
from rlhf_ray.engines.vllm import VLLMWorker

pipe, worker = Connection(int(sys.argv[1])), VLLMWorker()
while True:
    try:
        verb, args = pipe.recv()
    except EOFError:
        break
    try:
        pipe.send((getattr(worker, verb)(*args), None))
    except Exception as error:
        pipe.send((None, error))
"""


@dataclass(eq=False)
class Engine:
    """The process of an engine, and its calls that go on."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    calls: deque[Done] = field(default_factory=deque)


class Processes(LocalBackend):
    """Engines are processes of their own; everything else is called here, at once."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []

    def engine(self, number: int) -> Engine:
        ours, theirs = Pipe()
        process = subprocess.Popen([sys.executable, "-c", ENGINE, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        self.engines.append(Engine(process, ours))
        return self.engines[-1]

    def call(self, handle: Any, verb: str, *args: Any) -> Done:
        if not isinstance(handle, Engine):
            return super().call(handle, verb, *args)
        call = Done()
        handle.calls.append(call)
        with suppress(BrokenPipeError):  # `wait` finds out
            handle.pipe.send((verb, args))
        return call

    def wait(self, references: Sequence[Done], timeout: float) -> list[Done]:
        wanted = set(references)
        while True:
            busy = {engine.pipe: engine for engine in self.engines if engine.calls}
            under_way = {call for engine in busy.values() for call in engine.calls}
            if (ready := wanted - under_way) or not (heard := wait(list(busy), timeout)):
                return list(ready)
            for pipe in heard:
                self.hear(busy[pipe])  # type: ignore[index]

    def hear(self, engine: Engine) -> None:
        try:
            call = engine.calls[0]
            call.value, call.error = engine.pipe.recv()
            engine.calls.popleft()
        except (EOFError, ConnectionError):
            for call in engine.calls:
                call.error = WorkerDied("its process is gone")
            engine.calls.clear()

    def stop(self, handle: Any) -> None:
        if isinstance(handle, Engine):
            handle.process.kill()
            handle.process.wait(30)


@dataclass
class Run:
    """A policy in this process, and an engine in another one."""

    config: PPOConfig
    policy: Any
    backend: Processes
    engines: VLLMEngines
    version: int = 0

    def sync(self) -> dict[str, float]:
        self.version += 1
        return self.engines.sync(self.version)

    def change(self, scale: float) -> None:
        """Train the policy, in a way."""
        import torch

        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for weight in self.policy.model.parameters():
                weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        self.engines.submit(requests)
        return self.rest()

    def rest(self) -> list[Answer]:
        found: list[Answer] = []
        while self.engines.outstanding:
            found += self.engines.collect()
        return sorted(found, key=lambda answer: answer[0])


def requests_of(count: int, *, n: int = 2, temperature: float = 0.7, length: int = 12) -> list[Request]:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 250, 4 + number % 5).astype(np.int32) for number in range(count)]
    return [Request(k, prompt, 1000 + 10 * k, n, temperature, 1.0, length) for k, prompt in enumerate(prompts)]


def ids(answers: Sequence[Answer]) -> list[list[list[int]]]:
    return [[response.token_ids.tolist() for response in responses] for _, responses in answers]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A tiny random policy with a tied head, and an engine with prefix caching that has its weights."""
    from rlhf_core.libraries import settle

    settle()
    from rlhf_core.tiny import make_model, make_tokenizer
    from rlhf_ray.workers.policy import PolicyWorker

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(["the old bird by the river saw a red star"], folder, vocab_size=300)
    make_model(tokenizer, folder, hidden_size=64, max_len=128, initializer_range=0.3)
    config = PPOConfig(
        model={"pretrain": str(folder)},  # type: ignore[arg-type]
        data={"prompt_data": "unread.jsonl"},  # type: ignore[arg-type]
        rewards={"reward_pretrain": "unread.py"},  # type: ignore[arg-type]
        rollout={"rollout_batch_size": 128, "temperature": 0.7, "generate_max_len": 64},  # type: ignore[arg-type]
        engines={
            "vllm_num_engines": 1, "max_num_seqs": 16, "enable_prefix_caching": True, "check_sync_steps": 1,
            "engine_restarts": 1,
        },  # type: ignore[arg-type]
        parallel={"zero_stage": 0},  # type: ignore[arg-type]
        cluster={"start_timeout": 200, "call_timeout": 100},  # type: ignore[arg-type]
    )  # fmt: skip
    backend, policy = Processes(), PolicyWorker(0, 1)
    group = WorkerGroup("policy", backend, [policy], config.cluster.call_timeout)
    prompts = [request.prompt_ids for request in requests_of(4)]
    stop = [tokenizer.eos_token_id]
    engines = VLLMEngines(config, backend, group, backend.engine, (config, stop, 128), prompts)
    policy.setup(config, None, 10)
    (facts,) = engines.ready.result()
    assert facts["kv_cache_tokens"] > 0
    assert engines.sync(0)["sync_logp_gap"] < 1e-4
    yield Run(config, policy, backend, engines)
    engines.close()


def test_an_engine_writes_what_the_policy_finds_as_likely_at_the_sampling_temperature(run: Run) -> None:
    figures = run.sync()
    assert figures["sync_logp_gap"] < 1e-4
    assert figures["sync_bytes"] == sum(weight.nbytes for _, weight in run.policy.weights())


def test_after_an_update_it_writes_with_the_new_weights_and_forgets_cached_prefixes(run: Run) -> None:
    greedy = requests_of(8, n=1, temperature=0.0)
    before = ids(run.answers(greedy))
    assert before == ids(run.policy.generate(greedy))
    run.change(0.1)
    assert run.sync()["sync_logp_gap"] < 1e-4
    answers = run.answers(greedy)
    assert ids(answers) == ids(run.policy.generate(greedy)) != before
    assert {response.version for _, responses in answers for response in responses} == {run.version}


def test_responses_that_are_being_written_go_on_and_keep_the_version_that_began_them(run: Run) -> None:
    run.engines.submit(requests_of(24, length=60))  # 48 responses, of which 16 begin at once
    run.change(0.1)
    assert run.sync()["sync_logp_gap"] < 1e-4
    answers = run.rest()
    versions = [response.version for _, responses in answers for response in responses]
    assert len(versions) == 48 and set(versions) == {run.version - 1, run.version}
    assert ids(answers) != ids(run.answers(requests_of(24, length=60))), "some were begun by other weights"


def test_a_weight_that_is_wrong_in_the_engine_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = run.policy.weights

    def corrupted() -> Iterator[tuple[str, Any]]:
        for name, weight in weights():
            yield name, -weight if name == "model.layers.1.mlp.down_proj.weight" else weight

    with monkeypatch.context() as patch:
        patch.setattr(run.policy, "weights", corrupted)
        with pytest.raises(RunError, match=r"vLLM engine 0 does not write with the policy's weights \(version"):
            run.sync()
    assert run.sync()["sync_logp_gap"] < 1e-4


def test_one_wrong_bit_on_the_way_which_no_log_prob_shows_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_ray.engines import transfer

    fill, written = transfer.fill, list[Any]()

    def flip(buffer: Any, start: int, weight: Any) -> None:
        fill(buffer, start, weight)
        if not written:
            buffer[start] ^= 1
        written.append(weight)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "fill", flip)
        with pytest.raises(
            RunError, match=r"engine 0 has not loaded the policy's weights .* of 1 of \d+ differ, first of "
        ):
            run.sync()
    assert run.sync()["sync_logp_gap"] < 1e-4


def test_a_killed_engine_is_started_anew_and_its_requests_get_the_same_answers(run: Run) -> None:
    requests = requests_of(24)
    expected = ids(run.answers(requests))
    run.engines.submit(requests)
    os.kill(run.backend.engines[0].process.pid, 9)
    assert ids(run.rest()) == expected
    assert len(run.backend.engines) == 2 and run.engines.figures()["engine_restarts"] == 1

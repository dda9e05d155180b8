"""`rlhf train ppo` as its users start it, on a real Ray with real vLLM engines: its options, and what it does when things die."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/ppo.sh"

TIMED = ("seconds", "samples_per_second", "tokens_per_second", "sync_seconds")
"""Figures that no two runs have in common."""

SECONDS = 400
"""In which a run must have ended."""


class Server(ThreadingHTTPServer):
    """A reward server that pays for vowels, and does what a test says when it is asked for the nth time."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked = 0
        self.at: dict[int, Callable[[], int]] = {}
        """By the number of a request, from 1: what happens, and the status that is answered with."""
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def hang(self) -> int:
        """Answer when the test is over."""
        self.released.wait()
        return 503


class Handler(BaseHTTPRequestHandler):
    """Answers of that server."""

    server: Server

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
        self.server.asked += 1
        status = self.server.at.get(self.server.asked, lambda: 200)()
        rewards = [sum(text.count(vowel) for vowel in "aeiou") / (1 + len(text)) for text in texts]
        with suppress(BrokenPipeError):  # whoever asked is gone
            self.answer(status, rewards)

    def answer(self, status: int, rewards: list[float]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"rewards": rewards}).encode() if status == 200 else b"out of order")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to the terminal."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def prompts(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 26 prompts: chats, the same as plain text, and plain text to go on with."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["context_messages"] = [{"role": "user", "content": row["question"]}]
        row["text"] = row["response"] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random reward model with its statistics."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    config = AutoConfig.from_pretrained(tiny)
    config.num_labels, config.problem_type = 1, "regression"
    config.mean, config.std = 0.1, 0.5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def function(tmp_path: Path) -> Path:
    """A file with a reward function that pays for vowels."""
    path = tmp_path / "vowels.py"
    path.write_text(
        "def reward(responses):\n"
        "    return [sum(text.count(vowel) for vowel in 'aeiou') / (1 + len(text)) for text in responses]\n"
    )
    return path


@pytest.fixture
def ppo(tiny: Path, prompts: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a short run, with options changed, added, or (None) left out."""

    def make(**options: Any) -> list[str]:
        usual = {
            "pretrain": tiny, "prompt_data": prompts, "input_key": "question", "save_path": tmp_path / "out",
            "rollout_batch_size": 16, "train_batch_size": 8, "micro_train_batch_size": 4, "micro_rollout_batch_size": 8,
            "prompt_max_len": 32, "generate_max_len": 12, "max_rollouts": 3, "num_episodes": 9, "zero_stage": 0,
            "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "start_timeout": 150, "call_timeout": 100,
        }  # fmt: skip
        return [sys.executable, "-m", "rlhf_cli", "train", "ppo", *flags(**usual | options)]

    return make


def flags(**options: Any) -> list[str]:
    """Options as they are written on a command line; None leaves one out, True is a bare flag."""
    given = {f"--{name}": value for name, value in options.items() if value is not None}
    return [part for flag, value in given.items() for part in ([flag] if value is True else [flag, str(value)])]


def untimed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of a record without what depends on the clock."""
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def kill(role: str, driver: subprocess.Popen[str]) -> int:
    """Kill the process of a role in a run's own Ray, whose log begins with its name; the status of a server's answer."""
    logs = {child: Path(f"/proc/{child.pid}/fd/1").readlink() for child in children(driver)}
    (victim,) = (
        child
        for child, log in logs.items()
        if log.name.startswith("worker-") and f":actor_name:{role}\n" in log.read_text()
    )
    victim.kill()
    return 200


def children(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes of a run but the driver."""
    return psutil.Process(driver.pid).children(recursive=True)


@needs_vllm
def test_the_command_of_openrlhf_s_users_runs_and_survives_the_death_of_an_engine(
    tiny, prompts, reward_model, server, start, finish, metrics, tmp_path
):
    """`examples/ppo.sh` is that command. Here with everything of it, and with three sources of rewards, one of them a server."""
    for name, place in (("sft", tiny), ("reward", reward_model), ("questions", prompts.parent)):
        (tmp_path / name).symlink_to(place)
    driver = start(
        [
            "sh", str(EXAMPLE), *flags(
                input_key="context_messages", apply_chat_template=True, bf16=True, adam_offload=True, train_batch_size=8,
                rollout_batch_size=16, micro_rollout_batch_size=8, num_episodes=9, max_rollouts=3, generate_max_len=12,
                reward_pretrain="reward,reward", remote_rm_url=server.url, reward_weights="1,0.5,2",
                save_value_network=True, start_timeout=SECONDS,
            ),
        ],
        QUICKSTART=".", OUT="out", PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )  # fmt: skip
    server.at[3] = lambda: kill("vLLM engine 0", driver)  # each rollout makes two requests
    answer = finish(driver, SECONDS)
    assert answer.code == 0, answer.out[-2000:] + answer.err[-4000:]
    rows = metrics(tmp_path / "out")
    assert [row["engine_restarts"] for row in rows] == [0, 1, 1]
    assert [row["weight_version"] for row in rows] == [1, 2, 3] and all(row["staleness_max"] == 0 for row in rows)
    assert all(row["rollout_logp_gap"] < 0.05 for row in rows), "bfloat16"
    for row in rows:
        first, second, third = (
            row[f"reward_{part}"] for part in ("reward-1", "reward-2", server.url.removeprefix("http://"))
        )
        assert row["reward"] == pytest.approx(first + 0.5 * second + 2 * third, abs=1e-4)
        assert "value_loss" in row and row["kl_coef"] == 0.01
    for folder, kind in (("out", "LlamaForCausalLM"), ("out_critic", "LlamaForSequenceClassification")):
        assert json.loads((tmp_path / folder / "config.json").read_text())["architectures"] == [kind]


@needs_vllm
def test_generation_beside_training_writes_with_weights_that_are_at_most_one_update_old(
    ppo, function, prompts, start, finish, metrics, tmp_path
):
    command = ppo(
        vllm_num_engines=1, reward_pretrain=function, zero_stage=2, lora_rank=4, lora_alpha=8, pretrain_data=prompts,
        ptx_coef=0.1, max_rollouts=4, advantage_estimator="grpo", n_samples_per_prompt=4, enable_prefix_caching=True,
        check_sync_steps=1, max_staleness=1, actor_learning_rate=1e-2,
    )  # fmt: skip
    answer = finish(start([*command, "--async"]), SECONDS)
    assert answer.code == 0, answer.out[-2000:] + answer.err[-4000:]
    rows = metrics(tmp_path / "out")
    assert [row["staleness_max"] for row in rows] == [0, 1, 1, 1]
    assert all(row["sync_logp_gap"] < 1e-4 for row in rows)
    assert rows[0]["rollout_logp_gap_max"] < 1e-4 < rows[2]["rollout_logp_gap_max"]
    assert all(row["ptx_loss"] > 0 and "kl" in row for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "out/run/samples.jsonl").read_text().splitlines()]
    assert {sample["version"] for sample in samples} == {0, 1, 2}
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_killed_driver_leaves_nothing_running_and_the_run_goes_on_until_the_policy_is_killed(
    ppo, server, start, finish, metrics, tmp_path
):
    """Two ranks of the policy write with transformers; rewards come from a server that hangs once and is out of order once."""
    options = {
        "actor_num_gpus_per_node": 2, "remote_rm_url": server.url, "remote_rm_timeout": 1, "ref_reward_offload": True,
        "init_kl_coef": 0.05, "kl_target": 0.05, "kl_horizon": 100, "save_steps": 2, "max_rollouts": 6, "enable_ema": True,
    }  # fmt: skip
    first = start(ppo(**options))
    ranks: list[psutil.Process] = []

    def end_the_driver() -> int:
        ranks.extend(child for child in children(first) if "Agent" not in child.name())  # Ray's agents take a minute
        first.kill()
        return 200

    server.at |= {1: server.hang, 2: lambda: 500, 6: end_the_driver}
    answer = finish(first, SECONDS)
    assert answer.code == -signal.SIGKILL, answer.out[-2000:] + answer.err[-4000:]
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    before = untimed(metrics(tmp_path / "out"))
    assert [row["rollout"] for row in before] == [1, 2, 3]

    second = start(ppo(**options, load_checkpoint=True))
    server.at[9] = lambda: kill("policy rank 1", second)
    answer = finish(second, SECONDS)
    assert answer.code == 1 and "continuing from" in answer.out
    assert "error: the policy, rank 1, `" in answer.err and "was killed" in answer.err, answer.err[-4000:]
    assert "Traceback" not in answer.err
    after = untimed(metrics(tmp_path / "out"))
    assert [row["rollout"] for row in after] == [1, 2, 3, 4] and after[:3] == before
    from rlhf_core.checkpoint import damage

    kept = sorted((tmp_path / "out/checkpoints").iterdir())
    assert [path.name for path in kept] == ["global_step2", "global_step4"] and not any(damage(path) for path in kept)


@needs_vllm
def test_a_job_on_a_cluster_of_two_nodes_has_all_roles_on_the_same_devices(
    ppo, function, start, finish, metrics, tmp_path
):
    _, _, _, *command = ppo(
        actor_num_nodes=2, vllm_num_engines=1, colocate_all=True, reward_pretrain=function, init_kl_coef=0,
        advantage_estimator="rloo", n_samples_per_prompt=2, eval_ratio=0.2, check_sync_steps=1,
    )  # fmt: skip
    job = tmp_path / "job.json"
    job.write_text(json.dumps(command))
    nodes = [sys.executable, str(Path(__file__).with_name("two_nodes.py")), str(job)]
    answer = finish(start(nodes, RAY_ENABLE_UV_RUN_RUNTIME_ENV="0"), SECONDS)  # the tests may run below `uv run`
    assert answer.code == 0, answer.out[-4000:] + answer.err[-4000:]
    assert len(set(re.findall(r"/[0-9a-f]{6}", answer.out.partition("Placement")[2].partition("\n  ")[0]))) == 2, (
        answer.out
    )
    rows = metrics(tmp_path / "out")
    trained = [row for row in rows if "reward" in row]
    assert [row["rollout"] for row in trained] == [1, 2, 3] and "eval_reward" in rows[-1]
    assert all(row["sync_logp_gap"] < 1e-4 and row["staleness_max"] == 0 for row in trained)

"""Several ranks: the documented command, every launcher, several nodes, and what happens when one of them dies."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
RLHF = [sys.executable, "-m", "rlhf_cli"]
LAUNCHERS = {
    "rlhf": [*RLHF],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "PORT", "-m", "rlhf_cli"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", "--module", "rlhf_cli"],
}
PROMPT = 180
"""Seconds within which a two-rank run of a few steps has ended, on a slow and busy machine."""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def usage(tiny: Path, data: Path, save_path: Path) -> list[str]:
    """The SFT command of usage.rst: model, data and batch are small ones, and samples fit the model."""
    return [
        "train", "sft",
        "--max_len", "96",
        "--dataset", str(data),
        "--input_key", "question",
        "--output_key", "response",
        "--input_template", "User: {}\\nAssistant: ",
        "--train_batch_size", "8",
        "--micro_train_batch_size", "2",
        "--max_samples", "500000",
        "--pretrain", str(tiny),
        "--save_path", str(save_path),
        "--save_steps", "-1",
        "--logging_steps", "1",
        "--eval_steps", "-1",
        "--zero_stage", "2",
        "--max_epochs", "1",
        "--bf16",
        "--flash_attn",
        "--learning_rate", "5e-6",
        "--gradient_checkpointing",
        "--use_wandb", "True",
    ]  # fmt: skip


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_documented_command_runs(ranks, tiny, data, rlhf, program, tmp_path, metrics, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "checkpoint/tiny-sft"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    command = usage(tiny, data, out)
    answer = rlhf(command) if ranks == 1 else program([*command, "--num_procs", str(ranks)], PROMPT)
    assert answer.code == 0, answer.err
    assert answer.out.count("attention: ") == answer.out.count("Plan\n") == 1, "every rank speaks"
    rows = metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    model = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.dtype.itemsize == 2 and model.num_parameters() == start.num_parameters()
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size


def close(rows: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    """Losses and gradient norms of every step agree to 1e-6."""
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-6), (row["step"], name)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("launcher", "stage"), [("rlhf", 0), ("torchrun", 2), ("deepspeed", 3)])
def test_two_ranks_compute_what_one_does(launcher, stage, sft, rlhf, start, finish, tmp_path, metrics):
    one = rlhf(sft(zero_stage=stage, save_path=tmp_path / "one", micro_train_batch_size=2))
    assert one.code == 0, one.err
    command = [free_port() if part == "PORT" else part for part in LAUNCHERS[launcher]]
    two = [*sft(zero_stage=stage, save_path=tmp_path / "two", micro_train_batch_size=1)]
    given = ["--num_procs", "2"] if launcher == "rlhf" else []
    answer = finish(start([*command, *two, *given], DS_ACCELERATOR="cpu", PATH=f"{BIN}:/usr/bin:/bin"), PROMPT)
    assert answer.code == 0, answer.err
    assert "2 rank(s)" in answer.out and answer.out.count("Plan\n") == 1
    close(metrics(tmp_path / "one"), metrics(tmp_path / "two"))


@pytest.mark.timeout(400)
def test_two_nodes_compute_what_one_does(sft, rlhf, start, finish, tmp_path, metrics):
    assert rlhf(sft(save_path=tmp_path / "one", micro_train_batch_size=2)).code == 0
    meeting = {"num_nodes": 2, "num_procs": 1, "master_addr": "127.0.0.1", "master_port": free_port()}
    nodes = [
        start([*RLHF, *sft(save_path=tmp_path / "two", micro_train_batch_size=1, node_rank=n, **meeting)])
        for n in (0, 1)
    ]
    for answer in [finish(node, PROMPT) for node in nodes]:
        assert answer.code == 0, answer.err
    close(metrics(tmp_path / "one"), metrics(tmp_path / "two"))


def wait_for(what: str, found, process, seconds: float = PROMPT):
    """Poll until `found()` is true. Fails when the process ends first, or it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        if process.poll() is not None:
            pytest.fail(f"it ended before {what}: {process.communicate()[1][-3000:]}")
        time.sleep(0.1)
    pytest.fail(f"no {what} within {seconds} s")


def error_lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.timeout(400)
def test_a_rank_that_is_killed_ends_the_run_with_a_message(sft, start, finish, tmp_path):
    import psutil

    run = start([*RLHF, *sft(num_procs=2, max_epochs=1000)])
    record = tmp_path / "out/run/metrics.jsonl"
    wait_for("the first logged step", lambda: record.exists() and record.stat().st_size, run)
    ranks = [child for child in psutil.Process(run.pid).children(recursive=True) if child.environ().get("RANK")]
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGKILL)
    answer = finish(run, 60)
    assert answer.code == 1
    assert error_lines(answer.err) == ["error: rank 1 was killed by signal SIGKILL; the other ranks were ended"]
    assert not any(rank.is_running() for rank in ranks)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run"]


BREAK = """
import os
if os.environ.get("RANK") == "1":
    from rlhf_core.libraries import settle
    settle()
    from rlhf_core.strategy import Strategy
    plain, steps = Strategy.step, []
    def step(self, engine):
        steps.append(engine)
        if len(steps) == 3:
            raise RuntimeError("the second rank broke")
        return plain(self, engine)
    Strategy.step = step
"""


@pytest.mark.timeout(400)
def test_a_rank_that_fails_ends_the_run_with_its_own_message(sft, program, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BREAK)
    answer = program(sft(num_procs=2), PROMPT, PYTHONPATH=str(tmp_path))
    assert answer.code == 1, answer.err
    assert error_lines(answer.err) == ["error: RuntimeError: the second rank broke (--debug shows where)"]
    assert "Traceback" not in answer.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run"]


@pytest.mark.timeout(400)
def test_a_mistake_is_reported_once_for_all_ranks(sft, data, program, tmp_path):
    answer = program(sft(num_procs=2, train_split="trian"), PROMPT)
    assert answer.code == 2, answer.err
    assert answer.err == f"error: {data} has no split `trian`; its splits: train\n"
    assert not (tmp_path / "out").exists()

"""Several ranks: the documented command, every launcher, several nodes, and what happens when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
RLHF = [sys.executable, "-m", "rlhf_cli"]
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


DOCUMENTED = {
    "rm": """--max_len 96 --zero_stage 3 --learning_rate 9e-6 --apply_chat_template --chosen_key chosen --rejected_key rejected""",
    "dpo": """--max_len 96 --zero_stage 3 --learning_rate 5e-7 --beta 0.1 --apply_chat_template --chosen_key chosen
        --rejected_key rejected""",
    "kto": """--max_len 96 --zero_stage 3 --learning_rate 5e-7 --input_key instruction --output_key response --label_key score
        --input_template User:_{}\\nAssistant:_ --beta 0.1""",
    "kd": """--max_len 96 --zero_stage 3 --learning_rate 5e-6 --input_key instruction --output_key response
        --input_template User:_{}\\nAssistant:_ --max_samples 500000 --teacher_model OTHER --kd_coef 0.4 --teacher_offload""",
}
"""The commands of usage.rst, without what all of them have: model and data are small ones, and samples fit the model."""


def documented(method: str, tiny: Path, other: Path, chats: Path, save_path: Path) -> list[str]:
    own = DOCUMENTED[method].replace("OTHER", str(other)).split()
    return [
        "train", method,
        "--save_path", str(save_path),
        "--save_steps", "-1",
        "--logging_steps", "1",
        "--eval_steps", "-1",
        "--train_batch_size", "8",
        "--micro_train_batch_size", "2" if method == "kd" else "1",
        "--pretrain", str(tiny),
        "--bf16",
        "--max_epochs", "1",
        "--dataset", str(chats),
        *[part.replace("_{}", " {}").replace(":_", ": ") for part in own],
        "--flash_attn",
        "--gradient_checkpointing",
        "--use_wandb", "True",
    ]  # fmt: skip


COMPARED = {
    "sft": ("sft", {"zero_stage": 0}),
    "sft-split": ("sft", {"zero_stage": 2, "packing_samples": True}),
    "rm": ("rm", {"zero_stage": 1, "margin_loss": True, "flash_attn": True}),
    "dpo": ("dpo", {"zero_stage": 3, "ref_pretrain": "OTHER", "flash_attn": True}),
    "dpo-precomputed": (
        "dpo",
        {"zero_stage": 2, "ref_pretrain": "OTHER", "precompute_ref": True, "label_smoothing": 0.1},
    ),
    "kto": ("kto", {"zero_stage": 0, "ref_pretrain": "OTHER", "packing_samples": True}),
    "kto-sharded": ("kto", {"zero_stage": 3, "ref_pretrain": "OTHER", "ref_offload": True}),
    "kd": ("kd", {"zero_stage": 3, "teacher_model": "OTHER", "flash_attn": True}),
    "kd-cached": ("kd", {"zero_stage": 2, "teacher_model": "OTHER", "cache_teacher": True, "teacher_top_k": 8}),
}
"""Float32 runs that do not depend on how many ranks there are: method and options."""


@pytest.fixture(scope="module")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random model with the tokenizer of `tiny`: a reference, a teacher."""
    from transformers import AutoTokenizer

    from rlhf_core.tiny import make_model

    folder = tmp_path_factory.mktemp("other")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, folder, hidden_size=96, layers=1, max_len=128, seed=1)
    return folder


@pytest.fixture(scope="module")
def chats(preferred: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows with the columns of the documented commands, pairs as conversations."""

    def chat(row: dict[str, Any], side: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row[side]}]

    rows = [json.loads(line) for line in preferred.read_text().splitlines()]
    rows = [
        {side: chat(row, side) for side in ("chosen", "rejected")}
        | {"instruction": row["question"], "response": row["response"], "score": int(row["label"])}
        for row in rows
    ]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def compared(train, other: Path) -> Callable[..., list[str]]:
    """A command of `COMPARED`, saving (and caching) under a folder."""

    def make(name: str, folder: Path, **options: Any) -> list[str]:
        method, own = COMPARED[name]
        own = {key: str(other) if value == "OTHER" else value for key, value in own.items()}
        usual = {"learning_rate": 1e-3, "eval_ratio": 0.2, "eval_at_start": True, "save_path": folder / name}
        return train(method, **usual | own | options, data_cache_dir=folder / "cache")

    return make


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def on_two_ranks(shared_folder, tiny, other, chats, compared) -> Path:
    """Folder of what all these commands write on two ranks. They run once, in one launch."""
    said = shared_folder / "said.json"
    if not said.exists():
        commands = [
            documented(method, tiny, other, chats, shared_folder / "documented" / method) for method in DOCUMENTED
        ]
        commands += [compared(name, shared_folder / "compared", micro_train_batch_size=2) for name in COMPARED]
        (shared_folder / "commands.json").write_text(json.dumps(commands))
        launch = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()]
        ran = subprocess.run(
            [*launch, str(Path(__file__).with_name("several.py")), str(shared_folder / "commands.json")],
            capture_output=True, text=True, timeout=2 * PROMPT, cwd=shared_folder,
            env=os.environ | {"WANDB_MODE": "disabled", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        said.write_text(json.dumps([ran.returncode, ran.stdout, ran.stderr]))
    code, out, err = json.loads(said.read_text())
    assert code == 0, err[-4000:]
    assert out.count("Plan\n") == len(DOCUMENTED) + len(COMPARED), "every rank speaks"
    return shared_folder


def check_documented(method: str, out: Path, rows: list[dict[str, float]]) -> None:
    """Four steps were made and evaluated, and what they made can be used."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4]
    kind = AutoModelForSequenceClassification if method == "rm" else AutoModelForCausalLM
    model, found = kind.from_pretrained(out, output_loading_info=True)
    assert model.dtype.itemsize == 2 and not any(found.values())
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
    if method == "rm":
        assert model.config.num_labels == 1 and model.config.std > 0


@pytest.mark.timeout(500)
@pytest.mark.parametrize("method", DOCUMENTED)
def test_the_documented_command_of_a_method_runs(
    method, on_two_ranks, tiny, other, chats, rlhf, tmp_path, metrics, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    answer = rlhf(documented(method, tiny, other, chats, tmp_path / "out"))
    assert answer.code == 0, answer.err
    for out in (tmp_path / "out", on_two_ranks / "documented" / method):
        check_documented(method, out, metrics(out))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", COMPARED)
def test_two_ranks_compute_what_one_does_by_any_method(name, on_two_ranks, compared, rlhf, tmp_path, metrics):
    answer = rlhf(compared(name, tmp_path, micro_train_batch_size=4))
    assert answer.code == 0, answer.err
    one, two = metrics(tmp_path / name), metrics(on_two_ranks / "compared" / name)
    close(one, two)
    assert len(one) == 5 and one[0].keys() == two[0].keys()


def close(rows: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    """Losses and gradient norms of every step agree to 1e-6."""
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-6), (row["step"], name)


@pytest.mark.timeout(400)
def test_two_ranks_of_deepspeed_s_launcher_compute_what_one_does(sft, rlhf, start, finish, tmp_path, metrics):
    one = rlhf(sft(zero_stage=3, save_path=tmp_path / "one", micro_train_batch_size=2))
    assert one.code == 0, one.err
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", free_port(), "--module", "rlhf_cli"]
    two = sft(zero_stage=3, save_path=tmp_path / "two", micro_train_batch_size=1)
    answer = finish(start([*launcher, *two], DS_ACCELERATOR="cpu", PATH=f"{BIN}:/usr/bin:/bin"), PROMPT)
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

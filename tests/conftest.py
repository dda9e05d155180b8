"""Tests of the whole program, through its command line, on a tiny model and a little data that are made here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

WORDS = "red blue green cat dog bird sun moon star tree river stone".split()


class Answer(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


def words(count: int) -> list[dict[str, str]]:
    """Questions and answers of different lengths; always the same."""
    return [
        {
            "question": f"Say {WORDS[i % 12]} and {WORDS[(i * 5 + 1) % 12]} {'please ' * (i % 4)}",
            "response": " ".join([WORDS[i % 12], WORDS[(i * 5 + 1) % 12]] * (1 + i % 3)),
        }
        for i in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    """Those questions with a better and a worse answer, how much better it is, and whether the response is desirable."""
    return [
        row
        | {
            "chosen": row["response"],
            "rejected": " ".join([*reversed(row["response"].split()), WORDS[(i * 7 + 3) % 12]]),
            "margin": (i % 5) / 4,
            "label": i % 3 != 1,
        }
        for i, row in enumerate(words(count))
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer model with its tokenizer; copy it before changing it."""
    from rlhf_core.libraries import settle

    settle()
    from transformers.utils import logging

    from rlhf_core.tiny import make_model, make_tokenizer

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer([f"{row['question']} {row['response']}" for row in words(60)], folder, vocab_size=320)
    make_model(tokenizer, folder, hidden_size=64, max_len=128)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 26 questions and responses: a few steps, the last of them not full."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in words(26)))
    return path


@pytest.fixture(scope="session")
def preferred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 26 rows that every method can learn from: question, response, chosen, rejected, margin, label."""
    path = tmp_path_factory.mktemp("data") / "preferred.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preferences(26)))
    return path


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a copy of the tiny model: keys of its JSON files changed (None removes one), files removed."""

    def make(without: tuple[str, ...] = (), **files: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny, folder)
        for name in without:
            (folder / name).unlink()
        for name, changes in files.items():
            path = folder / f"{name}.json"
            content = json.loads(path.read_text()) | changes
            path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return folder

    return make


@pytest.fixture(autouse=True)
def _apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's account is read or written, and no rank that ran before is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    # what vLLM learns of an architecture, in a process of its own: once for all
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.getbasetemp().parent / "vllm"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def as_flags(options: dict[str, Any]) -> list[str]:
    """Options as they are written on a command line; None leaves one out, True is a bare flag."""
    given = {f"--{name}": value for name, value in options.items() if value is not None}
    return [part for flag, value in given.items() for part in ([flag] if value is True else [flag, str(value)])]


@pytest.fixture
def sft(tiny: Path, data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a small fine-tuning run, with options changed, added, or (None) left out."""

    def make(*more: str, **options: Any) -> list[str]:
        usual = {
            "pretrain": tiny, "dataset": data, "input_key": "question", "output_key": "response", "max_len": 96,
            "train_batch_size": 8, "micro_train_batch_size": 4, "max_epochs": 1, "learning_rate": 1e-3,
            "save_path": tmp_path / "out",
        }  # fmt: skip
        return ["train", "sft", *as_flags(usual | options), *more]

    return make


METHODS = {
    "sft": {"input_key": "question", "output_key": "response"},
    "rm": {"prompt_key": "question"},
    "dpo": {"prompt_key": "question"},
    "kto": {"input_key": "question", "output_key": "response", "input_template": ""},
    "kd": {"input_key": "question", "output_key": "response"},
}


@pytest.fixture
def train(tiny: Path, preferred: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a small run of any method, with options changed, added, or (None) left out."""

    def make(method: str, *more: str, **options: Any) -> list[str]:
        usual = {
            "pretrain": tiny, "dataset": preferred, "max_len": 96, "train_batch_size": 8, "micro_train_batch_size": 4,
            "max_epochs": 1, "learning_rate": 1e-3, "save_path": tmp_path / "out",
        }  # fmt: skip
        own = METHODS[method] | ({"teacher_model": tiny} if method == "kd" else {})
        return ["train", method, *as_flags(usual | own | options), *more]

    return make


@pytest.fixture
def rlhf(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Answer]:
    """Run a command line in this process, which has imported torch already."""

    def run(arguments: list[str]) -> Answer:
        from rlhf_cli.main import main

        monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Answer(ended.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def start(tmp_path: Path):
    """Start a program; whatever is left of it when the test ends is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], **environment: str) -> subprocess.Popen[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TORCHELASTIC", "LOCAL_", "GROUP_"))
        }
        process = subprocess.Popen(
            command, cwd=tmp_path, env=inherited | {"PYTHONFAULTHANDLER": "1"} | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        for rank in family(process):
            stop(rank, signal.SIGKILL)
        process.communicate()


def family(process: subprocess.Popen[str]) -> list[int]:
    """Ids of a process that still runs and of all its descendants, itself first."""
    import psutil

    if process.poll() is not None:
        return []
    return [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]


def stop(rank: int, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank, sign)


@pytest.fixture
def finish() -> Callable[..., Answer]:
    """Wait for a started program. When it takes too long, the test fails with the stacks of all its processes."""

    def wait(process: subprocess.Popen[str], seconds: float) -> Answer:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for rank in reversed(family(process)):
                stop(rank, signal.SIGABRT)  # faulthandler prints the stacks
            out, err = process.communicate()
            pytest.fail(f"{' '.join(process.args)}\nhung for {seconds} s; it said:\n{out[-2000:]}\n{err[-6000:]}")  # type: ignore[arg-type]
        return Answer(process.returncode, out, err)

    return wait


@pytest.fixture
def program(start, finish) -> Callable[..., Answer]:
    """Run `rlhf` as a program of its own, to its end."""

    def run(arguments: list[str], seconds: float = 120, **environment: str) -> Answer:
        return finish(start([sys.executable, "-m", "rlhf_cli", *arguments], **environment), seconds)

    return run


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, float]]]:
    """Rows of a run's `metrics.jsonl`."""
    return lambda folder: [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]

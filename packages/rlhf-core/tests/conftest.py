"""A tiny model, a tokenizer and a little data, made once; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.libraries import settle

settle()

WORDS = ["red", "blue", "green", "cat", "dog", "bird", "sun", "moon", "star", "tree", "river", "stone"]


def rows(count: int) -> list[dict[str, str]]:
    """Questions and answers of different lengths, some empty of pattern; always the same."""
    return [
        {
            "question": f"Say {WORDS[i % 12]} and {WORDS[(i * 5 + 1) % 12]} {'please ' * (i % 4)}",
            "answer": " ".join([WORDS[i % 12], WORDS[(i * 5 + 1) % 12]] * (1 + i % 3)),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer model with its tokenizer."""
    from rlhf_core.tiny import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer([f"{row['question']} {row['answer']}" for row in rows(60)], folder, vocab_size=320)
    make_model(tokenizer, folder, hidden_size=64, max_len=128)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 44 questions and answers."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(44)))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def options(tiny: Path, data: Path, tmp_path: Path):
    """Build an `SFTConfig` from flat options, on the tiny model and data unless told otherwise."""
    from rlhf_core.config import SFTConfig

    def make(**given) -> SFTConfig:
        flat = {
            "pretrain": str(tiny), "dataset": str(data), "input_key": "question", "output_key": "answer", "max_len": 96,
            "train_batch_size": 8, "micro_train_batch_size": 4, "max_epochs": 1, "learning_rate": 1e-3, "eval_ratio": 0.1,
            "save_path": str(tmp_path / "out"), "seed": 7,
        } | given  # fmt: skip
        groups = {
            name: {key: flat[key] for key in field.annotation.model_fields if key in flat}
            for name, field in SFTConfig.model_fields.items()
        }
        assert set(flat) == {key for group in groups.values() for key in group}
        return SFTConfig(**groups)

    return make


@pytest.fixture
def train(options):
    """Run SFT with flat options; returns the rows of `metrics.jsonl`."""
    from rlhf_core.methods import sft

    def run(**given) -> list[dict[str, float]]:
        config = options(**given)
        sft.train(config)
        return read_metrics(Path(config.checkpoint.save_path))

    return run


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]

"""A tiny model, a tokenizer and a little data, made once; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
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


LONG = "the long way round by the river and the stone and the old tree "


def pair_rows(count: int) -> list[dict[str, object]]:
    """Prompts with a better and a worse answer; every fourth prompt is long, some answers are there more than once."""
    return [
        {
            "prompt": f"{LONG if i % 4 == 3 else ''}Say {WORDS[i % 12]} {'please ' * (i % 3)}: ",
            "chosen": " ".join([WORDS[i % 12]] * (1 + i % 3)),
            "rejected": " ".join([WORDS[(i * 7 + 3) % 12], "no"] * (1 + (i + 1) % 3)),
            "margin": (i % 5) / 4,
        }
        for i in range(count)
    ]


def labelled_rows(count: int) -> list[dict[str, object]]:
    """Questions with an answer that is good or bad; prompts and answers are there more than once."""
    return [
        {
            "question": f"Say {WORDS[(i // 2) % 12]} {'please ' * (i % 4)}",
            "answer": "yes" if i % 7 == 0 else " ".join([WORDS[(i + i // 3) % 12]] * (1 + i % 4)),
            "label": i % 3 != 0,
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    return write_rows(path, rows(44))


@pytest.fixture(scope="session")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random model with the tokenizer of `tiny`, of another width: a reference, a teacher."""
    from rlhf_core.tiny import make_model
    from rlhf_data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("other")
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, folder, hidden_size=32, layers=1, max_len=128, seed=1)
    return folder


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """JSONL files of 26 pairs and of 26 labelled answers."""
    folder = tmp_path_factory.mktemp("preferences")
    return {
        "pairs": write_rows(folder / "pairs.jsonl", pair_rows(26)),
        "labelled": write_rows(folder / "labelled.jsonl", labelled_rows(26)),
    }


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the session, also where a test undoes its own patches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture
def options(tiny: Path, data: Path, preferences: dict[str, Path], other: Path, tmp_path: Path):
    """Build the config of a method from flat options, on the tiny model and data unless told otherwise."""
    from rlhf_core import config

    kinds = {"sft": config.SFTConfig, "rm": config.RMConfig, "dpo": config.DPOConfig, "kto": config.KTOConfig,
             "kd": config.KDConfig}  # fmt: skip
    rows = {"input_key": "question", "output_key": "answer"}
    own = {
        "sft": {"dataset": str(data)} | rows,
        "rm": {"dataset": str(preferences["pairs"])},
        "dpo": {"dataset": str(preferences["pairs"])},
        "kto": {"dataset": str(preferences["labelled"])} | rows,
        "kd": {"dataset": str(data), "max_samples": 26, "teacher_model": str(other)} | rows,
    }

    def make(method: str = "sft", **given):
        kind = kinds[method]
        flat = {
            "pretrain": str(tiny), "max_len": 96, "train_batch_size": 8, "micro_train_batch_size": 4, "max_epochs": 1,
            "learning_rate": 1e-3, "eval_ratio": 0.1, "save_path": str(tmp_path / "out"), "seed": 7,
        } | own[method] | given  # fmt: skip
        groups = {
            name: {key: flat[key] for key in field.annotation.model_fields if key in flat}
            for name, field in kind.model_fields.items()
        }
        assert set(flat) == {key for group in groups.values() for key in group}
        return kind(**groups)

    return make


class Engine:
    """What the loop sees of a model, without DeepSpeed."""

    def __init__(self, module: Any) -> None:
        self.module, self.train, self.eval = module, module.train, module.eval

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.fixture
def prepared(options):
    """Everything of a run up to its first step, with a bare model in place of DeepSpeed's engine: a `Fit`.

    With a `dtype`, the loaded and checked models are cast to it.
    """
    from rlhf_core.fit import Fit
    from rlhf_core.models.load import load_model_config
    from rlhf_core.models.loader import Models
    from rlhf_core.strategy import Strategy
    from rlhf_data.tokenizer import load_tokenizer

    def make(name: str, dtype: Any = None, **given) -> Fit:
        config = options(name, **({"zero_stage": 0} | given))
        tokenizer, strategy = load_tokenizer(config.model.pretrain), Strategy.of(config)
        kind = getattr(import_module(f"rlhf_core.methods.{name}"), name.upper())
        method = kind(config, tokenizer)
        ragged = config.model.flash_attn or config.data.packing_samples
        models = Models(
            config.model,
            strategy,
            ragged=ragged,
            share_prefix=method.share_prefix,
            head=method.head,
            lora=config.lora,
        )
        method.prepare(models)
        engine = Engine(models.trained(load_model_config(config.model)))
        if method.frozen:
            method.frozen_model = models.frozen(method.frozen)
        for model in (engine.module, method.frozen_model):
            if model is not None and dtype is not None:
                model.base.set_experts_implementation("eager")  # torch's grouped products have no float64
                model.to(dtype)
        engine.train()
        return Fit(method, engine, tokenizer, strategy, config, None)

    return make


@dataclass
class Step:
    """Loss, metrics and gradient of one optimizer step, and how many micro-batches it had."""

    loss: float
    metrics: dict[str, float]
    gradient: dict[str, Any]
    micro_batches: int


@pytest.fixture
def step(prepared):
    """One optimizer step of a method over its first samples, as the loop divides it, but for the update."""
    from rlhf_core.method import Window
    from rlhf_core.metrics import Meter

    def run(name: str, *, samples: int = 16, **given) -> Step:
        fit = given.pop("fit", None) or prepared(name, **given)
        window = fit.method.begin_step(fit.engine, Window(fit.method.train, np.arange(samples)), fit)
        count, meter, loss, number = fit.method.divisor(window), Meter(), 0.0, 0
        for _, batch in fit.micro_batches(window):
            total, sums = fit.method.loss(fit.engine, batch)
            (total / count).backward()
            meter.add(sums)
            loss, number = loss + total.item() / count, number + 1
        metrics = fit.method.report(meter.means(fit.strategy))
        gradient = {name: p.grad for name, p in fit.engine.module.named_parameters() if p.grad is not None}
        return Step(loss, metrics, gradient, number)

    return run


@pytest.fixture
def train(options):
    """Run a method with flat options; returns the rows of `metrics.jsonl`."""

    def run(method: str = "sft", **given) -> list[dict[str, float]]:
        config = options(method, **given)
        import_module(f"rlhf_core.methods.{method}").train(config)
        return read_metrics(Path(config.checkpoint.save_path))

    return run


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]

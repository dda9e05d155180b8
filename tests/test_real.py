"""Real data and a real pretrained model, when they lie beside the repository; the numbers a plain loop reaches too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[2] / "shared"
MODEL = SHARED / "models" / "stories260K"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MODEL.is_dir(), reason="there is no ../shared"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory):
    """`rlhf train sft` on a real data set; returns the folder and its metrics."""

    def run(name: str, *options: str) -> tuple[Path, list[dict[str, float]]]:
        out = tmp_path_factory.mktemp("real")
        arguments = ["train", "sft", "--pretrain", str(MODEL), "--dataset", str(SHARED / "data" / name)]
        fixed = [
            "--data_cache_dir",
            str(out / "tokens"),
            "--max_len",
            "512",
            "--train_batch_size",
            "16",
            "--micro_train_batch_size",
            "16",
            "--max_epochs",
            "1",
        ]
        subprocess.run(
            [sys.executable, "-m", "rlhf_cli", *arguments, *fixed, "--packing_samples", "--eval_at_start", "--save_path", str(out), *options],
            check=True, timeout=800, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        return out, [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(scope="module")
def gsm8k(fine_tune):
    options = ["--input_key", "question", "--output_key", "answer", "--input_template", r"User: {}\nAssistant: "]
    batches = ["--train_batch_size", "8", "--micro_train_batch_size", "8"]
    return fine_tune("gsm8k_train.jsonl", *options, "--max_samples", "900", "--learning_rate", "2e-3", *batches)


def test_the_held_out_loss_on_answers_falls_as_a_plain_loop_makes_it_fall(gsm8k):
    _, rows = gsm8k
    assert rows[0]["eval_loss"] == pytest.approx(7.0, abs=0.4)
    assert rows[-1]["eval_loss"] < 2.1
    assert all(row["grad_norm"] < 50 for row in rows if "grad_norm" in row)


def test_the_result_loads_in_transformers_and_writes_in_the_manner_it_was_taught(gsm8k):
    """A model of this size does not solve the problem, but where it told stories it now annotates its arithmetic."""
    from transformers import AutoModelForCausalLM

    from rlhf_data.encode import EncodeOptions, Encoder
    from rlhf_data.rows import Pair
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.config import SamplingConfig
    from rlhf_infer.engines.engine import answer_all
    from rlhf_infer.engines.transformers import TransformersEngine

    folder, _ = gsm8k
    tokenizer = load_tokenizer(str(folder))
    encoder = Encoder(tokenizer, EncodeOptions(max_len=512, input_template=r"User: {}\nAssistant: "))
    (prompt,) = encoder.prompts([Pair("Tom has 3 apples and buys 4 more. How many apples does he have?", "")])
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(folder).eval(), [tokenizer.eos_token_id])
    ((written,),) = answer_all(engine, [prompt.ids], SamplingConfig(max_new_tokens=200, greedy_sampling=True))
    text = tokenizer.decode(written.token_ids, skip_special_tokens=True)
    assert "<<" in text and ">>" in text, text


def test_chat_rows_train(fine_tune):
    _, rows = fine_tune("chat_sft.jsonl", "--apply_chat_template", "--max_samples", "200", "--learning_rate", "1e-3")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.5


def test_continued_pre_training_keeps_the_perplexity_low(fine_tune):
    _, rows = fine_tune("stories.jsonl", "--pretrain_mode", "--max_samples", "200", "--learning_rate", "1e-4")
    assert rows[0]["eval_perplexity"] < 8
    assert rows[-1]["eval_perplexity"] < rows[0]["eval_perplexity"]


def read(name: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / "data" / name).read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def learn(rlhf, tmp_path, metrics) -> Callable[..., list[dict[str, float]]]:
    """A short run of any method on real data, in this process; returns its metrics. The model is in `tmp_path / name`."""

    def run(name: str, method: str, dataset: Path, *options: str, pretrain: Path = MODEL) -> list[dict[str, float]]:
        usual = ["--max_len", "256", "--train_batch_size", "16", "--micro_train_batch_size", "16", "--max_epochs", "1",
                 "--flash_attn", "--save_path", str(tmp_path / name)]  # fmt: skip
        answer = rlhf(["train", method, "--pretrain", str(pretrain), "--dataset", str(dataset), *usual, *options])
        assert answer.code == 0, answer.err
        return metrics(tmp_path / name)

    return run


@pytest.fixture
def stories(tmp_path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Files of 320 short pairs of a story's continuation and something worse, and of 80 others that are held out."""
    rows = [
        row
        for row in read("story_pairs.jsonl")
        if len(row["prompt"]) + max(map(len, (row["chosen"], row["rejected"]))) < 320
    ]
    train, held_out = rows[:320], rows[-80:]
    return write(tmp_path / "train.jsonl", train), write(tmp_path / "held_out.jsonl", held_out), held_out


def unpaired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "response": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def test_a_reward_model_tells_a_story_from_its_words_shuffled_and_from_another_story(stories, learn, tmp_path):
    """Each response scored alone, by transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    train, held_out, rows = stories
    metrics = learn("rm", "rm", train, "--eval_dataset", str(held_out), "--learning_rate", "1e-3")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")

    @torch.no_grad()
    def score(text: str) -> float:
        return model(torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])).logits.item()

    right: dict[str, list[bool]] = {}
    for row in rows:
        chosen, rejected = (score(row["prompt"] + row[side]) for side in ("chosen", "rejected"))
        right.setdefault(row["kind"], []).append(chosen > rejected)
    shares = {kind: sum(pairs) / len(pairs) for kind, pairs in right.items()}
    assert {kind: len(pairs) for kind, pairs in right.items()} == {"words shuffled": 46, "another story": 34}
    assert shares["words shuffled"] >= 0.85
    assert shares["another story"] > 0.5
    assert metrics[-1]["eval_accuracy"] == pytest.approx(sum(map(sum, right.values())) / len(rows), abs=0.02)


def test_dpo_makes_the_continuation_likelier_than_what_is_worse(stories, learn):
    train, held_out, _ = stories
    options = ["--eval_dataset", str(held_out), "--max_samples", "160", "--learning_rate", "5e-4", "--eval_at_start"]
    first, *_, last = learn("dpo", "dpo", train, *options)
    assert first["eval_reward_margin"] == pytest.approx(0, abs=1e-5)
    assert last["eval_reward_margin"] > 0.5
    assert last["eval_accuracy"] > 0.75
    assert last["eval_loss"] < first["eval_loss"]


def test_kto_makes_what_is_desirable_likelier_than_what_is_not(stories, learn, tmp_path):
    train, held_out = (write(path.with_name(f"kto_{path.name}"), unpaired(read(path))) for path in stories[:2])
    options = ["--eval_dataset", str(held_out), "--beta", "0.1", "--input_template", "", "--max_samples", "240",
               "--learning_rate", "5e-4", "--eval_at_start"]  # fmt: skip
    first, *_, last = learn("kto", "kto", train, *options)
    assert first["eval_reward_margin"] == pytest.approx(0, abs=1e-5)
    assert last["eval_reward_margin"] > 0.3
    assert last["eval_loss"] < first["eval_loss"]


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("rm", "gsm8k_pairs.jsonl", ""),
        ("dpo", "gsm8k_pairs.jsonl", "--input_template 'User: {}\\nAssistant: '"),
        ("kto", "gsm8k_unpaired.jsonl", "--input_key instruction --output_key response --label_key score"),
        ("rm", "chat_pairs.jsonl", "--apply_chat_template"),
        ("dpo", "chat_pairs.jsonl", "--apply_chat_template"),
        ("kto", "kto_en_demo.json", "--apply_chat_template --input_key messages"),
    ],
)
def test_other_preferences_train_without_trouble(method, name, options, learn):
    import math
    import shlex

    more = ["--max_samples", "40", "--max_len", "512", "--eval_ratio", "0.2", "--learning_rate", "1e-4"]
    rows = learn("out", method, SHARED / "data" / name, *shlex.split(options), *more)
    assert len([row for row in rows if "loss" in row]) >= 1
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(0 < row["grad_norm"] < 200 for row in rows if "grad_norm" in row)


def test_a_student_learns_more_from_a_teacher_than_from_the_text_alone(learn, tmp_path):
    """The teacher has read millions of such stories; its student reads a few dozen, several times."""
    from transformers import AutoTokenizer

    from rlhf_core.tiny import make_model

    student = tmp_path / "student"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.save_pretrained(student)
    make_model(tokenizer, student, hidden_size=64, layers=2, max_len=512)
    data = SHARED / "data/stories.jsonl"
    options = ["--pretrain_mode", "--max_samples", "40", "--eval_ratio", "0.2", "--max_epochs", "12", "--eval_steps", "48",
               "--learning_rate", "3e-3"]  # fmt: skip
    alone = learn("sft", "sft", data, *options, pretrain=student)
    taught = learn("kd", "kd", data, *options, "--teacher_model", str(MODEL), "--kd_coef", "0.8", pretrain=student)
    assert alone[-1]["step"] == taught[-1]["step"]
    assert taught[-1]["eval_ce_loss"] < alone[-1]["eval_loss"] - 0.01

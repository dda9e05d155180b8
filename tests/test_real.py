"""Real data and a real pretrained model, when they lie beside the repository; the numbers a plain loop reaches too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
        arguments = ["train", "sft", "--pretrain", str(MODEL), "--dataset", str(SHARED / "data" / name), *options]
        fixed = ["--max_len", "512", "--train_batch_size", "16", "--micro_train_batch_size", "16", "--max_epochs", "1"]
        subprocess.run(
            [sys.executable, "-m", "rlhf_cli", *arguments, *fixed, "--packing_samples", "--eval_at_start", "--save_path", str(out)],
            check=True, timeout=800, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        return out, [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(scope="module")
def gsm8k(fine_tune):
    options = ["--input_key", "question", "--output_key", "answer", "--input_template", r"User: {}\nAssistant: "]
    return fine_tune("gsm8k_train.jsonl", *options, "--max_samples", "2000", "--learning_rate", "1e-3")


def test_the_held_out_loss_on_answers_falls_as_a_plain_loop_makes_it_fall(gsm8k):
    _, rows = gsm8k
    assert rows[0]["eval_loss"] == pytest.approx(7.0, abs=0.4)
    assert rows[-1]["eval_loss"] < 2.25
    assert all(row["grad_norm"] < 50 for row in rows if "grad_norm" in row)


def test_the_result_loads_in_transformers_and_writes_in_the_manner_it_was_taught(gsm8k):
    """A model of this size does not solve the problem, but where it told stories it now annotates its arithmetic."""
    from transformers import AutoModelForCausalLM

    from rlhf_data.encode import EncodeOptions, Encoder
    from rlhf_data.rows import Pair
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.config import SamplingConfig
    from rlhf_infer.engine import TransformersEngine

    folder, _ = gsm8k
    tokenizer = load_tokenizer(str(folder))
    encoder = Encoder(tokenizer, EncodeOptions(max_len=512, input_template=r"User: {}\nAssistant: "))
    prompt = encoder.prompt_ids(Pair("Tom has 3 apples and buys 4 more. How many apples does he have?", ""))
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(folder).eval(), [tokenizer.eos_token_id])
    (written,) = engine.generate([prompt], SamplingConfig(max_new_tokens=200, greedy_sampling=True))
    text = tokenizer.decode(written.token_ids, skip_special_tokens=True)
    assert "<<" in text and ">>" in text, text


def test_chat_rows_train(fine_tune):
    _, rows = fine_tune("chat_sft.jsonl", "--apply_chat_template", "--max_samples", "300", "--learning_rate", "1e-3")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.5


def test_continued_pre_training_keeps_the_perplexity_low(fine_tune):
    _, rows = fine_tune("stories.jsonl", "--pretrain_mode", "--max_samples", "300", "--learning_rate", "1e-4")
    assert rows[0]["eval_perplexity"] < 8
    assert rows[-1]["eval_perplexity"] < rows[0]["eval_perplexity"]
